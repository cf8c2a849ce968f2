"""What a benchmark ran on: the machine in words, how busy it was, and its peaks, measured here."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

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


@dataclass(frozen=True)
class Peaks:
    """flops: float32 multiply-adds by a large matrix product, 2 for each, per second; bytes_per_second: of a copy much
    larger than the caches, what is read and what is written counted; where: the device that was measured; by_library:
    the same flops by each library that was tried."""

    flops: float
    bytes_per_second: float
    where: str
    by_library: Mapping[str, float] = field(default_factory=dict)


def describe() -> dict[str, Any]:
    """Machine, versions, commit. Call it before anything runs: the load average is of that moment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "processor": _processor(),
        "vector_instructions": _vector_instructions(),
        "cores": cores,
        "memory_bytes": memory()[1],
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "load_average": [round(value, 2) for value in load],
        "quiet": bool(load) and load[0] < QUIET_LOAD * cores,
    }


def memory() -> tuple[int | None, int | None]:
    """Bytes of host memory that are free for a new process, and in all; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return found.get("MemAvailable"), found.get("MemTotal")


def measure_peaks(size: int = 2048, megabytes: int = 256, device: str = "cpu") -> Peaks:
    """The best of a few: what the machine can do, not what it did on average. Takes seconds.

    On a CPU the matrix product is that of the fastest library here: one whose kernels do not know the processor would
    set a limit that others pass.
    """
    if device == "cuda":
        return _measure_cuda_peaks()
    found = {name: _best(work, 4) for name, work in _products(size).items()}
    fastest = min(found, key=found.__getitem__)
    source = np.ones(megabytes << 18, np.float32)
    target = np.empty_like(source)
    copying = _best(lambda: np.copyto(target, source), 4)
    flops = {name: 2 * size**3 / seconds for name, seconds in found.items()}
    return Peaks(flops[fastest], 2 * source.nbytes / copying, f"cpu, float32 ({fastest})", flops)


def _products(size: int) -> dict[str, Callable[[], object]]:
    """A product of two float32 matrices of that size, by each library that is installed."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    b, out = a.T.copy(), np.empty_like(a)
    found: dict[str, Callable[[], object]] = {"numpy": lambda: np.matmul(a, b, out=out)}
    with contextlib.suppress(ImportError):
        import torch

        x, y = torch.from_numpy(a), torch.from_numpy(b)
        found["torch"] = lambda: torch.matmul(x, y)
    with contextlib.suppress(ImportError):
        import onnxruntime
        from onnx import TensorProto, helper

        names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "abc"]
        graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", names[:2], names[2:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found["onnxruntime"] = lambda: session.run(None, {"a": a, "b": b})
    return found


def _measure_cuda_peaks() -> Peaks:
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)

    def timed(work: Any) -> float:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return _best(run, 5)

    seconds = timed(lambda: torch.matmul(a, a))
    copying = timed(lambda: target.copy_(source))
    name = torch.cuda.get_device_name()
    return Peaks(2 * 8192**3 / seconds, 2 * source.numel() * 4 / copying, f"{name}, float16 (torch)")


def _best(work: Any, times: int) -> float:
    work()
    found = []
    for _ in range(times):
        start = perf_counter()
        work()
        found.append(perf_counter() - start)
    return min(found)


def peak_host_bytes() -> int | None:
    """The most host memory that this process has held; None where the system does not say.

    Not `getrusage`: on Linux its maximum is inherited from the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak_host_bytes() -> None:
    """Let the peak start anew from what the process holds now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _vector_instructions() -> list[str]:
    """Those that matrix products are written for; a library that does not know the best of them is slow here."""
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
        """Processor seconds of processes that are neither this one nor ended children of it, for each core's second;
        None where the system does not say."""
        everyone, own = _busy_seconds()
        passed = (perf_counter() - self.since) * (os.cpu_count() or 1)
        if not everyone or passed <= 0:
            return None
        return max(0.0, (everyone - self.all) - (own - self.own)) / passed


def _busy_seconds() -> tuple[float, float]:
    """Since the start: of all processors, and of this process with its children that have ended."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return 0.0, own
    user, nice, system, _, _, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), own


def _gpu() -> str | None:
    """What the driver says of the first GPU; None where there is none that can be asked."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _commit() -> str | None:
    """The repository's commit, with "+changes" where the tree differs from it. Outside a repository what the variable
    MAGICFACE_RT_COMMIT says, which is for a copy without its history; None where it says nothing."""
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
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
