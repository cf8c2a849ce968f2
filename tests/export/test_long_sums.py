"""Group normalisation of images with millions of values in a group."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from magicface_rt.export.long_sums import LONG, split_long_sums

EPSILON = 1e-6


def normalised(
    elements: int, *, groups: int = 2, scale: float = 1.0, shift: float = 0.0, kind: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """A graph of one normalisation over [R, groups, elements]."""
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    graph = helper.make_graph(
        [helper.make_node("InstanceNormalization", ["x", "scale", "shift"], ["y"], epsilon=EPSILON)],
        "norm",
        [helper.make_tensor_value_info("x", kind, ["R", groups, elements])],
        [helper.make_tensor_value_info("y", kind, ["R", groups, elements])],
        [
            numpy_helper.from_array(np.full(groups, value, dtype), name)
            for name, value in (("scale", scale), ("shift", shift))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def error(model: onnx.ModelProto, x: NDArray[np.float32]) -> float:
    """Relative 2-norm from float64."""
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(2, keepdims=True)) / np.sqrt(exact.var(2, keepdims=True) + EPSILON)
    return float(np.linalg.norm(run(model, x) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("elements", [LONG, 4 * 768 * 768, 7 * 11 * 13 * 1024])
def test_long_groups_are_as_exact_as_float32_is(elements: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, elements), dtype=np.float32) * 3 + 5
    model = normalised(elements)
    before = error(model, x)
    assert split_long_sums(model) == 1
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.name for tensor in model.graph.initializer} <= {n for node in model.graph.node for n in node.input}
    after = error(model, x)
    assert after < 1e-6, (before, after)
    if elements > 1 << 20:
        assert after < before / 10, "ONNX Runtime sums as exactly by itself: this pass is not needed any more"


def test_rows_and_constant_groups_stay_apart() -> None:
    x = np.random.default_rng(1).standard_normal((3, 2, LONG), dtype=np.float32)
    x[1, 0] = 7.0
    model = normalised(LONG)
    expected = run(model, x)
    split_long_sums(model)
    found = run(model, x)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(found[1, 0], 0, atol=1e-3)


@pytest.mark.parametrize(
    "model",
    [
        normalised(LONG - 1),
        normalised(LONG, scale=2.0),
        normalised(LONG, shift=0.5),
        normalised(LONG, kind=TensorProto.FLOAT16),
    ],
    ids=["short", "scaled", "shifted", "in 16 bits"],
)
def test_others_are_left_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert split_long_sums(model) == 0
    assert model.SerializeToString() == before
