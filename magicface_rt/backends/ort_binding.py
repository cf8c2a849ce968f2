"""A binding for ONNX Runtime's GPU providers: tensors are OrtValues on the device, bound by IOBinding."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import GraphContract, Tensor
from ..errors import BackendError
from ..process.interrupts import reraise_if_interrupt
from .binding import Binding
from .checks import Shape, output_shape
from .device import Device
from .host import BFLOAT16, host_dtype
from .single_thread_executor import Invoker, call_directly

logger = logging.getLogger("magicface_rt.onnxruntime")

ONNX_BFLOAT16 = 16
MAX_GRAPHS = 8
"""The most CUDA graphs that a session may capture: ONNX Runtime frees them only with the session. It keeps them once
for each thread that runs the session, so there must be only one; see `OnnxRuntime`."""


OrtDevice = tuple[str, int] | tuple[str, int, int]


class GraphIds:
    """The numbers of a session's CUDA graphs, by what they were captured for. "-1" means running without."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._known: dict[tuple[Any, ...], int] = {}
        self._refused = False

    def disable(self) -> None:
        """Capture no more graphs, and do not use those that there are."""
        self._enabled = False

    def of(self, key: tuple[Any, ...], graph: str) -> str:
        """Return the number of a graph for `key`. `graph`: the name by which it is logged, once, that there are no more
        numbers.
        """
        if not self._enabled:
            return "-1"
        if key not in self._known and len(self._known) >= MAX_GRAPHS:
            if not self._refused:
                self._refused = True
                logger.warning(
                    "graph %s: %d CUDA graphs were captured, and ONNX Runtime frees none: other numbers of images or "
                    "reference tokens run without from now on. Session(pad_keys=True) has fewer of them.",
                    graph,
                    MAX_GRAPHS,
                )
            return "-1"
        return str(self._known.setdefault(key, len(self._known) + 1))


