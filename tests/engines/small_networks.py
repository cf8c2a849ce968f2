"""One attention as a network of its own, parsed and built with the real TensorRT-RTX: a tenth of a second each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

from magicface_rt.engines.attentions import Attention, find_attentions
from magicface_rt.export import operators

REGION = operators._REGION_ATTENTION["tensorrt"]
TOKEN = operators._TOKEN_ATTENTION["tensorrt"]

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def replaced(body: str, old: str, new: str) -> str:
    """`body` with one piece replaced. Fails when the piece is not there: then nothing would be broken."""
    assert body.count(old) == 1, old
    return body.replace(old, new)


# The body as it is, and broken in the ways that the gate names.
NARROW_V = replaced(
    replaced(REGION, "MatMul(probabilities, v_wide)", "MatMul(probabilities, v_all)"),
    "Slice(out_wide, start, end, channels)",
    "Identity(out_wide)",
)
FLATTENED_K = replaced(
    REGION,
    "k_transposed = Transpose<perm = [0, 1, 3, 2]>(k_wide)",
    """k_tokens = Transpose<perm = [0, 2, 1, 3]>(k_wide)
    k_flat = Reshape(k_tokens, join) k_again = Reshape(k_flat, split)
    k_transposed = Transpose<perm = [0, 2, 3, 1]>(k_again)""",
)
MASKED = operators._REGION_ATTENTION["select"]
NESTED = """<domain: "magicface", opset_import: ["": 18, "magicface": 1]>
    RegionAttention <num_heads, scale> (q, k, v, k_ref, v_ref, query_group, key_group, key_bias) => (out) {
    one = Constant<value_ints = [1]>()
    batch_size = Shape<start = 0, end = 1>(q) batch = Concat<axis = 0>(batch_size, one, one)
    k_ref_batch = Expand(k_ref, batch) v_ref_batch = Expand(v_ref, batch)
    k_all = Concat<axis = 1>(k, k_ref_batch) v_all = Concat<axis = 1>(v, v_ref_batch)
    out = magicface.TokenAttention<num_heads: int = @num_heads, scale: float = @scale>(q, k_all, v_all)
}"""


class Silent(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        pass


LOGGER = Silent()


@dataclass
class Small:
    """A parsed network with the shapes of its profile. The parser is kept: the network reads its memory."""

    builder: Any
    network: Any
    parser: Any
    shapes: dict[str, Shapes]
    largest: dict[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.largest = {name: shapes[2] for name, shapes in self.shapes.items()}

    def attentions(self, region_attentions: int | None = None) -> tuple[Attention, ...]:
        return find_attentions(self.network, self.largest, "small", region_attentions)

    def build(self, capabilities: Sequence[str] = ("SM86",)) -> bytes:
        config = self.builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
        profile = self.builder.create_optimization_profile()
        for name, shapes in self.shapes.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
        plan = self.builder.build_serialized_network(self.network, config)
        assert plan is not None
        return bytes(plan)


def parse(model: onnx.ModelProto | str, shapes: Mapping[str, Shapes]) -> Small:
    """Parse a model, or the model in a file."""
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOGGER)
    done = parser.parse_from_file(model) if isinstance(model, str) else parser.parse(model.SerializeToString())
    assert done, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    return Small(builder, network, parser, dict(shapes))


def region(
    body: str = REGION,
    dtype: int = TensorProto.FLOAT16,
    tokens: int = 4096,
    channels: int = 320,
    heads: int = 8,
    kept: tuple[int, int, int] = (1, 4096, 12288),
) -> Small:
    """A call of RegionAttention named `up.attn`, one image, `kept` reference tokens (min, opt, max)."""
    value = helper.make_tensor_value_info
    inputs = [value(x, dtype, ["B", tokens, channels]) for x in ("q", "k", "v")]
    inputs += [value(x, dtype, ["K", "M", channels]) for x in ("k_ref", "v_ref")]
    inputs += [
        value("query_group", TensorProto.INT64, ["B", tokens]),
        value("key_group", TensorProto.INT64, ["K", "M"]),
    ]
    inputs += [value("key_bias", TensorProto.FLOAT, ["K", "M"])]
    call = helper.make_node(
        "RegionAttention",
        [x.name for x in inputs],
        ["out"],
        name="up.attn",
        domain="magicface",
        num_heads=heads,
        scale=(channels / heads) ** -0.5,
    )
    graph = helper.make_graph([call], "g", inputs, [value("out", dtype, ["B", tokens, channels])])
    shapes: dict[str, Shapes] = dict.fromkeys(("q", "k", "v"), ((1, tokens, channels),) * 3)
    shapes |= {x: tuple((1, m, channels) for m in kept) for x in ("k_ref", "v_ref")}  # type: ignore[misc]
    shapes |= {x: tuple((1, m) for m in kept) for x in ("key_group", "key_bias")}  # type: ignore[misc]
    shapes["query_group"] = ((1, tokens),) * 3
    return parse(_model(graph, body, TOKEN), shapes)


def token_and_map(
    tokens: int = 4096, channels: int = 320, heads: int = 8, dtype: int = TensorProto.FLOAT16, rows: int = 2
) -> Small:
    """A call of TokenAttention named `down.attn`, and beside it explicit probabilities, as the segmentation reads."""
    value = helper.make_tensor_value_info
    inputs = [value(x, dtype, ["B", tokens, channels]) for x in ("q", "k", "v")]
    nodes = [
        helper.make_node(
            "TokenAttention",
            ["q", "k", "v"],
            ["out"],
            name="down.attn",
            domain="magicface",
            num_heads=heads,
            scale=(channels / heads) ** -0.5,
        ),
        helper.make_node("Transpose", ["k"], ["k_t"], perm=[0, 2, 1], name="map_k"),
        helper.make_node("MatMul", ["q", "k_t"], ["map_logits"], name="map_logits"),
        helper.make_node("Softmax", ["map_logits"], ["map_p"], axis=-1, name="map_softmax"),
        helper.make_node("ReduceMean", ["map_p", "axis"], ["mean"], keepdims=0, name="map_mean"),
    ]
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    outputs = [value("out", dtype, ["B", tokens, channels]), value("mean", dtype, ["B", tokens])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [axis])
    shape = ((1, tokens, channels), (rows, tokens, channels), (rows, tokens, channels))
    return parse(_model(graph, TOKEN), dict.fromkeys(("q", "k", "v"), shape))


def _model(graph: onnx.GraphProto, *bodies: str) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", operators.OPSET), helper.make_opsetid("magicface", 1)]
    functions = [onnx.parser.parse_function(body) for body in bodies]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)
