"""What all backends share: bindings, names, and the choice of the fastest. ONNX Runtime's bindings run on the CPU."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from magicface_rt.backends import BACKENDS, Binding, GraphRunner, OnnxRuntime, open_backend, why_not
from magicface_rt.backends import device as device_module
from magicface_rt.backends import onnxruntime as onnxruntime_module
from magicface_rt.backends.device import Buffer, Device
from magicface_rt.backends.host import from_bfloat16, host_dtype, non_finite, to_bfloat16
from magicface_rt.backends.onnxruntime import DeviceRunner, import_onnxruntime
from magicface_rt.backends.ort_binding import MAX_GRAPHS, GraphIds, OrtBinding
from magicface_rt.backends.single_thread_executor import SingleThreadExecutor
from magicface_rt.backends.sum_model import sum_model
from magicface_rt.bundle import GraphContract, Tensor
from magicface_rt.engines.targets import load_target
from magicface_rt.errors import BackendError, BackendMissingError, NonFiniteError, OptionError, TargetError
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_world import SOURCE, STEP, SmallBundle, World, small_recipes, source, step

Make = Callable[[GraphContract], GraphRunner]


class HostRunner(GraphRunner):
    """A runtime that implements no more than it must."""

    def _run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        compute = {"source": source, "step": step}[self.contract.name]
        results = compute(**inputs)
        return {name: results[name] for name in outputs}


def ort_session(contract: GraphContract) -> Any:
    """The graph as an ONNX model."""
    from onnx import parser

    bodies = {
        "source": "(float[M,2] x, float[1] gain) => (float[M,2] k) { k = Mul(x, gain) }",
        "step": """(float[B,3] state, float[K,M,2] k, float[B] bias, int64[B] label)
            => (float[B,3] state_out, int64[B] label_out, float[B] seen)
            <int64[1] one = {1}, float two = {2.0}> {
                seen = Mul(bias, two)
                label_out = Add(label, one)
                total = ReduceSum<keepdims = 0>(k)
                number = Cast<to = 1>(label)
                sum = Add(bias, number)
                column = Unsqueeze(sum, one)
                all = Add(column, total)
                state_out = Add(state, all)
            }""",
        "turn": "(bfloat16[B] a) => (bfloat16[B] b) { b = Identity(a) }",
    }
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {contract.name} {bodies[contract.name]}')
    ort = import_onnxruntime()
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def ort_runner(contract: GraphContract) -> GraphRunner:
    """The graph with its tensors in OrtValues."""
    return DeviceRunner(contract, ort_session(contract), import_onnxruntime(), ("cpu", 0), GraphIds(True))


@pytest.fixture(params=[HostRunner, ort_runner], ids=["host", "ort"])
def make(request: pytest.FixtureRequest) -> Make:
    chosen: Make = request.param
    return chosen


class Pair:
    """`source` and `step`, bound beside each other and ready to run."""

    def __init__(self, make: Make, images: int = 2) -> None:
        self.source = make(SOURCE).bind()
        self.step = make(STEP).bind(["state_out", "label_out"], beside=self.source)
        self.x = np.arange(6, dtype=np.float32).reshape(3, 2)
        self.bias = np.arange(images, dtype=np.float32)
        self.state, self.label = np.zeros((images, 3), np.float32), np.arange(images)
        self.source.set("x", self.x)
        for name in ("state", "label", "bias"):
            self.step.set(name, getattr(self, name))

    def run(self, gain: float) -> None:
        self.source.set("gain", np.array([gain], np.float32))
        self.source.run()
        self.step.link("k", self.source, "k")
        self.step.run()
        self.step.feed_back("state", "state_out")
        self.step.feed_back("label", "label_out")
        results = step(self.state, (self.x * gain)[None], self.bias, self.label)
        self.state, self.label = results["state_out"], results["label_out"]

    def check(self) -> None:
        self.step.wait()
        np.testing.assert_allclose(self.step.read("state_out"), self.state)
        np.testing.assert_array_equal(self.step.read("label_out"), self.label)


def test_a_binding_runs_a_loop(make: Make) -> None:
    pair = Pair(make)
    for number in range(5):
        pair.run(float(number))
    pair.check()
    assert pair.step.seconds > 0


def test_an_input_has_one_source_at_a_time(make: Make) -> None:
    pair = Pair(make)
    pair.run(1.0)
    pair.step.set("state", pair.state * 0 + 7)  # instead of what was fed back
    pair.step.set("k", np.zeros((1, 1, 2), np.float32))  # instead of the other graph's output
    pair.step.run()
    expected = step(pair.state * 0 + 7, np.zeros((1, 1, 2)), pair.bias, pair.label)["state_out"]
    np.testing.assert_allclose(pair.step.read("state_out"), expected)
    pair.step.feed_back("state", "state_out")
    pair.step.link("k", pair.source, "k")
    pair.step.run()
    again = step(expected, pair.x[None], pair.bias, pair.label + 1)["state_out"]
    np.testing.assert_allclose(pair.step.read("state_out"), again)


def test_what_was_set_may_be_changed_by_the_caller(make: Make) -> None:
    pair = Pair(make)
    pair.run(1.0)
    bias = np.full(2, 3.0, np.float32)
    pair.step.set("bias", bias)
    pair.bias = bias.copy()
    bias[:] = -100
    pair.run(2.0)
    pair.check()


def test_what_was_read_stays_as_it_was(make: Make) -> None:
    pair = Pair(make)
    pair.run(1.0)
    first = pair.step.read("state_out")
    before = first.copy()
    for _ in range(3):
        pair.run(2.0)
    np.testing.assert_array_equal(first, before)


def test_shapes_may_change_between_runs(make: Make) -> None:
    pair = Pair(make)
    pair.run(1.0)
    pair.x = np.ones((9, 2), np.float32)
    pair.source.set("x", pair.x)
    pair.run(1.0)
    pair.check()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda b, o: b.set("other", np.zeros(1)), "unknown input 'other'"),
        (lambda b, o: b.set("bias", np.zeros(2)), "input bias is float64"),
        (lambda b, o: b.set("bias", np.zeros((2, 1), np.float32)), r"float32\[2, 1\], expected bias float32\[B\]"),
        (lambda b, o: b.set("state", np.zeros((2, 4), np.float32)), r"input state is float32\[2, 4\]"),
        (lambda b, o: b.link("k", o, "x"), "cannot read x of graph source in place"),
        (lambda b, o: b.link("label", o, "k"), "cannot read output k float32"),
        (lambda b, o: b.feed_back("state", "label_out"), "cannot be fed back"),
        (lambda b, o: b.feed_back("state", "seen"), "no seen of a run before"),
        (lambda b, o: b.read("seen"), "no seen of a run before"),
        (lambda b, o: (b.set("label", np.zeros(1, np.int64)), b.run()), "expected label .* with B = 2"),
    ],
)
def test_wrong_use_is_named(make: Make, change: Callable[[Binding, Binding], object], found: str) -> None:
    pair = Pair(make)
    pair.run(1.0)
    with pytest.raises(BackendError, match=found):
        change(pair.step, pair.source)


def test_before_a_run_there_is_nothing_to_read_or_feed_back(make: Make) -> None:
    pair = Pair(make)
    for use in (lambda: pair.step.read("state_out"), lambda: pair.step.feed_back("state", "state_out")):
        with pytest.raises(BackendError, match="state_out of a run before"):
            use()
    with pytest.raises(BackendError, match=r"missing inputs \['k'\]"):
        pair.step.run()
    with pytest.raises(BackendError, match=r"no outputs \['eps'\]"):
        make(STEP).bind(["eps"])


def test_a_closed_binding_says_so(make: Make) -> None:
    pair = Pair(make)
    pair.run(1.0)
    pair.source.close()
    pair.source.close()
    pair.step.close()
    for use in (pair.step.run, lambda: pair.step.read("state_out"), lambda: pair.step.set("bias", pair.bias)):
        with pytest.raises(BackendError, match="binding was closed"):
            use()


def test_once_checks_inputs_and_outputs(make: Make) -> None:
    binding = make(SOURCE).bind()
    x = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(binding.once({"x": x, "gain": np.array([3], np.float32)})["k"], x * 3)
    with pytest.raises(BackendError, match=r"missing inputs \['gain'\]"):
        binding.once({"x": x})
    with pytest.raises(NonFiniteError, match="graph source: 4 of 4 values of k"):
        binding.once({"x": x, "gain": np.array([np.inf], np.float32)})


# ------------------------------------------------------------------------------------------------- ONNX Runtime's GPUs


def addresses(binding: Binding) -> dict[str, int]:
    assert isinstance(binding, OrtBinding)
    return {name: value.data_ptr() for name, value in binding._bound.items()}


def test_ort_values_ping_pong_and_are_read_in_place() -> None:
    pair = Pair(ort_runner)
    seen = []
    for number in range(5):
        pair.run(float(number))
        seen.append(addresses(pair.step))
    assert seen[0]["k"] == addresses(pair.source)["k"]
    for before, after in pairwise(seen):
        assert (after["state"], after["state_out"]) == (before["state_out"], before["state"])
        assert all(after[name] == before[name] for name in ("k", "bias"))


def test_ort_graphs_are_captured_by_shape_and_address_after_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(ort_runner)
    assert isinstance(pair.step, OrtBinding)
    ids: list[str] = []
    original = pair.step._graph_id

    def spy(shapes: Any) -> str:
        ids.append(original(shapes))
        return ids[-1]

    monkeypatch.setattr(pair.step, "_graph_id", spy)
    for number in range(6):
        pair.run(float(number))
    pair.x = np.ones((9, 2), np.float32)
    pair.source.set("x", pair.x)
    for number in range(3):
        pair.run(float(number))
    pair.check()
    assert ids == ["-1", "1", "2", "1", "2", "1", "-1", "3", "4"]


def test_ort_runs_on_where_a_graph_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair(ort_runner)
    assert isinstance(pair.step, OrtBinding)
    session, ids, broken = pair.step._session, [], False

    def run(binding: Any, options: Any) -> None:
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        if ids[-1] != "-1" or broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        session.run_with_iobinding(binding, options)

    monkeypatch.setattr(pair.step, "_session", SimpleNamespace(run_with_iobinding=run))
    for number in range(4):
        pair.run(float(number))
    pair.check()
    assert ids == ["-1", "1", "-1", "-1", "-1"]
    assert "graph step: no CUDA graph" in caplog.text
    broken = True
    with pytest.raises(BackendError, match="graph step: onnxruntime failed: operation not permitted"):
        pair.run(1.0)


def test_ort_graphs_are_limited_in_number_and_can_be_off(caplog: pytest.LogCaptureFixture) -> None:
    on, off = GraphIds(True), GraphIds(False)
    assert [on.of((n,), "step") for n in range(MAX_GRAPHS)] == [*map(str, range(1, MAX_GRAPHS + 1))]
    assert not caplog.records
    assert [on.of((n,), "step") for n in range(MAX_GRAPHS, MAX_GRAPHS + 3)] == ["-1"] * 3
    (told,) = caplog.records
    assert "graph step: 8 CUDA graphs were captured, and ONNX Runtime frees none" in told.getMessage()
    assert on.of((0,), "step") == "1"
    assert off.of((0,), "step") == "-1"


def test_sixteen_bits_that_numpy_lacks_travel_through_ort() -> None:
    contract = GraphContract("turn", (Tensor("a", "bfloat16", ("B",)),), (Tensor("b", "bfloat16", ("B",)),), {})
    bits = to_bfloat16(np.array([1.0, -2.5, 1e30], np.float32))
    found = ort_runner(contract).run({"a": bits})["b"]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, bits)


def test_sixteen_bits_that_numpy_lacks_are_read_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(devices=2)
    monkeypatch.setattr(device_module, "import_cuda", lambda: cuda)
    contract = GraphContract("turn", (Tensor("a", "bfloat16", ("B",)),), (Tensor("b", "bfloat16", ("B",)),), {})
    binding = ort_runner(contract).bind()
    bits = to_bfloat16(np.array([1.0, -2.5, 1e30], np.float32))
    binding.set("a", bits)
    binding.run()
    held = Buffer(Device(1), bits.nbytes)
    cuda.view(held.address, bits.nbytes)[:] = bits[::-1].copy().view(np.uint8)
    assert isinstance(binding, OrtBinding)
    binding._device = ("cuda", 1)
    binding._values["b"] = SimpleNamespace(shape=lambda: [3], data_ptr=lambda: held.address)
    Device(0)
    np.testing.assert_array_equal(binding.read("b"), bits[::-1])
    assert cuda.count("cudaMemcpy") == 1
    held.free()


def test_bfloat16_is_held_as_its_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e3
    values[:5] = [0, -0.0, np.inf, -np.inf, 1 + 2**-8]
    expected = values.astype(ml_dtypes.bfloat16)
    bits = to_bfloat16(values)
    assert host_dtype("bfloat16") == bits.dtype == np.uint16
    np.testing.assert_array_equal(bits, expected.view(np.uint16))
    np.testing.assert_array_equal(from_bfloat16(bits), expected.astype(np.float32))
    assert non_finite(bits, "bfloat16") == 2
    assert np.isnan(from_bfloat16(to_bfloat16(np.array([np.nan], np.float32))))


class FakeOrt:
    """The parts of the onnxruntime module that a provider is started with."""

    __version__ = "1.32"

    def __init__(self, *providers: str, devices: Sequence[Any] = (), refuse: str = "", fall_back: bool = False) -> None:
        self.providers, self.devices, self.refuse, self.fall_back = list(providers), list(devices), refuse, fall_back
        self.opened: list[dict[str, Any]] = []
        self.preloaded = 0
        self.session: Any = None
        self.registered: list[tuple[str, str]] = []

    def get_available_providers(self) -> list[str]:
        return self.providers

    def preload_dlls(self) -> None:
        assert not self.opened, "after a session it is too late"
        self.preloaded += 1
        print("Failed to load libcudnn.so.9")
        raise OSError("libcublasLt.so.12")

    def SessionOptions(self) -> Any:  # noqa: N802
        return SimpleNamespace(
            add_provider_for_devices=lambda devices, options: self.opened.append(
                {"devices": devices, "options": options}
            ),
            add_session_config_entry=lambda key, value: None,
        )

    def InferenceSession(  # noqa: N802
        self, model: Any, options: Any, providers: Any = None, *, enable_fallback: int = 1
    ) -> Any:
        assert not enable_fallback
        if providers is not None:
            self.opened.append({"model": model, "providers": providers})
            if self.refuse in providers[0][1]:
                raise RuntimeError(f"{self.refuse}: not all nodes are on the GPU")
            names = ["CPUExecutionProvider"] if self.fall_back else [name for name, _ in providers]
        else:
            names = ["NvTensorRTRTXExecutionProvider"]
        if self.session is not None:
            return self.session
        return SimpleNamespace(get_providers=lambda: names, io_binding=lambda: None)

    def get_ep_devices(self) -> list[Any]:
        return self.devices if self.registered else []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))


@pytest.fixture
def bundle() -> Any:
    made: Any = SmallBundle()
    files = {"onnxruntime": "step.onnxruntime.onnx", "tensorrt": "step.tensorrt.onnx"}
    inputs = [Tensor(t.name, t.dtype, tuple("M1" if d == "M" else d for d in t.shape)) for t in STEP.inputs]
    made.graphs = {"step": GraphContract("step", tuple(inputs), STEP.outputs, files)}
    made.factors, made.expected_mask_share = (1,), 0.5
    made.grid = lambda factor: (4, 4)
    made.limits = SimpleNamespace(images=2, references=3, kept_tokens={1: 40})
    return made


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    monkeypatch.setattr(device_module, "import_cuda", lambda: made)
    return made


def use(monkeypatch: pytest.MonkeyPatch, ort: FakeOrt) -> FakeOrt:
    monkeypatch.setattr(onnxruntime_module, "import_onnxruntime", lambda: ort)
    return ort


CUDA, TRT, RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
PRECISE = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cuda_provider_gets_its_options(monkeypatch: pytest.MonkeyPatch, bundle: Any, dtype: str) -> None:
    bundle.dtype = dtype
    ort = use(monkeypatch, FakeOrt(CUDA, "CPUExecutionProvider", refuse="nothing"))
    runner = OnnxRuntime("cuda", device=3).load(bundle, "step")
    assert isinstance(runner, DeviceRunner)
    assert runner._device == ("cuda", 3)
    (opened,) = ort.opened
    assert opened["providers"] == [(CUDA, {"device_id": "3", "enable_cuda_graph": "1", **PRECISE})]
    assert opened["model"].endswith("step.onnxruntime.onnx")


def test_without_cuda_graph_where_the_provider_cannot(monkeypatch: pytest.MonkeyPatch, bundle: Any) -> None:
    ort = use(monkeypatch, FakeOrt(CUDA, refuse="enable_cuda_graph"))
    runner = OnnxRuntime("cuda").load(bundle, "step")
    assert [len(o["providers"][0][1]) for o in ort.opened] == [4, 3]
    assert isinstance(runner, DeviceRunner)
    assert runner._graph_ids.of((1,), "step") == "-1"
    use(monkeypatch, FakeOrt(CUDA, refuse="device_id"))
    with pytest.raises(BackendError, match=r"onnxruntime-cuda refused step\.onnxruntime\.onnx \(float32\): device_id"):
        OnnxRuntime("cuda").load(bundle, "step")
    use(monkeypatch, FakeOrt(CUDA, refuse="nothing", fall_back=True))
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        OnnxRuntime("cuda").load(bundle, "step")


def test_nvidias_libraries_are_loaded_before_a_session_and_quietly(
    monkeypatch: pytest.MonkeyPatch, bundle: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    ort = use(monkeypatch, FakeOrt(CUDA, "CPUExecutionProvider", refuse="nothing"))
    OnnxRuntime("cpu")
    assert not ort.preloaded
    with caplog.at_level(logging.INFO, "magicface_rt.onnxruntime"):
        OnnxRuntime("cuda").load(bundle, "step")
    assert ort.preloaded == 1
    assert capsys.readouterr().out == ""
    assert "libcudnn.so.9" in caplog.text
    assert "libcublasLt.so.12" in caplog.text
    monkeypatch.delattr(FakeOrt, "preload_dlls")
    OnnxRuntime("cuda").load(bundle, "step")


def test_providers_that_compile_take_tensorrts_body_and_a_cache(
    monkeypatch: pytest.MonkeyPatch, bundle: Any, tmp_path: Path, cuda: FakeCuda
) -> None:
    ort = use(monkeypatch, FakeOrt(TRT, CUDA, refuse="nothing"))
    bundle.dtype = "float16"
    OnnxRuntime("tensorrt", cache=tmp_path).load(bundle, "step")
    (opened,) = ort.opened
    (name, options), second = opened["providers"]
    assert (name, second) == (TRT, (CUDA, {"device_id": "0", **PRECISE}))
    # A precision that is switched on makes a weakly typed network, with types of the builder's choice.
    assert options.keys() == {
        *(f"trt_profile_{which}_shapes" for which in ("min", "opt", "max")),
        *("device_id", "trt_engine_cache_enable", "trt_engine_cache_path"),
    }
    assert options["trt_engine_cache_path"] == str(tmp_path / "small")
    assert opened["model"].endswith("step.tensorrt.onnx")
    assert (tmp_path / "small").stat().st_mode & 0o77 == 0
    (tmp_path / "file").write_text("")
    OnnxRuntime("tensorrt", cache=tmp_path / "file").load(bundle, "step")
    assert "trt_engine_cache_enable" not in ort.opened[-1]["providers"][0][1]


@pytest.mark.parametrize(
    ("provider", "target", "capability", "images", "best", "most"),
    [
        (TRT, None, (8, 9), (1, 1, 2), 24, 40),
        (RTX, None, (8, 9), (1, 1, 2), 24, 40),
        (RTX, "rtx-portable", (8, 9), (1, 1, 1), 24, 40),
        (RTX, load_target("rtx-portable"), (8, 9), (1, 1, 1), 24, 40),
        (RTX, None, None, (1, 1, 1), 24, 40),
    ],
)
def test_providers_that_compile_do_it_once_for_all_shapes_of_a_target(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Any,
    cuda: FakeCuda,
    provider: str,
    target: Any,
    capability: tuple[int, int] | None,
    images: tuple[int, int, int],
    best: int,
    most: int,
) -> None:
    if capability is None:
        cuda.count_status = 35
    else:
        cuda.capability = capability
    ort = use(monkeypatch, FakeOrt(provider, refuse="nothing"))
    OnnxRuntime("tensorrt" if provider == TRT else "nv-tensorrt-rtx", target=target).load(bundle, "step")
    options = ort.opened[0]["providers"][0][1]
    prefix = "trt" if provider == TRT else "nv"
    for which, b, k, m in zip(("min", "opt", "max"), images, (1, 1, images[2]), (1, best, most), strict=True):
        expected = f"state:{b}x3,k:{k}x{m}x2,bias:{b},label:{b}"
        assert options[f"{prefix}_profile_{which}_shapes"] == expected


def test_providers_that_compile_capture_no_graphs(monkeypatch: pytest.MonkeyPatch, bundle: Any, cuda: FakeCuda) -> None:
    """They keep one for all addresses, and a loop whose buffers change places would be replayed from the wrong ones."""
    for provider, name in ((TRT, "tensorrt"), (RTX, "nv-tensorrt-rtx")):
        ort = use(monkeypatch, FakeOrt(provider, refuse="nothing"))
        runner = OnnxRuntime(name, cuda_graphs=True).load(bundle, "step")
        assert isinstance(runner, DeviceRunner)
        assert runner._graph_ids.of(("any",), "step") == "-1"
        assert not any("cuda_graph" in option for option in ort.opened[0]["providers"][0][1])


def test_tensorrts_wheel_is_loaded_before_its_provider(monkeypatch: pytest.MonkeyPatch, bundle: Any) -> None:
    """It holds the libraries; without it the system's loader may find them."""
    loaded: list[str] = []
    real = importlib.import_module

    def load(name: str, *more: Any) -> Any:
        if name != "tensorrt":
            return real(name, *more)
        loaded.append(name)
        raise ImportError("no wheel")

    monkeypatch.setattr(importlib, "import_module", load)
    use(monkeypatch, FakeOrt(TRT, CUDA, refuse="nothing"))
    OnnxRuntime("tensorrt")
    OnnxRuntime("cuda")
    assert loaded == ["tensorrt"]


