"""The two operators: every body against explicit masks in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from magicface_rt.export import operators

BODIES = ("onnxruntime", "onnxruntime-cuda", "tensorrt", "select")
HEADS, WIDTH = 2, 16
SCALE = (WIDTH // HEADS) ** -0.5


def session(
    body: str, dtype: int = TensorProto.FLOAT, *, heads: int = HEADS, width: int = WIDTH, scale: float = SCALE
) -> onnxruntime.InferenceSession:
    value = helper.make_tensor_value_info
    names = ["q", "k", "v", "k_ref", "v_ref", "query_group", "key_group", "key_bias"]
    node = helper.make_node("RegionAttention", names, ["out"], domain=operators.DOMAIN, num_heads=heads, scale=scale)
    inputs = [value(n, dtype, ["B", "n", width]) for n in "qkv"]
    inputs += [value(n, dtype, ["K", "M", width]) for n in ("k_ref", "v_ref")]
    inputs += [value("query_group", TensorProto.INT64, ["B", "n"]), value("key_group", TensorProto.INT64, ["K", "M"])]
    inputs += [value("key_bias", TensorProto.FLOAT, ["K", "M"])]
    graph = helper.make_graph([node], "g", inputs, [value("out", dtype, ["B", "n", width])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", operators.OPSET)], ir_version=10)
    operators.write_bodies(model, body)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


SESSIONS = {body: session(body) for body in BODIES}


def explicit(feed: dict[str, Any], *, heads: int = HEADS, scale: float = SCALE) -> np.ndarray:
    """The operator's definition, a loop over images and heads in float64."""
    q, k, v, k_ref, v_ref = (feed[n].astype(np.float64) for n in ("q", "k", "v", "k_ref", "v_ref"))
    out = np.empty_like(q)
    d = q.shape[2] // heads
    for b in range(len(q)):
        r = b if len(k_ref) > 1 else 0
        sees = feed["query_group"][b][:, None] == feed["key_group"][r][None]
        bias = np.where(sees, feed["key_bias"][r][None].astype(np.float64), -np.inf)
        bias = np.concatenate([np.zeros((q.shape[1], k.shape[1])), bias], 1)
        keys, values = np.concatenate([k[b], k_ref[r]]), np.concatenate([v[b], v_ref[r]])
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            logits = q[b, :, part] @ keys[:, part].T * scale + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            out[b, :, part] = p / p.sum(1, keepdims=True) @ values[:, part]
    return out


def feed_for(
    seed: int,
    images: int,
    shared: bool,
    concepts: int,
    cells: int,
    kept: int,
    weights: list[float],
    *,
    width: int = WIDTH,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows = 1 if shared else images
    normal = lambda *shape: (2 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    group = rng.integers(-1, concepts + 1, (rows, kept))  # -1: padding; concepts without a key, cells without a concept
    return {
        **{name: normal(images, cells, width) for name in "qkv"},
        **{name: normal(rows, kept, width) for name in ("k_ref", "v_ref")},
        "query_group": rng.integers(0, concepts + 1, (images, cells)),
        "key_group": np.where(group == 0, -1, group),
        "key_bias": np.array(weights, np.float32)[np.maximum(group, 0) % len(weights)],
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 3),
    shared=st.booleans(),
    concepts=st.integers(1, 6),
    cells=st.integers(1, 12),
    kept=st.integers(1, 20),
    weights=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6),
)
def test_every_body_is_the_explicitly_masked_attention(**case: Any) -> None:
    feed = feed_for(**case)
    expected = explicit(feed)
    for body, one in SESSIONS.items():
        found = one.run(None, feed)[0]
        assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max()), body


@pytest.mark.parametrize("body", BODIES)
def test_padding_keys_change_nothing(body: str) -> None:
    feed = feed_for(1, 2, True, 3, 9, 7, [3.0, 2.5, 1.0])
    padded = dict(feed)
    extra = np.random.default_rng(2).standard_normal((1, 5, WIDTH)).astype(np.float32) * 30
    padded["k_ref"] = np.concatenate([feed["k_ref"], extra], 1)
    padded["v_ref"] = np.concatenate([feed["v_ref"], extra], 1)
    padded["key_group"] = np.concatenate([feed["key_group"], np.full((1, 5), -1)], 1)
    padded["key_bias"] = np.concatenate([feed["key_bias"], np.full((1, 5), 90, np.float32)], 1)
    one = SESSIONS[body]
    np.testing.assert_allclose(one.run(None, padded)[0], one.run(None, feed)[0], atol=2e-6)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("apart", [3900, -3900])
