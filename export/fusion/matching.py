"""Small helpers with which the passes inspect and change a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The content of a constant value; None if it is not constant."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def is_filled(value: ir.Value | None, number: float, relative: float = 1e-3) -> bool:
    """Whether a value is a constant that holds this number everywhere, up to rounding to 16 bits."""
    array = constant(value)
    return array is not None and bool(np.all(np.abs(array.astype(np.float64) - number) <= relative * abs(number)))


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that produces a value, if it is the standard operator of this type; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def only_consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only node that reads a value, if it is of this type; None if there are others or the graph returns it."""
    consumers = tuple(value.consumers())
    if len(consumers) != 1 or value.is_graph_output() or consumers[0].op_type != op_type or consumers[0].domain != "":
        return None
    return consumers[0]


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The input that is not `value`, of a node with two inputs of which `value` is one; else None."""
    if len(node.inputs) != 2 or value not in node.inputs:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def rank(value: ir.Value | None) -> int:
    """Number of dimensions of a value; -1 if unknown."""
    return -1 if value is None or value.shape is None else value.shape.rank()


def dims(value: ir.Value | None) -> tuple[str, ...] | None:
    """Dimensions as text, so equal symbols compare equal; None if unknown."""
    return None if value is None or value.shape is None else tuple(str(d) for d in value.shape.dims)


def permuted(value: ir.Value, perm: Sequence[int]) -> ir.Shape | None:
    """The shape of a value after a transposition; None if unknown."""
    return None if value.shape is None else ir.Shape([value.shape[i] for i in perm])


def permutation(node: ir.Node | None) -> tuple[int, ...]:
    """The `perm` of a Transpose; () for anything else."""
    if node is None or node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return ()
    return tuple(node.attributes["perm"].as_ints())


def new_value(like: ir.Value, suffix: str, shape: ir.Shape | None) -> ir.Value:
    """Return a new value that is named after another and has its dtype."""
    return ir.Value(name=f"{like.name}{suffix}", type=like.type, shape=shape)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Make everything that reads `old` read `new`; an output of the graph keeps its name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
