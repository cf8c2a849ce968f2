"""Find the traced forms of operations that the CUDA provider has kernels for, and replace them.

Operations on images are replaced by operators of the private domain `CHANNELS_FIRST`, which have the signatures of
their com.microsoft namesakes but take and return [B, C, H, W]; `layout` turns them into the real ones.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .matching import constant, dims, is_filled, made_by, new_value, only_consumer, other_input, rank, replace

CHANNELS_FIRST = "magicface.channels-first"
SPLIT_GELU_WIDTHS = (2560, 5120, 10240)
"""Numbers of channels that the CUDA kernel of BiasSplitGelu is compiled for."""


def replace_patterns(graph: ir.Graph, split_gelu_widths: Collection[int]) -> list[str]:
    """Replace every pattern, in place; return what looks like one but was not recognised."""
    missed = []
    for node in tuple(graph):
        if node.domain != "":
            continue
        if node.op_type == "InstanceNormalization":
            match = _match_group_norm(node)
            if match is None:
                missed.append(f"group normalisation {node.outputs[0].name}")
            else:
                _replace_group_norm(graph, match)
        elif node.op_type == "Erf" and not _gelu(graph, node, split_gelu_widths):
            missed.append(f"GELU {node.outputs[0].name}")
        elif node.op_type == "LayerNormalization":
            _skip_layer_norm(graph, node)
    return missed


@dataclass(frozen=True)
class _GroupNorm:
    """The nodes and values of a traced group norm that replacing it needs."""

    norm: ir.Node
    """The InstanceNormalization."""
    x: ir.Value
    """What is read: `image`, or its form [B, C, H W]."""
    image: ir.Value
    """[B, C, H, W]"""
    groups: int
    gamma: NDArray[Any]
    beta: NDArray[Any]
    shift: ir.Node
    """The last node of the norm itself: the Add of beta."""
    silu: ir.Value | None
    """The output of the SiLU that follows; None if none does."""


def _match_group_norm(norm: ir.Node) -> _GroupNorm | None:
    """Match a group norm: Reshape, InstanceNormalization, Reshape, Mul, Add, then Sigmoid, Mul if SiLU follows."""
    split = made_by(norm.inputs[0], "Reshape")
    back = only_consumer(norm.outputs[0], "Reshape")
    scale = only_consumer(back.outputs[0], "Mul") if back is not None else None
    shift = only_consumer(scale.outputs[0], "Add") if scale is not None else None
    if split is None or back is None or scale is None or shift is None:
        return None
    x, whole = split.inputs[0], made_by(back.inputs[1], "Shape")
    gamma = constant(other_input(scale, back.outputs[0]))
    beta = constant(other_input(shift, scale.outputs[0]))
    grouping = constant(split.inputs[1])
    if x is None or x.shape is None or gamma is None or beta is None or grouping is None or whole is None:
        return None
    channels, spatial = gamma.size, rank(x) - 2
    fits = (
        whole.inputs[0] is x
        and whole.attributes.get_int("start", 0) == 0
        and "end" not in whole.attributes
        and grouping.shape == (3,)
        and (grouping[0], grouping[2]) == (0, -1)
        and gamma.shape == beta.shape == (channels, *[1] * spatial)
        and x.shape[1] == channels
        and channels % int(2 * grouping[1]) == 0  # the kernel reads two channels at a time
        and is_filled(norm.inputs[1], 1)
        and is_filled(norm.inputs[2], 0)
    )
    image = _image_of(x)
    if not fits or image is None:
        return None
    return _GroupNorm(norm, x, image, int(grouping[1]), gamma, beta, shift, _silu_of(shift.outputs[0]))


def _replace_group_norm(graph: ir.Graph, match: _GroupNorm) -> None:
    """Put a GroupNorm in the place of what was matched; a SkipGroupNorm if its image is a sum."""
    x, image, shift = match.x, match.image, match.shift
    y = shift.outputs[0]
    last = y if match.silu is None else match.silu
    out = new_value(last, "_fused", image.shape)
    first, skip = _summands(image)
    named = (("gamma", match.gamma), ("beta", match.beta))
    parameters = [_parameter(graph, f"{y.name}_{name}", array) for name, array in named]
    outputs = [out]
    if skip is not None:
        outputs.append(new_value(image, "_sum", image.shape))
    node = ir.node(
        "GroupNorm" if skip is None else "SkipGroupNorm",
        [first, *parameters, *([] if skip is None else [skip])],
        {
            "groups": match.groups,
            "epsilon": match.norm.attributes.get_float("epsilon", 1e-5),
            "activation": int(match.silu is not None),
            "channels_last": 1,
        },
        domain=CHANNELS_FIRST,
        outputs=outputs,
    )
    place = image.producer() if skip is not None else shift
    assert place is not None
    graph.insert_after(place, node)
    if x is not image:  # the norm is read as [B, C, H W]
        reshape = x.producer()
        assert reshape is not None
        flat_out = new_value(y, "_flat", x.shape)
        flat = ir.node("Reshape", [out, reshape.inputs[1]], dict(reshape.attributes), outputs=[flat_out])
        graph.insert_after(shift, flat)
        out = flat.outputs[0]
    replace(last, out)
    if skip is not None:
        replace(image, outputs[1])


def _image_of(x: ir.Value) -> ir.Value | None:
    """The [B, C, H, W] tensor behind a group norm's input, which is that tensor or its form [B, C, H W]."""
    if rank(x) == 4:
        return x
    reshape = made_by(x, "Reshape")
    image = reshape.inputs[0] if reshape is not None else None
    if image is None or image.shape is None or rank(image) != 4 or rank(x) != 3:
        return None
    assert x.shape is not None
    height, width = image.shape[2], image.shape[3]
    same = image.shape[1] == x.shape[1] and isinstance(height, int) and isinstance(width, int)
    return image if same and x.shape[2] == height * width else None