def test_a_copy_that_fails_is_an_error_that_names_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    ort = import_onnxruntime()
    contract = SmallBundle().graph("source")
    binding = DeviceRunner(contract, ort_session(contract), ort, ("cpu", 0), GraphIds(False)).bind()
    name = contract.inputs[0].name
    monkeypatch.setattr(ort.OrtValue, "update_inplace", fail)
    with pytest.raises(BackendError, match=f"{name} could not be copied to or from cpu 0: CUDA failure 700"):
        binding.set(name, np.ones((2, 2), np.float32))


def test_a_gpu_without_a_target_is_served_and_a_wrong_target_refused(
    monkeypatch: pytest.MonkeyPatch, bundle: Any, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    ort = use(monkeypatch, FakeOrt(TRT, refuse="nothing"))
    cuda.capability = (6, 1)
    assert OnnxRuntime("tensorrt").load(bundle, "step")
    assert "onnxruntime-tensorrt compiles graph step again for every new shape: tensorrt has no target" in caplog.text
    assert not any("profile" in name for name in ort.opened[0]["providers"][0][1])
    for wrong in ("abacus", "rtx-portable"):
        with pytest.raises(TargetError, match=wrong):
            open_backend("onnxruntime-tensorrt", target=wrong).load(bundle, "step")


def test_a_cache_that_others_may_write_into_is_not_run(
    monkeypatch: pytest.MonkeyPatch, bundle: Any, tmp_path: Path, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    ort = use(monkeypatch, FakeOrt(TRT, refuse="nothing"))
    cache, folder = tmp_path / "store" / "cache", tmp_path / "store" / "cache" / "small"

    def is_used() -> bool:
        OnnxRuntime("tensorrt", cache=cache).load(bundle, "step")
        return "trt_engine_cache_path" in ort.opened[-1]["providers"][0][1]

    assert is_used()
    for part in (cache, folder):
        assert part.stat().st_mode & 0o777 == 0o700
        for mode in (0o770, 0o702):
            part.chmod(mode)
            assert not is_used()
            assert f"{part} may be written by others (mode {mode:o}, expected 700)" in caplog.text
        part.chmod(0o755)
        assert is_used(), "to read is no harm"
        part.chmod(0o700)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert not is_used()
    assert f"belongs to user {mine}" in caplog.text
    monkeypatch.undo()
    ort = use(monkeypatch, ort)
    monkeypatch.setattr(device_module, "import_cuda", lambda: cuda)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert not is_used()
    assert "is a symbolic link" in caplog.text


def test_the_rtx_provider_comes_as_a_plugin(monkeypatch: pytest.MonkeyPatch, bundle: Any, cuda: FakeCuda) -> None:
    name = RTX
    ort = use(monkeypatch, FakeOrt("CPUExecutionProvider", devices=[SimpleNamespace(ep_name=name)]))
    with pytest.raises(BackendMissingError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        OnnxRuntime("nv-tensorrt-rtx")
    # The name that the wheel gives is that of its library; a provider has the name under which it is registered.
    plugin = SimpleNamespace(get_ep_name=lambda: "nv_tensorrt_rtx", get_library_path=lambda: "/lib/rtx.so")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    runner = OnnxRuntime("nv-tensorrt-rtx").load(bundle, "step")
    assert ort.registered == [(name, "/lib/rtx.so")]
    options = ort.opened[0]["options"]
    assert sorted(options) == ["nv_profile_max_shapes", "nv_profile_min_shapes", "nv_profile_opt_shapes"]
    assert isinstance(runner, DeviceRunner)
    assert runner._device == ("gpu", 0, 0x10DE)
    OnnxRuntime("nv-tensorrt-rtx")
    assert len(ort.registered) == 1
    with pytest.raises(BackendMissingError, match="offers 1 devices, and device 1"):
        OnnxRuntime("nv-tensorrt-rtx", device=1)


def test_bf16_is_refused_by_the_cpu_provider_only(monkeypatch: pytest.MonkeyPatch, bundle: Any) -> None:
    bundle.dtype = "bfloat16"
    with pytest.raises(BackendError, match="is in bf16, which onnxruntime-cpu does not serve"):
        OnnxRuntime("cpu").load(bundle, "step")
    use(monkeypatch, FakeOrt(CUDA, refuse="nothing"))
    assert OnnxRuntime("cuda").load(bundle, "step")


# --------------------------------------------------------------------------------------------- one thread, with graphs


class Traced:
    """An InferenceSession that notes which threads touch it, and says that it runs on a GPU."""

    def __init__(self, session: Any, ort: Any) -> None:
        self._session = session
        self.threads: dict[str, set[int]] = {"run": set(), "allocate": set(), "open": {threading.get_ident()}}
        self.at_once = 0
        self.most_at_once = 0
        self._ort = ort

    def get_providers(self) -> list[str]:
        return [CUDA]

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.threads["run"].add(threading.get_ident())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(0.02)
        self.at_once -= 1
        options = self._ort.RunOptions()
        self._session.run_with_iobinding(binding, options)

    def ortvalue_from_shape_and_type(self, shape: Any, element: Any, *device: Any) -> Any:
        self.threads["allocate"].add(threading.get_ident())
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, element, "cpu", 0)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_with_cuda_graphs_one_thread_does_all_and_without_them_each_its_own(
    monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool
) -> None:
    real, traced = import_onnxruntime(), []
    bundle: Any = SmallBundle()
    files = {"onnxruntime": "source.onnx", "tensorrt": ""}
    bundle.graphs = {"source": GraphContract("source", SOURCE.inputs, SOURCE.outputs, files)}

    class TracedOrt(FakeOrt):
        RunOptions = real.RunOptions

        def InferenceSession(self, model: Any, options: Any, providers: Any = None, **_: Any) -> Any:  # noqa: N802
            traced.append(Traced(ort_session(SOURCE), real))
            self.OrtValue = traced[-1]
            return traced[-1]

    use(monkeypatch, TracedOrt(CUDA, refuse="nothing"))
    before = set(threading.enumerate())
    backend = OnnxRuntime("cuda", cuda_graphs=cuda_graphs)
    runner = backend.load(bundle, "source")
    monkeypatch.setattr(OrtBinding, "_bind_input", bind_on_the_cpu)
    (session,) = traced
    together, found = threading.Barrier(2), {}

    def work(number: int) -> None:
        binding = runner.bind()
        together.wait(timeout=30)
        for rows in (2, 3):
            x = np.full((rows, 2), number, np.float32)
            found[number] = binding.once({"x": x, "gain": np.ones(1, np.float32)})["k"]
        binding.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[n] == n).all() for n in range(2))
    used = session.threads["run"]
    if cuda_graphs:
        assert len(used) == 1
        assert session.threads == {"run": used, "allocate": used, "open": used}
        assert used.isdisjoint({t.ident for t in threads} | {threading.get_ident()})
        assert session.most_at_once == 1
    else:
        assert used == session.threads["allocate"] == {t.ident for t in threads}
        assert session.threads["open"] == {threading.get_ident()}
    runner.close()
    assert [t.name for t in threading.enumerate() if t not in before] == ["onnxruntime-cuda"] * cuda_graphs
    backend.close()
    backend.close()
    assert not [t for t in threading.enumerate() if t not in before]


