"""Definitions in plain ONNX of what the CUDA provider's operators compute.

They are written from the documentation of ONNX Runtime's contrib operators and not from the traced graph, so a mistake
in an attribute, a layout or the order of inputs shows when a rewritten graph is run by these definitions.
Normalisations compute in float32, as the kernels do.
"""

from __future__ import annotations

import onnx
from onnx import parser

DOMAIN = "magicface.defined"
OPSET = 18
CONTRIB = "com.microsoft"

_HEADER = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>'

# From s [N, H, W, C], the sum to normalise: Y. Means are taken axis by axis: one float32 sum over a whole image, as
# ONNX Runtime's CPU provider makes it, is off by 1e-5.
_NORMALISE = """
    minus_one = Constant<value_ints = [-1]>() one = Constant<value_int = 1>()
    groups_scalar = Constant<value_int: int = @groups>()
    groups = Reshape(groups_scalar, minus_one)
    shape = Shape(s) image = Shape<start = 0, end = 3>(s) channels = Shape<start = 3, end = 4>(s)
    per_group = Div(channels, groups)
    grouped = Concat<axis = 0>(image, groups, per_group)
    wide = Cast<to = 1>(s)
    split = Reshape(wide, grouped)
    axis_h = Constant<value_ints = [1]>() axis_w = Constant<value_ints = [2]>() axis_c = Constant<value_ints = [4]>()
    mean_c = ReduceMean<keepdims = 1>(split, axis_c) mean_w = ReduceMean<keepdims = 1>(mean_c, axis_w)
    mean = ReduceMean<keepdims = 1>(mean_w, axis_h)
    centred = Sub(split, mean)
    square = Mul(centred, centred)
    square_c = ReduceMean<keepdims = 1>(square, axis_c) square_w = ReduceMean<keepdims = 1>(square_c, axis_w)
    variance = ReduceMean<keepdims = 1>(square_w, axis_h)
    epsilon = Constant<value_float: float = @epsilon>()
    raised = Add(variance, epsilon) deviation = Sqrt(raised)
    normal = Div(centred, deviation)
    joined = Reshape(normal, shape)
    gamma_wide = Cast<to = 1>(gamma) beta_wide = Cast<to = 1>(beta)
    scaled = Mul(joined, gamma_wide) y = Add(scaled, beta_wide)
    activation = Constant<value_int: int = @activation>()
    is_silu = Equal(activation, one)
    gate = Sigmoid(y) silu = Mul(y, gate)
    chosen = Where(is_silu, silu, y)
    Y = CastLike(chosen, X)
"""

_DEFINITIONS = {
    "GroupNorm": f"""{_HEADER} GroupNorm <groups, epsilon, activation, channels_last> (X, gamma, beta) => (Y) {{
    s = Identity(X)
    {_NORMALISE}
}}""",
    # skip is [N, H, W, C] or [N, C].
    "SkipGroupNorm": f"""{_HEADER}
    SkipGroupNorm <groups, epsilon, activation, channels_last> (X, gamma, beta, skip) => (Y, S) {{
    batch = Shape<start = 0, end = 1>(skip) last = Shape<start = -1>(skip)
    middle = Constant<value_ints = [-1]>() all_shape = Shape(X)
    rows = Concat<axis = 0>(batch, middle, last)
    skip_rows = Reshape(skip, rows)
    flat = Reshape(X, rows)
    total = Add(flat, skip_rows)
    s = Reshape(total, all_shape)
    S = Identity(s)
    {_NORMALISE}
}}""",
    "NhwcConv": f"""{_HEADER}
    NhwcConv <group, auto_pad, pads, strides, dilations, kernel_shape> (X, W, B) => (Y) {{
    x = Transpose<perm = [0, 3, 1, 2]>(X)
    w = Transpose<perm = [0, 3, 1, 2]>(W)
    y = Conv<group: int = @group, auto_pad: string = @auto_pad, pads: ints = @pads, strides: ints = @strides,
             dilations: ints = @dilations, kernel_shape: ints = @kernel_shape>(x, w, B)
    Y = Transpose<perm = [0, 2, 3, 1]>(y)
}}""",
    "BiasSplitGelu": f"""{_HEADER} BiasSplitGelu (X, bias) => (Y) {{
    biased = Add(X, bias)
    left, right = Split<axis = -1, num_outputs = 2>(biased)
    wide = Cast<to = 1>(right)
    root = Constant<value_float = 1.4142135623730951>() one = Constant<value_float = 1.0>()
    half = Constant<value_float = 0.5>()
    quotient = Div(wide, root) erf = Erf(quotient) raised = Add(erf, one)
    weighted = Mul(wide, half) gelu = Mul(weighted, raised)
    gelu_like = CastLike(gelu, X)
    Y = Mul(left, gelu_like)
}}""",
}

DEFINED = frozenset(_DEFINITIONS)
"""Operators without a CPU kernel. The others that rewritten graphs hold, SkipLayerNormalization and Gelu, have one."""


def define(model: onnx.ModelProto) -> None:
    """Make a rewritten model call the definitions instead of com.microsoft's operators, in place."""
    used = set()
    for node in model.graph.node:
        if node.domain == CONTRIB and node.op_type in DEFINED:
            node.domain = DOMAIN
            used.add(node.op_type)
    model.functions.extend(parser.parse_function(_DEFINITIONS[name]) for name in sorted(used))
    if used:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
