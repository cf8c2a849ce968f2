"""ONNX Runtime: its CPU provider, and those for NVIDIA GPUs, whose tensors stay on the device."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..bundle import Bundle, GraphContract
from ..errors import BackendError, BackendMissingError
from .base import Arrays, Backend, GraphRunner
from .binding import Binding
from .host import BFLOAT16
from .ort_binding import GraphIds, OrtBinding, OrtDevice, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

COMPILING_PROVIDERS = {"tensorrt": "TensorrtExecutionProvider", "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider"}
"""They build TensorRT engines of their own, and take the graph with the body that TensorRT fuses."""

_ALL = {**PROVIDERS, **COMPILING_PROVIDERS}
_CURES = {
    "cpu": "`pip install 'magicface_rt[cpu]'`",
    "cuda": "`pip uninstall onnxruntime; pip install 'magicface_rt[gpu]'`",
    "tensorrt": "`pip uninstall onnxruntime; pip install 'magicface_rt[gpu]' tensorrt`",
    "nv-tensorrt-rtx": "`pip install onnxruntime-ep-nv-tensorrt-rtx-cu13`",
}
_CUDA_GRAPH_OPTION = {
    "cuda": "enable_cuda_graph",
    "tensorrt": "trt_cuda_graph_enable",
    "nv-tensorrt-rtx": "enable_cuda_graph",
}
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_NVIDIA = 0x10DE

logger = logging.getLogger("magicface_rt.onnxruntime")
_registering = threading.Lock()


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
    """ONNX Runtime with one provider.

    provider     "cpu", "cuda", "tensorrt", "nv-tensorrt-rtx", or None: "cuda" where it is installed, else "cpu"
    threads      0 lets the runtime choose
    device       the GPU's ordinal
    cuda_graphs  capture a graph's work once and launch it as one thing afterwards, where the provider can
    cache        a folder where a provider that compiles may keep what it made, None for nowhere

    Raises:
        BackendMissingError: this onnxruntime does not have the provider.
    """

    def __init__(
        self,
        provider: str | None = None,
        *,
        threads: int = 0,
        device: int = 0,
        cuda_graphs: bool = True,
        cache: Path | None = None,
    ) -> None:
        self._ort = import_onnxruntime()
        if provider is None:
            provider = "cuda" if PROVIDERS["cuda"] in self._ort.get_available_providers() else "cpu"
        if provider not in _ALL:
            raise BackendMissingError(f"provider {provider!r} is not known; there are {', '.join(sorted(_ALL))}.")
        self.provider = provider
        self.name = f"onnxruntime-{provider}"
        self._threads = threads
        self._ordinal = device
        self._cuda_graphs = cuda_graphs and provider != "cpu"
        self._cache = cache
        self._plugin_devices: list[Any] = []
        available = self._ort.get_available_providers()
        if _ALL[provider] not in available:
            if provider == "nv-tensorrt-rtx":
                self._plugin_devices = self._register_plugin()
            if not self._plugin_devices:
                raise BackendMissingError(
                    f"onnxruntime {self._ort.__version__} has no {_ALL[provider]}, only {', '.join(available)}. "
                    f"To get it: {_CURES[provider]}."
                )

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        contract = bundle.graph(graph)
        if bundle.dtype == BFLOAT16 and self.provider == "cpu":
            raise BackendError(
                f"bundle {bundle.path} is in bf16, which {self.name} does not serve: numpy and ONNX Runtime's CPU "
                "provider have no such type. Export it in fp32 (CPU) or fp16."
            )
        path = bundle.path / contract.files["tensorrt" if self.provider in COMPILING_PROVIDERS else "onnxruntime"]
        subject = f"graph {graph} of bundle {bundle.path}: {self.name} refused {path.name} ({bundle.dtype})"
        try:
            session, captures = self._open(str(path), bundle.dtype, bundle.hash)
        except Exception as error:
            raise BackendError(f"{subject}: {first_line(error)}") from error
        self._check_provider(f"graph {graph}", session)
        if self.provider == "cpu":
            return _Runner(contract, session)
        where: OrtDevice = ("gpu", self._ordinal, _NVIDIA) if self._plugin_devices else ("cuda", self._ordinal)
        return DeviceRunner(contract, session, self._ort, where, GraphIds(captures))

    def run_model(self, model: bytes, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs of a small ONNX model that holds its weights; to find out whether the provider works.

        Raises:
            BackendError: the provider did not start.
            whatever onnxruntime raises.
        """
        session, _ = self._open(model, "float32", None)
        self._check_provider("a small model", session)
        return list(session.run(None, dict(inputs)))

    def _check_provider(self, what: str, session: Any) -> None:
        if session.get_providers()[0] != _ALL[self.provider]:
            raise BackendError(
                f"{what}: onnxruntime fell back to {session.get_providers()[0]} instead of {_ALL[self.provider]}; run "
                "`magicface-rt doctor`."
            )

    def _open(self, model: str | bytes, dtype: str, cache_name: str | None) -> tuple[Any, bool]:
        """A session, and whether it captures CUDA graphs."""
        if self._cuda_graphs and cache_name is not None:
            try:
                return self._session(model, self._settings(dtype, cache_name, captures=True)), True
            except Exception as error:
                # A CUDA graph needs every node on the GPU; without one the graph may still run there.
                logger.info("%s runs without CUDA graph: %s", self.name, first_line(error))
        return self._session(model, self._settings(dtype, cache_name, captures=False)), False

    def _session(self, model: str | bytes, settings: dict[str, str]) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        if self._plugin_devices:
            options.add_provider_for_devices([self._plugin_devices[self._ordinal]], settings)
            return self._ort.InferenceSession(model, options)
        providers: list[Any] = [(_ALL[self.provider], settings)]
        if self.provider in COMPILING_PROVIDERS and PROVIDERS["cuda"] in self._ort.get_available_providers():
            providers.append((PROVIDERS["cuda"], {"device_id": str(self._ordinal)}))
        return self._ort.InferenceSession(model, options, providers=providers)

    def _settings(self, dtype: str, cache_name: str | None, *, captures: bool) -> dict[str, str]:
        """The provider's options."""
        if self.provider == "cpu":
            return {}
        settings = {} if self._plugin_devices else {"device_id": str(self._ordinal)}
        if captures:
            settings[_CUDA_GRAPH_OPTION[self.provider]] = "1"
        if self.provider == "cuda" and dtype == "float32":
            settings["use_tf32"] = "0"  # an fp32 bundle promises fp32
        if self.provider == "tensorrt":
            settings["trt_fp16_enable"] = str(int(dtype == "float16"))
            settings["trt_bf16_enable"] = str(int(dtype == BFLOAT16))
        folder = self._cache_folder(cache_name)
        if folder and self.provider == "tensorrt":
            settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
        if folder and self.provider == "nv-tensorrt-rtx":
            settings["nv_runtime_cache_path"] = folder
        return settings

    def _cache_folder(self, name: str | None) -> str:
        """Where the provider may keep what it compiled, for its owner only; "" where it may not."""
        if self._cache is None or name is None or self.provider not in COMPILING_PROVIDERS:
            return ""
        folder = self._cache / name
        try:
            self._cache.parent.parent.mkdir(parents=True, exist_ok=True)
            for part in (self._cache.parent, self._cache, folder):
                part.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            logger.warning("%s: %s cannot be made (%s); every start compiles again.", self.name, folder, error)
            return ""
        return str(folder)

    def _register_plugin(self) -> list[Any]:
        """The GPUs that the provider's own wheel offers; none where it is not installed."""
        try:
            plugin = importlib.import_module(_RTX_PLUGIN)
        except (ImportError, OSError):
            return []
        name = plugin.get_ep_name()
        with _registering:
            if not any(d.ep_name == name for d in self._ort.get_ep_devices()):
                try:
                    self._ort.register_execution_provider_library(name, plugin.get_library_path())
                except Exception as error:
                    raise BackendMissingError(
                        f"{_RTX_PLUGIN} is installed and does not load: {first_line(error)}."
                    ) from error
        devices = [d for d in self._ort.get_ep_devices() if d.ep_name == name]
        if self._ordinal >= len(devices):
            raise BackendMissingError(
                f"{_RTX_PLUGIN} offers {len(devices)} devices, and device {self._ordinal} was asked for."
            )
        return devices


