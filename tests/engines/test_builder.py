"""Building plans of the tiny bundle with the real TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

trt = pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

from magicface_rt.bundle import Bundle  # noqa: E402
from magicface_rt.engines import gpu, timing_cache  # noqa: E402
from magicface_rt.engines.builder import build, build_plan, plan_key  # noqa: E402
from magicface_rt.engines.finding import build_command, target_with_plans  # noqa: E402
from magicface_rt.engines.flavour import Flavour, load_flavour  # noqa: E402
from magicface_rt.engines.profiles import profile, symbol_ranges  # noqa: E402
from magicface_rt.engines.store import EngineStore, Plan  # noqa: E402
from magicface_rt.engines.targets import Span, Target, load_target  # noqa: E402
from magicface_rt.errors import (  # noqa: E402
    BackendMissingError,
    BuildError,
    BundleError,
    Cancelled,
    DeviceError,
    GateError,
    TargetError,
)
from tests.engines.store_worker import sample_key, writer  # noqa: E402

QUICK = "text_encoder"
"""The graph that takes a second."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return load_flavour("tensorrt-rtx")


@pytest.fixture(scope="module")
def target() -> Target:
    """One GPU, and room for what fp32 stores."""
    portable = load_target("rtx-portable")
    return replace(portable, compute_capabilities=("8.6",), scratch_limits_mib={"others": 1024})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EngineStore:
    return EngineStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def plans(bundle: Bundle, flavour: Flavour, target: Target, store: EngineStore) -> list[Plan]:
    return build(bundle, flavour, target, store)


def test_a_bundle_that_is_replaced_while_a_plan_is_built_leaves_none(
    tiny_bundle: Path, flavour: Flavour, target: Target, tmp_path: Path
) -> None:
    """It would be kept under the hash of weights that it does not have."""
    folder, store = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle")), EngineStore(tmp_path / "store")
    opened, replaced = Bundle.open(folder), list[str]()

    def replace_weights(*_: object) -> bool:
        if not replaced:
            shutil.copy(folder / "weights.bin", folder / "new")
            os.replace(folder / "new", folder / "weights.bin")
            replaced.append("weights.bin")
        return True

    with pytest.raises(BundleError, match=r"weights\.bin was replaced since the bundle was opened"):
        build_plan(opened, QUICK, flavour, target, store, advance=replace_weights)
    assert replaced
    assert store.plans() == []


# What a plan is made for


