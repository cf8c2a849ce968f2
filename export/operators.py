"""The two attention operators of the exported graphs: what they mean, and one body per runtime.

The graphs hold `magicface::TokenAttention` and `magicface::RegionAttention` as model-local ONNX functions. A runtime
that knows nothing of them inlines the function's body, so no plugin is needed; which body stands in the file is
decided when the file is written, because runtimes fuse different forms (docs/design.md, "One operator, two bodies").

    TokenAttention<num_heads, scale>(q, k, v) -> out
        q [B, n, C], k [B, m, C], v [B, m, C] -> out [B, n, C]: multi-head attention, softmax(scale q k^T) v per head.

    RegionAttention<num_heads, scale>(q, k, v, k_ref, v_ref, query_group, key_group, key_bias) -> out
        q, k, v [B, n, C]; k_ref, v_ref [K, M, C] with K = 1 (shared by the batch) or B; query_group int64 [B, n];
        key_group int64 [K, M]; key_bias float32 [K, M] -> out [B, n, C].
        A pixel of group g sees its own n keys, and the reference keys of group g with their bias on the logits.
        Query groups run from 0 to 6; a key of group -1 is padding, seen by nobody.

**Channel encoding.** The bias matrix over (query group, key group) has low rank, so it is written into E = 8 extra
channels of q and k per head and the attention stays a plain one without a mask, which runtimes fuse. A query carries
the one-hot of its group and a constant 1. A reference key carries, in channel j, `fp(bias / scale)` if its group is j
and `NEG / scale` otherwise, and in the last channel what rounding lost, `bias / scale - fp(bias / scale)`. Own keys
carry zeros. With NEG = -4000 a forbidden key's softmax weight is exactly 0 in float32, as long as its own logit is not
nearly 4000 above those that the pixel may see. In heads of more than 225 channels NEG is nearer to 0, so that NEG /
scale stays below float16's largest value.
"""

from __future__ import annotations

from typing import Literal

import onnx
import torch
from onnx import parser

DOMAIN = "magicface"
OPSET = 18
GROUPS = 7
"""Query groups that the channel encoding holds: 0 (no concept) and at most 6 concepts."""

NEGATIVE_BIAS = -4000.0

LOWEST_IN_16_BITS = -60_000.0
"""What NEG / scale is limited to: beyond float16's range it would be infinite, and 0 times it no number."""

Runtime = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt", "select"]
"""Names a body: those made for the runtimes, or `select`, the exact masked form that the tests compare the others with.

`onnxruntime-cuda` is for 16 bits: it gets flash attention, which ONNX Runtime's CUDA provider has in 16 bits only.
"""

_HEADER = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "com.microsoft": 1, "{DOMAIN}": 1]>'

# What every body needs to split the channels into heads and to join them again.
_HEAD_SHAPES = """
    zero_zero = Constant<value_ints = [0, 0]>()
    minus_one = Constant<value_ints = [-1]>()
    one = Constant<value_ints = [1]>()
    heads_scalar = Constant<value_int: int = @num_heads>()
    heads = Reshape(heads_scalar, one)
    split = Concat<axis = 0>(zero_zero, heads, minus_one)
    join = Concat<axis = 0>(zero_zero, minus_one)
    scale = Constant<value_float: float = @scale>()
"""

