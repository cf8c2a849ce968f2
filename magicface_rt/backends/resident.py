"""A binding whose tensors live on the device, for a runtime that takes addresses and enqueues on a stream."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import GraphContract, Tensor
from ..errors import BackendError, DeviceError
from .binding import Binding
from .checks import Shape, ShapeRanges, output_shape
from .device import Buffer, CapturedGraph, Event, Staging, capture, logger
from .host import host_dtype
from .key_uploader import KeyUploader
from .pieces import DeviceArray, OutputRows, Piece
from .worker_stream import Slot, WorkerStream

MAX_CAPTURED = 8
"""The most captured graphs kept for one binding: 2 to 4 for each set of shapes. The least recently used goes first."""


class Executor(ABC):
    """A graph as the runtime runs it: shapes and addresses are set, then it is enqueued."""

    outputs: Sequence[str]
    limits: ShapeRanges

    @property
    @abstractmethod
    def scratch_bytes(self) -> int:
        """Bytes of memory for intermediate results, which `use_scratch` must provide."""

    @abstractmethod
    def set_shape(self, name: str, shape: Shape) -> None: ...

    @abstractmethod
    def set_address(self, name: str, address: int) -> None: ...

    @abstractmethod
    def use_scratch(self, address: int, nbytes: int) -> None: ...

    @abstractmethod
    def enqueue(self, stream: int) -> None: ...

    @abstractmethod
    def can_be_captured(self, stream: int) -> bool:
        """Whether a CUDA graph of it would be complete and final, now that it has run with these shapes."""

    def keep_what_was_compiled(self) -> None:  # noqa: B027 - not every runtime compiles as it runs
        """Save what was compiled; called when a run with new shapes is done. Never raises."""

    @abstractmethod
    def close(self) -> None: ...


def check_produced(graph: str, wanted: Sequence[str], produced: Sequence[str]) -> None:
    """Raise BackendError if a plan was built without an output that is wanted."""
    missing = sorted(set(wanted) - set(produced))
    if missing:
        raise BackendError(
            f"graph {graph}: the plan does not have the outputs {missing}, only {sorted(produced)}. Build a plan with "
            "all outputs."
        )


@dataclass(eq=False)
class _Context:
    """An executor, and what it was told last. `warm`: the shapes of its last run, None before the first."""

    executor: Executor
    warm: dict[str, Shape] | None = None
    _shapes: dict[str, Shape] = field(default_factory=dict)
    _buffers: dict[str, Buffer] = field(default_factory=dict)
    _scratch: Buffer | None = None

    def tell(self, shapes: Mapping[str, Shape], buffers: Mapping[str, Buffer]) -> None:
        """Tell the executor what has changed. `buffers`: of every tensor, and the scratch under the name "".

        What it was told is forgotten first and noted afterwards: an interrupt in between must not leave a note of
        something else than it was told.
        """
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape:
                self._shapes.pop(name, None)
                self.executor.set_shape(name, shape)
                self._shapes[name] = shape
        scratch = buffers.get("")
        if scratch is not None and self._scratch is not scratch:
            self._scratch = None
            self.executor.use_scratch(scratch.address, scratch.nbytes)
            self._scratch = scratch
        for name, buffer in buffers.items():
            if name and self._buffers.get(name) is not buffer:
                self._buffers.pop(name, None)
                self.executor.set_address(name, buffer.address)
                self._buffers[name] = buffer

    def enqueue(self, shapes: dict[str, Shape], buffers: Mapping[str, Buffer], stream: int) -> None:
        self.tell(shapes, buffers)
        self.warm = None
        self.executor.enqueue(stream)
        self.warm = shapes


@dataclass(eq=False)
class _Captured:
    """A captured run. `context`: what it was captured from, which nothing else uses as long as the graph is there."""

    graph: CapturedGraph
    buffers: tuple[Buffer, ...]
    context: _Context


_Key = tuple[tuple[Shape, ...], tuple[int, ...]]


class ResidentBinding(Binding):
    """A binding in device memory. `make` gives an executor; if that or anything else here fails, all is freed.

    Each captured graph has an executor of its own: TensorRT's developer guide advises one execution context per
    captured graph, because a context has a state that changes with its shapes, and which a replayed graph may read.
    """

    def __init__(
        self,
        contract: GraphContract,
        make: Callable[[], Executor],
        worker_stream: WorkerStream,
        outputs: Sequence[str] | None = None,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__(contract, outputs)
        self.worker_stream = worker_stream
        self._cuda_graphs = cuda_graphs
        self._slots: dict[str, Slot] = {t.name: Slot() for t in (*contract.inputs, *contract.outputs)}
        self._staging: dict[str, Staging] = {}
        self._events: list[Event] = []
        self._captured: dict[_Key, _Captured] = {}
        self._make = make
        self._free: list[_Context] = []  # those that no captured graph has
        self._has_compiled: Executor | None = None
        self._refusal_logged = False
        worker_stream.join()
        try:
            executor = make()
            self._free.append(_Context(executor))
            self._scratch_bytes = executor.scratch_bytes
            self.limits = executor.limits
            self._produced = tuple(executor.outputs)
            check_produced(contract.name, outputs or (), self._produced)
            self.outputs = self._produced if outputs is None else tuple(outputs)
            worker_stream.reserve({worker_stream.scratch: self._scratch_bytes}, contract.name)
            self._events = [Event(worker_stream.device) for _ in range(2)]
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------------ inputs

    def _can_link(self, source: Binding) -> bool:
        return isinstance(source, ResidentBinding) and source.worker_stream is self.worker_stream

    def _put(self, tensor: Tensor, array: NDArray[Any]) -> None:
        with self.worker_stream.naming(self.contract.name):
            self.worker_stream.device.use()
            slot = self._slots[tensor.name]
            self.worker_stream.reserve({slot: array.nbytes}, self.contract.name, f": input {tensor.name}")
            assert slot.buffer
            self._staged(tensor.name).upload(array, slot.buffer, self.worker_stream.stream)

    def _staged(self, name: str) -> Staging:
        if name not in self._staging:
            self._staging[name] = Staging(self.worker_stream.device)
        return self._staging[name]

    def key_uploader(self, contents: str) -> KeyUploader:
        return KeyUploader(self.worker_stream, self.contract.name, contents)

    def _lay(self, tensor: Tensor, shape: Shape, pieces: Sequence[Piece], clear: bool) -> None:
        with self.worker_stream.naming(self.contract.name):
            self.worker_stream.device.use()
            slot, itemsize = self._slots[tensor.name], host_dtype(tensor.dtype).itemsize
            nbytes = math.prod(shape) * itemsize
            moved = self.worker_stream.reserve({slot: nbytes}, self.contract.name, f": input {tensor.name}")
            assert slot.buffer
            if clear or moved:
                self.worker_stream.stream.clear(slot.buffer)
            for piece in pieces:
                self._copy(piece, tensor, slot.buffer, piece.first_element(shape) * itemsize)

    def _copy(self, piece: Piece, tensor: Tensor, to: Buffer, offset: int) -> None:
        source, stream = piece.source, self.worker_stream.stream
        if isinstance(source, DeviceArray):
            if source.ready is not None:
                stream.wait_for(source.ready)
            stream.copy(source.buffer.address + source.offset, to.address + offset, source.nbytes)
        elif isinstance(source, OutputRows):
            assert isinstance(source.binding, ResidentBinding)
            buffer = source.binding._slots[source.output].buffer
            assert buffer
            width = math.prod(source.binding.output_shape(source.output)[1:]) * host_dtype(tensor.dtype).itemsize
            stream.copy(buffer.address + source.first * width, to.address + offset, source.count * width)
        else:
            self._staged(tensor.name).upload(source, to, stream, offset=offset)

    # --------------------------------------------------------------------------------------------------------- run

    def _execute(self, shapes: Mapping[str, Shape]) -> None:
        with self.worker_stream.naming(self.contract.name):
            self._start(shapes)

    def _start(self, shapes: Mapping[str, Shape]) -> None:
        self.worker_stream.device.use()
        # Ping-pong: what was written last is read now, and what was read last is written over.
        for name, output in self._fed_back.items():
            self._slots[name], self._slots[output] = self._slots[output], self._slots[name]
        self._reserve()
        before, after = self._events
        before.record(self.worker_stream.stream)
        self.worker_stream.enqueued(self.contract.name)
        self._launch({name: shapes[name] for name in self._inputs})
        after.record(self.worker_stream.stream)

    def _reserve(self) -> None:
        """Reserve memory for outputs and scratch, all of it or none."""
        needs = {self.worker_stream.scratch: self._scratch_bytes}
        for name in self._produced:
            tensor = self._outputs[name]
            needs[self._slots[name]] = math.prod(self._shape_of(tensor)) * host_dtype(tensor.dtype).itemsize
        self.worker_stream.reserve(needs, self.contract.name)

    def _shape_of(self, tensor: Tensor) -> Shape:
        return output_shape(tensor, self._sizes)

    def _launch(self, shapes: dict[str, Shape]) -> None:
        buffers = self._buffers()
        self._drop_stale()
        key = (tuple(shapes.values()), tuple(b.address for b in buffers.values()))
        captured = self._captured.get(key)
        if captured is None:
            context = self._context(shapes)
            if self._may_capture(context, shapes):
                captured = self._capture(context, shapes, buffers)
            if captured is None:
                if context.warm != shapes:
                    self._has_compiled = context.executor
                context.enqueue(shapes, buffers, self._stream)
                return
        self._captured.pop(key, None)
        self._captured[key] = captured  # the most recently used stands last
        self._drop(list(self._captured)[:-MAX_CAPTURED])
        captured.graph.launch(self.worker_stream.stream)

    @property
    def _stream(self) -> int:
        return int(self.worker_stream.stream.handle)

    def _context(self, shapes: dict[str, Shape]) -> _Context:
        """Return a context that no captured graph has, if possible one that has run with these shapes."""
        if not self._free:
            self._make_another()
        return next((context for context in self._free if context.warm == shapes), self._free[0])

    def _make_another(self) -> None:
        """Make one more context. If that fails, such as for lack of memory, keep a single one, that of a captured
        graph, and capture no more.
        """
        try:
            self._free.append(_Context(self._make()))
        except BackendError as error:
            if not self._captured:
                raise
            self._cuda_graphs = False
            logger.warning(
                "graph %s: CUDA graphs need one more execution context, which could not be made; it runs without: %s",
                self.contract.name,
                error,
            )
            self._drop(list(self._captured))
            while len(self._free) > 1:
                self._free.pop().executor.close()

    def _buffers(self) -> dict[str, Buffer]:
        """Return the memory of every tensor, and the scratch under the name ""."""
        found = {}
        for name in (*self._inputs, *self._produced):
            source, output = self._links.get(name, (self, name))
            assert isinstance(source, ResidentBinding)
            buffer = source._slots[output].buffer
            if buffer is None:
                raise BackendError(f"graph {self.contract.name}: there is no memory for {name}; set it again.")
            found[name] = buffer
        if self.worker_stream.scratch.buffer:
            found[""] = self.worker_stream.scratch.buffer
        return found

    def _may_capture(self, context: _Context, shapes: dict[str, Shape]) -> bool:
        """Whether to capture: only after a run with these shapes, since the first may compile, allocate and upload."""
        if not self._cuda_graphs or context.warm != shapes:
            return False
        if context.executor.can_be_captured(self._stream):
            return True
        if not self._refusal_logged:
            self._refusal_logged = True
            logger.warning("graph %s: the runtime says that no CUDA graph of it can be captured.", self.contract.name)
        return False

    def _capture(self, context: _Context, shapes: dict[str, Shape], buffers: dict[str, Buffer]) -> _Captured | None:
        self._free.remove(context)  # before it is captured: if interrupted, it is lost, and never changed
        try:
            with capture(self.worker_stream.stream) as made:
                context.enqueue(shapes, buffers, self._stream)
        except DeviceError as error:
            # The picture can be made without it, so this is logged once and not raised.
            self._free.append(context)
            self._cuda_graphs = False
            logger.warning("graph %s: no CUDA graph could be captured, it runs without: %s", self.contract.name, error)
            return None
        return _Captured(made.graph, tuple(buffers.values()), context)

    def _drop(self, keys: Sequence[_Key]) -> None:
        """Destroy captured graphs, when they no longer run; their contexts are free again."""
        if keys:
            self.worker_stream.wait(self.contract.name)
        for key in keys:
            captured = self._captured.pop(key)
            captured.graph.destroy()
            self._free.append(captured.context)

    def _drop_stale(self) -> None:
        """Destroy the captured graphs that use memory which has moved since."""
        self._drop([key for key, one in self._captured.items() if any(buffer.freed for buffer in one.buffers)])

    # ----------------------------------------------------------------------------------------------------- outputs

    def wait(self) -> None:
        self._check_open()
        with self.worker_stream.naming(self.contract.name):
            self.worker_stream.device.use()
            self.worker_stream.wait(self.contract.name)
        if self._has_compiled is not None:
            executor, self._has_compiled = self._has_compiled, None
            executor.keep_what_was_compiled()

    @property
    def seconds(self) -> float:
        before, after = self._events
        return after.seconds_since(before) if self._has_run else 0.0

    def _get(self, tensor: Tensor) -> NDArray[Any]:
        self.wait()
        array = np.empty(self._shape_of(tensor), host_dtype(tensor.dtype))
        buffer = self._slots[tensor.name].buffer
        assert buffer
        with self.worker_stream.naming(self.contract.name):
            self.worker_stream.stream.download(buffer, array)
        return array

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        self.worker_stream.wait_quietly()
        for captured in self._captured.values():
            captured.graph.destroy()
            captured.context.executor.close()
        self._captured.clear()
        for context in self._free:
            context.executor.close()
        self._free.clear()
        self._has_compiled = None
        for staging in self._staging.values():
            staging.free()
        self._staging.clear()
        for slot in self._slots.values():
            slot.free()
        for event in self._events:
            event.destroy()
        self.worker_stream.leave()
