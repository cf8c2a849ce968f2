"""ONNX Runtime: its CPU provider, and those for NVIDIA GPUs, whose tensors stay on the device."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..bundle import CUDA_RUNTIME, Bundle, GraphContract
from ..errors import BackendError, BackendMissingError, TargetError
from ..files.write_access import why_not_private
from ..process.cores import cores
from ..process.host_memory import check_addresses, share_heap, stack_bytes
from ..process.interrupts import reraise_if_interrupt
from ..store_folders import COMPILING_PROVIDERS
from .base import Arrays, Backend, GraphRunner
from .binding import Binding
from .device import Device
from .host import BFLOAT16
from .ort_arena import give_back, registering, trim, use_shared_arena
from .ort_binding import GraphIds, OrtBinding, OrtDevice, first_line
from .ort_placement import left_to_the_cpu, record_placement
from .single_thread_executor import Invoker, SingleThreadExecutor, call_directly

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_ALL = {**PROVIDERS, **COMPILING_PROVIDERS}
_CURES = {
    "cpu": "`pip install 'magicface_rt[cpu]'`",
    "cuda": "`pip uninstall onnxruntime; pip install 'magicface_rt[gpu]'`",
    "tensorrt": "`pip uninstall onnxruntime; pip install 'magicface_rt[gpu]' tensorrt`",
    "nv-tensorrt-rtx": "`pip install onnxruntime-ep-nv-tensorrt-rtx-cu13`",
}
_FLAVOUR = {"tensorrt": "tensorrt", "nv-tensorrt-rtx": "tensorrt-rtx"}
_PROFILE_OPTION = {"tensorrt": "trt_profile_{}_shapes", "nv-tensorrt-rtx": "nv_profile_{}_shapes"}
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_NVIDIA = 0x10DE

_CUDA_PRECISION = {
    "use_tf32": "0",
    "enable_skip_layer_norm_strict_mode": "1",  # its sums in float32 for float16 tensors as well
}

ORT_ADDRESSES = 96 << 20
"""The bytes of address space that loading the library takes; with less, the system's loader may end the process."""

THREADS_ADDRESSES = 16 << 20
"""Bytes of address space, besides their stacks, without which a graph's threads may end the process as they start."""

logger = logging.getLogger("magicface_rt.onnxruntime")


def import_onnxruntime() -> Any:
    """Import onnxruntime, with its telemetry off unless the environment has decided.

    Raises:
        BackendMissingError: neither wheel is installed; the message names both.
        HostMemoryError: a limit of the address space leaves too little for it.
    """
    # Official builds report to their maker, and leave an identifier in the temporary folder. The variable is read when
    # the library starts; there is no way to switch all of it off later.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if "onnxruntime" not in sys.modules:
        check_addresses(ORT_ADDRESSES, "ONNX Runtime")
        share_heap()
    try:
        module = importlib.import_module("onnxruntime")
        _ = module.InferenceSession
    except (ImportError, AttributeError) as error:
        reraise_if_interrupt(error)
        missing = getattr(error, "name", None) == "onnxruntime" or isinstance(error, AttributeError)
        state = "is not installed" if missing else f"does not load ({type(error).__name__}: {first_line(error)})"
        raise BackendMissingError(
            f"onnxruntime {state}. Install exactly one of its two wheels: "
            "`pip install 'magicface_rt[cpu]'` (onnxruntime) or `pip install 'magicface_rt[gpu]'` (onnxruntime-gpu)."
        ) from error
    return module


