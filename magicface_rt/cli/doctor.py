"""`magicface-rt doctor`: what works here, and what would make the rest work."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from magicface_rt.backends.onnxruntime import PROVIDERS, import_onnxruntime
from magicface_rt.errors import BackendMissingError

from ._bundle_view import grid
from ._command import JsonOption, command

PACKAGES = (
    "numpy",
    "pillow",
    "tokenizers",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)
EXPORT_EXTRA = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
INSTALL = {
    "onnxruntime-cpu": "pip install 'magicface_rt[cpu]'",
    "onnxruntime-cuda": "pip uninstall onnxruntime; pip install 'magicface_rt[gpu]'",
}
NOT_SERVED = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Finding:
    """Whether a backend works here; if not, why, and the command that would make it work."""

    name: str
    works: bool
    found: str
    command: str = ""


def doctor(json_to: JsonOption = None) -> None:
    """Say for each backend whether it works here, and how to make it work. Exit code 3 where none does."""
    with command(json_to) as verb:
        backends = [_try_onnxruntime(provider) for provider in PROVIDERS] + [_not_served(name) for name in NOT_SERVED]
        extra = _export_extra()
        versions = {"python": platform.python_version(), "magicface_rt": _version("magicface_rt")}
        versions |= {name: _version(name) for name in PACKAGES}
        both = versions["onnxruntime"] is not None and versions["onnxruntime-gpu"] is not None
        verb.outcome = {
            "can_serve": any(backend.works for backend in backends),
            "backends": [asdict(backend) for backend in backends],
            "export": asdict(extra),
            "providers": _providers(),
            "versions": versions | {name: _version(name) for name in EXPORT_EXTRA},
        }

        table = grid("backends", "backend", "works", "found", "what to do")
        for finding in [*backends, extra]:
            table.add_row(finding.name, "yes" if finding.works else "no", finding.found, finding.command)
        verb.print(table)
        verb.print()
        table = grid("versions", "package", "version")
        for name, found in versions.items():
            table.add_row(name, found or "not installed")
        table.add_row("onnxruntime providers", ", ".join(_providers()) or "none")
        verb.print(table)
        if both:
            verb.note(
                "warning: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
                "pip uninstall both, then install one."
            )
        if not any(backend.works for backend in backends):
            verb.note("error: no backend can serve here. Simplest: pip install 'magicface_rt[cpu]'")
            verb.fail(3)


def _try_onnxruntime(provider: str) -> Finding:
    """Compute one sum there: a provider that is listed may still lack its libraries or its device."""
    name = f"onnxruntime-{provider}"
    try:
        ort = import_onnxruntime()
        wanted = PROVIDERS[provider]
        if wanted not in ort.get_available_providers():
            return Finding(name, False, f"onnxruntime {ort.__version__} has no {wanted}", INSTALL[name])
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(_sum_model(), options, providers=[wanted])
        if session.get_providers()[0] != wanted:
            todo = "install NVIDIA's driver and the CUDA and cuDNN libraries that this onnxruntime names"
            return Finding(name, False, f"onnxruntime {ort.__version__} could not start {wanted}", todo)
        (total,) = session.run(None, {"x": np.ones(1, np.float32)})
        works = bool(total[0] == 2)
        return Finding(name, works, f"onnxruntime {ort.__version__}" + ("" if works else " says that 1 + 1 is not 2"))
    except BackendMissingError:
        return Finding(name, False, "onnxruntime is not installed", INSTALL[name])
    except Exception as error:
        return Finding(name, False, str(error).strip().split("\n")[0] or type(error).__name__, INSTALL[name])


def _not_served(name: str) -> Finding:
    found = _version(name)
    installed = f"{name} {found} is installed" if found else f"{name} is not installed"
    cure = "nothing helps; use an onnxruntime backend"
    return Finding(name, False, f"not served by this release ({installed})", cure)


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


def _sum_model() -> bytes:
    """The ONNX model y = x + x for float32 [1], written out as protobuf, since the onnx package may not be here."""

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return bytes([number << 3, content])
        return bytes([number << 3 | 2, len(content)]) + content

    def tensor(name: bytes) -> bytes:
        shape = field(1, field(1, 1))  # one dimension, of 1
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))  # element type 1: float32

    node = field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Add")
    graph = field(1, node) + field(2, b"sum") + field(11, tensor(b"x")) + field(12, tensor(b"y"))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))  # IR version 8, operator set 13
