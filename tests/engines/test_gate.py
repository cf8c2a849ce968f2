"""The fusion and memory gate, with the real TensorRT-RTX building plans without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("torch")  # the operators' bodies stand beside their PyTorch form
onnx = pytest.importorskip("onnx")

import small_networks  # noqa: E402

from magicface_rt.bundle import Bundle  # noqa: E402
from magicface_rt.engines.attentions import Attention  # noqa: E402
from magicface_rt.engines.gate import (  # noqa: E402
    SCRATCH_SLACK_BYTES,
    GateReport,
    Inspection,
    agree,
    check_plan,
    inspect_engine,
)
from magicface_rt.engines.plan_text import read_plan  # noqa: E402
from magicface_rt.errors import BuildError, GateError  # noqa: E402

FP16, BF16, FP32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
MB = 10**6
LIMIT = 300 * MB


@dataclass
class Built:
    attentions: tuple[Attention, ...]
    plan: bytes

    def report(self, scratch_limit: int = LIMIT) -> GateReport:
        return check_plan("denoise_step", self.plan, self.attentions, scratch_limit)


def built(network: small_networks.Small) -> Built:
    return Built(network.attentions(), network.build())


@pytest.fixture(scope="module")
def fused() -> Built:
    """One RegionAttention over 4096 tokens and up to 12288 kept ones, fp16, as it is exported."""
    return built(small_networks.region())


@pytest.fixture(scope="module")
def decomposed() -> Built:
    """The same with v left as narrow as it comes."""
    return built(small_networks.region(small_networks.NARROW_V))


# What is expected of a network


def test_an_attention_is_known_by_its_call_with_the_sizes_of_the_largest_shapes() -> None:
    network = small_networks.region()
    before = [tuple(network.network.get_input(i).shape) for i in range(network.network.num_inputs)]

    (attention,) = network.attentions(region_attentions=1)

    assert (attention.name, attention.function) == ("up.attn", "RegionAttention")
    assert (attention.rows, attention.heads, attention.queries, attention.keys) == (1, 8, 4096, 4096 + 12288)
    assert (attention.width, attention.value_width, attention.dtype) == (48, 48, "HALF")  # 40 and 8 code channels
    assert attention.logits_bytes == 8 * 4096 * 16384 * 2
    assert attention.expected
    assert not attention.obstacles
    assert not attention.hints
    assert "up.attn" in str(attention)
    assert [tuple(network.network.get_input(i).shape) for i in range(network.network.num_inputs)] == before


def test_probability_maps_are_meant_to_be_stored_and_are_not_counted() -> None:
    network = small_networks.token_and_map()
    report = built(network).report(scratch_limit=10**9)

    assert [a.name for a in network.attentions()] == ["down.attn"]
    assert (report.expected, report.fused, report.attentions, report.verdict) == (1, 1, 1, "fine")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": "FLOAT"}, True),  # it would be fused in 16 bits, so it is missed in 32
        ({"keys": 77}, True),  # cross-attention on the finest grid
        ({"queries": 64, "keys": 64}, False),  # decomposed without harm
        ({"heads": 1, "width": 512, "rows": 4}, False),  # the VAE's: no kernel is that wide
        ({"heads": 1, "width": 160}, False),  # a single head of a single row
        ({"heads": 4, "width": 12, "rows": 4}, False),  # a test model's
        ({"heads": 384, "width": 1}, True),  # a real model's channels, with the head count lost
    ],
)
def test_which_attentions_must_be_fused(changes: dict[str, Any], expected: bool) -> None:
    attention = Attention("a", "TokenAttention", "[a]", ("[b]", "[c]"), 1, 8, 4096, 4096, 40, 40, "HALF")
    assert replace(attention, **changes).expected is expected


def test_a_network_with_other_calls_than_the_bundle_says_is_refused() -> None:
    with pytest.raises(BuildError, match=r"graph small: 1 calls of RegionAttention .* expected 6"):
        small_networks.region().attentions(region_attentions=6)


def test_an_attention_without_softmax_is_refused() -> None:
    body = small_networks.replaced(small_networks.REGION, "Softmax<axis = -1>(logits)", "Sigmoid(logits)")
    with pytest.raises(BuildError, match=r"graph small: the attention up\.attn \(RegionAttention\) holds no softmax"):
        small_networks.region(body).attentions()


# Plans of the real library


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("tokens", "channels", "kept"), [(4096, 320, (1, 4096, 12288)), (1024, 640, (1, 1024, 3072))], ids=["4096", "1024"]
)
def test_the_exported_body_is_fused(tokens: int, channels: int, kept: tuple[int, int, int], dtype: int) -> None:
    report = built(small_networks.region(dtype=dtype, tokens=tokens, channels=channels, kept=kept)).report()

    assert (report.verdict, report.expected, report.fused, report.decomposed) == ("fine", 1, 1, ())
    assert report.scratch_bytes is not None
    assert 10 * MB < report.scratch_bytes < 40 * MB  # the operands in 4-D; the logits would take 1074 or 67 MB
    report.raise_if_closed()


def test_a_plan_for_several_gpus_is_read_as_well() -> None:
    network = small_networks.region()
    plan = network.build(("SM80", "SM86", "SM89", "SM120"))
    assert check_plan("denoise_step", plan, network.attentions(), LIMIT).verdict == "fine"


def test_a_v_narrower_than_q_and_k_closes_the_gate(decomposed: Built) -> None:
    report = decomposed.report(scratch_limit=10**10)

    assert (report.verdict, report.expected, report.fused) == ("closed", 1, 0)
    assert report.scratch_bytes is not None
    assert report.scratch_bytes == pytest.approx(2.18e9, rel=0.01)  # logits and probabilities
    with pytest.raises(GateError, match=r"graph denoise_step: .* 1 of 1 large attentions were decomposed") as caught:
        report.raise_if_closed()
    assert "up.attn (RegionAttention: 4096 queries, 16384 keys" in str(caught.value)
    assert "its v is 40 wide, its q and k are 48 wide; pad v" in str(caught.value)


def test_fp32_closes_the_gate() -> None:
    report = built(small_networks.region(dtype=FP32)).report(scratch_limit=10**10)

    assert (report.verdict, report.fused) == ("closed", 0)
    with pytest.raises(GateError, match=r"it is fp32, for which there is no fused kernel; export .* --dtype fp16"):
        report.raise_if_closed()


def test_fp32_is_fine_where_no_attention_is_large() -> None:
    network = small_networks.region(dtype=FP32, tokens=256, channels=32, heads=4, kept=(1, 256, 512))
    report = built(network).report()
    assert (report.verdict, report.expected, report.attentions, report.attentions_fused) == ("fine", 0, 1, 0)


def test_a_lost_head_count_closes_the_gate() -> None:
    """TensorRT's parser reads attribute references as 0 in a function that a function calls: 320 heads of 1."""
    network = small_networks.region(small_networks.NESTED, tokens=1024, kept=(1, 1024, 3072))
    (attention,) = network.attentions()
    report = check_plan("denoise_step", network.build(), (attention,), 10**12)

    assert (attention.heads, attention.width) == (320, 1)
    assert report.verdict == "closed"
    assert "its heads are 1 wide, fused kernels take 9 to 256" in report.causes[0]