def _silu_of(y: ir.Value) -> ir.Value | None:
    """The value y sigmoid(y), if y is used for nothing else."""
    consumers = list(y.consumers())
    sigmoid = next((n for n in consumers if n.op_type == "Sigmoid"), None)
    if len(consumers) != 2 or sigmoid is None or y.is_graph_output():
        return None
    product = only_consumer(sigmoid.outputs[0], "Mul")
    if product is None or product not in consumers or set(product.inputs) != {y, sigmoid.outputs[0]}:
        return None
    return product.outputs[0]


def _summands(image: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The inputs of a SkipGroupNorm: an image, and another image or [B, C] that is added to it, or None."""
    add = made_by(image, "Add")
    if add is None:
        return image, None
    a, b = add.inputs
    assert a is not None
    assert b is not None
    for first, second in ((a, b), (b, a)):
        if dims(first) != dims(image) or constant(first) is not None:
            continue
        if dims(second) == dims(image) and constant(second) is None:
            return first, second
        column = made_by(second, "Unsqueeze")
        axes = constant(column.inputs[1]) if column is not None else None
        if column is not None and axes is not None and axes.tolist() == [2, 3]:
            vector, whole = column.inputs[0], dims(image)
            if whole is not None and dims(vector) == whole[:2]:
                return first, vector
    return image, None


def _parameter(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register gamma or beta as the kernel takes it: float32 [C], whatever the dtype of x."""
    tensor = ir.tensor(np.ascontiguousarray(array.reshape(-1), np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _gelu(graph: ir.Graph, erf: ir.Node, widths: Collection[int]) -> bool:
    """Replace a GELU: Div, Erf, Add, Mul, Mul; if a Split before and a Mul after make it a GEGLU, with its bias.

    Returns whether the pattern was recognised.
    """
    div = made_by(erf.inputs[0], "Div")
    one = only_consumer(erf.outputs[0], "Add")
    half = only_consumer(one.outputs[0], "Mul") if one is not None else None
    gelu = only_consumer(half.outputs[0], "Mul") if half is not None else None
    if div is None or one is None or half is None or gelu is None:
        return False
    x = div.inputs[0]
    fits = (
        x is not None
        and is_filled(div.inputs[1], 2**0.5)
        and is_filled(other_input(one, erf.outputs[0]), 1)
        and is_filled(other_input(half, one.outputs[0]), 0.5)
        and other_input(gelu, half.outputs[0]) is x
    )
    if not fits or x is None:
        return False
    if _split_gelu(graph, x, gelu, widths):
        return True
    node = ir.node("Gelu", [x], domain="com.microsoft", outputs=[new_value(gelu.outputs[0], "_fused", x.shape)])
    graph.insert_after(gelu, node)
    replace(gelu.outputs[0], node.outputs[0])
    return True


def _split_gelu(graph: ir.Graph, x: ir.Value, gelu: ir.Node, widths: Collection[int]) -> bool:
    split = made_by(x, "Split")
    product = only_consumer(gelu.outputs[0], "Mul")
    if split is None or product is None or len(split.outputs) != 2 or split.outputs[1] is not x:
        return False
    whole = split.inputs[0]
    biased = made_by(whole, "Add")
    fits = (
        other_input(product, gelu.outputs[0]) is split.outputs[0]
        and len(tuple(split.outputs[0].uses())) == 1
        and split.attributes.get_int("axis", 0) in (-1, 2)
        and len(split.inputs) == 1
        and rank(whole) == 3
        and biased is not None
        and len(tuple(biased.outputs[0].uses())) == 1
    )
    if not fits or biased is None:
        return False
    bias = next((v for v in biased.inputs if rank(v) == 1 and constant(v) is not None), None)
    plain = other_input(biased, bias) if bias is not None else None
    if bias is None or bias.shape is None or bias.shape[0] not in widths or dims(plain) != dims(whole):
        return False
    out = new_value(product.outputs[0], "_fused", product.outputs[0].shape)
    graph.insert_after(product, ir.node("BiasSplitGelu", [plain, bias], domain="com.microsoft", outputs=[out]))
    replace(product.outputs[0], out)
    return True


def _skip_layer_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """Replace a sum, one summand of which may carry a bias, and its layer norm; the sum itself may be read as well."""
    total = norm.inputs[0]
    add = made_by(total, "Add")
    whole = dims(total)
    if total is None or add is None or whole is None or len(norm.inputs) != 3 or len(norm.outputs) != 1:
        return
    if len(whole) != 3 or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return
    if any(dims(v) != whole or constant(v) is not None for v in add.inputs):
        return
    x, skip = add.inputs
    bias: ir.Value | None = None
    for first, second in ((x, skip), (skip, x)):
        inner = made_by(first, "Add")
        if inner is None or first is None or len(tuple(first.uses())) != 1 or first.is_graph_output():
            continue
        found = next((v for v in inner.inputs if dims(v) == whole[2:] and constant(v) is not None), None)
        if found is not None:
            x, skip, bias = other_input(inner, found), second, found
            break
    out, kept = new_value(norm.outputs[0], "_fused", total.shape), new_value(total, "_sum", total.shape)
    unused = [ir.Value(name=""), ir.Value(name="")]  # mean and deviation, which the operator may leave out
    node = ir.node(
        "SkipLayerNormalization",
        [x, skip, *norm.inputs[1:], *([] if bias is None else [bias])],
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain="com.microsoft",
        outputs=[out, *unused, kept],
    )
    graph.insert_after(add, node)
    replace(norm.outputs[0], out)
    replace(total, kept)
