"""Group normalisation of large images, in a form whose sums stay exact enough in ONNX Runtime on a CPU.

ONNX Runtime's InstanceNormalization sums a whole group in float32, one element after another, and the VAE has groups
of millions: its decoder was 2.2e-5 from PyTorch at 512 pixels and 7.2e-5 at 768 (one image, random weights). If rows
are summed first, and then their sums, the roundings number the sum of both lengths, not their product: 1.5e-6, 1.6e-6.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

LONG = 1 << 18
"""Groups of at least this many elements have their sums split; those of the U-Net are shorter at usual sizes."""


def split_long_sums(model: onnx.ModelProto) -> int:
    """Replace the InstanceNormalizations of float32 groups of at least `LONG` elements, in place; return how many.

    Those that scale or shift as well are left alone: a traced group normalisation does both in later nodes.
    """
    graph = model.graph
    shapes = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.input)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    replaced = 0
    for node in graph.node:
        long = _long_groups(node, shapes, constants)
        if long is None:
            nodes.append(node)
        else:
            added, tensors = _in_two_sums(node, *long)
            nodes += added
            graph.initializer.extend(tensors)
            replaced += 1
    del graph.node[:]
    graph.node.extend(nodes)
    if replaced:
        _drop_unused_constants(graph)
    return replaced


def _drop_unused_constants(graph: onnx.GraphProto) -> None:
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    used = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(used)


def _long_groups(
    node: onnx.NodeProto, shapes: dict[str, onnx.TypeProto.Tensor], constants: dict[str, onnx.TensorProto]
) -> tuple[int, int] | None:
    """The number of groups and the elements of each, if a node normalises long groups and does nothing else."""
    if node.op_type != "InstanceNormalization" or node.domain:
        return None
    found = shapes.get(node.input[0])
    if found is None or found.elem_type != onnx.TensorProto.FLOAT or len(found.shape.dim) != 3:
        return None
    groups, elements = (dim.dim_value for dim in found.shape.dim[1:])
    fills = [constants.get(name) for name in node.input[1:]]
    if elements < LONG or any(tensor is None or tensor.data_location for tensor in fills):
        return None
    scale, shift = (numpy_helper.to_array(tensor) for tensor in fills if tensor is not None)
    return (groups, elements) if np.all(scale == 1) and np.all(shift == 0) else None


def _in_two_sums(
    node: onnx.NodeProto, groups: int, elements: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants for (x - mean) / sqrt(variance + epsilon), over x as [rows, groups, n, m], n m = elements."""
    (source, *_), (target,) = node.input, node.output
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    inner = _near_the_root(elements)

    def name(what: str) -> str:
        return f"{target}_{what}"

    def of(op_type: str, out: str, *inputs: str) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs, [out], name=f"{out}_node")

    def reduce(op_type: str, value: str, axis: str, out: str) -> onnx.NodeProto:
        return helper.make_node(op_type, [value, name(axis)], [name(out)], name=name(f"{out}_node"), keepdims=1)

    constants = {
        "rows": np.array([0, groups, elements // inner, inner], np.int64),
        "whole": np.array([0, groups, elements], np.int64),
        "last": np.array([3], np.int64),
        "before": np.array([2], np.int64),
        "count": np.array(elements, np.float32),
        "epsilon": np.array(epsilon, np.float32),
    }
    nodes = [
        of("Reshape", name("split"), source, name("rows")),
        reduce("ReduceMean", name("split"), "last", "row_mean"),
        reduce("ReduceMean", name("row_mean"), "before", "mean"),
        of("Sub", name("centred"), name("split"), name("mean")),
        reduce("ReduceSumSquare", name("centred"), "last", "row_squares"),
        reduce("ReduceSum", name("row_squares"), "before", "squares"),
        of("Div", name("variance"), name("squares"), name("count")),
        of("Add", name("above"), name("variance"), name("epsilon")),
        of("Sqrt", name("deviation"), name("above")),
        of("Div", name("normal"), name("centred"), name("deviation")),
        of("Reshape", target, name("normal"), name("whole")),
    ]
    return nodes, [numpy_helper.from_array(array, name(key)) for key, array in constants.items()]


def _near_the_root(elements: int) -> int:
    """The largest divisor that is at most the square root."""
    return next(n for n in range(math.isqrt(elements), 0, -1) if elements % n == 0)
