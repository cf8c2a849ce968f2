"""The graphs for ONNX Runtime's CUDA provider: what they are made of, and that they compute what the traced ones do.

No CUDA kernel runs here. Each operator's definition is compared with PyTorch, and rewritten graphs are run by the
definitions.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, parser
from torch.nn import functional as F

from magicface_rt.backends import OnnxRuntime
from magicface_rt.backends import onnxruntime as onnxruntime_module
from magicface_rt.bundle import CUDA_RUNTIME, MANIFEST, Bundle
from magicface_rt.errors import BackendError, HostMemoryError
from magicface_rt.export import exporter
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.fusion import Fused, fuse
from magicface_rt.export.fusion.defined import DefinedCuda
from magicface_rt.export.fusion.definitions import define
from magicface_rt.export.samples import sample_inputs

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
FUSED = {
    "text_encoder": {"SkipLayerNormalization": 4},
    "vae_encoder": {"GroupNorm": 10, "SkipGroupNorm": 4, "NhwcConv": 19},
    "vae_decoder": {"GroupNorm": 14, "SkipGroupNorm": 8, "NhwcConv": 27},
    "reference_kv": {"GroupNorm": 16, "SkipGroupNorm": 44, "NhwcConv": 96, "Gelu": 15, "SkipLayerNormalization": 30},
    "denoise_step": {"GroupNorm": 16, "SkipGroupNorm": 45, "NhwcConv": 98, "Gelu": 16, "SkipLayerNormalization": 32},
}
"""Of the tiny bundle. SD1.5's U-Net has the same numbers, with BiasSplitGelu instead of Gelu."""


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def operator(op_type: str, feed: dict[str, np.ndarray], outputs: int = 1, **attributes: Any) -> list[np.ndarray]:
    """A com.microsoft operator by its definition."""
    names = ["y", "s"][:outputs]
    node = helper.make_node(op_type, list(feed), names, domain="com.microsoft", **attributes)
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), None) for n, a in feed.items()]
    dtype = helper.np_dtype_to_tensor_dtype(next(iter(feed.values())).dtype)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info(n, dtype, None) for n in names])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    define(model)
    return run(model, feed)


def last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("skip", ["none", "vector", "image"])
def test_group_norm_is_pytorchs(skip: str, activation: int, dtype: type) -> None:
    x = torch.from_numpy((normal(2, 8, 5, 3) * 3 + 1).astype(dtype)).float()
    gamma, beta = torch.from_numpy(normal(8, seed=1)), torch.from_numpy(normal(8, seed=2))
    feed = {"x": last(x).astype(dtype), "gamma": gamma.numpy(), "beta": beta.numpy()}
    total = x
    if skip != "none":
        added = torch.from_numpy(normal(*((2, 8) if skip == "vector" else (2, 8, 5, 3)), seed=3).astype(dtype)).float()
        feed["skip"] = (added.numpy() if skip == "vector" else last(added)).astype(dtype)
        total = x + (added[:, :, None, None] if skip == "vector" else added)
    expected = F.group_norm(total, 4, gamma, beta, 1e-3)
    expected = F.silu(expected) if activation else expected
    settings = {"groups": 4, "epsilon": 1e-3, "activation": activation, "channels_last": 1}
    outputs = 1 if skip == "none" else 2
    found = operator("GroupNorm" if skip == "none" else "SkipGroupNorm", feed, outputs, **settings)
    tolerance = 2e-6 if dtype == np.float32 else 4e-3
    assert found[0].dtype == dtype
    np.testing.assert_allclose(found[0], last(expected), atol=tolerance, rtol=tolerance)
    if outputs == 2:
        np.testing.assert_allclose(found[1], last(total), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("pads", [[0, 0, 1, 1], [1, 1, 1, 1]])
def test_convolution_is_pytorchs(pads: list[int]) -> None:
    x, w, b = (torch.from_numpy(a) for a in (normal(2, 3, 7, 6), normal(5, 3, 3, 3, seed=1), normal(5, seed=2)))
    top, left, bottom, right = pads
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, stride=2)
    settings = {"pads": pads, "strides": [2, 2], "dilations": [1, 1], "group": 1, "kernel_shape": [3, 3]}
    (found,) = operator("NhwcConv", {"x": last(x), "w": last(w), "b": b.numpy()}, auto_pad="NOTSET", **settings)
    np.testing.assert_allclose(found, last(expected), atol=2e-6)


