"""Rewrite a traced graph for ONNX Runtime's CUDA provider, by the kernels that it has.

    group normalisation, SiLU, and the sum before them    com.microsoft GroupNorm, SkipGroupNorm
    GEGLU with its bias                                   com.microsoft BiasSplitGelu, or Gelu at other widths
    residual sum, its bias, layer normalisation           com.microsoft SkipLayerNormalization
    convolutions                                          com.microsoft NhwcConv, and all between them channels-last

`patterns` finds the first three, `layout` turns the image tensors from [B, C, H, W] to [B, H, W, C], which the kernels
want, `definitions` says in plain ONNX what each of these operators computes, and `defined` runs a rewritten graph by
those definitions where there are no CUDA kernels. The weights stay as they are in weights.bin: a convolution's weight
is transposed by a node that ONNX Runtime folds when it opens the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from .layout import channels_last
from .patterns import SPLIT_GELU_WIDTHS, replace_patterns

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Fused:
    """What a rewritten graph holds. `nodes`: how many of each fused operator; `missed`: what kept its traced form."""

    nodes: Mapping[str, int]
    missed: tuple[str, ...]


def fuse(model: ir.Model, split_gelu_widths: Collection[int] = SPLIT_GELU_WIDTHS) -> Fused:
    """Rewrite a traced model for ONNX Runtime's CUDA provider, in place.

    split_gelu_widths: channels before the split for which BiasSplitGelu is used.

    A pattern that is not recognised stays as it was traced and is named in `missed`.
    """
    graph = model.graph
    if any(value.dtype == ir.DataType.BFLOAT16 for value in graph.initializers.values()):
        return Fused({}, ())
    missed = replace_patterns(graph, split_gelu_widths)
    missed += channels_last(graph)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    counts: dict[str, int] = {}
    for node in graph:
        if node.domain == CONTRIB:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    if counts:
        graph.opset_imports.setdefault(CONTRIB, 1)
    return Fused(dict(sorted(counts.items())), tuple(missed))
