"""Optimisation profiles: derive the range of every dynamic input from a graph's contract and a target."""

from __future__ import annotations

import math
from collections.abc import Mapping

from magicface_rt.bundle import Bundle, GraphContract
from magicface_rt.errors import TargetError

from .plan_key import ShapeRange
from .targets import Target

Range = tuple[int, int, int]

ONE_AT_A_TIME = ("vae_encoder", "vae_decoder")
"""Graphs that Session calls with one picture at a time: a second would cost as much memory again and save nothing."""


def profile(bundle: Bundle, contract: GraphContract, target: Target) -> dict[str, ShapeRange]:
    """Smallest, best and largest shape of every input with a symbol in its shape.

    Raises:
        TargetError: a shape has an unknown symbol.
    """
    ranges = symbol_ranges(bundle, target, contract.name)
    shapes: dict[str, ShapeRange] = {}
    for tensor in contract.inputs:
        unknown = [d for d in tensor.shape if isinstance(d, str) and d not in ranges]
        if unknown:
            raise TargetError(f"graph {contract.name}: input {tensor} has the unknown symbol {unknown[0]}.")
        if any(isinstance(d, str) for d in tensor.shape):
            smallest, best, largest = (
                tuple(ranges[d][i] if isinstance(d, str) else int(d) for d in tensor.shape) for i in range(3)
            )
            shapes[tensor.name] = (smallest, best, largest)
    return shapes


def symbol_ranges(bundle: Bundle, target: Target, graph: str) -> Mapping[str, Range]:
    """Smallest, best and largest value of the contracts' symbols B, R, K and M1..M8 in a graph.

    Kept tokens (M1..M8) are at most the cells of the target's `full_masks`; best is what its usual number of references
    needs with masks of the bundle's expected share. Nothing exceeds the bundle's own limits.
    """
    images = min(target.images.maximum, bundle.limits.images)
    references = min(target.references.maximum, bundle.limits.references)
    ranges: dict[str, Range] = {
        "B": _range(target.images.optimum, images),
        "R": _range(target.references.optimum, references),
        "K": (1, 1, images),  # a single request has one row of reference keys for its whole batch
    }
    for factor in bundle.factors:
        rows, columns = bundle.grid(factor)
        largest = min(target.full_masks * rows * columns, bundle.limits.kept_tokens[factor])
        best = math.ceil(target.references.optimum * bundle.expected_mask_share * rows * columns)
        ranges[f"M{factor}"] = _range(best, largest)
    if graph == "text_encoder":  # the two prompts of a request, or its references' prompts together
        ranges["B"] = (1, 2, max(2, references))
    elif graph in ONE_AT_A_TIME:
        ranges["B"] = ranges["R"] = (1, 1, 1)
    return ranges


def _range(best: int, largest: int) -> Range:
    return 1, max(1, min(best, largest)), largest
