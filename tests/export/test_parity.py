"""`verify`: bundles against recordings and against their checkpoints, and that a wrong bundle is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from magicface_rt.backends import OnnxRuntime
from magicface_rt.bundle import Bundle, GraphContract, Tensor
from magicface_rt.errors import (
    BackendError,
    BundleError,
    CheckpointError,
    ExportError,
    HostMemoryError,
    OptionError,
    OutputError,
    ParityError,
)
from magicface_rt.export import exporter, graph_parity
from magicface_rt.export import parity as parity_module
from magicface_rt.export.bundle_runner import BundleStepRunner
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.exporter import ExportOptions, export_bundle
from magicface_rt.export.made_from import why_not_made_from
from magicface_rt.export.parity import _case_bundle, _kept_bundle, verify_bundle, verify_case
from magicface_rt.export.recordings import Recording
from magicface_rt.export.replay import relative_error, replay_steps
from magicface_rt.export.samples import sample_inputs
from magicface_rt.export.trajectory import TrajectoryReport
from magicface_rt.export.widened import widen
from tests.killed import fill, killed, temporary
from tests.locations import DATA, GOLDENS

SHIPPED = DATA / "recordings" / "guidance-3"
CASES = sorted(path.parent for path in GOLDENS.glob("*/case.json"))


def test_a_bundle_that_is_removed_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process that is killed meanwhile would leave a folder that is none, which no later call replaces."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "bundle.json").write_text("{}")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        _kept_bundle(folder)
    assert not folder.exists()


def test_a_bundle_reproduces_a_recording(work: Path) -> None:
    verdict = verify_case(SHIPPED, work=work)
    assert verdict.passed, "\n".join(verdict.summary())
    bundle_steps = next(r for r in verdict.reports if r.runner.startswith("bundle") and r.mode == "steps")
    assert bundle_steps.worst()["eps_c"][1].error < 1e-5
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"weights": (6.0, 2.0)}, id="weights"),
        pytest.param({"inject_step": 4}, id="inject_step"),
        *(  # the recording is spoiled alike in test_recordings.py, and there quickly
            pytest.param(change, id=next(iter(change)), marks=pytest.mark.slow)
            for change in ({"tokens": ((5,), (9,))}, {"guidance": 3.03}, {"ca_scale": 0.65})
        ),
    ],
)
def test_a_bundle_fails_a_recording_with_another_setting(work: Path, change: dict) -> None:
    recording = Recording.load(SHIPPED)
    bundle = _case_bundle(recording, work, lambda _: None)
    spoiled = replace(recording, **change)
    runner = BundleStepRunner(spoiled, bundle, OnnxRuntime("cpu"))
    assert not replay_steps(recording, runner, steps=range(min(6, recording.recorded_steps))).passed


def test_a_bundle_fails_a_recording_with_its_references_swapped(work: Path) -> None:
    recording = Recording.load(SHIPPED)
    bundle = _case_bundle(recording, work, lambda _: None)
    inputs = recording.inputs
    swapped = replace(recording, inputs=replace(inputs, ref_z0=np.ascontiguousarray(inputs.ref_z0[::-1])))
    assert not replay_steps(recording, BundleStepRunner(swapped, bundle, OnnxRuntime("cpu")), steps=range(2)).passed


def test_a_bundle_is_what_its_checkpoint_is(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    verdict = verify_bundle(tiny_bundle, tiny_checkpoint, steps=3)
    assert verdict.passed, "\n".join(verdict.summary())
    assert len(verdict.reports) == 11  # five graphs; two requests, each step by step, in a Session, and end to end


def test_a_bundle_whose_graph_was_changed_is_noticed(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A graph that runs and is wrong: the scale of one attention doubled. The manifest is made to agree."""
    broken = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    path = broken / "denoise_step.onnxruntime.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "RegionAttention")
    next(a for a in node.attribute if a.name == "scale").f *= 2
    onnx.save(model, path)
    with pytest.raises(BundleError, match="denoise_step"):
        verify_bundle(broken, tiny_checkpoint, steps=1)
    manifest = json.loads((broken / "bundle.json").read_text())
    from magicface_rt.bundle import sha256

    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (broken / "bundle.json").write_text(json.dumps(manifest))
    verdict = verify_bundle(broken, tiny_checkpoint, steps=1)
    assert not verdict.passed
    assert [r.graph for r in verdict.reports if hasattr(r, "graph") and not r.passed] == ["denoise_step"]


