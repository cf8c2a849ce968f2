"""Checks of a graph's inputs before it runs, against its contract, and of its outputs afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from numpy.typing import NDArray

from ..bundle import GraphContract, Tensor
from ..errors import BackendError, NonFiniteError
from .host import holds, non_finite

Shape = tuple[int, ...]
ShapeRanges = Mapping[str, tuple[Shape, Shape]]
"""The smallest and the largest shape that a plan takes, by input."""


def check_inputs(contract: GraphContract, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Compare inputs with the contract: names, dtypes, shapes, and that each symbol has one value.

    K may be 1 or B: reference keys are shared by the batch, or each image has its own.

    Raises:
        BackendError: something differs; the message says what was found and what was expected.
    """
    check_names(contract, inputs)
    for tensor in contract.inputs:
        check_input(contract.name, tensor, inputs[tensor.name])
    match_sizes(contract, {name: array.shape for name, array in inputs.items()})


def check_names(contract: GraphContract, given: Iterable[str]) -> None:
    """Raise BackendError if an input is missing or unknown."""
    found, known = set(given), {t.name for t in contract.inputs}
    unknown, missing = sorted(found - known), sorted(known - found)
    if unknown or missing:
        raise BackendError(
            f"graph {contract.name}: unknown inputs {unknown}, missing inputs {missing}; it takes {sorted(known)}."
        )


def check_input(graph: str, tensor: Tensor, array: NDArray[Any]) -> None:
    """Raise BackendError if the dtype, the rank or a fixed size differs."""
    found = f"{array.dtype}{list(array.shape)}"
    fixed = all(d == e for d, e in zip(array.shape, tensor.shape, strict=False) if isinstance(e, int))
    if not holds(array, tensor.dtype) or array.ndim != len(tensor.shape) or not fixed:
        raise BackendError(f"graph {graph}: input {tensor.name} is {found}, expected {tensor}.")


def match_sizes(contract: GraphContract, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the value of each symbol. `shapes`: those of all inputs, with the contract's ranks.

    Raises:
        BackendError: a symbol has two values, or one below 1; K is neither 1 nor B.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in contract.inputs:
        for size, symbol in zip(shapes[tensor.name], tensor.shape, strict=True):
            if isinstance(symbol, int):
                continue
            known, source = sizes.setdefault(symbol, (size, tensor.name))
            if size != known or size < 1:
                raise BackendError(
                    f"graph {contract.name}: input {tensor.name} is {tensor.dtype}{list(shapes[tensor.name])}, "
                    f"expected {tensor} with {symbol} = {known} as in {source}, at least 1."
                )
    if "K" in sizes and sizes["K"][0] not in (1, sizes["B"][0]):
        raise BackendError(
            f"graph {contract.name}: {sizes['K'][1]} has K = {sizes['K'][0]} rows of reference keys, expected 1 "
            f"(shared) or B = {sizes['B'][0]} (one for each image)."
        )
    return {symbol: size for symbol, (size, _) in sizes.items()}


def check_limits(contract: GraphContract, shapes: Mapping[str, Shape], limits: ShapeRanges) -> None:
    """Raise BackendError if a shape is outside the range that a plan was built for."""
    for tensor in contract.inputs:
        if tensor.name not in limits:
            continue
        shape, (least, most) = shapes[tensor.name], limits[tensor.name]
        for axis, (size, low, high) in enumerate(zip(shape, least, most, strict=True)):
            if not low <= size <= high:
                raise BackendError(
                    f"graph {contract.name}: input {tensor.name} is {tensor.dtype}{list(shape)}, and the plan takes "
                    f"{tensor.shape[axis]} from {low} to {high} (axis {axis}), found {size}. Ask for less, or build "
                    "the plan for a target with a larger range."
                )


def output_shape(tensor: Tensor, sizes: Mapping[str, int]) -> Shape:
    """Return the shape of an output, with the values of its symbols put in."""
    return tuple(d if isinstance(d, int) else sizes[d] for d in tensor.shape)


def check_finite(graph: str, name: str, array: NDArray[Any], dtype: str | None = None) -> None:
    """Raise NonFiniteError, naming the graph and the output, if a floating-point array is not finite."""
    dtype = dtype or array.dtype.name
    if bad := non_finite(array, dtype):
        raise NonFiniteError(
            f"graph {graph}: {bad} of {array.size} values of {name} ({dtype}) are NaN or infinite. In a bundle in fp16 "
            "a number may have grown beyond what fp16 holds (65504): export it in bf16 or fp32. In another the weights "
            "may be damaged: compare them with their checkpoint, `magicface-rt verify BUNDLE --checkpoint DIR`."
        )
