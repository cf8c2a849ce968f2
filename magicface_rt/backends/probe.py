"""Whether a backend works on this machine, found by trying and not by looking at what is installed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ..errors import MagicFaceError
from .device import Device
from .onnxruntime import OnnxRuntime
from .ort_binding import first_line


def why_not(name: str, *, device: int = 0, cuda: Any = None) -> str:
    """Why a backend cannot compute here, "" where it can. Never raises.

    `name`: "onnxruntime-cpu", "tensorrt-rtx", ...; `device`: the GPU's ordinal. Plans and bundles are not looked at.
    """
    try:
        if name.startswith("onnxruntime-"):
            _add_on_provider(name.removeprefix("onnxruntime-"), device)
        else:
            importlib.import_module("magicface_rt.engines.flavour").load_flavour(name)
            Device(device, cuda=cuda)
    except MagicFaceError as error:
        return str(error)
    except Exception as error:  # a broken installation raises whatever it raises
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _add_on_provider(provider: str, device: int) -> None:
    """Compute 1 + 1 there: a provider that is listed may lack its libraries or its device."""
    backend = OnnxRuntime(provider, device=device)
    (total,) = backend.run_model(sum_model(), {"x": np.ones(1, np.float32)})
    if total[0] != 2:
        raise ArithmeticError(f"{backend.name} says that 1 + 1 is {total[0]}")


def sum_model() -> bytes:
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