class _Runner(GraphRunner):
    """Takes and returns host arrays."""

    def __init__(self, contract: GraphContract, session: Any) -> None:
        super().__init__(contract)
        self._session = session

    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        try:
            results = self._session.run(list(outputs), dict(inputs))
        except Exception as error:
            raise BackendError(f"graph {self.contract.name}: onnxruntime failed: {first_line(error)}") from error
        return dict(zip(outputs, results, strict=True))

    def close(self) -> None:
        self._session = None


class DeviceRunner(GraphRunner):
    """Tensors on the device. `run` binds them for one run; `bind` holds them for many."""

    def __init__(self, contract: GraphContract, session: Any, ort: Any, device: OrtDevice, graph_ids: GraphIds) -> None:
        super().__init__(contract)
        self._session = session
        self._ort = ort
        self._device = device
        self._graph_ids = graph_ids

    def bind(self, outputs: Sequence[str] | None = None, *, beside: Binding | None = None) -> Binding:
        if self._session is None:
            raise BackendError(f"graph {self.contract.name}: it was closed; load it again.")
        return OrtBinding(self.contract, self._ort, self._session, self._device, self._graph_ids, outputs)

    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        binding = self.bind(outputs)
        try:
            for name, array in inputs.items():
                binding.set(name, array)
            binding.run()
            return {name: binding.read(name) for name in outputs}
        finally:
            binding.close()

    def close(self) -> None:
        self._session = None