def test_a_reshape_to_three_dimensions_is_found_and_judged_by_what_became_of_it() -> None:
    """TensorRT-RTX 1.7.1 undoes this reshape, so the gate stays open; were it decomposed, the cause is known."""
    network = small_networks.region(small_networks.FLATTENED_K)
    (attention,) = network.attentions()
    plan = network.build()
    report = check_plan("denoise_step", plan, (attention,), LIMIT)

    assert attention.hints == ("it is reshaped to three dimensions at node_of_k_flat; keep it in four",)
    assert (report.verdict, report.fused, report.causes) == ("fine", 1, ())
    lost = check_plan("denoise_step", plan.replace(b"_gemm_mha_v2", b"_gemm_xyz_v2"), (attention,), LIMIT)
    assert lost.verdict != "fine"


def test_a_decomposed_attention_without_obstacles_is_told_with_its_hints(decomposed: Built) -> None:
    (attention,) = decomposed.attentions
    hint = "it is reshaped to three dimensions at k_flat; keep it in four"
    report = check_plan("g", decomposed.plan, [replace(attention, obstacles=(), hints=(hint,))], LIMIT)
    assert f"up.attn: {hint}" in report.causes

    blank = check_plan("g", decomposed.plan, [replace(attention, obstacles=(), hints=())], 10**10)
    assert blank.causes == ("nothing in the network is known to prevent fusion here, so the library may have changed",)