@pytest.mark.slow
def test_a_session_that_drives_the_graphs_wrongly_is_noticed(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs and steps are right here; only the loop of Session never enters the second stage."""
    monkeypatch.setattr("magicface_rt.work.is_region_step", lambda *_: False)
    verdict = verify_bundle(tiny_bundle, tiny_checkpoint, steps=6)
    failed = [report for report in verdict.reports if not report.passed]
    assert failed
    assert all(isinstance(report, TrajectoryReport) for report in failed)
    assert "Session beside the plain loop" in failed[0].name


def test_a_bundle_of_another_checkpoint_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    from magicface_rt.export.random_weights import write_checkpoint

    write_checkpoint("tiny", tmp_path / "other", seed=1)
    with pytest.raises(ParityError, match="was exported from"):
        verify_bundle(tiny_bundle, tmp_path / "other")


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, r"beta_end 0\.012, and .* has 0\.02 by now"),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": True}, "set_alpha_to_one False, and .* has True"),
        ("tokenizer/special_tokens_map.json", {"pad_token": "!"}, "pad_token_id"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}, "pad_token_id"),
        ("tokenizer/tokenizer.json", {"normalizer": {"type": "NFC"}}, "another tokenizer"),
    ],
)
def test_a_checkpoint_whose_text_files_decide_other_pictures_by_now_is_refused(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, file: str, change: dict, named: str
) -> None:
    """Its weights are the same, and both sides of the comparison would take the bundle's schedule and tokens."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    if file == "tokenizer/tokenizer_config.json":
        (checkpoint / "tokenizer" / "special_tokens_map.json").unlink()
    content = json.loads((checkpoint / file).read_text())
    assert content | change != content
    (checkpoint / file).write_text(json.dumps(content | change))
    with pytest.raises(ParityError, match=f"was exported with {named}.*export it again"):
        verify_bundle(tiny_bundle, checkpoint)


def test_the_offset_of_a_checkpoint_is_the_pipelines_and_that_of_a_bundle_its_own(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A bundle that was exported with an offset of 0 runs at other timesteps than its checkpoint's pipeline."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    file, bundle = checkpoint / "scheduler" / "scheduler_config.json", Bundle.open(tiny_bundle)
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps_offset": 0}))
    opened = Checkpoint.open(checkpoint)
    assert why_not_made_from(bundle, opened) is None
    old = replace(bundle, schedule=replace(bundle.schedule, steps_offset=0))
    said = why_not_made_from(old, opened)
    assert said is not None
    assert "was exported with steps_offset 0, and" in said
    assert said.endswith("has 1 by now")


def told_before_graphs(
    checkpoint: Path, config: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What an export of the checkpoint says before its first graph, with these changes to one of its configs."""

    def stop(*_: object) -> None:
        raise ExportError("that is enough")

    monkeypatch.setattr("magicface_rt.export.exporter.graph_makers", stop)
    file = checkpoint / config
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    told: list[str] = []
    with pytest.raises(ExportError, match="that is enough"):
        export_bundle(Checkpoint.open(checkpoint), checkpoint.parent / "out", report=told.append)
    return told


def test_an_export_says_that_it_takes_another_offset_than_the_checkpoint_has(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    for offset, warnings in (
        (0, ["scheduler: warning: steps_offset is 1 and not 0, as in diffusers' pipeline"]),
        (1, []),
        (None, []),
    ):
        changes = {"steps_offset": offset}
        found = told_before_graphs(checkpoint, "scheduler/scheduler_config.json", changes, monkeypatch)
        assert found == warnings


def test_an_export_says_that_the_text_encoder_has_more_tokens_than_the_tokenizer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings may have been padded, so it is no reason to refuse; or the file that tells of words is missing."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    assert told_before_graphs(checkpoint, "text_encoder/config.json", {"vocab_size": 49408}, monkeypatch) == []
    (warning,) = told_before_graphs(checkpoint, "text_encoder/config.json", {"vocab_size": 49410}, monkeypatch)
    assert warning.startswith("tokenizer: warning: it has 49408 tokens and the text encoder 49410")


def test_a_tokenizer_that_is_written_in_another_way_is_the_same(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    file, bundle = checkpoint / "tokenizer" / "tokenizer.json", Bundle.open(tiny_bundle)
    content = json.loads(file.read_text(encoding="utf-8"))
    for text in (json.dumps(content), json.dumps(content, indent=1).replace("\n", "\r\n")):
        assert text != file.read_text(encoding="utf-8")
        file.write_bytes(text.encode())
        assert why_not_made_from(bundle, Checkpoint.open(checkpoint)) is None


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["concepts", "references"])
def test_a_bundle_that_takes_one_concept_is_verified_with_one(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, limit: str
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["limits"][limit] = 1
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    verdict = verify_bundle(bundle, tiny_checkpoint, steps=2)
    assert verdict.passed, "\n".join(verdict.summary())


def test_a_failed_export_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ExportError("graph text_encoder: tracing failed")

    monkeypatch.setattr("magicface_rt.export.exporter.trace", fail)
    with pytest.raises(ExportError):
        export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("when", ["between hashing and loading", "after the last load"])
def test_weights_that_change_during_the_export_are_noticed(
    when: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the bundle tells the hash of weights that it does not hold, and is taken for theirs."""
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    file = source / "text_encoder" / "model.safetensors"
    makers, content_hash = exporter.graph_makers, Checkpoint.content_hash

    def change() -> None:
        shutil.copyfile(file, tmp_path / "other")
        (tmp_path / "other").replace(file)

    def hashed(checkpoint: Checkpoint) -> str:
        found = content_hash(checkpoint)
        if when == "between hashing and loading":
            change()
        return found

    def report(said: str) -> None:
        if when == "after the last load" and said == "text_encoder: running in PyTorch":
            change()

    monkeypatch.setattr(Checkpoint, "content_hash", hashed)
    monkeypatch.setattr(exporter, "graph_makers", lambda *given: iter([next(makers(*given))]))
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.safetensors was replaced"):
        export_bundle(Checkpoint.open(source), tmp_path / "out" / "bundle", report=report)
    assert not list((tmp_path / "out").iterdir())


def test_too_little_memory_to_trace_is_told_as_that(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("torch.onnx.export", short)
    with pytest.raises(HostMemoryError):
        export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


def test_an_existing_output_folder_is_not_touched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("height", 500), ("width", 0), ("dtype", "int8"), ("injection_layers", (16,)), ("concepts", 7), ("images", 0)],
)
def test_export_options_name_what_is_wrong(field: str, value: object) -> None:
    with pytest.raises(OptionError, match=field):
        ExportOptions(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("graph", ["text_encoder", "vae_encoder", "vae_decoder", "reference_kv", "denoise_step"])
def test_the_tensorrt_files_compute_the_same(tiny_bundle: Path, graph: str) -> None:
    """Their bodies are plain ONNX, so that ONNX Runtime can run them; what TensorRT makes of them is not run here."""
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    contract = bundle.graph(graph)
    sizes = {"B": 2, "R": 2, "K": 2, "M1": 40, "M2": 15}
    inputs = sample_inputs(contract.inputs, sizes, seed=5)
    names = ["eps", "latents_out", "rate"] if graph == "denoise_step" else [t.name for t in contract.outputs]
    found = {}
    for runtime in ("onnxruntime", "tensorrt"):
        path = tiny_bundle / contract.files[runtime]
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found[runtime] = session.run(names, inputs)
    for name, ours, theirs in zip(names, found["onnxruntime"], found["tensorrt"], strict=True):
        assert relative_error(theirs, ours) < 2e-5, name


def test_graph_files_hold_no_trace_of_the_machine_that_made_them(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        assert b"site-packages" not in path.read_bytes()
        assert b".py" not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_every_recording_is_reproduced(case: Path, work: Path) -> None:
    verdict = verify_case(case, work=work)
    assert verdict.passed, "\n".join(verdict.summary())


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "layers"), [(128, 192, range(16)), (320, 64, (0, 3, 6, 8, 15))])
def test_other_sizes_and_injection_layers_hold_parity(
    tiny_checkpoint: Path, tmp_path: Path, height: int, width: int, layers: range
) -> None:
    options = ExportOptions(height=height, width=width, injection_layers=tuple(layers))
    bundle = export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "bundle", options)
    assert Bundle.open(bundle.path).factors == (1, 2, 4, 8)
    verdict = verify_bundle(bundle.path, tiny_checkpoint, steps=2)
    assert verdict.passed, "\n".join(verdict.summary())


@pytest.mark.slow
def test_float16_holds_parity_within_twice_its_own_noise(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "bundle", ExportOptions(dtype="fp16"))
    assert verify_bundle(bundle.path, tiny_checkpoint, steps=2).passed


@pytest.mark.slow
def test_bfloat16_holds_parity_in_float32_arithmetic(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "bundle", ExportOptions(dtype="bf16"))
    for name, parity in bundle.parity.items():
        assert parity["passed"], name
        assert parity["errors"]
        assert "float32 arithmetic" in parity["note"]
    with pytest.raises(BackendError, match="bf16"):
        OnnxRuntime("cpu").load(bundle, "vae_decoder")
    verdict = verify_bundle(tmp_path / "bundle", tiny_checkpoint, backend="onnxruntime-cpu", steps=1)
    assert verdict.passed
    assert len(verdict.reports) == 6
    assert "not made: onnxruntime-cpu has no bfloat16 kernels" in "\n".join(verdict.summary())


@pytest.mark.parametrize("given", [True, False], ids=["in a folder", "among temporary files"])
def test_where_a_bfloat16_graph_cannot_be_widened_the_place_is_named(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, __: object, folder: Path) -> None:
        (folder / "half.bin").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(graph_parity, "widen", full)
    monkeypatch.setattr(tempfile, "tempdir", None if given else str(place))
    stub, wanted = SimpleNamespace(dtype="bfloat16"), SimpleNamespace(graph="g")
    with pytest.raises(OutputError, match=f"graph g: .*{place}: .*Free some space"):
        graph_parity.compare_graph(stub, wanted, OnnxRuntime("cpu"), scratch=place if given else None)  # type: ignore[arg-type]
    assert list(place.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and flock")
def test_what_a_killed_verification_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of a recording's model, and weights in float32: gigabytes, among the system's temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(parity_module, "_replays", lambda *_: [])
    for runner in ("BundleStepRunner", "ReferenceStepRunner"):
        monkeypatch.setattr(parity_module, runner, lambda *_: None)
    monkeypatch.setattr(parity_module, "_case_bundle", lambda _, work, __: fill(work))
    stub, wanted = SimpleNamespace(dtype="bfloat16"), SimpleNamespace(graph="g")

    def compare() -> object:
        return graph_parity.compare_graph(stub, wanted, OnnxRuntime("cpu"))  # type: ignore[arg-type]

    killed(lambda: verify_case(DATA / "recordings" / "guidance-3"))
    (left,) = temporary(tmp_path, "magicface-rt-verify")
    assert (left / "weights.bin").exists()
    found: list[Path] = []
    monkeypatch.setattr(parity_module, "_case_bundle", lambda _, work, __: found.append(work))
    verify_case(DATA / "recordings" / "guidance-3")
    assert found[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    verify_case(DATA / "recordings" / "guidance-3", work=tmp_path / "work")
    assert found[1:] == [tmp_path / "work"]

    monkeypatch.setattr(graph_parity, "widen", lambda _, __, folder: fill(folder))
    killed(compare)
    (left,) = temporary(tmp_path, "magicface-rt-float32")
    assert (left / "weights.bin").exists()
    monkeypatch.setattr(graph_parity, "widen", lambda _, __, folder: pytest.fail(f"{left.exists()} {folder.exists()}"))
    with pytest.raises(pytest.fail.Exception, match="False True"):
        compare()
    assert list(tmp_path.iterdir()) == []


def test_widening_keeps_every_value(tmp_path: Path) -> None:
    """Weights in the shared file and in the graph, constants, casts and the types of inputs and outputs."""
    stored = np.arange(-64, 64, dtype=np.float32).reshape(8, 16)
    outside = onnx.TensorProto(name="outside", data_type=onnx.TensorProto.BFLOAT16, dims=stored.shape)
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": 64, "length": 256}.items():
        outside.external_data.add(key=key, value=str(value))
    half = (stored.view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "weights.bin").write_bytes(bytes(64) + half.tobytes())
    inside = onnx.helper.make_tensor("inside", onnx.TensorProto.BFLOAT16, [1], [0.5])
    constant = onnx.helper.make_tensor("constant", onnx.TensorProto.BFLOAT16, [1], [3.0])
    nodes = [
        onnx.helper.make_node("Constant", [], ["c"], value=constant),
        onnx.helper.make_node("Cast", ["x"], ["x16"], to=onnx.TensorProto.BFLOAT16),
        onnx.helper.make_node("Mul", ["x16", "outside"], ["a"]),
        onnx.helper.make_node("Add", ["a", "inside"], ["b"]),
        onnx.helper.make_node("Mul", ["b", "c"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, [8, 16])],
        [value("y", onnx.TensorProto.BFLOAT16, [8, 16])],
        [outside, inside],
        value_info=[value("a", onnx.TensorProto.BFLOAT16, [8, 16])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save_model(model, str(tmp_path / "g.onnx"))
    contract = GraphContract(
        "g", (Tensor("x", "float32", (8, 16)),), (Tensor("y", "bfloat16", (8, 16)),), {"onnxruntime": "g.onnx"}
    )
    recorded = BundleStub(tmp_path, "bfloat16", {"g": contract})
    out = tmp_path / "wide"
    out.mkdir()
    wide = widen(recorded, "g", out)  # type: ignore[arg-type]
    assert wide.dtype == "float32"
    assert wide.graph("g").outputs[0].dtype == "float32"
    session = onnxruntime.InferenceSession(str(out / "g.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], (x * stored + 0.5) * 3, rtol=1e-6)


@dataclass(frozen=True)
class BundleStub:
    """What `widen` reads of a bundle."""

    path: Path
    dtype: str
    graphs: dict[str, GraphContract]

    def graph(self, name: str) -> GraphContract:
        return self.graphs[name]
