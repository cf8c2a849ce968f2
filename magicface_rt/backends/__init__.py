"""Runtimes that serve bundles.

A `Backend` makes a bundle's graphs ready; a `GraphRunner` runs one, and `bind` gives a `Binding`, which holds its
tensors where the runtime computes. An instance of a subclass of `Backend` may be given to `Session(backend=...)`,
which is also how tests plug in their own.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import BackendMissingError, MagicFaceError, OptionError
from ..store_folders import COMPILING_PROVIDERS, FLAVOURS, onnxruntime_cache
from .base import Backend, GraphRunner
from .binding import Binding
from .onnxruntime import PROVIDERS, OnnxRuntime, import_onnxruntime
from .probe import why_not
from .tensorrt import PlanStore, TensorRT

__all__ = [
    "BACKENDS",
    "FLAVOURS",
    "Backend",
    "Binding",
    "GraphRunner",
    "OnnxRuntime",
    "TensorRT",
    "open_backend",
    "why_not",
]

BACKENDS = (
    "auto",
    "onnxruntime",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-nv-tensorrt-rtx",
    "tensorrt",
    "tensorrt-rtx",
)
logger = logging.getLogger("magicface_rt.backends")


def open_backend(
    name: str,
    *,
    threads: int = 0,
    store: PlanStore | Path | str | None = None,
    device: int = 0,
    build_missing: bool = False,
    target: Any = None,
    cuda_graphs: bool = True,
    bundle: Bundle | None = None,
) -> Backend:
    """Open the backend of that name.

    "auto" takes the fastest that works here: a TensorRT flavour whose plans of the `bundle` are all in the `store`,
    else "onnxruntime". "onnxruntime" takes CUDA where it works, else the CPU.

    threads                threads of a CPU provider, 0 for its own choice
    store                  engine store, for the TensorRT flavours
    device                 the GPU's ordinal
    build_missing, target  see `TensorRT`
    cuda_graphs            capture and replay a step's work on the GPU; ONNX Runtime's compiling providers do not

    Raises:
        BackendMissingError: the name is not known, or the runtime is not installed.
        DeviceError: there is no such GPU, or its driver is too old.
        OptionError: a TensorRT flavour without a store; or `build_missing` without such a flavour.
    """
    if name not in BACKENDS:
        raise BackendMissingError(f"backend {name!r} is not known; there are {', '.join(BACKENDS)}.")
    if build_missing and name not in FLAVOURS:
        raise OptionError(
            f"build_missing is for a backend that serves plans, and backend {name!r} builds none. Name "
            f"{' or '.join(FLAVOURS)}, or build the plans first: `magicface-rt build`."
        )
    if name in FLAVOURS:
        if store is None:
            raise OptionError(
                f"backend {name!r} serves plans out of an engine store, and none was named. Name it: store=DIR; "
                "`magicface-rt build` fills it."
            )
        return TensorRT(
            name, store=store, device=device, build_missing=build_missing, target=target, cuda_graphs=cuda_graphs
        )
    if name == "auto" and store is not None and bundle is not None:
        for flavour in FLAVOURS:
            found = _with_plans(flavour, bundle, store, device, target, cuda_graphs)
            if found is not None:
                return found
    if name in ("auto", "onnxruntime"):
        name = _with_onnxruntime(name, device)
    provider = name.removeprefix("onnxruntime-")
    return OnnxRuntime(
        provider,
        threads=threads,
        device=device,
        cuda_graphs=cuda_graphs,
        target=target,
        cache=_cache_folder(store, provider),
    )


def _with_onnxruntime(asked: str, device: int) -> str:
    """Return the CUDA backend's name if it works, else the CPU's; the log says why if the GPU wheel is installed."""
    reason = why_not("onnxruntime-cuda", device=device)
    if not reason:
        return "onnxruntime-cuda"
    if PROVIDERS["cuda"] in import_onnxruntime().get_available_providers():
        logger.warning("backend %r: onnxruntime-cuda is not used, and the CPU computes: %s", asked, reason)
    return "onnxruntime-cpu"


def _with_plans(
    flavour: str, bundle: Bundle, store: PlanStore | Path | str, device: int, target: Any, cuda_graphs: bool
) -> Backend | None:
    """Open the flavour if it works here, and the store holds the bundle's plans, and they fit; else log why not."""
    if reason := why_not(flavour, device=device):
        logger.info("backend 'auto': %s is not used: %s", flavour, reason)
        return None
    backend = TensorRT(flavour, store=store, device=device, target=target, cuda_graphs=cuda_graphs)
    try:
        backend.check(bundle)
    except MagicFaceError as error:
        # Nobody should wonder why a picture takes ten times as long as yesterday.
        logger.warning("backend 'auto': %s is not used: %s", flavour, error)
        backend.close()
        return None
    return backend


def _cache_folder(store: PlanStore | Path | str | None, provider: str) -> Path | None:
    """Return the folder, beside the plans, for a provider that compiles graphs itself; None for another, or without a
    store.
    """
    if store is None or provider not in COMPILING_PROVIDERS:
        return None
    root = Path(store) if isinstance(store, (str, Path)) else store.root
    return root / onnxruntime_cache(provider)
