"""What a runtime must do to serve a bundle, and what is checked for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle, GraphContract, Tensor
from ..errors import BackendError, NonFiniteError

Arrays = dict[str, NDArray[Any]]


class GraphRunner(ABC):
    """One graph, ready to run. Safe to call from several threads unless the backend says otherwise."""

    def __init__(self, contract: GraphContract) -> None:
        self.contract = contract

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        """Run the graph on host arrays and return the named outputs (all by default).

        Raises:
            BackendError: an input is missing, unknown, or of another dtype or shape than the contract says; the
                runtime failed.
            NonFiniteError: an output holds NaN or infinity.
        """
        check_inputs(self.contract, inputs)
        wanted = [t.name for t in self.contract.outputs] if outputs is None else list(outputs)
        results = self._run(inputs, wanted)
        for name, array in results.items():
            check_finite(self.contract.name, name, array)
        return results

    @abstractmethod
    def _run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run; inputs have been checked."""

    def close(self) -> None:  # noqa: B027 - not every runner holds something
        """Free what the runner holds. May be called twice."""


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


def check_inputs(contract: GraphContract, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Compare inputs with the contract: names, dtypes, shapes, and that each symbol has one value.

    K may be 1 or B: reference keys are shared by the batch, or each image has its own.
    """
    known = {t.name for t in contract.inputs}
    unknown, missing = sorted(set(inputs) - known), sorted(known - set(inputs))
    if unknown or missing:
        raise BackendError(
            f"graph {contract.name}: unknown inputs {unknown}, missing inputs {missing}; it takes {sorted(known)}."
        )
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in contract.inputs:
        _check_input(contract.name, tensor, inputs[tensor.name], sizes)
    if "K" in sizes and sizes["K"][0] not in (1, sizes["B"][0]):
        raise BackendError(
            f"graph {contract.name}: {sizes['K'][1]} has K = {sizes['K'][0]} rows of reference keys, expected 1 "
            f"(shared) or B = {sizes['B'][0]} (one for each image)."
        )


def _check_input(graph: str, tensor: Tensor, array: NDArray[Any], sizes: dict[str, tuple[int, str]]) -> None:
    found = f"{array.dtype}{list(array.shape)}"
    if array.dtype.name != tensor.dtype or array.ndim != len(tensor.shape):
        raise BackendError(f"graph {graph}: input {tensor.name} is {found}, expected {tensor}.")
    for size, expected in zip(array.shape, tensor.shape, strict=True):
        if isinstance(expected, int):
            if size != expected:
                raise BackendError(f"graph {graph}: input {tensor.name} is {found}, expected {tensor}.")
            continue
        known, source = sizes.setdefault(expected, (size, tensor.name))
        if size != known or size < 1:
            raise BackendError(
                f"graph {graph}: input {tensor.name} is {found}, expected {tensor} with {expected} = {known} as in "
                f"{source}, at least 1."
            )


def check_finite(graph: str, name: str, array: NDArray[Any]) -> None:
    """Raises NonFiniteError, naming the graph and the output, where a floating-point array is not finite."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise NonFiniteError(
            f"graph {graph}: {bad} of {array.size} values of {name} are NaN or infinite. The weights may not fit "
            f"{array.dtype}; export the bundle in fp32 and compare with `magicface-rt verify`."
        )
