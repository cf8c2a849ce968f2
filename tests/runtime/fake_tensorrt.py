"""A stand-in for the modules `tensorrt` and `tensorrt_rtx`: engines that compute with numpy or ONNX Runtime.

A plan is text that names a registered engine. An execution context checks what TensorRT leaves undefined: everything
set before the enqueue, memory alive, scratch memory brought, one run before a capture, nothing changed after one.
"""

# ruff: noqa: N802 - the names are the libraries'

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from magicface_rt.backends.host import host_dtype
from magicface_rt.bundle import Bundle, GraphContract

from .fake_cuda import FakeCuda

Compute = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Ranges = dict[str, tuple[int, int]]

TensorIOMode = Enum("TensorIOMode", ["INPUT", "OUTPUT"])
TensorLocation = Enum("TensorLocation", ["DEVICE", "HOST"])
DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT64"])
Strategy = Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])
_TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int64": DataType.INT64,
}


@dataclass
class Recipe:
    """What a plan says: the graph, how it computes, its profile by symbol, its scratch memory.

    weights: bytes of its file, and of the device's memory that an engine of it takes.
    """

    contract: GraphContract
    compute: Compute
    ranges: Ranges = field(default_factory=dict)
    scratch: int = 4096
    capability: str = "8.9"
    location: TensorLocation = TensorLocation.DEVICE
    weights: int = 0


class Run:
    """One execution: which memory it read and wrote."""

    def __init__(self, graph: str, addresses: Mapping[str, int], captured: bool) -> None:
        self.graph, self.addresses, self.captured = graph, dict(addresses), captured


class FakeTensorRT:
    """The module. `rtx`: with the runtime configuration and cache of TensorRT-RTX."""

    __version__ = "1.7.1"
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = Strategy

    def __init__(self, cuda: FakeCuda, *, rtx: bool = True) -> None:
        self.cuda = cuda
        self.recipes: dict[str, Recipe] = {}
        self.runs: list[Run] = []
        """Executions in the order in which the device did them."""
        self.enqueued: list[str] = []
        self.alive: set[int] = set()
        """Engines and contexts that were made and not dropped."""
        self.refuse_contexts = False
        self.takes_caches = True
        self.beside_weights = 0
        """Device memory that must be free as well for an engine to be made."""
        self.capturable = True
        self.making: Callable[[], None] = lambda: None
        """Called while an execution context is made."""
        self.logger: Any = None
        self.fail_enqueue_after: int | None = None
        self.caches: list[FakeRuntimeCache] = []
        self.configs: list[Any] = []
        if rtx:
            self.IRuntimeCache = FakeRuntimeCache
            self.CudaGraphStrategy = Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
            self.DynamicShapesKernelSpecializationStrategy = Enum("Specialization", ["LAZY", "EAGER", "NONE"])

    def complain(self, reason: str = "a reason") -> None:
        """Tell the logger why something fails."""
        self.logger.errors = [*self.logger.errors, reason]

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, data: bytes) -> Any:
        self.cuda.check_device()
        recipe = self.recipes[data.decode().rstrip()]
        major, minor = self.cuda.capability
        room = self.cuda.total - self.cuda.allocated() - self.beside_weights
        if recipe.capability != f"{major}.{minor}":
            self.complain()
            return None
        if recipe.weights > room:
            self.complain("[defaultAllocator.cpp::allocate::57] Error Code 1: Cuda Runtime (out of memory)")
            return None
        return FakeEngine(self, recipe)


class _Counted:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        trt.alive.add(id(self))

    def __del__(self) -> None:
        self.trt.alive.discard(id(self))


