"""TensorRT and TensorRT-RTX, which share one API: plans from an engine store, run over device memory."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ..bundle import Bundle, GraphContract
from ..errors import BackendError, DeviceError, DeviceMemoryError, PlanError
from ..values.sizes import megabytes
from .base import Arrays, Backend, GraphRunner
from .binding import Binding
from .checks import Shape, ShapeRanges
from .device import Device
from .host import BFLOAT16
from .resident import Executor, ResidentBinding, check_produced
from .runtime_cache import RuntimeCache, cache_path
from .worker_stream import WorkerStream

_LACKS_MEMORY = re.compile(r"out ?of ?memory|not enough (?:free )?memory|could not be allocated", re.IGNORECASE)
"""What the libraries say where they find too little memory, for which they have no status."""

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": BFLOAT16, "INT64": "int64", "INT32": "int32", "BOOL": "bool"}

logger = logging.getLogger("magicface_rt.tensorrt")


class PlanKey(Protocol):
    """The part of `magicface_rt.engines.plan_key.PlanKey` that is used here."""

    @property
    def digest(self) -> str: ...

    @property
    def flavour_version(self) -> str: ...

    @property
    def compute_capabilities(self) -> Sequence[str]: ...


class Plan(Protocol):
    """The part of `magicface_rt.engines.store.Plan` that is used here."""

    @property
    def key(self) -> PlanKey: ...

    @property
    def folder(self) -> Path: ...

    @property
    def bytes(self) -> int: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...


class PlanStore(Protocol):
    """The part of `magicface_rt.engines.store.EngineStore` that is used here."""

    root: Path

    def find(self, key: Any) -> Any: ...

    def get(self, key: Any, command: str | None = None) -> Any: ...

    def read(self, plan: Any, command: str | None = None) -> bytes: ...

    def in_use(self, plan: Any, command: str | None = None) -> Any: ...


class TensorRT(Backend):
    """The backend of both flavours.

    flavour        "tensorrt" or "tensorrt-rtx"
    store          the engine store, or its folder
    device         the GPU's ordinal
    build_missing  build a plan that the store does not hold, or holds damaged; else that is an error
    target         a target of magicface_rt.engines, by name or as an object; None for what this GPU can load
    cuda_graphs    capture a graph's work once and launch it as one thing afterwards
    report         called with lines of text while a missing plan is built

    Raises:
        BackendMissingError: the flavour or cuda-bindings is not installed.
        DeviceError: no GPU, no such GPU, or too old a driver.
    """

    def __init__(
        self,
        flavour: str = "tensorrt",
        *,
        store: PlanStore | Path | str,
        device: int | Device = 0,
        build_missing: bool = False,
        target: Any = None,
        cuda_graphs: bool = True,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.flavour = _engines("flavour").load_flavour(flavour)
        self.name: str = self.flavour.name
        self.device = device if isinstance(device, Device) else Device(device)
        self.store: PlanStore = _engines("store").EngineStore(store) if isinstance(store, (str, Path)) else store
        self._build_missing = build_missing
        self._target = target
        self._cuda_graphs = cuda_graphs
        self._report = report
        self._runtime: Any = None
        self.logger: Any = None
        self._opening = threading.Lock()

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        """Read a graph's plan and make it ready.

        Raises:
            BundleError: the bundle does not hold that graph.
            PlanError: the store has no such plan, or it is damaged, or made for another GPU or bundle.
            DeviceMemoryError: the plan does not fit into the device's free memory.
        """
        contract = bundle.graph(graph)
        try:
            plan, lease, data = self._read(bundle, self._plan(bundle, graph))
        except PlanError:
            if not self._build_missing:
                raise
            plan, lease, data = self._read(bundle, self._build(bundle, graph))
        try:
            self.device.use()
            self.device.require(len(data), f"plan of graph {graph}")
            engine = self._deserialize(bundle, graph, plan, data)
            return _Runner(self, contract, engine, plan, lease)
        except BaseException:
            lease.close()
            raise

    def check(self, bundle: Bundle) -> None:
        """Check that the store has every graph's plan, and that there is memory for all of them.

        With `build_missing` nothing is checked, as nothing is known before a build.

        Raises:
            PlanError: the store lacks a plan.
            TargetError: no target serves this GPU and the bundle's precision.
            DeviceMemoryError: the plans and the largest scratch memory do not fit into what is free.
        """
        if self._build_missing:
            return
        plans = [self.find(bundle, graph) for graph in bundle.graphs]
        weights = sum(plan.bytes for plan in plans)
        scratch = max((int(plan.facts.get("gate", {}).get("scratch_bytes") or 0) for plan in plans), default=0)
        self.device.require(
            weights + scratch,
            f"bundle {bundle.path} (plans of {megabytes(weights)}, and at least {megabytes(scratch)} to compute in)",
        )

    def free_device_memory(self) -> int | None:
        return self.device.memory()[0]

    def close(self) -> None:
        self._runtime = None

    def find(self, bundle: Bundle, graph: str) -> Plan:
        """Return the plan of a graph in the store; it is neither read nor built.

        Without a target of its own, the backend takes a plan for any target that this GPU can load: if there is one of
        which all of the bundle's plans are stored, that one's, since targets differ in how much their plans take.

        Raises:
            PlanError: there is none that can be used; the message says why.
            TargetError: no target serves this GPU and the bundle's precision.
        """
        first, *others = targets = self._targets(bundle)
        if others:
            whole = (target for target in targets if all(self._find(bundle, name, target) for name in bundle.graphs))
            for target in (*itertools.islice(whole, 1), *targets):
                if (found := self._find(bundle, graph, target)) is not None:
                    return found
        only: Plan = self.store.get(self._key(bundle, graph, first), self._command(bundle))
        return only

    def _find(self, bundle: Bundle, graph: str, target: Any) -> Plan | None:
        found: Plan | None = self.store.find(self._key(bundle, graph, target))
        return found

    def _key(self, bundle: Bundle, graph: str, target: Any) -> Any:
        return _engines("builder").plan_key(bundle, graph, self.flavour, target)

    def _targets(self, bundle: Bundle) -> list[Any]:
        """Return the targets whose plans would do, beginning with the one to build for."""
        if self._target is not None:
            return [self._chosen_target()]
        first, *others = _engines("targets").targets_for(self.name, self.device.compute_capability)
        return [first, *(target for target in others if bundle.dtype in target.precisions)]

    def _command(self, bundle: Bundle) -> str:
        """Return the command that builds the plans which are looked for."""
        root, ordinal = self.store.root, self.device.ordinal
        command: str = _engines("finding").build_command(bundle, self._chosen_target(), root, ordinal)
        return command

    def _chosen_target(self) -> Any:
        """Return the target that was given, by name or as an object; else the narrowest target for this GPU."""
        targets = _engines("targets")
        if self._target is None:
            return targets.target_for(self.name, self.device.compute_capability)
        if isinstance(self._target, (str, Path)):
            return targets.load_target(self._target, self.name)
        return self._target

    def _plan(self, bundle: Bundle, graph: str) -> Plan:
        if not self._build_missing:
            return self.find(bundle, graph)
        with contextlib.suppress(PlanError):
            return self.find(bundle, graph)
        return self._build(bundle, graph)

    def _read(self, bundle: Bundle, plan: Plan) -> tuple[Plan, Any, bytes]:
        """Return the plan, with a lease on it and its bytes."""
        command = self._command(bundle)
        lease = self.store.in_use(plan, command)
        try:
            return plan, lease, self.store.read(plan, command)
        except BaseException:
            lease.close()
            raise

    def _build(self, bundle: Bundle, graph: str) -> Plan:
        """Build a new plan, replacing a damaged one if there is one."""
        self.device.use()
        built: Plan = _engines("builder").build_plan(
            bundle,
            graph,
            self.flavour,
            self._chosen_target(),
            self.store,
            device=self.device.ordinal,
            report=self._report,
        )
        return built

    def _deserialize(self, bundle: Bundle, graph: str, plan: Plan, data: bytes) -> Any:
        with self._opening:
            if self._runtime is None:
                self.logger = _engines("log").trt_logger(self.flavour.trt)
                self._runtime = self.flavour.trt.Runtime(self.logger)
            engine = self._create_with_reclaim(lambda: self._runtime.deserialize_cuda_engine(data), len(data))
        if engine is None and _LACKS_MEMORY.search(self.logger.reason()):
            raise DeviceMemoryError(
                f"plan of graph {graph}: {self.device} has too little memory for it ({megabytes(len(data))}, and what "
                f"{self.name} takes besides). {self.logger.reason()} Free some, or use a smaller bundle."
            )
        if engine is None:
            made_for = ", ".join(plan.key.compute_capabilities)
            raise PlanError(
                f"plan of graph {graph}: {self.name} {self.flavour.version} did not take it. It was made by "
                f"{plan.key.flavour_version} for GPUs of compute capability {made_for}, and {self.device} is used. "
                f"{self.logger.reason()} Its bytes are those that were built, so no build replaces it: remove "
                f"{plan.folder}, and build it here: `{self._command(bundle)}`"
            )
        return engine

    def _create_with_reclaim(self, create: Callable[[], Any], nbytes: int = 1) -> Any:
        """Return what the library makes, or None if it fails. It takes device memory of its own, `nbytes` or more, and
        does not say when it found too little; so memory is reclaimed, and it tries again.
        """
        self.logger.clear_errors()
        created = create()
        while created is None and self.device.reclaim(nbytes):
            self.logger.clear_errors()
            created = create()
        return created


class _Runner(GraphRunner):
    """A deserialised plan. `run` is for single runs, one at a time; `bind` gives bindings contexts of their own."""

    def __init__(self, backend: TensorRT, contract: GraphContract, engine: Any, plan: Plan, lease: Any) -> None:
        self._inputs, self._outputs = _compare(contract, engine, backend.flavour.trt)
        # `run` returns all outputs unless told otherwise: all that the plan has.
        super().__init__(replace(contract, outputs=tuple(t for t in contract.outputs if t.name in self._outputs)))
        self._whole = contract
        self.plan = plan
        self._lease = lease
        self._backend = backend
        self._engine = engine
        self._runtime_cache: RuntimeCache | None = None
        self._making = threading.Lock()
        self._running = threading.Lock()
        self._own: Binding | None = None
        self._limits = _limits(engine, self._inputs)

    def bind(self, outputs: Sequence[str] | None = None, *, beside: Binding | None = None) -> Binding:
        if self._engine is None:
            raise BackendError(f"graph {self.contract.name}: it was closed; load it again.")
        device = self._backend.device
        if beside is None:
            worker_stream = WorkerStream(device)
        elif isinstance(beside, ResidentBinding) and beside.worker_stream.device.ordinal == device.ordinal:
            worker_stream = beside.worker_stream
        else:
            raise BackendError(
                f"graph {self.contract.name}: it cannot be bound beside graph {beside.contract.name} of another "
                "backend or device."
            )
        return ResidentBinding(
            self._whole, self._executor, worker_stream, outputs, cuda_graphs=self._backend._cuda_graphs
        )

    @property
    def limits(self) -> ShapeRanges:
        return self._limits

    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        check_produced(self.contract.name, outputs, self._outputs)
        with self._running:
            if self._own is None:
                self._own = self.bind()
            try:
                for name, array in inputs.items():
                    self._own.set(name, array)
                self._own.run()
                return {name: self._own.read(name) for name in outputs}
            except DeviceError:
                self._own.close()
                self._own = None
                raise

    def close(self) -> None:
        with self._running:
            if self._own is not None:
                self._own.close()
                self._own = None
        if self._runtime_cache is not None:
            self._backend.device.release("cudaSetDevice", self._backend.device.ordinal)
            self._runtime_cache.save()
            self._runtime_cache = None
        self._engine = None
        self._lease.close()

    def _executor(self) -> Executor:
        return _ContextExecutor(
            self.contract.name,
            self._context(),
            self._engine,
            self._inputs,
            self._outputs,
            self._limits,
            self._backend,
            self._runtime_cache,
        )

    def _context(self) -> Any:
        """Make an execution context whose scratch memory is provided by the binding."""
        trt = self._backend.flavour.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._making:  # the plan's contexts share a runtime cache; an engine is not said to be thread-safe
            how = self._rtx_config(trt, strategy) if hasattr(trt, "IRuntimeCache") else strategy
            context = self._backend._create_with_reclaim(lambda: self._engine.create_execution_context(how))
        if context is None:
            raise BackendError(
                f"graph {self.contract.name}: {self._backend.name} could not make an execution context. "
                f"{self._backend.logger.reason()}"
            )
        return context

    def _rtx_config(self, trt: Any, strategy: Any) -> Any:
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # We capture CUDA graphs ourselves. With LAZY a captured graph could hold the slow kernels that stand in until
        # those for the shape are compiled; with EAGER the warm-up run compiles them, and the runtime cache keeps them.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if self._backend._cuda_graphs else kinds.LAZY
        if self._runtime_cache is None:
            device, backend = self._backend.device, self._backend
            path = cache_path(
                backend.store.root,
                self.plan.key.digest,
                device.compute_capability,
                device.driver_version,
                backend.flavour.version,
            )
            self._runtime_cache = RuntimeCache(path, config.create_runtime_cache)
            self._runtime_cache.load()
        if not config.set_runtime_cache(self._runtime_cache.cache):
            logger.warning("graph %s: %s keeps nothing of what it compiles", self.contract.name, self._backend.name)
        return config


class _ContextExecutor(Executor):
    """An `IExecutionContext`, whose refusals become errors that name the graph."""

    def __init__(
        self,
        graph: str,
        context: Any,
        engine: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        limits: ShapeRanges,
        backend: TensorRT,
        runtime_cache: RuntimeCache | None,
    ) -> None:
        self._graph = graph
        self._backend = backend
        self._runtime_cache = runtime_cache
        self._context = context
        self._taken = {*inputs, *outputs}
        self._scratch = int(engine.get_device_memory_size_for_profile_v2(0))
        self.outputs = tuple(outputs)
        self.limits = limits

    @property
    def scratch_bytes(self) -> int:
        return self._scratch

    def set_shape(self, name: str, shape: Shape) -> None:
        # A plan lacks the inputs that none of its outputs depends on.
        if name not in self._taken:
            return
        self._backend.logger.clear_errors()
        if not self._context.set_input_shape(name, tuple(shape)):
            raise BackendError(
                f"graph {self._graph}: the plan refused shape {list(shape)} for input {name}. "
                f"{self._backend.logger.reason()}"
            )

    def set_address(self, name: str, address: int) -> None:
        if name not in self._taken:
            return
        self._backend.logger.clear_errors()
        if not self._context.set_tensor_address(name, address):
            raise BackendError(
                f"graph {self._graph}: the plan refused the memory for {name}. {self._backend.logger.reason()}"
            )

    def use_scratch(self, address: int, nbytes: int) -> None:
        self._context.set_device_memory(address, nbytes)

    def enqueue(self, stream: int) -> None:
        self._backend.logger.clear_errors()
        if not self._context.execute_async_v3(stream):
            raise DeviceError(f"graph {self._graph}: it could not be enqueued. {self._backend.logger.reason()}")

    def can_be_captured(self, stream: int) -> bool:
        asked = getattr(self._context, "is_stream_capturable", None)
        return True if asked is None else bool(asked(stream))

    def keep_what_was_compiled(self) -> None:
        if self._runtime_cache is not None:
            self._runtime_cache.save_now_and_then()

    def close(self) -> None:
        self._context = None


def _engines(module: str) -> Any:
    """Import a module of `magicface_rt.engines`, when a plan is wanted and not before."""
    return importlib.import_module(f"magicface_rt.engines.{module}")


def _compare(contract: GraphContract, engine: Any, trt: Any) -> tuple[list[str], list[str]]:
    """Compare a plan's inputs and outputs with the contract, and return their names.

    A plan may lack outputs that exist only for comparison, and inputs that nothing depends on.

    Raises:
        PlanError: a tensor is not in the contract, has another dtype, or is to be kept on the host.
    """
    known = {
        trt.TensorIOMode.INPUT: {t.name: t for t in contract.inputs},
        trt.TensorIOMode.OUTPUT: {t.name: t for t in contract.outputs},
    }
    found: dict[Any, list[str]] = {mode: [] for mode in known}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode = engine.get_tensor_mode(name)
        dtype = _DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name)
        tensor = known[mode].get(name)
        if tensor is None or tensor.dtype != dtype or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            expected = tensor or f"one of {', '.join(known[mode])}"
            raise PlanError(
                f"plan of graph {contract.name}: it has {name} {dtype}, and the bundle's contract {expected} on the "
                "device. The plan is of another bundle; build it again."
            )
        found[mode].append(name)
    inputs, outputs = found[trt.TensorIOMode.INPUT], found[trt.TensorIOMode.OUTPUT]
    if not outputs:
        raise PlanError(f"plan of graph {contract.name}: it has no outputs; build it again.")
    return inputs, outputs


def _limits(engine: Any, inputs: Sequence[str]) -> dict[str, tuple[Shape, Shape]]:
    """Return the range of the plan's only profile, for the inputs of which a size may vary."""
    limits = {}
    for name in inputs:
        if -1 not in tuple(engine.get_tensor_shape(name)):
            continue
        least, _, most = engine.get_tensor_profile_shape(name, 0)
        limits[name] = (tuple(int(d) for d in least), tuple(int(d) for d in most))
    return limits
