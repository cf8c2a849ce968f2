"""Runtimes that serve bundles.

A `Backend` makes a bundle's graphs ready; a `GraphRunner` runs one. Any object with these two methods may be given
to `Session(backend=...)`, which is also how tests plug in their own.
"""

from __future__ import annotations

from ..errors import BackendMissingError
from .base import Backend, GraphRunner
from .onnxruntime import OnnxRuntime

__all__ = ["BACKENDS", "Backend", "GraphRunner", "OnnxRuntime", "open_backend"]

BACKENDS = ("auto", "onnxruntime", "onnxruntime-cpu", "onnxruntime-cuda")


def open_backend(name: str, *, threads: int = 0) -> Backend:
    """The backend of that name; "auto" takes the best provider that onnxruntime has.

    Raises:
        BackendMissingError: the name is not known, or the runtime is not installed.
    """
    if name not in BACKENDS:
        raise BackendMissingError(f"backend {name!r} is not known; there are {', '.join(BACKENDS)}.")
    provider = {"onnxruntime-cpu": "cpu", "onnxruntime-cuda": "cuda"}.get(name)
    return OnnxRuntime(provider, threads=threads)
