"""Finds out whether a backend works on this machine, by trying it and not by looking at what is installed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from ..errors import MagicFaceError
from ..process.interrupts import reraise_if_interrupt
from .device import Device
from .onnxruntime import OnnxRuntime
from .ort_binding import first_line
from .sum_model import sum_model


def why_not(name: str, *, device: int = 0, cuda: Any = None) -> str:
    """Return why a backend cannot compute here; "" if it can. Never raises.

    `name`: "onnxruntime-cpu", "tensorrt-rtx", ...; `device`: the GPU's ordinal. Plans and bundles are not looked at.
    """
    try:
        if name.startswith("onnxruntime-"):
            _add_on_provider(name.removeprefix("onnxruntime-"), device)
            if name.endswith("tensorrt-rtx"):
                return no_plan_for(name, Device(device, cuda=cuda).compute_capability)
        else:
            importlib.import_module("magicface_rt.engines.flavour").load_flavour(name)
            return no_plan_for(name, Device(device, cuda=cuda).compute_capability)
    except MagicFaceError as error:
        return str(error)
    except Exception as error:  # a broken installation raises whatever it raises
        reraise_if_interrupt(error)
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def no_plan_for(name: str, capability: str | None) -> str:
    """Return why a backend has no plan for a GPU of that compute capability; "" if it has, or if that is None."""
    capabilities = importlib.import_module("magicface_rt.engines.targets").RTX_CAPABILITIES
    if not name.endswith("tensorrt-rtx") or capability is None or capability in capabilities:
        return ""
    return f"TensorRT-RTX offers no plan for compute capability {capability}, only {', '.join(capabilities)}"


def _add_on_provider(provider: str, device: int) -> None:
    """Compute 1 + 1 on the provider, without a fallback to the CPU: it may be listed but lack libraries or a device."""
    backend = OnnxRuntime(provider, device=device)
    (total,) = backend.run_model(sum_model(), {"x": np.ones(1, np.float32)})
    if total[0] != 2:
        raise ArithmeticError(f"{backend.name} says that 1 + 1 is {total[0]}")