def test_split_gelu_is_pytorchs() -> None:
    x, bias = torch.from_numpy(normal(2, 3, 12)), torch.from_numpy(normal(12, seed=1))
    left, right = (x + bias).chunk(2, -1)
    (found,) = operator("BiasSplitGelu", {"x": x.numpy(), "bias": bias.numpy()})
    np.testing.assert_allclose(found, (left * F.gelu(right)).numpy(), atol=1e-6)


BLOCK = """
<ir_version: 10, opset_import: ["": 18]>
block (float[B, 4, 6, 5] x, float[B, 8] t) => (float[B, 30, 8] tokens, float[B, 8, 12, 10] image)
{
    c0 = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(x, w0, b0)
    r1 = Reshape(c0, grouping) i1 = InstanceNormalization<epsilon = 0.001>(r1, ones, zeros) s1 = Shape(c0)
    q1 = Reshape(i1, s1) m1 = Mul(q1, gamma) n1 = Add(m1, beta) g1 = Sigmoid(n1) a1 = Mul(n1, g1)
    c1 = Conv<pads = [1, 1, 1, 1], kernel_shape = [3, 3]>(a1, w1, b1)
    column = Unsqueeze(t, axes) timed = Add(c1, column)
    r2 = Reshape(timed, grouping) i2 = InstanceNormalization<epsilon = 0.002>(r2, ones, zeros) s2 = Shape(timed)
    q2 = Reshape(i2, s2) m2 = Mul(q2, gamma) n2 = Add(m2, beta) g2 = Sigmoid(n2) a2 = Mul(n2, g2)
    residual = Add(a2, c0)
    r3 = Reshape(residual, grouping) i3 = InstanceNormalization<epsilon = 0.001>(r3, ones, zeros) s3 = Shape(residual)
    q3 = Reshape(i3, s3) m3 = Mul(q3, gamma) n3 = Add(m3, beta)
    both = Concat<axis = 1>(residual, n3)
    c3 = Conv<kernel_shape = [1, 1]>(both, w3, b3)
    image = Resize<mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric">
        (c3, , scales)
    last = Transpose<perm = [0, 2, 3, 1]>(c3) before = Reshape(last, as_tokens)
    normed = LayerNormalization<axis = -1, epsilon = 0.001>(before, lgamma, lbeta)
    h0 = MatMul(normed, wide) h = Add(h0, wide_bias) left, right = Split<axis = 2, num_outputs = 2>(h)
    d = Div(right, root) e = Erf(d) e1 = Add(e, one) e2 = Mul(half, e1) gelu = Mul(right, e2)
    geglu = Mul(left, gelu) back0 = MatMul(geglu, narrow) back = Add(back0, narrow_bias) added = Add(back, before)
    normed2 = LayerNormalization<axis = -1, epsilon = 0.002>(added, lgamma, lbeta)
    tokens = Add(normed2, added)
}
"""


def block(text: str = BLOCK, **changed: np.ndarray) -> ir.Model:
    """A residual block and a feed-forward, in the form that PyTorch's exporter gives them."""
    weights = {
        "w0": normal(8, 4, 3, 3), "b0": normal(8, seed=1), "w1": normal(8, 8, 3, 3, seed=2) / 5,
        "b1": normal(8, seed=3), "w3": normal(8, 16, 1, 1, seed=4) / 3, "b3": normal(8, seed=5),
        "gamma": normal(8, 1, 1, seed=6), "beta": normal(8, 1, 1, seed=7), "lgamma": normal(8, seed=8),
        "lbeta": normal(8, seed=9),
        "wide": normal(8, 24, seed=10), "wide_bias": normal(24, seed=11), "narrow": normal(12, 8, seed=12),
        "narrow_bias": normal(8, seed=13), "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32),
        "root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
        "scales": np.array([1, 1, 2, 2], np.float32), "grouping": np.array([0, 4, -1]), "axes": np.array([2, 3]),
        "as_tokens": np.array([-1, 30, 8]), **changed,
    }  # fmt: skip
    model = parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def both_ways(model: ir.Model, **options: Any) -> tuple[Any, Counter[str], list[np.ndarray], list[np.ndarray]]:
    """What was fused, the operators then, and the outputs of the model before and after."""
    feed = {"x": normal(3, 4, 6, 5, seed=20), "t": normal(3, 8, seed=21)}
    plain = run(ir.to_proto(model), feed)
    fused = fuse(model, **options)
    proto = ir.to_proto(model)
    operators = Counter(node.op_type for node in proto.graph.node)
    define(proto)
    return fused, operators, plain, run(proto, feed)