# q [B, n, 8] and k [K, M, 8]: the code channels described above, and `batch`, the shape [B, 1, 1].
_CODES = f"""
    last = Constant<value_ints = [-1]>()
    group_ids = Constant<value_ints = [{", ".join(str(g) for g in range(GROUPS))}]>()
    query_column = Unsqueeze(query_group, last)
    query_is = Equal(query_column, group_ids)
    query_one_hot = CastLike(query_is, q)
    query_true = Equal(query_column, query_column)
    query_one = CastLike(query_true, q)
    query_code = Concat<axis = 2>(query_one_hot, query_one)
    negative = Constant<value_float = {NEGATIVE_BIAS}>()
    lowest = Constant<value_float = {LOWEST_IN_16_BITS}>()
    negative_unlimited = Div(negative, scale)
    negative_scaled = Max(negative_unlimited, lowest)
    forbidden = CastLike(negative_scaled, q)
    key_column = Unsqueeze(key_group, last)
    key_is = Equal(key_column, group_ids)
    bias_column = Unsqueeze(key_bias, last)
    bias_scaled = Div(bias_column, scale)
    bias_high = CastLike(bias_scaled, q)
    bias_high_float = CastLike(bias_high, scale)
    bias_rest = Sub(bias_scaled, bias_high_float)
    bias_low = CastLike(bias_rest, q)
    key_one_hot = Where(key_is, bias_high, forbidden)
    key_code = Concat<axis = 2>(key_one_hot, bias_low)
    own_code = Sub(query_code, query_code)
    batch_size = Shape<start = 0, end = 1>(q)
    batch = Concat<axis = 0>(batch_size, one, one)
"""

# q_joined [B, n, H (d + 8)] and k_joined [B, n + M, H (d + 8)]: the code channels behind each head's own, as
# MultiHeadAttention takes them, and v_all [B, n + M, C]. `key_code_heads` [B, n + M, H, 8] is there for its shape.
_WIDENED = """
    two = Constant<value_ints = [2]>()
    per_head = Concat<axis = 0>(one, one, heads, one)
    k_ref_batch = Expand(k_ref, batch) v_ref_batch = Expand(v_ref, batch) key_code_batch = Expand(key_code, batch)
    k_all = Concat<axis = 1>(k, k_ref_batch)
    v_all = Concat<axis = 1>(v, v_ref_batch)
    code_all = Concat<axis = 1>(own_code, key_code_batch)
    q_heads = Reshape(q, split) k_heads = Reshape(k_all, split)
    query_code4 = Unsqueeze(query_code, two) query_code_heads = Expand(query_code4, per_head)
    key_code4 = Unsqueeze(code_all, two) key_code_heads = Expand(key_code4, per_head)
    q_wide = Concat<axis = 3>(q_heads, query_code_heads)
    k_wide = Concat<axis = 3>(k_heads, key_code_heads)
    q_joined = Reshape(q_wide, join) k_joined = Reshape(k_wide, join)
"""

_TOKEN_ATTENTION = {
    "onnxruntime": f"""{_HEADER} TokenAttention <num_heads, scale> (q, k, v) => (out) {{
    out = com.microsoft.MultiHeadAttention<num_heads: int = @num_heads, scale: float = @scale>(q, k, v)
}}""",
    "tensorrt": f"""{_HEADER} TokenAttention <num_heads, scale> (q, k, v) => (out) {{
    {_HEAD_SHAPES}
    q_heads = Reshape(q, split) k_heads = Reshape(k, split) v_heads = Reshape(v, split)
    q4 = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    k4 = Transpose<perm = [0, 2, 3, 1]>(k_heads)
    v4 = Transpose<perm = [0, 2, 1, 3]>(v_heads)
    scale_like = CastLike(scale, q)
    q_scaled = Mul(q4, scale_like)
    logits = MatMul(q_scaled, k4)
    probabilities = Softmax<axis = -1>(logits)
    out4 = MatMul(probabilities, v4)
    out_heads = Transpose<perm = [0, 2, 1, 3]>(out4)
    out = Reshape(out_heads, join)
}}""",
}

_REGION_SIGNATURE = (
    "RegionAttention <num_heads, scale> (q, k, v, k_ref, v_ref, query_group, key_group, key_bias) => (out)"
)