class FakeEngine(_Counted):
    def __init__(self, trt: FakeTensorRT, recipe: Recipe) -> None:
        super().__init__(trt)
        self.recipe = recipe
        trt.cuda.engines[id(self)] = recipe.weights
        self.device = trt.cuda.current
        contract = recipe.contract
        self.tensors = {t.name: t for t in (*contract.inputs, *contract.outputs)}
        self.num_io_tensors = len(self.tensors)

    def __del__(self) -> None:
        self.trt.cuda.engines.pop(id(self), None)
        super().__del__()

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {t.name for t in self.recipe.contract.inputs}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self.tensors[name].dtype]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return self.recipe.location

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        ranges = [
            (d, d) if isinstance(d, int) else self.recipe.ranges.get(d, (1, 1 << 20)) for d in self.tensors[name].shape
        ]
        return [tuple(r[0] for r in ranges), tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return self.recipe.scratch

    def create_runtime_config(self) -> Any:
        config = _Config(self.trt)
        self.trt.configs.append(config)
        return config

    def create_execution_context(self, strategy: Any) -> Any:
        chosen = strategy.strategy if isinstance(strategy, _Config) else strategy
        assert chosen is Strategy.USER_MANAGED
        assert self.trt.cuda.current == self.device
        self.trt.making()
        if self.trt.refuse_contexts:
            self.trt.complain()
            return None
        return FakeContext(self.trt, self)


class _Config:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.strategy: Any = Strategy.STATIC
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        self._trt.caches.append(FakeRuntimeCache(self._trt.cuda))
        return self._trt.caches[-1]

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return self._trt.takes_caches


class FakeRuntimeCache:
    """Holds the names of the kernels that were compiled: "kernels a b". `replaces`: what is read replaces the rest."""

    replaces = False

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._device = cuda.current
        self.content = b"nothing"

    def deserialize(self, blob: bytes) -> bool:
        assert self._cuda.current == self._device
        if not blob.startswith(b"kernels"):
            return False
        before = set() if self.replaces else set(self.content.split())
        names = {*before, *bytes(blob).split()} - {b"nothing", b"kernels"}
        self.content = b" ".join([b"kernels", *sorted(names)])
        return True

    def serialize(self) -> bytes:
        assert self._cuda.current == self._device
        return self.content


class FakeContext(_Counted):
    def __init__(self, trt: FakeTensorRT, engine: FakeEngine) -> None:
        super().__init__(trt)
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.warm = False
        self.changes = 0
        self.calls: list[str] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append(f"shape {name}")
        self.changes += 1
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        if not all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True)):
            return False
        self.warm = self.warm and self.shapes.get(name) == shape
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append(f"address {name}")
        self.changes += 1
        self.engine.trt.logger.errors = ["about something else"]
        assert address % 256 == 0
        self.addresses[name] = address
        return name in self.engine.tensors

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self.calls.append("scratch")
        self.changes += 1
        assert nbytes >= self.engine.recipe.scratch
        self.scratch = (address, nbytes)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt, cuda, contract = self.engine.trt, self.engine.trt.cuda, self.engine.recipe.contract
        if trt.fail_enqueue_after is not None:
            trt.fail_enqueue_after -= 1
            if trt.fail_enqueue_after < 0:
                trt.complain()
                return False
        cuda.check_device(stream)
        self.calls.append("enqueue")
        captured = cuda.capturing(stream)
        assert set(self.shapes) == {t.name for t in contract.inputs}, "a shape is not set"
        assert set(self.addresses) == set(self.engine.tensors), "an address is not set"
        assert self.warm or not captured, "captured before a run with these shapes"
        cuda.view(*self.scratch)
        self.warm = True
        shapes, addresses, scratch = dict(self.shapes), dict(self.addresses), self.scratch
        changes = self.changes
        trt.enqueued.append(contract.name)

        def work() -> None:
            assert self.changes == changes or not captured, "a captured graph's context was changed"
            cuda.view(*scratch)[:] = 0xAB  # whatever else lies there is lost
            arrays = {t.name: self._read(cuda, t.dtype, shapes[t.name], addresses[t.name]) for t in contract.inputs}
            for name, array in self.engine.recipe.compute(arrays).items():
                if name in addresses:
                    cuda.view(addresses[name], array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            trt.runs.append(Run(contract.name, addresses, captured))

        cuda.submit(stream, work)
        return True

    @staticmethod
    def _read(cuda: FakeCuda, dtype: str, shape: tuple[int, ...], address: int) -> np.ndarray:
        nbytes = math.prod(shape) * host_dtype(dtype).itemsize
        return cuda.view(address, nbytes).copy().view(host_dtype(dtype)).reshape(shape)


@lru_cache(maxsize=8)
def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def bundle_recipe(bundle: Bundle, graph: str, outputs: tuple[str, ...] | None = None) -> Recipe:
    """A bundle's graph, computed by ONNX Runtime on the CPU; with the named outputs only."""
    contract = bundle.graph(graph)
    if outputs is not None:
        kept = tuple(t for t in contract.outputs if t.name in outputs)
        contract = GraphContract(contract.name, contract.inputs, kept, contract.files)
    names = [t.name for t in contract.outputs]
    path = bundle.path / contract.files["onnxruntime"]

    def compute(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return dict(zip(names, _session(path).run(names, dict(arrays)), strict=True))

    ranges = {"B": (1, bundle.limits.images), "R": (1, bundle.limits.references), "K": (1, bundle.limits.images)}
    ranges |= {f"M{factor}": (1, count) for factor, count in bundle.limits.kept_tokens.items()}
    return Recipe(contract, compute, ranges)
