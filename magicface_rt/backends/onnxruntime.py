"""ONNX Runtime: the CPU provider, and CUDA where onnxruntime-gpu is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import BackendError, BackendMissingError
from .base import Arrays, Backend, GraphRunner

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendMissingError: neither wheel is installed; the message names both.
    """
    try:
        module = importlib.import_module("onnxruntime")
        _ = module.InferenceSession
    except (ImportError, AttributeError) as error:
        raise BackendMissingError(
            "onnxruntime is not installed. Install exactly one of its two wheels: "
            "`pip install 'magicface_rt[cpu]'` (onnxruntime) or `pip install 'magicface_rt[gpu]'` (onnxruntime-gpu)."
        ) from error
    return module


class OnnxRuntime(Backend):
    """`provider`: "cpu", "cuda", or None for the best one that is installed. `threads`: 0 lets the runtime choose."""

    def __init__(self, provider: str | None = None, *, threads: int = 0) -> None:
        self._ort = import_onnxruntime()
        available = self._ort.get_available_providers()
        if provider is None:
            provider = "cuda" if PROVIDERS["cuda"] in available else "cpu"
        if provider not in PROVIDERS:
            raise BackendMissingError(f"provider {provider!r} is not known; there are {', '.join(sorted(PROVIDERS))}.")
        if PROVIDERS[provider] not in available:
            raise BackendMissingError(
                f"onnxruntime {self._ort.__version__} has no {PROVIDERS[provider]}, only {', '.join(available)}. "
                "For CUDA: `pip uninstall onnxruntime; pip install 'magicface_rt[gpu]'`."
            )
        self.provider = provider
        self.name = f"onnxruntime-{provider}"
        self._threads = threads

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        contract = bundle.graph(graph)
        if bundle.dtype == "bfloat16":
            raise BackendError(
                f"bundle {bundle.path} is in bf16, which {self.name} does not serve: numpy and ONNX Runtime's CPU "
                "provider have no such type. Export it in fp32 (CPU) or fp16."
            )
        path = bundle.path / contract.files["onnxruntime"]
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        try:
            session = self._ort.InferenceSession(str(path), options, providers=[PROVIDERS[self.provider]])
        except Exception as error:
            raise BackendError(
                f"graph {graph} of bundle {bundle.path}: {self.name} refused {path.name} "
                f"({bundle.dtype}): {_first_line(error)}"
            ) from error
        if session.get_providers()[0] != PROVIDERS[self.provider]:
            raise BackendError(
                f"graph {graph}: onnxruntime fell back to {session.get_providers()[0]} instead of "
                f"{PROVIDERS[self.provider]}; run `magicface-rt doctor`."
            )
        return _Runner(contract, session)


class _Runner(GraphRunner):
    def __init__(self, contract: Any, session: Any) -> None:
        super().__init__(contract)
        self._session = session

    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        try:
            results = self._session.run(list(outputs), dict(inputs))
        except Exception as error:
            raise BackendError(f"graph {self.contract.name}: onnxruntime failed: {_first_line(error)}") from error
        return dict(zip(outputs, results, strict=True))

    def close(self) -> None:
        self._session = None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