def test_a_stored_mask_closes_the_gate_by_its_memory() -> None:
    report = built(small_networks.region(small_networks.MASKED)).report(scratch_limit=100 * MB)

    assert (report.verdict, report.fused, report.decomposed) == ("closed", 1, ())
    with pytest.raises(GateError, match=r"needs 1\d\d\.\d MB of scratch, expected at most 100\.0 MB") as caught:
        report.raise_if_closed()
    assert "a mask of shape [1, 1, 4096, 16384] meets the logits" in str(caught.value)
    assert "the largest memory regions are 134.2 MB" in str(caught.value)


def test_the_limit_is_the_last_byte_allowed(fused: Built) -> None:
    scratch = fused.report().scratch_bytes
    assert scratch is not None
    assert fused.report(scratch).verdict == "fine"
    assert fused.report(scratch - 1).verdict == "closed"


# What is not understood


def test_no_bytes_that_are_not_understood_are_called_fine(fused: Built) -> None:
    plan = fused.plan
    for damaged in (
        b"",
        b"\0" * 4096,
        b"NLYM" * 1000,
        plan[: len(plan) // 16],
        plan.replace(b"region = {", b"memory = {"),
        plan.replace(b"function={", b"funktion={"),
        plan.replace(b'layers="', b'lagers="'),
        plan.replace(b"_gemm_mha_v2", b"_gemm_xyz_v2"),
        plan.replace(b"NLYM", b"MLYN"),
        plan.replace(b"header {", b"heater {"),
    ):
        assert damaged != plan
        report = check_plan("denoise_step", damaged, fused.attentions, LIMIT)
        assert report.verdict == "unknown"
        assert report.causes
        assert report.fused == 0
        report.raise_if_closed()  # unknown is not closed: the builder decides what to do with it


def test_a_report_of_plain_types(decomposed: Built) -> None:
    report = decomposed.report()
    again = json.loads(json.dumps(report.to_dict()))
    assert again["verdict"] == "closed"
    assert again["scratch_bytes"] == report.scratch_bytes
    assert again["decomposed"] == list(report.decomposed)
    assert "0 of 1 large attentions fused, 2.2 GB of scratch" in str(report)


# The library's inspector, by stand-ins: its answer has the plan's own kernels


class StandIn:
    """An engine as far as the gate asks it."""

    def __init__(self, plan: bytes, edit: Callable[[list[Any]], None] = lambda layers: None) -> None:
        facts = read_plan(plan)
        self.device_memory_size_v2 = facts.scratch_bytes
        layers: list[Any] = [
            {
                "Name": f"{k.name}_myl0_{i}",
                "LayerType": "kgen",
                "Inputs": [],
                "Outputs": [],
                "TacticName": k.fqn,
                "StreamId": 0,
                "Metadata": "\x1f".join(k.layers),
            }
            for i, k in enumerate(facts.kernels)
        ]
        edit(layers)
        # The library writes the separator as it is, which strict JSON refuses.
        self.answer = json.dumps({"Layers": layers, "Bindings": []}).replace("\\u001f", "\x1f")

    def create_engine_inspector(self) -> StandIn:
        return self

    def get_engine_information(self, form: str) -> str:
        assert form == "json"
        return self.answer


class Library:
    class LayerInformationFormat:
        JSON = "json"


def inspected(engine: StandIn) -> Inspection:
    return inspect_engine(engine, Library)


def test_text_and_inspector_agree(fused: Built, decomposed: Built) -> None:
    both = agree(fused.report(), inspected(StandIn(fused.plan)), fused.attentions)
    assert (both.verdict, both.fused, both.inspected, both.causes) == ("fine", 1, True, ())

    both = agree(decomposed.report(), inspected(StandIn(decomposed.plan)), decomposed.attentions)
    assert (both.verdict, both.fused, len(both.decomposed)) == ("closed", 0, 1)


def test_the_inspector_may_close_what_the_text_called_fine(fused: Built, decomposed: Built) -> None:
    both = agree(fused.report(), inspected(StandIn(decomposed.plan)), fused.attentions)

    assert both.verdict == "closed"
    assert "the plan's text says 1 attentions are fused, the inspector 0" in both.causes
    with pytest.raises(GateError, match=r"2\.2 GB of scratch"):
        both.raise_if_closed()


def test_scratch_that_differs_is_unknown(fused: Built) -> None:
    near, far = StandIn(fused.plan), StandIn(fused.plan)
    near.device_memory_size_v2 += SCRATCH_SLACK_BYTES
    far.device_memory_size_v2 += SCRATCH_SLACK_BYTES + 1

    assert agree(fused.report(), inspected(near), fused.attentions).verdict == "fine"
    both = agree(fused.report(), inspected(far), fused.attentions)
    assert both.verdict == "unknown"
    assert both.causes == ("the plan's text says 31.5 MB of scratch, the engine 48.2 MB",)


def test_an_inspector_without_details_is_unknown(fused: Built) -> None:
    def names_only(layers: list[Any]) -> None:
        layers[:] = [layer["Name"] for layer in layers]

    def no_metadata(layers: list[Any]) -> None:
        for layer in layers:
            layer["Metadata"] = ""

    for edit in (names_only, no_metadata):
        both = agree(fused.report(), inspected(StandIn(fused.plan, edit)), fused.attentions)
        assert both.verdict == "unknown"
        assert "build with ProfilingVerbosity.DETAILED" in both.causes[0]
    broken = StandIn(fused.plan)
    broken.answer = "Layers: none"
    assert agree(fused.report(), inspected(broken), fused.attentions).verdict == "unknown"


def test_a_text_that_is_not_understood_stays_unknown_whatever_the_inspector_says(fused: Built) -> None:
    report = check_plan("denoise_step", b"another library's plan", fused.attentions, LIMIT)
    assert agree(report, inspected(StandIn(fused.plan)), fused.attentions).verdict == "unknown"


@pytest.mark.gpu
def test_text_and_the_real_inspector_agree(fused: Built) -> None:
    trt = small_networks.trt
    engine = trt.Runtime(small_networks.LOGGER).deserialize_cuda_engine(fused.plan)
    assert engine is not None, "the plan is for compute capability 8.6"
    report = agree(fused.report(), inspect_engine(engine, trt), fused.attentions)
    assert (report.verdict, report.fused, report.inspected) == ("fine", 1, True)


# A whole graph


@pytest.mark.slow
def test_the_tiny_bundle(tiny_bundle: Path) -> None:
    """Sixteen calls, none of them large enough in a test model; the segmentation's 22 maps are not among them."""
    bundle = Bundle.open(tiny_bundle)
    contract = bundle.graph("denoise_step")
    sizes = {"B": 1, "K": 1, **{f"M{f}": n for f, n in bundle.limits.kept_tokens.items()}}
    shapes: dict[str, Any] = {}
    for tensor in contract.inputs:
        if any(isinstance(d, str) for d in tensor.shape):
            small = tuple(1 if isinstance(d, str) else d for d in tensor.shape)
            large = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape)
            shapes[tensor.name] = (small, large, large)
    network = small_networks.parse(str(bundle.path / contract.files["tensorrt"]), shapes)
    attentions = network.attentions(region_attentions=len(bundle.injection_layers))
    report = check_plan("denoise_step", network.build(), attentions, 500 * MB)

    assert (len(attentions), report.expected, report.verdict) == (16, 0, "fine")
    assert report.scratch_bytes is not None
    assert report.scratch_bytes > 100 * MB  # fp32: the region attentions' logits are stored, 117 MB each
