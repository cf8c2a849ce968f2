"""The two flavours of TensorRT, which share one Python API: `tensorrt` and `tensorrt-rtx`.

`tensorrt` builds for the GPU it runs on. `tensorrt-rtx` builds portable plans without a GPU; their compilation is
finished on the user's GPU when they are first loaded.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from magicface_rt.errors import BackendMissingError
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.store_folders import FLAVOURS

__all__ = ["FLAVOURS", "Flavour", "load_flavour"]


@dataclass(frozen=True)
class Flavour:
    """An installed flavour. `trt`: its module; `version`: of the library, part of every plan's key."""

    name: str
    trt: Any
    version: str

    @property
    def builds_without_gpu(self) -> bool:
        return self.name == "tensorrt-rtx"


def load_flavour(name: str) -> Flavour:
    """Import a flavour's library.

    Raises:
        BackendMissingError: the name is not known, or the library is not installed or does not load.
    """
    if name not in FLAVOURS:
        raise BackendMissingError(f"flavour {name!r} is not known; there are {', '.join(FLAVOURS)}.")
    try:
        module = importlib.import_module(name.replace("-", "_"))
        _ = module.Builder
    except (ImportError, OSError, AttributeError) as error:
        reraise_if_interrupt(error)
        raise BackendMissingError(
            f"{name} is not installed or does not load ({type(error).__name__}: {error}). "
            f"Install it: pip install 'magicface_rt[{name}]'"
        ) from error
    return Flavour(name, module, str(module.__version__))