def assert_same(plain: list[np.ndarray], found: list[np.ndarray]) -> None:
    for one, other in zip(plain, found, strict=True):
        assert other.shape == one.shape
        assert np.linalg.norm(other - one) <= 2e-6 * np.linalg.norm(one)


@pytest.mark.parametrize("widths", [(), (24,)])
def test_a_block_is_fused_and_stays_what_it_was(widths: tuple[int, ...]) -> None:
    fused, operators, plain, found = both_ways(block(), split_gelu_widths=widths)
    assert fused.missed == ()
    gelu = "BiasSplitGelu" if widths else "Gelu"
    assert fused.nodes == {gelu: 1, "GroupNorm": 1, "NhwcConv": 3, "SkipGroupNorm": 2, "SkipLayerNormalization": 1}
    # One each for the input and the image that leaves, and the folded ones of the three weights.
    assert operators["Transpose"] == 5
    assert operators["Add"] == (1 if widths else 2)
    assert operators["Sigmoid"] == operators["InstanceNormalization"] == operators["Erf"] == operators["Conv"] == 0
    assert_same(plain, found)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [({"ones": np.full(4, 2, np.float32)}, 3), ({"half": np.float32(0.25)}, 1), ({"root": np.float32(1.5)}, 1)],
    ids=["scaled norm", "half a GELU", "another root"],
)
def test_what_is_not_the_known_form_is_left_and_named(changed: dict[str, np.ndarray], missed: int) -> None:
    fused, _, plain, found = both_ways(block(**changed))
    assert len(fused.missed) == missed
    assert_same(plain, found)


@pytest.mark.parametrize(
    ("traced", "other"),
    [
        ("geglu = Mul(left, gelu)", "other = Neg(left) geglu = Mul(other, gelu)"),
        ("gelu = Mul(right, e2)", "gelu = Mul(left, e2)"),
        (
            "m1 = Mul(q1, gamma) n1 = Add(m1, beta) g1 = Sigmoid(n1)",
            "m1 = Mul(q1, gamma) n1 = Add(m1, beta) g1 = Sigmoid(c0)",
        ),
        ("s1 = Shape(c0)", "s1 = Shape<start = 0>(c0)"),
        (
            "back = Add(back0, narrow_bias) added = Add(back, before)",
            "back = Add(before, narrow_bias) added = Add(back, back0)",
        ),
        ("residual = Add(a2, c0)", "residual = Add(c0, a2)"),
        ("residual = Add(a2, c0)", "residual = Mul(a2, c0)"),
        ("both = Concat<axis = 1>(residual, n3)", "both = Concat<axis = 1>(timed, n3)"),
    ],
)
def test_a_graph_wired_otherwise_stays_what_it_was(traced: str, other: str) -> None:
    assert traced in BLOCK
    _, _, plain, found = both_ways(block(BLOCK.replace(traced, other)), split_gelu_widths=(24,))
    assert_same(plain, found)


def test_odd_groups_are_left() -> None:
    """The CUDA kernel reads two channels at a time."""
    fused, _, plain, found = both_ways(
        block(grouping=np.array([0, 8, -1]), ones=np.ones(8, np.float32), zeros=np.zeros(8, np.float32))
    )
    assert len(fused.missed) == 3
    assert_same(plain, found)


def test_a_norm_whose_sum_nobody_else_reads_still_gives_it() -> None:
    """The CUDA kernel writes the sum wherever it adds."""
    model = block()
    fuse(model)
    norms = [node for node in model.graph if node.op_type == "SkipGroupNorm"]
    assert [bool(value.name) for node in norms for value in node.outputs] == [True] * 4


