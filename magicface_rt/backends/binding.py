"""A graph with its inputs and outputs held in place for many runs by one worker.

An input has one source at a time, and the latest call says which: a host array (`set`), an output of another graph
(`link`), an output of this graph's previous run (`feed_back`), or pieces put together (`lay`). The input keeps its
source, and a host array its value, from run to run, so what does not change is uploaded only once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import GraphContract, Tensor
from ..errors import BackendError
from .checks import Shape, ShapeRanges, check_finite, check_input, check_limits, check_names, match_sizes, output_shape
from .host import host_dtype
from .pieces import Layout, Piece, lay_on_host, layout

if TYPE_CHECKING:
    from .base import Arrays, GraphRunner
    from .key_uploader import KeyUploader


class Binding(ABC):
    """A bound graph, for one thread at a time. `outputs`: the names that can be read or linked after a run.

    Bindings that were made beside each other (`GraphRunner.bind(beside=...)`) run one at a time, in the order of the
    calls, and only such bindings may be linked.
    """

    def __init__(self, contract: GraphContract, outputs: Sequence[str] | None = None) -> None:
        self.contract = contract
        self._inputs: dict[str, Tensor] = {t.name: t for t in contract.inputs}
        self._outputs: dict[str, Tensor] = {t.name: t for t in contract.outputs}
        unknown = sorted(set(outputs or ()) - self._outputs.keys())
        if unknown:
            raise BackendError(f"graph {contract.name} has no outputs {unknown}; it has {sorted(self._outputs)}.")
        self.outputs = tuple(self._outputs) if outputs is None else tuple(outputs)
        self.limits: ShapeRanges = {}
        self._shapes: dict[str, Shape] = {}
        self._links: dict[str, tuple[Binding, str]] = {}
        self._fed_back: dict[str, str] = {}
        self._laid: dict[str, Layout] = {}
        self._assembled: dict[str, NDArray[Any]] = {}
        self._sizes: dict[str, int] = {}
        self._has_run = False
        self._closed = False

    # ------------------------------------------------------------------------------------------------- what callers do

    def set(self, name: str, array: NDArray[Any]) -> None:
        """Make a host array the input. It is copied at once, so the caller may change it afterwards.

        Raises:
            BackendError: the input is unknown, of another dtype or shape, or outside the plan's range.
        """
        tensor = self._input(name)
        check_input(self.contract.name, tensor, array)
        if name in self.limits:
            check_limits(_only(self.contract, tensor), {name: array.shape}, self.limits)
        self._put(tensor, array)
        self._links.pop(name, None)
        self._fed_back.pop(name, None)
        self._laid.pop(name, None)
        self._assembled.pop(name, None)
        self._shapes[name] = array.shape

    def lay(self, name: str, shape: Shape, pieces: Sequence[Piece]) -> None:
        """Put pieces together as the input [K, M, C], at once; what they do not cover is zero.

        Host arrays may be changed afterwards. Pieces on the device are read there in the order of the calls.

        Raises:
            BackendError: the input is unknown, of another shape, outside the plan's range, or there is no memory.
        """
        tensor = self._input(name)
        fixed = all(d == e for d, e in zip(shape, tensor.shape, strict=False) if isinstance(e, int))
        if len(shape) != len(tensor.shape) or not fixed:
            raise BackendError(f"graph {self.contract.name}: input {name} is {list(shape)}, expected {tensor}.")
        if name in self.limits:
            check_limits(_only(self.contract, tensor), {name: shape}, self.limits)
        wanted = layout(shape, pieces)
        clear = self._laid.pop(name, None) != wanted
        self._lay(tensor, shape, pieces, clear)
        self._links.pop(name, None)
        self._fed_back.pop(name, None)
        self._shapes[name] = shape
        self._laid[name] = wanted

    def key_uploader(self, contents: str) -> KeyUploader | None:
        """Make what uploads pieces for this graph ahead of need; None if they come from the host.

        contents: what the pieces are, for error messages. The caller closes it.
        """
        return None

    def link(self, name: str, source: Binding, output: str) -> None:
        """Make the input read another binding's output in place, as it is when this graph runs.

        If the output has one axis fewer than the input, an axis of size 1 is put in front.
        """
        tensor = self._input(name)
        if output not in source.outputs or not self._can_link(source):
            raise BackendError(
                f"graph {self.contract.name}: input {name} cannot read {output} of graph {source.contract.name} in "
                "place; it is not an output bound beside this graph."
            )
        from_ = source._outputs[output]
        if from_.dtype != tensor.dtype or len(tensor.shape) - len(from_.shape) not in (0, 1):
            raise BackendError(f"graph {self.contract.name}: input {tensor} cannot read output {from_}.")
        self._links[name] = (source, output)
        self._fed_back.pop(name, None)

    def feed_back(self, name: str, output: str) -> None:
        """From the next run on, use that output of the previous run as the input.

        Raises:
            BackendError: the graph has not run; the two differ in dtype or shape; the output is fed back already.
        """
        tensor = self._input(name)
        if output not in self.outputs or not self._has_run:
            raise BackendError(f"graph {self.contract.name}: there is no {output} of a run before to feed back.")
        from_ = self._outputs[output]
        taken = any(other == output for input_, other in self._fed_back.items() if input_ != name)
        if (from_.dtype, from_.shape) != (tensor.dtype, tensor.shape) or taken:
            raise BackendError(f"graph {self.contract.name}: output {from_} cannot be fed back into {tensor}.")
        self._links.pop(name, None)
        self._fed_back[name] = output

    def run(self) -> None:
        """Run the graph, or enqueue it on the device: `wait` returns when it is done.

        Raises:
            BackendError: an input has no source, or the shapes do not match; nothing was enqueued.
        """
        self._check_open()
        shapes = self._current_shapes()
        check_names(self.contract, shapes)
        sizes = match_sizes(self.contract, shapes)
        check_limits(self.contract, shapes, self.limits)
        self._sizes = sizes
        self._has_run = False  # after a failure in the middle nothing may be fed back or read
        self._execute(shapes)
        self._has_run = True

    def largest(self, symbol: str) -> int | None:
        """Return the largest value of a symbol such as B that the graph takes; None if there is no limit."""
        sizes = [
            most
            for name, (_, shape) in self.limits.items()
            for known, most in zip(self._inputs[name].shape, shape, strict=True)
            if known == symbol
        ]
        return min(sizes, default=None)

    def output_shape(self, name: str) -> Shape:
        """Return the shape of an output of the last run."""
        if name not in self.outputs or not self._has_run:
            raise BackendError(f"graph {self.contract.name}: there is no {name} of a run before.")
        return output_shape(self._outputs[name], self._sizes)

    def read(self, name: str) -> NDArray[Any]:
        """Wait for an output of the last run, and return it as a host array (bfloat16 as its bits, uint16)."""
        self._check_open()
        self.output_shape(name)
        return self._get(self._outputs[name])

    def check(self) -> None:
        """Raise NonFiniteError if an output of the last run is not finite."""
        for name in self.outputs:
            check_finite(self.contract.name, name, self.read(name), self._outputs[name].dtype)

    def once(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Set all inputs, run, and return the outputs after checking that they are finite.

        Raises:
            BackendError, NonFiniteError: as `GraphRunner.run`.
        """
        check_names(self.contract, inputs)
        for name, array in inputs.items():
            self.set(name, array)
        self.run()
        results = {name: self.read(name) for name in self.outputs}
        for name, array in results.items():
            check_finite(self.contract.name, name, array, self._outputs[name].dtype)
        return results

    # ------------------------------------------------------------------------------------------ what a runtime does

    def wait(self) -> None:  # noqa: B027 - a run on the host is done when it returns
        """Wait until the device has done all that was enqueued.

        Raises:
            DeviceError: a graph failed there; the message names it.
        """

    @property
    @abstractmethod
    def seconds(self) -> float:
        """How long the last run took, excluding time spent waiting; valid after `wait`."""

    @abstractmethod
    def _put(self, tensor: Tensor, array: NDArray[Any]) -> None:
        """Hold a checked array as the input."""

    def _lay(self, tensor: Tensor, shape: Shape, pieces: Sequence[Piece], clear: bool) -> None:
        """Hold the pieces as the input. `clear`: the previous pieces covered something else."""
        self._put(tensor, self._assemble(tensor, shape, pieces, clear))

    def _assemble(self, tensor: Tensor, shape: Shape, pieces: Sequence[Piece], clear: bool) -> NDArray[Any]:
        """Put the pieces into one host array, which stays the same from run to run."""
        if clear:
            self._assembled[tensor.name] = np.zeros(shape, host_dtype(tensor.dtype))
        into = self._assembled[tensor.name]
        lay_on_host(into, pieces)
        return into

    @abstractmethod
    def _execute(self, shapes: Mapping[str, Shape]) -> None:
        """Run with checked shapes."""

    @abstractmethod
    def _get(self, tensor: Tensor) -> NDArray[Any]:
        """Return an output on the host."""

    def _can_link(self, source: Binding) -> bool:
        return isinstance(source, type(self))

    def close(self) -> None:
        """Free what the binding holds. May be called twice."""
        self._closed = True
        self._links.clear()
        self._assembled.clear()

    # ------------------------------------------------------------------------------------------------------- inside

    def _input(self, name: str) -> Tensor:
        self._check_open()
        if name not in self._inputs:
            raise BackendError(f"graph {self.contract.name}: unknown input {name!r}; it takes {sorted(self._inputs)}.")
        return self._inputs[name]

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(f"graph {self.contract.name}: its binding was closed; bind the graph again.")

    def _current_shapes(self) -> dict[str, Shape]:
        shapes = dict(self._shapes)
        for name, (source, output) in self._links.items():
            shape = source.output_shape(output)
            shapes[name] = (1,) * (len(self._inputs[name].shape) - len(shape)) + shape
        for name, output in self._fed_back.items():
            shapes[name] = self.output_shape(output)
        return shapes