_REGION_ATTENTION = {
    # MultiHeadAttention takes a v narrower than q and k, so v needs no padding here.
    "onnxruntime": f"""{_HEADER} {_REGION_SIGNATURE} {{
    {_HEAD_SHAPES}
    {_CODES}
    {_WIDENED}
    out = com.microsoft.MultiHeadAttention<num_heads: int = @num_heads, scale: float = @scale>
        (q_joined, k_joined, v_all)
}}""",
    # v is padded to the width of q and k: the provider takes its flash attention only if both widths are equal.
    "onnxruntime-cuda": f"""{_HEADER} {_REGION_SIGNATURE} {{
    {_HEAD_SHAPES}
    {_CODES}
    {_WIDENED}
    v_heads = Reshape(v_all, split)
    v_zeros = Sub(key_code_heads, key_code_heads)
    v_wide = Concat<axis = 3>(v_heads, v_zeros)
    v_joined = Reshape(v_wide, join)
    out_wide = com.microsoft.MultiHeadAttention<num_heads: int = @num_heads, scale: float = @scale>
        (q_joined, k_joined, v_joined)
    out_split = Reshape(out_wide, split)
    start = Constant<value_ints = [0]>() end = Constant<value_ints = [{-(GROUPS + 1)}]>()
    channels = Constant<value_ints = [3]>()
    out_heads = Slice(out_split, start, end, channels)
    out = Reshape(out_heads, join)
}}""",
    # v is padded to the width of q and k, because TensorRT decomposes an attention whose v is narrower. The attention
    # is written out and does not call TokenAttention: in a function that another function calls TensorRT's parser reads
    # the attributes as 0.
    "tensorrt": f"""{_HEADER} {_REGION_SIGNATURE} {{
    {_HEAD_SHAPES}
    {_CODES}
    per_head = Concat<axis = 0>(one, heads, one, one)
    k_ref_batch = Expand(k_ref, batch) v_ref_batch = Expand(v_ref, batch) key_code_batch = Expand(key_code, batch)
    q_heads = Reshape(q, split) k_heads = Reshape(k, split) v_heads = Reshape(v, split)
    k_ref_heads = Reshape(k_ref_batch, split) v_ref_heads = Reshape(v_ref_batch, split)
    q4 = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    k4 = Transpose<perm = [0, 2, 1, 3]>(k_heads)
    v4 = Transpose<perm = [0, 2, 1, 3]>(v_heads)
    k_ref4 = Transpose<perm = [0, 2, 1, 3]>(k_ref_heads)
    v_ref4 = Transpose<perm = [0, 2, 1, 3]>(v_ref_heads)
    query_code4 = Unsqueeze(query_code, one) query_code_heads = Expand(query_code4, per_head)
    key_code4 = Unsqueeze(key_code_batch, one) key_code_heads = Expand(key_code4, per_head)
    own_code4 = Unsqueeze(own_code, one) own_code_heads = Expand(own_code4, per_head)
    ref_zeros = Sub(key_code_heads, key_code_heads)
    k_all = Concat<axis = 2>(k4, k_ref4)
    code_all = Concat<axis = 2>(own_code_heads, key_code_heads)
    v_all = Concat<axis = 2>(v4, v_ref4)
    v_zeros = Concat<axis = 2>(own_code_heads, ref_zeros)
    q_wide = Concat<axis = 3>(q4, query_code_heads)
    k_wide = Concat<axis = 3>(k_all, code_all)
    v_wide = Concat<axis = 3>(v_all, v_zeros)
    scale_like = CastLike(scale, q)
    k_transposed = Transpose<perm = [0, 1, 3, 2]>(k_wide)
    q_scaled = Mul(q_wide, scale_like)
    logits = MatMul(q_scaled, k_transposed)
    probabilities = Softmax<axis = -1>(logits)
    out_wide = MatMul(probabilities, v_wide)
    start = Constant<value_ints = [0]>() end = Constant<value_ints = [{-(GROUPS + 1)}]>()
    channels = Constant<value_ints = [3]>()
    out4 = Slice(out_wide, start, end, channels)
    out_heads = Transpose<perm = [0, 2, 1, 3]>(out4)
    out = Reshape(out_heads, join)
}}""",
    "select": f"""{_HEADER} {_REGION_SIGNATURE} {{
    {_HEAD_SHAPES}
    last = Constant<value_ints = [-1]>()
    batch_size = Shape<start = 0, end = 1>(q)
    batch = Concat<axis = 0>(batch_size, one, one)
    k_ref_batch = Expand(k_ref, batch) v_ref_batch = Expand(v_ref, batch)
    k_all = Concat<axis = 1>(k, k_ref_batch) v_all = Concat<axis = 1>(v, v_ref_batch)
    query_column = Unsqueeze(query_group, last)
    key_row = Unsqueeze(key_group, one) bias_row = Unsqueeze(key_bias, one)
    sees = Equal(query_column, key_row)
    forbidden = Constant<value_float = -3e38>()
    ref_bias = Where(sees, bias_row, forbidden)
    own_keys = Transpose<perm = [0, 2, 1]>(query_column)
    own_zero = Sub(query_column, query_column) own_row = Sub(own_keys, own_keys)
    own_square = Add(own_zero, own_row)
    own_bias = CastLike(own_square, ref_bias)
    bias3 = Concat<axis = 2>(own_bias, ref_bias)
    bias = Unsqueeze(bias3, one)
    q_heads = Reshape(q, split) k_heads = Reshape(k_all, split) v_heads = Reshape(v_all, split)
    q4 = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    k4 = Transpose<perm = [0, 2, 3, 1]>(k_heads)
    v4 = Transpose<perm = [0, 2, 1, 3]>(v_heads)
    scale_like = CastLike(scale, q)
    product = MatMul(q4, k4)
    logits = Mul(product, scale_like)
    bias_like = CastLike(bias, q)
    biased = Add(logits, bias_like)
    probabilities = Softmax<axis = -1>(biased)
    out4 = MatMul(probabilities, v4)
    out_heads = Transpose<perm = [0, 2, 1, 3]>(out4)
    out = Reshape(out_heads, join)
}}""",
}
_TOKEN_ATTENTION["onnxruntime-cuda"] = _TOKEN_ATTENTION["onnxruntime"]
_TOKEN_ATTENTION["select"] = _TOKEN_ATTENTION["tensorrt"]