class OrtBinding(Binding):
    """A binding of OrtValues on a device. A run is done when it returns.

    device: as ONNX Runtime names it, ("cuda", ordinal), ("cpu", 0), or ("gpu", ordinal, vendor) for a provider that
    came as a plugin; invoke: makes every call that touches the device.
    """

    def __init__(
        self,
        contract: GraphContract,
        ort: Any,
        session: Any,
        device: OrtDevice,
        graph_ids: GraphIds,
        outputs: Sequence[str] | None = None,
        *,
        invoke: Invoker = call_directly,
    ) -> None:
        super().__init__(contract, outputs)
        self._invoke = invoke
        self._ort = ort
        self._session = session
        self._device = device
        self._graph_ids = graph_ids
        self._values: dict[str, Any] = {}
        self._binding = session.io_binding()
        self._bound: dict[str, Any] = {}
        self._run_shapes: tuple[Shape, ...] | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds

    def _put(self, tensor: Tensor, array: NDArray[Any]) -> None:
        self._invoke(self._upload, tensor, array)

    def _upload(self, tensor: Tensor, array: NDArray[Any]) -> None:
        value, content = self._value(tensor, array.shape), np.ascontiguousarray(array.view(host_dtype(tensor.dtype)))
        with self._copying(tensor):
            value.update_inplace(content)

    def _execute(self, shapes: Mapping[str, Shape]) -> None:
        self._invoke(self._bind_and_run, shapes)

    def _bind_and_run(self, shapes: Mapping[str, Shape]) -> None:
        # Ping-pong: what was written last is read now, and what was read last is written over.
        for name, output in self._fed_back.items():
            self._values[name], self._values[output] = self._values[output], self._values.get(name)
        for name, tensor in self._inputs.items():
            self._bind_input(tensor, shapes[name])
        for name in self.outputs:
            tensor = self._outputs[name]
            value = self._value(tensor, output_shape(tensor, self._sizes))
            if self._bound.get(name) is not value:
                self._binding.bind_ortvalue_output(name, value)
                self._bound[name] = value
        graph_id = self._graph_id(shapes)
        start = perf_counter()
        try:
            self._run(graph_id)
        except Exception as error:
            reraise_if_interrupt(error)
            if graph_id == "-1":
                raise BackendError(f"graph {self.contract.name}: onnxruntime failed: {first_line(error)}") from error
            self._graph_ids.disable()
            logger.warning("graph %s: no CUDA graph, it runs without: %s", self.contract.name, first_line(error))
            try:
                self._run("-1")
            except Exception as error:
                reraise_if_interrupt(error)
                raise BackendError(f"graph {self.contract.name}: onnxruntime failed: {first_line(error)}") from error
        self._seconds = perf_counter() - start

    def _run(self, graph_id: str) -> None:
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph_id)
        self._session.run_with_iobinding(self._binding, options)

    def _graph_id(self, shapes: Mapping[str, Shape]) -> str:
        """Return the number of the graph to capture or replay, "-1" for none: it holds addresses, and is final only
        after a run with the same shapes.
        """
        key = tuple(shapes[name] for name in self._inputs)
        warm, self._run_shapes = self._run_shapes == key, key
        if not warm:
            return "-1"
        addresses = tuple((name, value.data_ptr()) for name, value in sorted(self._bound.items()))
        return self._graph_ids.of((key, addresses), self.contract.name)

    def _value(self, tensor: Tensor, shape: Shape) -> Any:
        """Return memory of that shape for a tensor; it moves only when the shape changes."""
        value = self._values.get(tensor.name)
        if value is None or tuple(value.shape()) != shape:
            try:
                value = self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _element(tensor), *self._device)
            except Exception as error:
                reraise_if_interrupt(error)
                raise BackendError(
                    f"graph {self.contract.name}: no memory for {tensor} of shape {list(shape)} on "
                    f"{self._device[0]} {self._device[1]}: {first_line(error)}"
                ) from error
            self._values[tensor.name] = value
        return value

    def _bind_input(self, tensor: Tensor, shape: Shape) -> None:
        """Bind an input to its own memory, or to that of the output it is linked to, in the input's shape."""
        name, value = tensor.name, self._values.get(tensor.name)
        if name in self._links:
            source, output = self._links[name]
            assert isinstance(source, OrtBinding)
            value = source._values[output]
        if self._bound.get(name) is value:
            return
        assert value is not None
        if tuple(value.shape()) == shape:
            self._binding.bind_ortvalue_input(name, value)
        elif len(self._device) == 2:
            self._binding.bind_input(name, *self._device, _element(tensor), list(shape), value.data_ptr())
        else:  # the public method takes no vendor
            where = self._ort.OrtDevice.make(*self._device)._get_c_device()
            self._binding._iobinding.bind_input(name, where, _element(tensor), list(shape), value.data_ptr())
        self._bound[name] = value

    def _get(self, tensor: Tensor) -> NDArray[Any]:
        return self._invoke(self._download, tensor)

    def _download(self, tensor: Tensor) -> NDArray[Any]:
        value = self._values[tensor.name]
        if tensor.dtype != BFLOAT16:
            with self._copying(tensor):
                return np.array(value.numpy())
        bits = np.empty(tuple(value.shape()), np.uint16)
        if self._device[0] == "cpu":
            ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
            return bits
        device = Device(self._device[1])
        kind = device.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        device.call("cudaMemcpy", bits.ctypes.data, value.data_ptr(), bits.nbytes, kind)
        return bits

    @contextmanager
    def _copying(self, tensor: Tensor) -> Iterator[None]:
        """Turn what onnxruntime raises as it copies a tensor to or from the device into a BackendError."""
        try:
            yield
        except Exception as error:
            reraise_if_interrupt(error)
            raise BackendError(
                f"graph {self.contract.name}: {tensor.name} could not be copied to or from {self._device[0]} "
                f"{self._device[1]}: {first_line(error)}"
            ) from error

    def _can_link(self, source: Binding) -> bool:
        return isinstance(source, OrtBinding) and source._device == self._device

    def close(self) -> None:
        super().close()
        self._bound.clear()
        self._values.clear()
        self._binding = None
        self._session = None


def _element(tensor: Tensor) -> Any:
    return ONNX_BFLOAT16 if tensor.dtype == BFLOAT16 else np.dtype(tensor.dtype).type


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
