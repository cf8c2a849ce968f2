"""`magicface-rt doctor`: what works here, and what would make the rest work."""

from __future__ import annotations

import importlib
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from magicface_rt.backends import BACKENDS, why_not
from magicface_rt.backends.device import Device, import_cuda
from magicface_rt.backends.onnxruntime import import_onnxruntime
from magicface_rt.backends.ort_binding import first_line
from magicface_rt.backends.probe import no_plan_for
from magicface_rt.errors import BackendMissingError, DeviceError, HostMemoryError
from magicface_rt.process.host_memory import check_addresses
from magicface_rt.process.interrupts import reraise_if_interrupt

from ._bundle_view import grid
from ._command import TORCH_ADDRESSES, JsonOption, command

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
_SERVICE = ("fastapi", "httpx", "prometheus-client", "python-multipart", "uvicorn")
EXTRAS = {
    "export": ("checkpoint, export, verify, demo", ("torch", "diffusers", "transformers", "onnx", "onnxscript")),
    "bench": ("bench, which needs export as well", ("matplotlib",)),
    "serve": ("serve", _SERVICE),
    "ui": ("ui, serve --ui", ("gradio", *_SERVICE)),
    "ray": ("serve --engine ray, which needs serve as well", ("ray",)),
}
"""The verbs that need an extra, and its packages, by the extra's name; those of backends are found by trying them."""
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
    """Say for each backend and each extra whether it works here, and how to make it work. Exit code 3 where no backend
    does.
    """
    with command(json_to) as verb:
        check_addresses(DOCTOR_ADDRESSES, "doctor, which loads every library that there is,")
        backends = [_backend(name) for name in CONCRETE]
        extras = {name: _extra(name) for name in EXTRAS}
        others = [_builds_plans(), *extras.values()]
        gpu = _gpu()
        versions = {"python": platform.python_version(), "magicface_rt": _version("magicface_rt")}
        versions |= {name: _version(name) for name in PACKAGES}
        both = versions["onnxruntime"] is not None and versions["onnxruntime-gpu"] is not None
        verb.outcome = {
            "can_serve": any(backend.works for backend in backends),
            "backends": [asdict(backend) for backend in backends],
            "build": asdict(others[0]),
            "export": asdict(extras["export"]),
            "extras": {name: asdict(extra) for name, extra in extras.items()},
            "gpu": gpu,
            "providers": _providers(),
            "versions": versions | {name: _version(name) for _, packages in EXTRAS.values() for name in packages},
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
    return not _why_not_imported(module)


def _why_not_imported(module: str) -> str:
    """Return why a module cannot be imported; "" if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it raises
        reraise_if_interrupt(error)
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _extra(name: str) -> Finding:
    """Look whether the packages of an extra are installed, and whether PyTorch can be loaded, if it is one of them."""
    verbs, packages = EXTRAS[name]
    missing = [package for package in packages if _version(package) is None]
    install = f"pip install 'magicface_rt[{name}]'"
    named = f"{name} ({verbs})"
    if missing:
        return Finding(named, False, "not installed: " + ", ".join(missing), install)
    if "torch" in packages and (torch := _why_no_torch()):
        return Finding(named, False, f"torch {_version('torch')} cannot be loaded: {torch[0]}", torch[1])
    return Finding(named, True, f"{packages[0]} {_version(packages[0])}")


def _why_no_torch() -> tuple[str, str] | None:
    """Return why PyTorch cannot be loaded, and what to do about it; None if it can."""
    if "torch" not in sys.modules:
        try:
            check_addresses(TORCH_ADDRESSES, "PyTorch")
        except HostMemoryError as error:
            return str(error), "give it more: ulimit -v unlimited"
    reason = _why_not_imported("torch")
    return (reason, "pip install --force-reinstall torch") if reason else None


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