def functions(runtime: Runtime) -> list[onnx.FunctionProto]:
    """The model-local functions with the bodies of `runtime`."""
    return [parser.parse_function(bodies[runtime]) for bodies in (_REGION_ATTENTION, _TOKEN_ATTENTION)]


def write_bodies(model: onnx.ModelProto, runtime: Runtime) -> None:
    """Write the bodies of `runtime` into `model`, in place, replacing any that it has."""
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    del model.functions[:]
    model.functions.extend(f for f in functions(runtime) if f.name in used)
    known = {entry.domain for entry in model.opset_import}
    wanted = ({DOMAIN} if used else set()) | (
        {"com.microsoft"} if used and runtime.startswith("onnxruntime") else set()
    )
    for domain in sorted(wanted - known):
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))


def token_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    """TokenAttention: the operator while a graph is traced, scaled_dot_product_attention otherwise."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::TokenAttention",
            (q, k, v),
            {"num_heads": num_heads, "scale": scale},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, n, d]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)  # [B, n, C]


def region_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_ref: torch.Tensor,
    v_ref: torch.Tensor,
    query_group: torch.Tensor,
    key_group: torch.Tensor,
    key_bias: torch.Tensor,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """RegionAttention: the operator while a graph is traced, an explicitly masked attention otherwise."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::RegionAttention",
            (q, k, v, k_ref, v_ref, query_group, key_group, key_bias),
            {"num_heads": num_heads, "scale": scale},
            dtype=q.dtype,
            shape=q.shape,
            version=1,
        )
    batch, n, _ = q.shape
    keys = torch.cat([k, k_ref.expand(batch, -1, -1)], 1)  # [B, n + M, C]
    values = torch.cat([v, v_ref.expand(batch, -1, -1)], 1)
    sees = query_group[:, :, None] == key_group[:, None, :]  # [B, n, M]
    bias = torch.where(sees, key_bias[:, None, :], -torch.inf)
    bias = torch.cat([bias.new_zeros(batch, n, n), bias], 2)[:, None].to(q.dtype)  # [B, 1, n, n + M]
    q, keys, values = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).flatten(2)
