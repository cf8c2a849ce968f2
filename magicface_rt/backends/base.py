"""The interface that a runtime must implement to serve a bundle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ..bundle import Bundle, GraphContract
from .binding import Binding, HostBinding
from .checks import ShapeRanges, check_finite, check_inputs

__all__ = ["Arrays", "Backend", "GraphRunner", "check_finite", "check_inputs"]

Arrays = dict[str, NDArray[Any]]


class GraphRunner(ABC):
    """One graph, ready to run. Safe to call from several threads unless the backend says otherwise."""

    def __init__(self, contract: GraphContract) -> None:
        self.contract = contract

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        """Run the graph on host arrays and return the named outputs (all by default).

        bfloat16 tensors are held as their bits, in uint16 arrays; inputs may also be of ml_dtypes' bfloat16.

        Raises:
            BackendError: an input is missing, unknown, or of another dtype or shape than the contract says; the
                runtime failed.
            NonFiniteError: an output holds NaN or infinity.
        """
        check_inputs(self.contract, inputs)
        wanted = [t.name for t in self.contract.outputs] if outputs is None else list(outputs)
        results = self._run(inputs, wanted)
        dtypes = {t.name: t.dtype for t in self.contract.outputs}
        for name, array in results.items():
            check_finite(self.contract.name, name, array, dtypes.get(name))
        return results

    @abstractmethod
    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run the graph; the inputs have been checked."""

    def bind(self, outputs: Sequence[str] | None = None, *, beside: Binding | None = None) -> Binding:
        """Return the graph with its tensors held in place, for many runs by one worker.

        outputs: those that will be read or linked, all by default; beside: a binding of the same worker, with which
        this one takes turns.

        Raises:
            BackendError: an output is unknown, or the device has not enough memory.
        """
        return HostBinding(self, outputs)

    @property
    def limits(self) -> ShapeRanges:
        """The smallest and the largest shape that each input takes, by input; an input that is not named takes any."""
        return {}

    def close(self) -> None:  # noqa: B027 - not every runner holds something
        """Free what the runner holds; its bindings must be closed before. May be called twice."""


class Backend(ABC):
    """A runtime. Opening one loads nothing; `load` makes a graph ready."""

    name: str

    @abstractmethod
    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        """Make a graph of the bundle ready to run.

        Raises:
            BundleError: the bundle does not hold that graph.
            BackendError: the runtime refused the graph.
        """

    def check(self, bundle: Bundle) -> None:  # noqa: B027 - not every backend can know before it loads
        """Check, before anything is loaded, that the bundle can be served.

        Raises:
            EngineError: a plan is missing or cannot be used.
            DeviceError: the bundle does not fit into the device's free memory.
        """

    def free_device_memory(self) -> int | None:
        """Return the bytes that the device has left for keys; None if bindings have no `key_uploader` there."""
        return None

    def close(self) -> None:  # noqa: B027 - not every backend holds something
        """Free what the backend holds; its runners must be closed before. May be called twice."""
