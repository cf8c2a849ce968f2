"""Small questions about a graph that the passes ask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The content of a constant value, None for another."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def is_filled(value: ir.Value | None, number: float, relative: float = 1e-3) -> bool:
    """Whether a value is a constant that holds this number everywhere (16 bits round it)."""
    array = constant(value)
    return array is not None and bool(np.all(np.abs(array.astype(np.float64) - number) <= relative * abs(number)))


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard operator of this type that produces a value, None for another."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it is of this type; None where others read it, or the graph returns it."""
    consumers = tuple(value.consumers())
    if len(consumers) != 1 or value.is_graph_output() or consumers[0].op_type != op_type or consumers[0].domain != "":
        return None
    return consumers[0]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Of a node with two inputs the one that is not `value`."""
    if len(node.inputs) != 2 or value not in node.inputs:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def rank(value: ir.Value | None) -> int:
    """Dimensions of a value, -1 where unknown."""
    return -1 if value is None or value.shape is None else value.shape.rank()


def dims(value: ir.Value | None) -> tuple[str, ...] | None:
    """Dimensions as text, so that equal symbols are equal."""
    return None if value is None or value.shape is None else tuple(str(d) for d in value.shape.dims)


def permuted(value: ir.Value, perm: Sequence[int]) -> ir.Shape | None:
    """The shape of a value after a transposition."""
    return None if value.shape is None else ir.Shape([value.shape[i] for i in perm])


def permutation(node: ir.Node | None) -> tuple[int, ...]:
    """The `perm` of a Transpose, () for anything else."""
    if node is None or node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return ()
    return tuple(node.attributes["perm"].as_ints())


def new_value(like: ir.Value, suffix: str, shape: ir.Shape | None) -> ir.Value:
    """A value named after another, of its dtype."""
    return ir.Value(name=f"{like.name}{suffix}", type=like.type, shape=shape)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everybody who reads `old` read `new`; an output of the graph keeps its name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