def test_a_bfloat16_graph_is_left() -> None:
    model = block()
    model.graph.initializers["w0"].dtype = ir.DataType.BFLOAT16
    assert fuse(model).nodes == {}


def test_onnx_runtime_folds_a_transposed_weight_when_it_opens_a_graph(tmp_path: Path) -> None:
    """The fused graphs count on it: weights.bin holds convolutions' weights in ONNX's order."""
    weight = normal(4, 3, 3, 3)
    (tmp_path / "weights.bin").write_bytes(weight.tobytes())
    tensor = TensorProto(name="w", data_type=FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": str(weight.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Transpose", ["w"], ["v"], perm=[0, 2, 3, 1]), helper.make_node("Add", ["x", "v"], ["y"])]
    values = [helper.make_tensor_value_info(n, FLOAT, [4, 3, 3, 3]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], [tensor]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    onnx.save_model(model, str(tmp_path / "m.onnx"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node] == ["Add"]


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


def graph_file(bundle: Bundle, graph: str, runtime: str) -> onnx.ModelProto:
    return onnx.load_model(str(bundle.path / bundle.graph(graph).files[runtime]), load_external_data=False)


@pytest.mark.parametrize("graph", FUSED)
def test_every_pattern_of_the_traced_graphs_is_known(opened: Bundle, graph: str) -> None:
    """Fails where a new exporter traces one in another form."""
    nodes = Counter((n.domain, n.op_type) for n in graph_file(opened, graph, CUDA_RUNTIME).graph.node)
    assert {name: count for (domain, name), count in nodes.items() if domain == "com.microsoft"} == FUSED[graph]
    left = {name for (domain, name) in nodes if domain == ""}
    assert not left & {"Conv", "InstanceNormalization", "Erf"}
    assert {domain for domain, _ in nodes} <= {"", "com.microsoft", "magicface"}


@pytest.mark.parametrize("graph", ["vae_encoder", "vae_decoder", "reference_kv"])
def test_images_change_layout_only_where_they_enter_and_leave(opened: Bundle, graph: str) -> None:
    model = graph_file(opened, graph, CUDA_RUNTIME).graph
    weights = {tensor.name for tensor in model.initializer}
    layouts = [list(n.attribute[0].ints) for n in model.node if n.op_type == "Transpose" and n.input[0] not in weights]
    assert layouts == [[0, 2, 3, 1]] + ([[0, 3, 1, 2]] if graph.startswith("vae") else [])


@pytest.mark.parametrize("graph", FUSED)
def test_the_cuda_files_share_the_weights(opened: Bundle, graph: str) -> None:
    def places(runtime: str) -> set[tuple[str, str]]:
        found = set()
        for tensor in graph_file(opened, graph, runtime).graph.initializer:
            entry = {e.key: e.value for e in tensor.external_data}
            if entry:
                found.add((entry["offset"], entry["length"]))
        return found

    assert places(CUDA_RUNTIME) <= places("onnxruntime")
    assert opened.files[opened.graph(graph).files[CUDA_RUNTIME]]["bytes"] < 1 << 20


@pytest.mark.parametrize("graph", ["vae_decoder", "denoise_step"])
def test_a_fused_graph_computes_what_the_traced_one_does(opened: Bundle, graph: str) -> None:
    sizes = {"B": 2, "R": 2, "K": 2, "M1": 19, "M2": 12, "M4": 8, "M8": 3}
    contract = opened.graph(graph)
    drawn = sample_inputs(contract.inputs, sizes, seed=5, vocabulary=512)
    feed = {t.name: np.asarray(drawn[t.name]).astype(t.dtype) for t in contract.inputs}
    plain = OnnxRuntime("cpu").load(opened, graph).run(feed)
    fused = DefinedCuda().load(opened, graph).run(feed)
    for name, expected in plain.items():
        if expected.dtype.kind == "f":
            error = np.linalg.norm(fused[name] - expected) / np.linalg.norm(expected)
            assert error < 2e-5, (name, error)
        else:
            assert (fused[name] == expected).mean() > 0.99, name


def test_the_export_has_compared_the_fused_graphs(opened: Bundle) -> None:
    for graph in FUSED:
        assert opened.parity[graph][CUDA_RUNTIME]["passed"]


@pytest.mark.parametrize("graph", ["vae_encoder", "denoise_step"])
def test_onnx_runtime_takes_the_file_and_lacks_only_cuda_kernels(opened: Bundle, graph: str) -> None:
    """Types, shapes and attributes by ONNX Runtime's own schemas; looking for kernels comes after that."""
    path = opened.path / opened.graph(graph).files[CUDA_RUNTIME]
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*(NhwcConv|GroupNorm)"):
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_only_the_cuda_provider_takes_the_fused_file(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = SimpleNamespace(
        __version__="1",
        get_available_providers=lambda: [*onnxruntime_module.PROVIDERS.values(), "TensorrtExecutionProvider"],
    )
    monkeypatch.setattr(onnxruntime_module, "import_onnxruntime", lambda: ort)
    contract = opened.graph("denoise_step")
    files = {provider: OnnxRuntime(provider)._file(contract) for provider in ("cpu", "cuda", "tensorrt")}
    assert files == {
        "cpu": "denoise_step.onnxruntime.onnx",
        "cuda": "denoise_step.onnxruntime-cuda.onnx",
        "tensorrt": "denoise_step.tensorrt.onnx",
    }
    assert OnnxRuntime("cuda", fused=False)._file(contract) == files["cpu"]


def test_a_bundle_without_cuda_files_is_read_and_served(
    opened: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As releases wrote them before."""
    for file in opened.path.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for graph in manifest["graphs"].values():
        del manifest["files"][graph["files"].pop(CUDA_RUNTIME)]
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    old = Bundle.open(tmp_path, check_hashes=False)
    ort = SimpleNamespace(__version__="1", get_available_providers=lambda: list(onnxruntime_module.PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime_module, "import_onnxruntime", lambda: ort)
    assert OnnxRuntime("cuda")._file(old.graph("denoise_step")) == "denoise_step.onnxruntime.onnx"
    monkeypatch.undo()
    with pytest.raises(BackendError, match="no file for onnxruntime-cuda"):
        DefinedCuda().load(old, "denoise_step")


def test_a_fused_graph_that_computes_something_else_is_left_out(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = exporter.graph_makers

    def wrong(model: ir.Model) -> Fused:
        fused = fuse(model)
        for node in model.graph:
            if node.op_type == "SkipLayerNormalization":
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
        return fused

    monkeypatch.setattr("magicface_rt.export.bundle_writer.fuse", wrong)
    monkeypatch.setattr(exporter, "graph_makers", lambda *given: iter([next(makers(*given))]))
    said: list[str] = []
    made = exporter.export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "bundle", report=said.append)
    assert set(made.graph("text_encoder").files) == {"onnxruntime", "tensorrt"}
    assert not any(CUDA_RUNTIME in name for name in made.files)
    assert CUDA_RUNTIME not in made.parity["text_encoder"]
    (warning,) = [line for line in said if "warning" in line]
    assert "graph text_encoder: not what PyTorch computes" in warning


@pytest.mark.parametrize("where", ["opened", "run"])
def test_too_little_memory_to_compare_the_form_for_cuda_ends_the_export(
    where: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the form, which would else be missing from the bundle with no more than a warning."""
    makers, ort = exporter.graph_makers, onnxruntime_module.import_onnxruntime()

    def short(*_: object, **__: object) -> None:
        raise RuntimeError("std::bad_alloc")

    def session(*given: object, **named: object) -> object:
        return short() if where == "opened" else SimpleNamespace(run=short)

    replaced = SimpleNamespace(SessionOptions=ort.SessionOptions, InferenceSession=session)
    monkeypatch.setattr("magicface_rt.export.fusion.defined.import_onnxruntime", lambda: replaced)
    monkeypatch.setattr(exporter, "graph_makers", lambda *given: iter([next(makers(*given))]))
    said: list[str] = []
    with pytest.raises(HostMemoryError, match="bad_alloc"):
        exporter.export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "bundle", report=said.append)
    assert "text_encoder: comparing the form for CUDA with PyTorch" in said
    assert not any("warning" in line for line in said)
    assert not list(tmp_path.iterdir())