def test_forbidden_keys_stay_so_however_far_logits_lie_apart(body: str, dtype: int, apart: float) -> None:
    """Those of keys that a cell may not see so far above those of its own; or its own so far below those of padding."""
    half = dtype == TensorProto.FLOAT16
    feed = feed_for(5, 1, True, 2, 6, 8, [0.0])
    feed["q"][:], feed["k"][:], feed["k_ref"][:] = 1.0, 0.0, 0.0
    feed["query_group"][:], feed["key_group"][:] = 1, 2
    feed["k_ref" if apart > 0 else "k"][:] = apart / (SCALE * WIDTH / HEADS)
    cast = {n: a.astype(np.float16) if half and n in ("q", "k", "v", "k_ref", "v_ref") else a for n, a in feed.items()}
    found = session(body, dtype).run(None, cast)[0].astype(np.float64)
    expected = explicit({**feed, "v": cast["v"].astype(np.float64)})
    assert np.abs(found - expected).max() < (5e-3 if half else 1e-5)


@pytest.mark.parametrize("width", [160, 320, 640])
@pytest.mark.parametrize("body", ["onnxruntime", "tensorrt"])
def test_wide_heads_stay_finite_in_16_bits(body: str, width: int) -> None:
    scale, heads = width**-0.5, 1
    one = session(body, TensorProto.FLOAT16, heads=heads, width=width, scale=scale)
    feed = feed_for(6, 1, True, 2, 6, 8, [1.0], width=width)
    half = {n: a.astype(np.float16) if n in ("q", "k", "v", "k_ref", "v_ref") else a for n, a in feed.items()}
    found = one.run(None, half)[0].astype(np.float64)
    wide = {**feed, **{n: half[n].astype(np.float64) for n in ("q", "k", "v", "k_ref", "v_ref")}}
    assert np.abs(found - explicit(wide, heads=heads, scale=scale)).max() < 2e-2 * np.abs(feed["v"]).max()


def test_float16_bias_keeps_its_low_part() -> None:
    """A weight that float16 cannot hold: rounding it alone would cost 1e-4 (docs/design.md)."""
    one = session("tensorrt", TensorProto.FLOAT16)
    feed = feed_for(3, 1, True, 2, 12, 20, [2.7183, 3.1416])
    half = {n: a.astype(np.float16) if n in ("q", "k", "v", "k_ref", "v_ref") else a for n, a in feed.items()}
    expected = explicit({**feed, **{n: half[n].astype(np.float64) for n in ("q", "k", "v", "k_ref", "v_ref")}})
    assert np.abs(one.run(None, half)[0] - expected).max() < 6e-3 * np.abs(expected).max()


def test_binding_again_replaces_the_bodies() -> None:
    model = onnx.ModelProto()
    model.graph.node.append(helper.make_node("TokenAttention", list("qkv"), ["out"], domain=operators.DOMAIN))
    operators.write_bodies(model, "onnxruntime")
    operators.write_bodies(model, "tensorrt")
    assert [f.name for f in model.functions] == ["TokenAttention"]
    assert not any(node.op_type == "MultiHeadAttention" for node in model.functions[0].node)


def test_flash_attention_gets_one_width() -> None:
    """ONNX Runtime's CUDA provider takes its flash attention only where v is as wide as q and k, a multiple of 8."""
    value = helper.make_tensor_value_info
    names = ["q", "k", "v", "k_ref", "v_ref", "query_group", "key_group", "key_bias"]
    node = helper.make_node("RegionAttention", names, ["out"], domain=operators.DOMAIN, num_heads=HEADS, scale=SCALE)
    dtypes = [TensorProto.FLOAT] * 5 + [TensorProto.INT64] * 2 + [TensorProto.FLOAT]
    inputs = [value(name, dtype, None) for name, dtype in zip(names, dtypes, strict=True)]
    graph = helper.make_graph([node], "g", inputs, [value("out", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", operators.OPSET)], ir_version=10)
    operators.write_bodies(model, "onnxruntime-cuda")
    model = onnx.inliner.inline_local_functions(model)
    (attention,) = [n for n in model.graph.node if n.op_type == "MultiHeadAttention"]
    model.graph.output.extend(value(name, TensorProto.FLOAT, None) for name in attention.input)
    one = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = feed_for(4, 2, True, 2, 5, 3, [1.0])
    out, *wide = one.run(None, feed)
    assert [a.shape for a in wide] == [(2, n, WIDTH + HEADS * 8) for n in (5, 8, 8)]
    assert (out.shape, np.abs(out - explicit(feed)).max() < 1e-5) == ((2, 5, WIDTH), True)
