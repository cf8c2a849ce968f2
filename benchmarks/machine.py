"""What a benchmark ran on: a description of the machine, how busy it was, and the memory that a process has held."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from magicface_rt.process.cores import cores
from magicface_rt.process.host_memory import available_bytes
from magicface_rt.process.interrupts import reraise_if_interrupt

PACKAGES = (
    "magicface_rt",
    "numpy",
    "torch",
    "diffusers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)
QUIET_LOAD = 0.3
"""Load average per core under which a machine counts as quiet."""


def describe() -> dict[str, Any]:
    """Describe machine, versions and commit. Call it before anything runs: the load average is that of the moment."""
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": _processor(),
        "vector_instructions": _vector_instructions(),
        "cores": cores(),
        "memory_bytes": memory()[1],
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "load_average": [round(value, 2) for value in load],
        "quiet": bool(load) and load[0] < QUIET_LOAD * cores(),
    }


def memory() -> tuple[int | None, int | None]:
    """Bytes of host memory that are free for a new process, also by a limit such as its container's; and in total.
    None if the system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        reraise_if_interrupt(error)
        return available_bytes(to_another=True), None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free = (found.get("MemAvailable"), available_bytes(to_another=True))
    return min((left for left in free if left is not None), default=None), found.get("MemTotal")


def peak_host_bytes() -> int | None:
    """The most bytes of host memory that this process has held; None if the system does not say.

    Not `getrusage`: on Linux its maximum is inherited from the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        reraise_if_interrupt(error)
    return None


def reset_peak_host_bytes() -> None:
    """Reset the peak to what the process holds now, if the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class DevicePeak:
    """The most device memory that this process was seen to hold, as the driver reports it.

    Contexts, plans and pools are included, whatever the library. `bytes`: None before the first look, and if it is not
    known, as in a container whose process numbers are not the driver's.
    """

    def __init__(self, on_device: bool) -> None:
        self.bytes: int | None = None
        self._on_device = on_device

    def look(self) -> None:
        """Ask the driver. Call it between measurements: asking takes a tenth of a second."""
        if self._on_device and (found := _device_bytes(os.getpid())):
            self.bytes = max(self.bytes or 0, found)


def _device_bytes(pid: int) -> int | None:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reraise_if_interrupt(error)
        return None
    found = 0
    for line in done.stdout.splitlines():
        owner, _, mebibytes = (part.strip() for part in line.partition(","))
        if owner == str(pid) and mebibytes.isdigit():
            found += int(mebibytes) << 20
    return found or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError as error:
        reraise_if_interrupt(error)
    return platform.processor() or platform.machine()


def _vector_instructions() -> list[str]:
    """The ones that matrix products are written for; a library that does not know the best of them is slow here."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
                return [flag for flag in wanted if flag in line.split()]
    return []


@dataclass
class Busy:
    """How busy others keep the processors, between `Busy.start()` and `share()`."""

    all: float
    own: float
    since: float

    @classmethod
    def start(cls) -> Busy:
        return cls(*_busy_seconds(), perf_counter())

    def share(self) -> float | None:
        """Processor seconds of processes other than this one and its ended children, for each second of each core.

        None if the system does not say.
        """
        everyone, own = _busy_seconds()
        passed = (perf_counter() - self.since) * (os.cpu_count() or 1)
        if not everyone or passed <= 0:
            return None
        return max(0.0, (everyone - self.all) - (own - self.own)) / passed


def _busy_seconds() -> tuple[float, float]:
    """Processor seconds used so far: on all processors, and by this process with its children that have ended."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError as error:
        reraise_if_interrupt(error)
        return 0.0, own
    user, nice, system, _, _, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own


def _gpu() -> str | None:
    """What the driver reports about the first GPU: name, driver version, memory. None if there is none to be asked."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reraise_if_interrupt(error)
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _commit() -> str | None:
    """The commit that MAGICFACE_RT_COMMIT names, for a copy without its history, else that of the repository.

    The latter gets "+changes" if the tree differs from it. None if there is neither.
    """
    if named := os.environ.get("MAGICFACE_RT_COMMIT"):
        return named
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        reraise_if_interrupt(error)
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