class HostBinding(Binding):
    """A binding for runtimes that take and return host arrays: holds them, and calls `GraphRunner.run`."""

    def __init__(self, runner: GraphRunner, outputs: Sequence[str] | None = None) -> None:
        super().__init__(runner.contract, outputs)
        self.limits = runner.limits
        self._runner = runner
        self._arrays: Arrays = {}
        self._results: Arrays = {}
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds

    def _put(self, tensor: Tensor, array: NDArray[Any]) -> None:
        self._arrays[tensor.name] = array.copy()

    def _lay(self, tensor: Tensor, shape: Shape, pieces: Sequence[Piece], clear: bool) -> None:
        self._arrays[tensor.name] = self._assemble(tensor, shape, pieces, clear)

    def _execute(self, shapes: Mapping[str, Shape]) -> None:
        inputs = dict(self._arrays)
        for name, (source, output) in self._links.items():
            inputs[name] = source.read(output).reshape(shapes[name])
        for name, output in self._fed_back.items():
            inputs[name] = self._results[output]
        start = perf_counter()
        self._results = self._runner.run(inputs, self.outputs)
        self._seconds = perf_counter() - start

    def _get(self, tensor: Tensor) -> NDArray[Any]:
        return self._results[tensor.name]

    def check(self) -> None:
        """Do nothing: `GraphRunner.run` has checked every output."""

    def close(self) -> None:
        super().close()
        self._arrays.clear()
        self._results.clear()


def _only(contract: GraphContract, tensor: Tensor) -> GraphContract:
    return GraphContract(contract.name, (tensor,), (), {})
