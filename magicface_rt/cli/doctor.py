"""`magicface-rt doctor`: what works here, and what would make the rest work."""

from __future__ import annotations

import importlib
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from magicface_rt.backends import BACKENDS, why_not
from magicface_rt.backends.device import Device, import_cuda
from magicface_rt.backends.onnxruntime import import_onnxruntime
from magicface_rt.backends.probe import no_plan_for
from magicface_rt.errors import BackendMissingError, DeviceError
from magicface_rt.process.host_memory import check_addresses
from magicface_rt.process.interrupts import reraise_if_interrupt

from ._bundle_view import grid
from ._command import JsonOption, command

DOCTOR_ADDRESSES = 192 << 20
"""Bytes of address space below which the system's loader may end the process, having none left for a library."""

PACKAGES = (
    "numpy",
    "pillow",
    "tokenizers",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
)
EXPORT_EXTRA = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
CONCRETE = tuple(name for name in BACKENDS if name not in ("auto", "onnxruntime"))
DRIVER = "install NVIDIA's driver on a machine with a GPU; nvidia-smi shows whether it is there"
ORT_GPU = "pip uninstall onnxruntime; pip install 'magicface_rt[gpu]'"
ORT_RTX = "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """Whether something works here; if not, why, and the command that would make it work."""

    name: str
    works: bool
    found: str
    command: str = ""


def doctor(json_to: JsonOption = None) -> None:
    """Say for each backend whether it works here, and how to make it work. Exit code 3 where none does."""
    with command(json_to) as verb:
        check_addresses(DOCTOR_ADDRESSES, "doctor, which loads every library that there is,")
        backends = [_backend(name) for name in CONCRETE]
        others = [_builds_plans(), _export_extra()]
        gpu = _gpu()
        versions = {"python": platform.python_version(), "magicface_rt": _version("magicface_rt")}
        versions |= {name: _version(name) for name in PACKAGES}
        both = versions["onnxruntime"] is not None and versions["onnxruntime-gpu"] is not None
        verb.outcome = {
            "can_serve": any(backend.works for backend in backends),
            "backends": [asdict(backend) for backend in backends],
            "build": asdict(others[0]),
            "export": asdict(others[1]),
            "gpu": gpu,
            "providers": _providers(),
            "versions": versions | {name: _version(name) for name in EXPORT_EXTRA},
        }

        table = grid("backends", "backend", "works", "found", "what to do")
        for finding in [*backends, *others]:
            table.add_row(finding.name, "yes" if finding.works else "no", finding.found, finding.command)
        verb.print(table)
        verb.print()
        table = grid("versions", "package", "version")
        for name, found in versions.items():
            table.add_row(name, found or "not installed")
        table.add_row("onnxruntime providers", ", ".join(_providers()) or "none")
        for name, found in gpu.items():
            table.add_row(f"GPU: {name}", found)
        verb.print(table)
        if both:
            verb.note(
                "warning: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
                "pip uninstall both, then install one."
            )
        if not any(backend.works for backend in backends):
            verb.note("error: no backend can serve here. Simplest: pip install 'magicface_rt[cpu]'")
            verb.fail(3)


def _backend(name: str) -> Finding:
    """Try a backend: even a listed provider or an installed library may lack its libraries or its device."""
    reason = why_not(name)
    if reason:
        return Finding(name, False, reason, _cure(name))
    package = name if not name.startswith("onnxruntime") else "onnxruntime"
    found = _version(package) or (_version("onnxruntime-gpu") if package == "onnxruntime" else None)
    return Finding(name, True, f"{package} {found or ''}".strip())


def _capability() -> str | None:
    try:
        return Device().compute_capability
    except (BackendMissingError, DeviceError):
        return None


def _cure(name: str) -> str:
    """Return what to do about a backend that does not work; the first step if there are several."""
    if name == "onnxruntime-cpu":
        return "pip install 'magicface_rt[cpu]'"
    if name == "onnxruntime-nv-tensorrt-rtx":
        lacks, install = "NvTensorRTRTXExecutionProvider" not in _providers(), ORT_RTX
    elif name.startswith("onnxruntime-"):
        lacks, install = "CUDAExecutionProvider" not in _providers(), ORT_GPU
    else:
        lacks, install = not _imports(name.replace("-", "_")) or not _has_cuda(), f"pip install 'magicface_rt[{name}]'"
    if lacks:
        return install
    if _has_cuda() and _capability() is None:
        return DRIVER
    if no_plan_for(name, _capability()):
        return "pip install 'magicface_rt[tensorrt]', and use --backend tensorrt"
    return "install the CUDA and cuDNN libraries that the message names"


def _builds_plans() -> Finding:
    name = "build (TensorRT-RTX plans, without a GPU)"
    if not _imports("tensorrt_rtx"):
        return Finding(name, False, "tensorrt-rtx is not installed", "pip install 'magicface_rt[tensorrt-rtx]'")
    return Finding(name, True, f"tensorrt-rtx {_version('tensorrt-rtx')}")


def _gpu() -> dict[str, str]:
    """Return what the driver says about the first GPU, or only why there is none."""
    try:
        device = Device()
        free, total = device.memory()
        return {
            "compute capability": device.compute_capability,
            "driver": _driver(),
            "driver supports CUDA": device.driver_version,
            "CUDA runtime": device.runtime_version,
            "memory": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        }
    except (BackendMissingError, DeviceError) as error:
        return {"none": str(error)}


def _driver() -> str:
    """Return the driver's own version, if the system reports it."""
    try:
        words = NVIDIA_VERSION.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return "unknown"
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), "unknown")


def _has_cuda() -> bool:
    try:
        import_cuda()
    except BackendMissingError:
        return False
    return True


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        reraise_if_interrupt(error)
        return False
    return True


def _export_extra() -> Finding:
    missing = [name for name in EXPORT_EXTRA if _version(name) is None]
    found = "not installed: " + ", ".join(missing) if missing else f"torch {_version('torch')}"
    install = "pip install 'magicface_rt[export]'" if missing else ""
    return Finding("export (checkpoint, export, verify, demo)", not missing, found, install)


def _providers() -> list[str]:
    try:
        return list(import_onnxruntime().get_available_providers())
    except BackendMissingError:
        return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