def test_profiles_come_from_the_contract_and_the_target(bundle: Bundle, target: Target) -> None:
    ranges = symbol_ranges(bundle, target, "denoise_step")
    cells = bundle.rows * bundle.columns
    assert ranges["B"] == (1, 1, 1)
    assert ranges["R"] == (1, 3, 6)
    assert ranges["M1"] == (1, -(-9 * cells // 10), 3 * cells)  # three masks of 30 %, three full masks
    assert ranges["M2"][2] == 3 * cells // 4
    shapes = profile(bundle, bundle.graph("denoise_step"), target)
    width = bundle.injection_layers[-1].width
    assert shapes["k_ref_15"] == ((1, 1, width), (1, ranges["M1"][1], width), (1, 3 * cells, width))
    assert set(shapes) == {t.name for t in bundle.graph("denoise_step").inputs}


def test_a_profile_stays_within_the_bundles_limits(bundle: Bundle, target: Target) -> None:
    generous = replace(target, images=Span(1, 99), references=Span(50, 99), full_masks=99)
    ranges = symbol_ranges(bundle, generous, "denoise_step")
    assert ranges["B"][2] == bundle.limits.images
    assert ranges["K"] == (1, 1, bundle.limits.images)
    assert ranges["R"] == (1, bundle.limits.references, bundle.limits.references)
    assert ranges["M1"][2] == bundle.limits.kept_tokens[1]
    assert all(1 <= low <= best <= high for low, best, high in ranges.values())


def test_every_graph_takes_what_a_session_gives_it(bundle: Bundle, target: Target) -> None:
    """Both prompts in one call, the references' prompts in one call, pictures one by one."""
    assert symbol_ranges(bundle, target, "text_encoder")["B"] == (1, 2, 6)
    assert symbol_ranges(bundle, target, "vae_encoder")["R"] == (1, 1, 1)
    assert symbol_ranges(bundle, target, "vae_decoder")["B"] == (1, 1, 1)
    assert symbol_ranges(bundle, target, "reference_kv")["R"] == (1, 3, 6)


def test_whatever_makes_a_plan_stale_is_in_its_key(bundle: Bundle, flavour: Flavour, target: Target) -> None:
    key = plan_key(bundle, QUICK, flavour, target)

    def field(**changes: Any) -> set[str]:
        given = {"bundle": bundle, "flavour": flavour, "target": target} | changes
        other = plan_key(given["bundle"], QUICK, given["flavour"], given["target"])
        return {difference.field for difference in key.differences(other)}

    weights = {**bundle.files, "weights.bin": {**bundle.files["weights.bin"], "sha256": "0" * 64}}
    assert field(bundle=replace(bundle, files=weights)) == {"graph_hash"}
    assert field(flavour=replace(flavour, version="1.8")) == {"flavour_version"}
    assert field(bundle=replace(bundle, dtype="float16")) == {"precision"}
    assert field(target=replace(target, compute_capabilities=("8.9",))) == {"compute_capabilities"}
    assert field(target=replace(target, references=Span(1, 2))) == {"profile.token_ids.max"}
    assert field(target=target.with_parity_outputs()) == {"builder_options.parity_outputs"}
    assert field(target=replace(target, builder=replace(target.builder, tf32=True))) == {"builder_options.tf32"}
    assert field(target=replace(target, name="other", scratch_limits_mib={"others": 1})) == set()


def test_a_target_of_another_flavour_has_no_key(bundle: Bundle, flavour: Flavour) -> None:
    with pytest.raises(TargetError, match="h100 is for tensorrt"):
        plan_key(bundle, QUICK, flavour, load_target("h100"))


# Building


def test_every_graph_of_the_tiny_bundle_is_built(bundle: Bundle, plans: list[Plan], store: EngineStore) -> None:
    assert [plan.key.graph for plan in plans] == list(bundle.graphs)
    for plan in plans:
        gate = plan.facts["gate"]
        assert gate["verdict"] == "fine", gate
        assert 0 < gate["scratch_bytes"] <= gate["scratch_limit"]
        assert len(store.read(plan)) == plan.bytes == plan.path.stat().st_size
    step = next(plan for plan in plans if plan.key.graph == "denoise_step")
    assert step.facts["gate"]["attentions"] == 16
    assert all(fault is None for _, fault in store.verify())


def test_plans_that_are_there_are_not_built_again(
    bundle: Bundle, flavour: Flavour, target: Target, store: EngineStore, plans: list[Plan]
) -> None:
    said: list[str] = []
    again = build(bundle, flavour, target, store, report=said.append)
    assert [plan.key.digest for plan in again] == [plan.key.digest for plan in plans]
    assert said == []


def test_a_limit_that_was_tightened_holds_for_plans_that_are_there(
    bundle: Bundle, flavour: Flavour, target: Target, store: EngineStore, plans: list[Plan]
) -> None:
    with pytest.raises(GateError, match=r"text_encoder: the plan in the store needs .* of scratch"):
        build_plan(bundle, QUICK, flavour, replace(target, scratch_limits_mib={"others": 1}), store)


def test_the_target_whose_plans_are_there_is_found(
    bundle: Bundle, flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of capability 8.9 has a target of its own; plans for the portable one serve it as well."""
    one = replace(bundle, graphs={QUICK: bundle.graph(QUICK)})
    kept = EngineStore(tmp_path)
    assert target_with_plans(one, "tensorrt-rtx", None, kept, "8.9").name == "rtx-4090"
    build(one, flavour, load_target("rtx-portable"), kept)
    assert target_with_plans(one, "tensorrt-rtx", None, kept, "8.9").name == "rtx-portable"
    assert target_with_plans(one, "tensorrt-rtx", "rtx-4090", kept, "8.9").name == "rtx-4090"
    with_outputs = target_with_plans(one, "tensorrt-rtx", None, kept, "8.9", parity=True)
    assert with_outputs.builder.parity_outputs
    command = build_command(one, with_outputs, kept.root)
    assert "--device" not in command
    assert "--device 1" in build_command(one, with_outputs, kept.root, 1)
    assert f"--target {with_outputs.name} --store {kept.root} --parity" in command


def test_outputs_for_parity_are_left_out_unless_wanted(bundle: Bundle, flavour: Flavour, target: Target) -> None:
    """The step's network, as it is given to the builder."""
    from magicface_rt.engines.builder import _Build

    def outputs(of: Target) -> set[str]:
        making = _Build(bundle, plan_key(bundle, "denoise_step", flavour, of), flavour, of, 0, None)
        making.start()
        making.parse()
        return {making.network.get_output(i).name for i in range(making.network.num_outputs)}

    assert outputs(target) == {"latents_out", "region_label_out"}
    assert outputs(target.with_parity_outputs()) == {t.name for t in bundle.graph("denoise_step").outputs}


def test_tf32_is_off_unless_wanted_and_all_memory_is_given(
    bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path
) -> None:
    from magicface_rt.engines.builder import _Build

    for wanted in (False, True):
        of = replace(target, builder=replace(target.builder, tf32=wanted))
        making = _Build(bundle, plan_key(bundle, QUICK, flavour, of), flavour, of, 0, None)
        making.start()
        making.parse()
        config = making._config(tmp_path)
        assert config.get_flag(trt.BuilderFlag.TF32) is wanted
        assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        assert config.num_compute_capabilities == 1
        assert config.get_compute_capability(0) == trt.ComputeCapability.SM86


def test_a_closed_gate_leaves_no_plan(bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path) -> None:
    small = replace(target, scratch_limits_mib={"others": 1})
    kept = EngineStore(tmp_path / "store")
    with pytest.raises(GateError, match=r"text_encoder.*scratch"):
        build_plan(bundle, QUICK, flavour, small, kept)
    assert kept.entries() == []
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_a_graph_that_cannot_be_parsed_names_the_node(
    bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path
) -> None:
    """A copy of the bundle whose graph file has a node of an operator that does not exist."""
    for path in bundle.path.iterdir():
        os.link(path, tmp_path / path.name)
    name = bundle.graph(QUICK).files["tensorrt"]
    model = onnx.load_model(str(bundle.path / name), load_external_data=False)
    model.graph.node[7].op_type = "Levitate"
    model.graph.node[7].name = "the_seventh"
    (tmp_path / name).unlink()
    onnx.save_model(model, str(tmp_path / name))
    with pytest.raises(BuildError, match=r"text_encoder: .*cannot parse.*the_seventh.*Levitate"):
        build_plan(replace(bundle, path=tmp_path), QUICK, flavour, target, EngineStore(tmp_path / "store"))


def test_a_graph_with_other_inputs_than_the_contract_is_refused(
    bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path
) -> None:
    contract = bundle.graph(QUICK)
    wrong = replace(contract, outputs=(replace(contract.outputs[0], name="words"),))
    changed = replace(bundle, graphs={**bundle.graphs, QUICK: wrong})
    with pytest.raises(BuildError, match="not those of the bundle's contract"):
        build_plan(changed, QUICK, flavour, target, EngineStore(tmp_path))


def test_progress_is_told_and_cancels(bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_plan(bundle, QUICK, flavour, target, EngineStore(tmp_path / "a"), advance=lambda *at: seen.append(at))
    assert seen
    assert all(0 <= done <= steps for _, done, steps in seen)
    kept = EngineStore(tmp_path / "b")
    with pytest.raises(Cancelled, match="text_encoder"):
        build_plan(bundle, QUICK, flavour, target, kept, advance=lambda *_: False)
    assert kept.entries() == []


def test_what_the_progress_callback_raises_ends_the_build(
    bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("in the bar")

    with pytest.raises(ZeroDivisionError, match="in the bar"):
        build_plan(bundle, QUICK, flavour, target, EngineStore(tmp_path), advance=broken)


# The flavours


def test_a_flavour_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(BackendMissingError, match="'tensorflow' is not known; there are tensorrt, tensorrt-rtx"):
        load_flavour("tensorflow")


def test_tensorrt_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device(_: int) -> None:
        raise DeviceError("there is no GPU")

    monkeypatch.setattr(gpu, "Device", no_device)
    assert gpu.capability_here() is None
    assert not gpu.can_load(("8.6",))
    with pytest.raises(DeviceError, match="no GPU"):
        gpu.check_target(Flavour("tensorrt", trt, "11.4"), load_target("h100"))


def test_tensorrt_builds_only_for_the_gpu_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "Device", lambda _: type("Ada", (), {"compute_capability": "8.9"})())
    gpu.check_target(Flavour("tensorrt", trt, "11.4"), load_target("l4"))
    gpu.check_target(Flavour("tensorrt-rtx", trt, "1.7"), load_target("turing"))  # needs no GPU at all
    with pytest.raises(TargetError, match=r"h100 is for compute capability 9.0, and the GPU here has 8.9"):
        gpu.check_target(Flavour("tensorrt", trt, "11.4"), load_target("h100"))


def test_a_capability_that_the_library_refuses_ends_the_build(
    bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so by False alone, and would build for something else."""
    monkeypatch.setattr("magicface_rt.engines.builder._capability", lambda trt, _: trt.ComputeCapability.NONE)
    store = EngineStore(tmp_path)
    with pytest.raises(BuildError, match=r"text_encoder: tensorrt-rtx .* refused compute capability 8\.6 of target"):
        build_plan(bundle, QUICK, flavour, target, store)
    assert store.plans() == []


def test_a_plan_that_a_busy_gpu_has_no_room_for_is_kept(
    bundle: Bundle,
    flavour: Flavour,
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """TensorRT-RTX needs no GPU to build; that this one cannot load the plan now is not the plan's fault."""
    monkeypatch.setattr(gpu, "capability_here", lambda _: "8.6")
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: None)
    monkeypatch.setattr(flavour.trt, "Runtime", lambda _: runtime)
    plan = build_plan(bundle, QUICK, flavour, target, EngineStore(tmp_path))
    assert plan.facts["gate"]["verdict"] == "fine"
    assert "text_encoder: the plan was judged by its text alone, since it was not loaded here" in caplog.text


def test_a_limit_removes_none_of_the_plans_that_are_built_together(
    bundle: Bundle, flavour: Flavour, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_one(bundle: Bundle, graph: str, *_: object, **__: object) -> Plan:
        return store.build(sample_key(graph=graph), writer(bytes(1000)))

    store = EngineStore(tmp_path, size_limit=2500)
    older = store.build(sample_key(graph="older"), writer(bytes(1000)))
    monkeypatch.setattr("magicface_rt.engines.builder.build_plan", build_one)
    plans = build(bundle, flavour, target, store)
    assert len(plans) == len(bundle.graphs)
    assert {plan.folder for plan in store.plans()} == {plan.folder for plan in plans}
    assert older.folder not in {plan.folder for plan in store.plans()}
    store.prune()
    assert len(store.plans()) < len(plans), "they are in use no longer"


# The timing cache of `tensorrt`


class Cache:
    def __init__(self, content: bytes | None) -> None:
        self.content = content

    def serialize(self) -> bytes | None:
        return self.content


class Config:
    """Takes a cache unless its content is `spoiled`."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"spoiled" else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True


def test_a_timing_cache_is_kept_and_found_again(tmp_path: Path) -> None:
    of = Flavour("tensorrt", trt, "11.4")
    first = Config()
    timing_cache.load(tmp_path / "store", of, 0, first)
    assert first.cache is not None
    assert first.cache.content == b""
    timing_cache.save(tmp_path / "store", of, 0, Cache(b"measured"))
    second = Config()
    timing_cache.load(tmp_path / "store", of, 0, second)
    assert second.cache is not None
    assert second.cache.content == b"measured"
    assert [path.name for path in timing_cache.cache_file(tmp_path / "store", of, 0).parent.iterdir()] == [
        timing_cache.cache_file(tmp_path / "store", of, 0).name
    ]
    third = Config()
    timing_cache.load(tmp_path / "store", replace(of, version="11.5"), 0, third)
    assert third.cache is not None
    assert third.cache.content == b""


def test_a_spoiled_timing_cache_costs_time_and_nothing_else(tmp_path: Path) -> None:
    of = Flavour("tensorrt", trt, "11.4")
    timing_cache.save(tmp_path, of, 0, Cache(b"spoiled"))
    config = Config()
    timing_cache.load(tmp_path, of, 0, config)
    assert config.cache is not None
    assert config.cache.content == b""
    timing_cache.save(Path("/dev/null/store"), of, 0, Cache(b"measured"))  # cannot be written; the build goes on
    timing_cache.save(tmp_path, of, 0, Cache(None))
    assert timing_cache.cache_file(tmp_path, of, 0).read_bytes() == b"spoiled"


# The process


def test_ctrl_c_leaves_nothing_half_written(tiny_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    program = [sys.executable, "-m", "magicface_rt.cli", "build", str(tiny_bundle), "--store", str(store)]
    process = subprocess.Popen(
        [*program, "--graph", "denoise_step", "--target", "rtx-portable"],
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job starts with SIGINT ignored, and so would this one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    watch = threading.Timer(300, process.kill)
    watch.start()
    for line in process.stderr:
        if "building for" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    code = process.wait(300)
    watch.cancel()
    assert code == 130, said
    assert "nothing half written" in said
    assert [path for path in store.rglob("*") if path.is_file()] == []
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