def bind_on_the_cpu(binding: OrtBinding, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """`_bind_input` for values that stand in for those of a GPU."""
    value = binding._values[tensor.name]
    binding._binding.bind_ortvalue_input(tensor.name, value)
    binding._bound[tensor.name] = value


@pytest.fixture
def one() -> Iterator[SingleThreadExecutor]:
    made = SingleThreadExecutor("one")
    yield made
    made.close()


def test_one_thread_returns_and_raises_what_the_call_does(one: SingleThreadExecutor) -> None:
    assert one(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(ZeroDivisionError):
        one(lambda: 1 / 0)
    assert one(lambda: one(threading.get_ident)) == one(threading.get_ident) != threading.get_ident()
    one.close()
    assert one(lambda: 4) == 4, "it can be started again"


def test_one_thread_ends_with_what_made_it() -> None:
    before = set(threading.enumerate())
    made = SingleThreadExecutor("forgotten")
    made(lambda: None)
    (thread,) = set(threading.enumerate()) - before
    del made
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_call_that_waits_is_not_made_after_ctrl_c(one: SingleThreadExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, made = threading.Event(), []
    busy = threading.Thread(target=one, args=(go_on.wait,))
    busy.start()

    while one._thread is None or one._thread.ident is None:
        time.sleep(0.01)
    put = one._put

    def put_and_interrupt(call: Any) -> None:
        put(call)
        raise KeyboardInterrupt

    monkeypatch.setattr(one, "_put", put_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        one(made.append, 1)
    monkeypatch.undo()
    go_on.set()
    busy.join()
    assert one(lambda: 6) == 6
    assert not made


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """A shell's background job starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_waits_for_the_call_that_goes_on(one: SingleThreadExecutor) -> None:
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        one(work)
    assert started.is_set()
    assert ended.is_set(), "nothing may be freed under it"
    assert one(lambda: 5) == 5


# ------------------------------------------------------------------------------------------------- names and the choice


def test_unknown_and_missing_backends_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(BackendMissingError, match="'cuda' is not known; there are auto, onnxruntime"):
        open_backend("cuda")
    with pytest.raises(OptionError, match="an engine store, and none was named"):
        open_backend("tensorrt-rtx")
    with pytest.raises(BackendMissingError, match="provider 'rocm' is not known"):
        OnnxRuntime("rocm")
    for name in ("auto", "onnxruntime", "onnxruntime-cpu"):
        with pytest.raises(OptionError, match=f"backend '{name}' builds none. Name tensorrt or tensorrt-rtx, or build"):
            open_backend(name, store=tmp_path, build_missing=True)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "onnxruntime is not installed."),
        (AttributeError("module 'onnxruntime' has no attribute 'InferenceSession'"), "onnxruntime is not installed."),
        (
            ImportError("libcudart.so.13: cannot open"),
            "onnxruntime does not load (ImportError: libcudart.so.13: cannot",
        ),
        (
            ModuleNotFoundError("No module named 'numpy'", name="numpy"),
            "onnxruntime does not load (ModuleNotFoundError",
        ),
    ],
)
def test_a_runtime_that_does_not_load_is_not_one_that_is_missing(
    raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> None:
        raise raised

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(BackendMissingError) as refused:
        import_onnxruntime()
    assert str(refused.value).startswith(said)


def test_a_probe_computes_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("onnxruntime-cpu") == ""
    for name in (n for n in BACKENDS if n not in ("auto", "onnxruntime", "onnxruntime-cpu")):
        assert isinstance(why_not(name), str)
    assert "not known" in why_not("onnxruntime-rocm")
    assert "not known" in why_not("tensorflow")
    monkeypatch.setattr(OnnxRuntime, "run_model", lambda *_: [np.array([3.0])])
    assert "1 + 1 is 3.0" in why_not("onnxruntime-cpu")
    monkeypatch.setattr(OnnxRuntime, "run_model", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in why_not("onnxruntime-cpu")
    assert len(sum_model()) < 100


def test_auto_takes_a_flavour_only_with_a_gpu_the_library_and_all_plans(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(monkeypatch, tmp_path)
    bundle: Any = SmallBundle()

    def chosen(**options: Any) -> str:
        backend = open_backend("auto", **{"store": world.store, "bundle": bundle, **options})
        backend.close()
        return backend.name

    recipes = small_recipes()
    cpu = open_backend("onnxruntime").name
    assert chosen() == cpu
    world.build(bundle, "source", recipes["source"])
    assert chosen() == cpu, "one plan is missing"
    assert "tensorrt-rtx is not used: engine store" in caplog.text
    world.build(bundle, "step", recipes["step"])
    assert chosen() == "tensorrt-rtx"
    assert chosen(store=str(world.store.root)) == "tensorrt-rtx"
    assert chosen(store=None) == cpu
    assert chosen(device=1) == cpu, "there is no such GPU"
    world.cuda.count_status = 35
    assert chosen() == cpu, "the driver is too old"
    assert world.nothing_left()


def test_onnxruntime_reports_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """Its telemetry would leave an identifier in the temporary folder as soon as it starts."""
    script = """
from magicface_rt.backends.onnxruntime import import_onnxruntime

options = import_onnxruntime().SessionOptions()
"""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", script], env={**environment, "TMPDIR": str(tmp_path)}, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