class OnnxRuntime(Backend):
    """ONNX Runtime with one provider.

    provider     "cpu", "cuda", "tensorrt", "nv-tensorrt-rtx", or None: "cuda" where it is installed, else "cpu"
    threads      0 lets the runtime choose
    device       the GPU's ordinal
    cuda_graphs  capture a graph's work once and launch it as one thing afterwards, where the provider can
    fused        with "cuda", take the graph that was rewritten for its kernels, where the bundle holds one
    target       a target of magicface_rt.engines, by name or as an object, with the shapes that a compiling provider
                 compiles for; None for that of this GPU
    cache        a folder where a compiling provider may keep what it compiled, None for nowhere

    Only "cuda" captures CUDA graphs. By their sources (not those of every release), the compiling providers keep a
    single one for all addresses, and TensorRT's replays it whatever number a run has; our loop alternates between two
    sets of addresses.

    With CUDA graphs, all that touches the device is done in one thread of this backend, whichever thread calls: ONNX
    Runtime then does not allow `Run` from several threads and keeps graphs by thread, and what other threads allocate
    or copy spoils a capture. So workers wait for each other's runs; without CUDA graphs they do not.

    Products of float32 are not rounded to TF32, not even in 16-bit bundles, whose guidance and schedule are in float32.
    The compiling providers have no setting for that: NVIDIA_TF32_OVERRIDE=0 in the environment turns TF32 off there.
    They take every tensor's type from the graph, as long as none of their precision options is switched on.

    What a compiling provider keeps is native code that it runs unchecked: unlike for a store's plans, no digest stands
    between the file and the GPU. So the cache folder must belong to this user, and nobody else may write into it.

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
        fused: bool = True,
        target: Any = None,
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
        self._cuda_graphs = cuda_graphs and provider == "cuda"
        self._fused = fused
        self._target = target
        self._cache = cache
        self._thread = SingleThreadExecutor(self.name) if self._cuda_graphs else None
        self._plugin_devices: list[Any] = []
        self._placement_missed = False
        if provider != "cpu":
            _preload_libraries(self._ort, tensorrt=provider == "tensorrt")
        available = self._ort.get_available_providers()
        if _ALL[provider] not in available:
            if provider == "nv-tensorrt-rtx":
                self._plugin_devices = self._register_plugin()
            if not self._plugin_devices:
                raise BackendMissingError(
                    f"onnxruntime {self._ort.__version__} has no {_ALL[provider]}, only {', '.join(available)}. "
                    f"To get it: {_CURES[provider]}."
                )

    @property
    def _invoke(self) -> Invoker:
        return self._thread or call_directly

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        contract = bundle.graph(graph)
        if bundle.dtype == BFLOAT16 and self.provider == "cpu":
            raise BackendError(
                f"bundle {bundle.path} is in bf16, which {self.name} does not serve: numpy and ONNX Runtime's CPU "
                "provider have no such type. Export it in fp32 (CPU) or fp16."
            )
        threads = self._threads or cores()
        check_addresses(THREADS_ADDRESSES + (threads - 1) * stack_bytes(), f"a graph that runs on {threads} threads")
        path = bundle.path / self._file(contract)
        subject = f"graph {graph} of bundle {bundle.path}: {self.name} refused {path.name} ({bundle.dtype})"
        profile = self._profile(bundle, contract)
        try:
            session, captures = self._invoke(self._open, str(path), bundle.hash, profile)
        except Exception as error:
            reraise_if_interrupt(error)
            raise BackendError(f"{subject}: {first_line(error)}") from error
        self._check_provider(f"graph {graph}", session)
        if self.provider == "cpu":
            return HostRunner(contract, session)
        left = left_to_the_cpu(session)
        if left is None:
            self._say_that_placement_is_not_known()
        elif left:
            logger.warning("%s computes a part of graph %s on the CPU, and is slow there: %s", self.name, graph, left)
        where: OrtDevice = ("gpu", self._ordinal, _NVIDIA) if self._plugin_devices else ("cuda", self._ordinal)
        return DeviceRunner(contract, session, self._ort, where, GraphIds(captures), invoke=self._invoke)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
        if self.provider == "cpu":
            give_back(self._ort)

    def _file(self, contract: GraphContract) -> str:
        """Return the file of the graph with the operators that the provider has kernels for."""
        if self.provider in COMPILING_PROVIDERS:
            return contract.files["tensorrt"]
        if self.provider == "cuda" and self._fused and CUDA_RUNTIME in contract.files:
            return contract.files[CUDA_RUNTIME]
        return contract.files["onnxruntime"]

    def run_model(self, model: bytes, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a small ONNX model that holds its weights and return the outputs, to see whether the provider works.

        Raises:
            BackendError: the provider did not start.
            whatever onnxruntime raises.
        """
        session, _ = self._open(model, None, {})
        self._check_provider("a small model", session)
        return list(session.run(None, dict(inputs)))

    def _check_provider(self, what: str, session: Any) -> None:
        if session.get_providers()[0] != _ALL[self.provider]:
            raise BackendError(
                f"{what}: onnxruntime fell back to {session.get_providers()[0]} instead of {_ALL[self.provider]}; run "
                "`magicface-rt doctor`."
            )

    def _say_that_placement_is_not_known(self) -> None:
        """Log, once, that onnxruntime does not say what it leaves to the CPU."""
        if not self._placement_missed:
            self._placement_missed = True
            logger.warning(
                "%s: onnxruntime %s does not say what it leaves to the CPU, so a slow part there goes unnoticed. From "
                "1.24 on it does: `pip install -U 'onnxruntime-gpu>=1.24'` (which needs Python 3.11).",
                self.name,
                self._ort.__version__,
            )

    def _open(self, model: str | bytes, cache_name: str | None, profile: dict[str, str]) -> tuple[Any, bool]:
        """Open a session; return it, and whether it captures CUDA graphs."""
        reason = ""
        if self._cuda_graphs and cache_name is not None:
            try:
                return self._session(model, self._settings(cache_name, captures=True) | profile), True
            except Exception as error:
                reraise_if_interrupt(error)
                # A CUDA graph needs every node on the GPU; without one the graph may still run there.
                reason = first_line(error)
        session = self._session(model, self._settings(cache_name, captures=False) | profile)
        if reason:
            logger.warning("%s runs without CUDA graph: %s", self.name, reason)
        return session, False

    def _session(self, model: str | bytes, settings: dict[str, str]) -> Any:
        """Make a session that never falls back to the CPU when the provider cannot start, or fails as it runs."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        if self.provider == "cpu":
            use_shared_arena(self._ort, options)
        else:
            record_placement(options)
        if self._plugin_devices:
            options.add_provider_for_devices([self._plugin_devices[self._ordinal]], settings)
            return self._ort.InferenceSession(model, options, enable_fallback=0)
        providers: list[Any] = [(_ALL[self.provider], settings)]
        if self.provider in COMPILING_PROVIDERS and PROVIDERS["cuda"] in self._ort.get_available_providers():
            providers.append((PROVIDERS["cuda"], {"device_id": str(self._ordinal), **_CUDA_PRECISION}))
        return self._ort.InferenceSession(model, options, providers=providers, enable_fallback=0)

    def _settings(self, cache_name: str | None, *, captures: bool) -> dict[str, str]:
        """Return the provider's options."""
        if self.provider == "cpu":
            return {}
        settings = {} if self._plugin_devices else {"device_id": str(self._ordinal)}
        if captures:
            settings["enable_cuda_graph"] = "1"
        if self.provider == "cuda":
            settings |= _CUDA_PRECISION
        folder = self._cache_folder(cache_name)
        if folder and self.provider == "tensorrt":
            settings |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
        if folder and self.provider == "nv-tensorrt-rtx":
            settings["nv_runtime_cache_path"] = folder
        return settings

    def _profile(self, bundle: Bundle, contract: GraphContract) -> dict[str, str]:
        """Return the shapes for a compiling provider to compile for, which would otherwise do so for every new one.

        Raises:
            TargetError: the target that was asked for is not known, or for another flavour.
        """
        if self.provider not in COMPILING_PROVIDERS:
            return {}
        targets, profiles = (importlib.import_module(f"magicface_rt.engines.{n}") for n in ("targets", "profiles"))
        target = self._target
        if isinstance(target, (str, Path)):
            target = targets.load_target(target, _FLAVOUR[self.provider])
        try:
            if target is None:
                target = targets.target_for(_FLAVOUR[self.provider], self._compute_capability())
            shapes = profiles.profile(bundle, contract, target)
        except TargetError as error:
            logger.warning("%s compiles graph %s again for every new shape: %s", self.name, contract.name, error)
            return {}
        return {
            _PROFILE_OPTION[self.provider].format(which): ",".join(
                f"{name}:{'x'.join(map(str, of_input[position]))}" for name, of_input in shapes.items()
            )
            for position, which in enumerate(("min", "opt", "max"))
            if shapes
        }

    def _compute_capability(self) -> str | None:
        try:
            return Device(self._ordinal).compute_capability
        except BackendError as error:  # without cuda-bindings a provider may work all the same
            logger.info("%s: the GPU's compute capability is not known: %s", self.name, error)
            return None

    def _cache_folder(self, name: str | None) -> str:
        """Return where the provider may keep what it compiled, for its owner only; "" if it may not."""
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
        for part in (self._cache, folder):
            if reason := why_not_private(part):
                logger.warning("%s: %s %s; it is not used, and every start compiles again.", self.name, part, reason)
                return ""
        return str(folder)

    def _register_plugin(self) -> list[Any]:
        """Register the provider's own wheel, and return the GPUs that it offers; none if it is not installed."""
        try:
            plugin = importlib.import_module(_RTX_PLUGIN)
        except (ImportError, OSError) as error:
            reraise_if_interrupt(error)
            return []
        name = _ALL["nv-tensorrt-rtx"]  # a library's providers have the name under which it is registered
        with registering():
            if not any(d.ep_name == name for d in self._ort.get_ep_devices()):
                try:
                    self._ort.register_execution_provider_library(name, plugin.get_library_path())
                except Exception as error:
                    reraise_if_interrupt(error)
                    raise BackendMissingError(
                        f"{_RTX_PLUGIN} is installed and does not load: {first_line(error)}."
                    ) from error
        devices = [d for d in self._ort.get_ep_devices() if d.ep_name == name]
        if self._ordinal >= len(devices):
            raise BackendMissingError(
                f"{_RTX_PLUGIN} offers {len(devices)} devices, and device {self._ordinal} was asked for."
            )
        return devices


