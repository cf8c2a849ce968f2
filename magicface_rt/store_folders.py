"""The names of an engine store's folders, for what makes them and for what lists and prunes them.

    DIR/<flavour>/                 plans (engines/layout.py)
    DIR/runtime-cache/             what TensorRT-RTX compiled on a GPU, a file for each plan (backends/runtime_cache.py)
    DIR/timing-caches/             what TensorRT measured while it built (engines/timing_cache.py)
    DIR/onnxruntime-<provider>/    what ONNX Runtime's TensorRT providers compiled, in a folder for each bundle's hash

A folder of any other name is not the store's, whatever it is in.
"""

from __future__ import annotations

FLAVOURS = ("tensorrt", "tensorrt-rtx")

RUNTIME_CACHE = "runtime-cache"
TIMING_CACHES = "timing-caches"

DIGEST_CHARACTERS = 32
"""How many leading characters of a plan's digest begin the name of its runtime cache."""

COMPILING_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
"""ONNX Runtime's name of each provider that builds TensorRT engines of its own. It begins the names of their files."""


def onnxruntime_cache(provider: str) -> str:
    """Return the name of the folder in which a provider of `COMPILING_PROVIDERS` keeps what it compiled."""
    return f"onnxruntime-{provider}"