class HostRunner(GraphRunner):
    """Runs a graph on host arrays."""

    def __init__(self, contract: GraphContract, session: Any) -> None:
        super().__init__(contract)
        self._session = session

    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        try:
            results = self._session.run(list(outputs), dict(inputs))
        except Exception as error:
            reraise_if_interrupt(error)
            raise BackendError(f"graph {self.contract.name}: onnxruntime failed: {first_line(error)}") from error
        return dict(zip(outputs, results, strict=True))

    def close(self) -> None:
        self._session = None
        trim()


class DeviceRunner(GraphRunner):
    """Runs a graph with its tensors on the device. `run` binds them for one run; `bind` holds them for many."""

    def __init__(
        self,
        contract: GraphContract,
        session: Any,
        ort: Any,
        device: OrtDevice,
        graph_ids: GraphIds,
        *,
        invoke: Invoker = call_directly,
    ) -> None:
        super().__init__(contract)
        self._invoke = invoke
        self._session = session
        self._ort = ort
        self._device = device
        self._graph_ids = graph_ids

    def bind(self, outputs: Sequence[str] | None = None, *, beside: Binding | None = None) -> Binding:
        if self._session is None:
            raise BackendError(f"graph {self.contract.name}: it was closed; load it again.")
        return OrtBinding(
            self.contract,
            self._ort,
            self._session,
            self._device,
            self._graph_ids,
            outputs,
            invoke=self._invoke,
        )

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
        if self._session is not None:
            held, self._session = [self._session], None
            self._invoke(held.clear)  # frees device memory, and destroys the captured graphs


def _preload_libraries(ort: Any, *, tensorrt: bool) -> None:
    """Load CUDA, cuDNN and perhaps TensorRT from NVIDIA's wheels, where the system's loader does not look. Never raises
    anything of theirs.
    """
    if tensorrt:
        try:
            importlib.import_module("tensorrt")  # which loads libnvinfer; onnxruntime only knows of the others
        except (ImportError, OSError) as error:
            reraise_if_interrupt(error)
            logger.info("tensorrt is not loaded from a wheel: %s", first_line(error))
    preload, said = getattr(ort, "preload_dlls", None), io.StringIO()
    if preload is None:
        return
    try:
        with contextlib.redirect_stdout(said):  # it prints what it does not find
            preload()
    except Exception as error:
        reraise_if_interrupt(error)
        logger.info("onnxruntime.preload_dlls failed: %s", first_line(error))
    if said.getvalue().strip():
        logger.info("onnxruntime.preload_dlls: %s", said.getvalue().strip())
