"""Reading recordings, replaying them, and above all: that a wrong implementation does not pass."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from magicface_rt.errors import RecordingError
from magicface_rt.export.recordings import Recording
from magicface_rt.export.reference import MagicFaceReference
from magicface_rt.export.replay import (
    ReferenceStepRunner,
    RunnerOutputs,
    contradictions,
    guidance_of,
    recorded_owners,
    replay_free,
    replay_steps,
)
from magicface_rt.schedule import Schedule
from tests.locations import DATA, GOLDENS

RECORDINGS = DATA / "recordings"
CASE = RECORDINGS / "guidance-3"
SWITCH = range(3, 5)  # of CASE: the last step of the first stage and the first of the second

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.load(CASE)


@pytest.fixture(scope="module")
def unet(recording):
    return recording.load_unet()


def runner_of(recording: Recording, unet) -> ReferenceStepRunner:
    return ReferenceStepRunner(recording, MagicFaceReference(unet, injection_layers=recording.injection_layers))


# ---------------------------------------------------------------------------------- the reference reproduces them


def test_the_reference_reproduces_the_recording_step_by_step(recording, unet):
    report = replay_steps(recording, runner_of(recording, unet))
    assert report.passed, "\n".join(report.summary())
    assert [step.stage for step in report.steps] == ["rsa"] * 4 + ["rba"]
    assert max(check.error for _, check in report.worst().values()) < 1e-4


def test_the_reference_reproduces_the_recording_from_its_noise(recording, unet):
    report = replay_free(recording, runner_of(recording, unet))
    assert report.passed, "\n".join(report.summary())


SHARED_CASES = [
    pytest.param(path.parent, id=path.parent.name, marks=pytest.mark.slow)
    for path in sorted(GOLDENS.glob("*/case.json"))
] or [pytest.param(None, marks=pytest.mark.skip(reason=f"{GOLDENS} is not there"), id="shared")]


@pytest.mark.parametrize("folder", SHARED_CASES)
def test_the_reference_reproduces_every_recording(folder):
    recording = Recording.load(folder)
    runner = ReferenceStepRunner(recording)
    reports = [replay_steps(recording, runner)] + ([replay_free(recording, runner)] if recording.free_run else [])
    for report in reports:
        assert report.passed, "\n".join(report.summary())


# --------------------------------------------------------------------------------------------- spoiled ones fail


def with_inputs(recording: Recording, **changes) -> Recording:
    return replace(recording, inputs=replace(recording.inputs, **changes))


def with_recorded(recording: Recording, **changes) -> Recording:
    return replace(recording, recorded=replace(recording.recorded, **changes))


def with_weight(recording: Recording, factor: float) -> Recording:
    return replace(recording, weights=(recording.weights[0] * factor, *recording.weights[1:]))


def without_offset(recording: Recording) -> Recording:
    schedule = replace(recording.schedule, steps_offset=0)
    return with_recorded(replace(recording, schedule=schedule), timesteps=recording.recorded.timesteps - 1)


SPOILED = {
    "layers one later": lambda r: replace(r, injection_layers=(11, 12, 13, 14, 15)),
    "layers one earlier": lambda r: replace(r, injection_layers=(9, 10, 11, 12, 13, 14)),
    "last layer left out": lambda r: replace(r, injection_layers=(10, 11, 12, 13, 14)),
    "references swapped": lambda r: with_inputs(r, ref_z0=r.inputs.ref_z0[::-1].copy()),
    "reference prompts swapped": lambda r: with_inputs(r, ref_embeds=r.inputs.ref_embeds[::-1].copy()),
    "reference prompts are the negative one": lambda r: with_inputs(r, ref_embeds=r.inputs.neg_embeds.repeat(2, 0)),
    "reference noise swapped": lambda r: with_inputs(r, ref_noise=r.inputs.ref_noise[:, ::-1].copy()),
    "reference noise of step 0": lambda r: with_inputs(r, ref_noise=r.inputs.ref_noise[:1].repeat(5, 0)),
    "masks swapped": lambda r: with_inputs(r, ref_masks=r.inputs.ref_masks[::-1].copy()),
    "masks one cell lower": lambda r: with_inputs(r, ref_masks=np.roll(r.inputs.ref_masks, 4, axis=1)),
    "masks ignored": lambda r: with_inputs(r, ref_masks=np.ones_like(r.inputs.ref_masks)),
    "first weight doubled": lambda r: with_weight(r, 2.0),
    "first weight 5 % more": lambda r: with_weight(r, 1.05),
    "weights swapped": lambda r: replace(r, weights=r.weights[::-1]),
    "token index one later": lambda r: replace(r, tokens=tuple((token + 1,) for (token,) in r.tokens)),
    "tokens swapped": lambda r: replace(r, tokens=r.tokens[::-1]),
    "ca_scale 0.05 more": lambda r: replace(r, ca_scale=r.ca_scale + 0.05),
    "no foreground constraint": lambda r: replace(r, ca_scale=0.9),
    "guidance 1 % more": lambda r: replace(r, guidance=r.guidance * 1.01),
    "rate off": lambda r: replace(r, semantic_guidance=False),
    "switch one step later": lambda r: replace(r, inject_step=r.inject_step + 1),
    "switch one step earlier": lambda r: replace(r, inject_step=r.inject_step - 1),
    "injection ends too early": lambda r: replace(r, end_step=4),
    "timesteps without the offset": without_offset,
    "another schedule": lambda r: replace(r, schedule=Schedule(beta_end=0.0125)),
    "prompts swapped": lambda r: with_inputs(r, neg_embeds=r.inputs.target_embeds, target_embeds=r.inputs.neg_embeds),
}
# one step each, so that they are quick: the others are tried in the first step of the second stage
SEEN_IN_FIRST_STAGE = {
    "layers one later",
    "references swapped",
    "masks ignored",
    "first weight 5 % more",
    "weights swapped",
    "switch one step earlier",
}
# each much like another of them, of which the quick tests try that one
LIKE_OTHERS = {
    "layers one earlier": "layers one later",
    "last layer left out": "layers one later",
    "reference prompts are the negative one": "reference prompts swapped",
    "reference noise of step 0": "reference noise swapped",
    "first weight doubled": "first weight 5 % more",
    "tokens swapped": "token index one later",
    "no foreground constraint": "ca_scale 0.05 more",
    "switch one step later": "switch one step earlier",
}
assert LIKE_OTHERS.keys() <= SPOILED.keys()
assert set(LIKE_OTHERS.values()) <= SPOILED.keys() - LIKE_OTHERS.keys()
SPOILED_STEPS = {  # what was computed is right, what is recorded is not
    "predictions swapped": lambda r: with_recorded(r, eps_u=r.recorded.eps_c, eps_c=r.recorded.eps_u),
    "labels of the next cell": lambda r: with_recorded(r, label=np.roll(r.recorded.label, 1, axis=2)),
    "regions swapped": lambda r: with_recorded(r, concept_mask=r.recorded.concept_mask[:, ::-1].copy()),
    "foreground turned round": lambda r: with_recorded(r, fore_mask=~r.recorded.fore_mask),
    "rate 0.1 % more": lambda r: with_recorded(r, rate=r.recorded.rate * np.float32(1.001)),
    "next latents 0.1 % more": lambda r: with_recorded(r, latents_out=r.recorded.latents_out * np.float32(1.001)),
    "every margin a near-tie": lambda r: with_recorded(r, margin=r.recorded.margin * np.float32(1e-6)),
}


@pytest.fixture(scope="module")
def computed(recording, unet) -> dict[int, dict]:
    """What the reference computes at the two steps around the switch."""
    runner, recorded = runner_of(recording, unet), recording.recorded
    return {i: vars(runner.run(i, recorded.latents_in[i], recorded.concept_mask[i - 1])) for i in SWITCH}


@pytest.mark.parametrize("fault", SPOILED_STEPS)
def test_spoiled_recorded_steps_fail(recording, computed, fault):
    assert replay_steps(recording, Playback(recording, computed), steps=SWITCH).passed
    spoiled = SPOILED_STEPS[fault](recording)
    report = replay_steps(spoiled, Playback(spoiled, computed), steps=SWITCH)
    assert not all(step.passed for step in report.steps)


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] if fault in LIKE_OTHERS else []) for fault in SPOILED]
)
def test_a_spoiled_recording_fails(recording, unet, fault):
    spoiled = SPOILED[fault](recording)
    step = SWITCH.start if fault in SEEN_IN_FIRST_STAGE else SWITCH.start + 1
    report = replay_steps(spoiled, runner_of(spoiled, unet), steps=range(step, step + 1))
    assert not report.steps[0].passed  # whatever contradictions of the recording itself say


def test_a_spoiled_recording_fails_from_its_noise(recording, unet):
    spoiled = with_weight(recording, 1.05)
    assert not replay_free(spoiled, runner_of(spoiled, unet)).passed


def test_contradictions_within_a_recording_are_found(recording):
    recorded = recording.recorded
    assert contradictions(recording) == ()
    assert "timesteps" in contradictions(with_recorded(recording, timesteps=recorded.timesteps - 1))[0]
    assert "x_T" in contradictions(with_inputs(recording, x_T=recording.inputs.x_T + 1))[0]
    assert "latents_in of step 1" in contradictions(with_recorded(recording, latents_in=recorded.latents_in * 2))[1]
    assert "eps_guided of step 0" in contradictions(with_recorded(recording, rate=recorded.rate * 1.001))[0]


# -------------------------------------------------------------------------------------------------- near-ties


@dataclass
class Playback:
    """A runner that gives back what is recorded, or what `changed` holds for a step, and notes the regions it gets."""

    recording: Recording
    changed: dict[int, dict]
    name: str = "playback"

    def __post_init__(self) -> None:
        self.regions_in: dict[int, np.ndarray | None] = {}

    def run(self, step, latents, regions):
        recorded = self.recording.recorded
        self.regions_in[step] = regions
        values = {
            "eps_u": recorded.eps_u[step],
            "eps_c": recorded.eps_c[step],
            "latents_out": recorded.latents_out[step],
            "token_label": recorded.label[step],
            "regions": recorded.concept_mask[step],
            "foreground": recorded.fore_mask[step],
            "rate": recorded.rate[step],
        }
        return RunnerOutputs(**{**values, **self.changed.get(step, {})})


def flip(recording: Recording, unet, step: int) -> tuple[int, int, dict]:
    """A cell of the first concept given to token 0 by an otherwise right implementation: the cell and its outputs."""
    recorded = recording.recorded
    row, col = np.argwhere(recorded.concept_mask[step, 0])[0]
    label, regions = recorded.label[step].copy(), recorded.concept_mask[step].copy()
    label[row, col], regions[0, row, col] = 0, False
    changed = {"token_label": label, "regions": regions}
    # the guidance that belongs to these regions, from the recorded predictions
    spoiled = with_recorded(
        recording,
        label=np.where(np.arange(5)[:, None, None] == step, label, recorded.label),
        concept_mask=np.where(np.arange(5)[:, None, None, None] == step, regions, recorded.concept_mask),
    )
    outputs = Playback(recording, {step: changed}).run(step, None, None)
    rate, latents = guidance_of(recording, step, outputs, recorded_owners(spoiled, step), recorded.fore_mask[step])
    return row, col, {**changed, "rate": rate, "latents_out": latents}


def with_margin(recording: Recording, step: int, row: int, col: int, value: float) -> Recording:
    margin = recording.recorded.margin.copy()
    margin[step, row, col] = value
    return with_recorded(recording, margin=margin)


def test_playing_back_a_recording_passes_and_hands_its_regions_on(recording):
    runner = Playback(recording, {})
    assert replay_steps(recording, runner).passed
    assert runner.regions_in[0] is None
    assert np.array_equal(runner.regions_in[4], recording.recorded.concept_mask[3])


def test_a_near_tie_that_flips_is_reported_and_the_next_step_gets_the_recorded_regions(recording, unet):
    row, col, changed = flip(recording, unet, 2)
    near = with_margin(recording, 2, row, col, 5e-5)
    runner = Playback(near, {2: changed})
    report = replay_steps(near, runner)
    assert report.passed, "\n".join(report.summary())
    assert {(step, f.map, f.row, f.col) for step, f in report.near_ties} == {
        (2, "label", row, col),
        (2, "regions[0]", row, col),
    }
    assert report.steps[2].recorded_regions_out
    assert report.steps[3].recorded_regions_in
    assert np.array_equal(runner.regions_in[3], recording.recorded.concept_mask[2])
    assert "near-tie label" in "\n".join(report.summary())


def test_a_near_tie_may_flip_where_a_concept_has_several_tokens(recording, unet):
    """`verify` records such requests where the checkpoint's tokenizer splits a word."""
    recorded, (first, *others) = recording.recorded, recording.tokens
    taken = {token for group in recording.tokens for token in group}
    found, cells = np.unique(recorded.label[2], return_counts=True)
    second = max((count, int(token)) for token, count in zip(found, cells, strict=True) if token not in taken)[1]
    owned = np.isin(recorded.label, (*first, second)) & (recorded.fore_mask | (recording.ca_scale >= 0.9))
    masks = np.concatenate([owned[:, None], recorded.concept_mask[:, 1:]], axis=1)
    assert masks[2, 0].sum() > recorded.concept_mask[2, 0].sum(), "the second token has cells of its own"
    split = with_recorded(replace(recording, tokens=((*first, second), *others)), concept_mask=masks)
    row, col, changed = flip(split, unet, 2)
    near = with_margin(split, 2, row, col, 5e-5)
    for report in (replay_steps(near, Playback(near, {2: changed})), replay_free(near, Playback(near, {2: changed}))):
        assert report.passed, "\n".join(report.summary())
        assert report.steps[2].recorded_regions_out
    wrong = {**changed, "latents_out": changed["latents_out"] * np.float32(1.001)}
    assert not replay_steps(near, Playback(near, {2: wrong})).passed


def test_a_flip_that_is_no_near_tie_fails(recording, unet):
    row, col, changed = flip(recording, unet, 2)
    clear = with_margin(recording, 2, row, col, 2e-4)
    report = replay_steps(clear, Playback(clear, {2: changed}))
    assert not report.passed
    assert len(report.wrong_cells) == 2


def test_a_near_tie_does_not_excuse_wrong_latents_or_predictions(recording, unet):
    row, col, changed = flip(recording, unet, 2)
    near = with_margin(recording, 2, row, col, 5e-5)
    recorded = recording.recorded
    for name, value in [
        ("latents_out", changed["latents_out"] * np.float32(1.001)),
        ("latents_out", recorded.latents_out[2]),  # of other regions than the runner says it has
        ("rate", recorded.rate[2]),
        ("eps_c", recorded.eps_c[2] * np.float32(1.0001)),
    ]:
        assert not replay_steps(near, Playback(near, {2: {**changed, name: value}})).passed, name


def test_a_free_run_goes_on_with_the_recorded_regions_where_only_near_ties_flipped(recording, unet):
    row, col, changed = flip(recording, unet, 2)
    near = with_margin(recording, 2, row, col, 5e-5)
    runner = Playback(near, {2: changed})
    report = replay_free(near, runner)
    assert report.passed, "\n".join(report.summary())
    assert report.steps[2].recorded_regions_out
    assert np.array_equal(runner.regions_in[3], recording.recorded.concept_mask[2])
    assert report.worst()["latents"][1].error < 1e-5


def test_a_free_run_excuses_neither_other_flips_nor_latents_that_do_not_follow(recording, unet):
    row, col, changed = flip(recording, unet, 2)
    strict = replace(recording, free_run_latents=1e-6)
    clear = with_margin(strict, 2, row, col, 2e-4)
    report = replay_free(clear, Playback(clear, {2: changed}))
    assert not report.passed
    assert not report.steps[2].recorded_regions_out
    near = with_margin(recording, 2, row, col, 5e-5)
    for name, value in [
        ("latents_out", changed["latents_out"] * np.float32(1.001)),
        ("eps_c", recording.recorded.eps_c[2] * np.float32(1.01)),
    ]:
        assert not replay_free(near, Playback(near, {2: {**changed, name: value}})).passed, name


@pytest.mark.parametrize(
    ("moved", "margin", "excused"),
    [(5e-4, 2e-4, True), (1.5e-4, 2e-4, False), (5e-2, 2e-3, False), (np.nan, 2e-4, False)],
    ids=["the drift explains it", "the drift is smaller", "wider than any near-tie", "no margins to speak of"],
)
def test_a_free_run_excuses_a_flip_as_far_as_the_margins_have_moved(recording, unet, moved, margin, excused):
    row, col, changed = flip(recording, unet, 2)
    drifted = with_margin(replace(recording, free_run_latents=1e-6), 2, row, col, margin)
    margins = drifted.recorded.margin[2].copy()
    margins[row, col] += 1.0  # what happened to the cell itself excuses nothing
    margins[(row + 1) % len(margins), col] += moved
    report = replay_free(drifted, Playback(drifted, {2: {**changed, "margin": margins}}))
    assert report.passed == excused
    assert report.steps[2].recorded_regions_out == excused


def test_one_step_excuses_no_flip_by_margins_that_have_moved(recording, unet):
    """From the recorded latents nothing has drifted."""
    row, col, changed = flip(recording, unet, 2)
    clear = with_margin(recording, 2, row, col, 2e-4)
    margins = clear.recorded.margin[2] + np.float32(5e-4)
    report = replay_steps(clear, Playback(clear, {2: {**changed, "margin": margins}}))
    assert len(report.wrong_cells) == 2


def test_predictions_that_are_not_finite_fail(recording):
    broken = np.full_like(recording.recorded.eps_c[1], np.nan)
    report = replay_steps(recording, Playback(recording, {1: {"eps_c": broken}}))
    assert not report.passed
    assert report.to_json()["worst"]["eps_c"]["error"] == "nan"
    json.dumps(report.to_json(), allow_nan=False)


def test_a_report_says_where_the_worst_element_is(recording):
    eps = recording.recorded.eps_u[1].copy()
    eps[0, 2, 5, 7] += 1
    report = replay_steps(recording, Playback(recording, {1: {"eps_u": eps}}))
    step, check = report.worst()["eps_u"]
    assert (step, check.worst_at, check.passed) == (1, (0, 2, 5, 7), False)
    assert "at [0, 2, 5, 7]  FAILED" in "\n".join(report.summary())
    assert report.to_json()["passed"] is False


# ------------------------------------------------------------------------------------------------ reading them


def copy_case(folder: Path, **changes) -> Path:
    """A copy of the case in a folder of its own, with other values in its case.json; None takes a key out."""
    target = folder / "case"
    shutil.copytree(CASE, target)
    case = json.loads((CASE / "case.json").read_text()) | {"model": str(RECORDINGS / "models" / "sd15-mini")} | changes
    (target / "case.json").write_text(json.dumps({key: value for key, value in case.items() if value is not None}))
    return target


def rewrite(path: Path, **changes) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_a_shortened_recording_says_so(recording):
    assert (recording.steps, recording.recorded_steps) == (8, 5)
    assert recording.recorded.timesteps.tolist() == recording.schedule.timesteps(8)[:5].tolist()


def test_layers_that_do_not_exist_and_surplus_weights_are_ignored(tmp_path):
    found = Recording.load(copy_case(tmp_path, layer_idx=[15, 12, 16, 40, -1], mask_weights=[3, 2, 9.0]))
    assert found.injection_layers == (12, 15)
    assert found.weights == (3.0, 2.0)


def test_references_beyond_the_tokens_belong_to_no_concept(tmp_path):
    folder = copy_case(tmp_path, ref_index=[4])
    rewrite(folder / "steps.npz", concept_mask=Recording.load(CASE).recorded.concept_mask[:, :1])
    assert Recording.load(folder).concept_of_reference == (0, -1)


def test_the_stages_follow_the_recorded_settings(recording):
    assert replace(recording, inject_step=-1).stages == replace(recording, inject_step=0).stages
    assert replace(recording, inject_step=0).stages == ("rsa",) + ("rba",) * 7
    assert replace(recording, inject_step=50).stages == ("rsa",) * 8
    assert replace(recording, start_step=2, end_step=6).stages == (
        *("off",) * 2,
        *("rsa",) * 2,
        *("rba",) * 2,
        *("off",) * 2,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 7.5}, "steps is 7.5"),
        ({"recorded_steps": 9}, "at most steps"),
        ({"recorded_steps": None}, r"shape \[5, 2, 4, 32, 32\], expected \[8, 2, 4, 32, 32\]"),
        ({"ca_scale": None}, "lacks ca_scale"),
        ({"ca_scale": "0.6"}, "a finite number"),
        ({"guidance_scale": float("nan")}, "a finite number"),
        ({"use_rate": 1}, "true or false"),
        ({"ref_index": [4, 77]}, "positions 0..76"),
        ({"mask_weights": [3.0]}, "at least 2 numbers"),
        ({"latent_size": [32, 36]}, "multiples of 8"),
        ({"latent_size": [40, 40], "mask_size": [20, 20]}, "x_T has shape"),
        ({"mask_size": [8, 8]}, "half of latent_size"),
        ({"n_refs": 3, "mask_weights": [1, 1, 1]}, "ref_embeds has shape"),
        ({"tolerance": {"eps_u": 1e-5, "eps_c": 1e-5}}, "lacks tolerance.latents"),
        ({"scheduler": {"prediction_type": "v_prediction"}}, "scheduler.prediction_type"),
        ({"scheduler": {"num_train_timesteps": 1000}}, "lacks scheduler.beta_start"),
        (
            {"model": "../nowhere"},
            r"case\.json: model is '\.\./nowhere', .*config\.json: missing\. .*\.safetensors\)\.$",
        ),
        ({"free_run_latents": None}, "lacks free_run_latents"),
    ],
)
def test_a_case_with_a_wrong_setting_is_refused(tmp_path, changes, message):
    with pytest.raises(RecordingError, match=message):
        Recording.load(copy_case(tmp_path, **changes))


@pytest.mark.parametrize(
    ("file", "name", "value", "message"),
    [
        ("inputs.npz", "x_T", None, "lacks x_T"),
        ("inputs.npz", "ref_masks", np.full((2, 128, 128), 255, np.uint8), "other values than 0 and 1"),
        ("inputs.npz", "ref_z0", np.full((2, 4, 32, 32), np.inf), "NaN or infinity"),
        ("inputs.npz", "ref_embeds", np.zeros((2, 77, 48)), r"expected \[2, 77, 32\]"),
        ("inputs.npz", "neg_embeds", np.zeros((77, 32)), r"expected \[1, 77, D\]"),
        ("steps.npz", "eps_c", np.array([object()], dtype=object), "cannot be read"),
        ("steps.npz", "label", np.full((5, 16, 16), 77), "outside 0..76"),
        ("steps.npz", "label", np.zeros((5, 16, 16)), "expected int"),
        ("steps.npz", "concept_mask", np.zeros((5, 3, 16, 16), bool), "concept_mask has shape"),
    ],
)
def test_a_case_with_a_wrong_array_is_refused(tmp_path, file, name, value, message):
    folder = copy_case(tmp_path)
    rewrite(folder / file, **{name: value})
    with pytest.raises(RecordingError, match=message):
        Recording.load(folder)


@pytest.mark.parametrize("file", ["case.json", "inputs.npz", "steps.npz"])
def test_a_missing_or_truncated_file_is_refused(tmp_path, file):
    path = copy_case(tmp_path) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RecordingError, match=f"{file}: cannot be read"):
        Recording.load(path.parent)
    path.unlink()
    with pytest.raises(RecordingError, match=f"{file}: missing"):
        Recording.load(path.parent)


def test_a_missing_folder_and_pickled_weights_are_refused(tmp_path):
    with pytest.raises(RecordingError, match="no such folder"):
        Recording.load(tmp_path / "nowhere")
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(RECORDINGS / "models" / "sd15-mini" / "config.json", model)
    (model / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RecordingError, match="safetensors: missing"):
        Recording.load(copy_case(tmp_path, model=str(model)))


def test_steps_outside_the_recording_and_unstable_free_runs_are_refused(recording):
    with pytest.raises(RecordingError, match="no slice"):
        replay_steps(recording, Playback(recording, {}), steps=range(3, 6))
    with pytest.raises(RecordingError, match="not stable"):
        replay_free(replace(recording, free_run_latents=None), Playback(recording, {}))


def test_a_reference_of_other_layers_is_refused(recording, unet):
    with pytest.raises(RecordingError, match="injects in"):
        ReferenceStepRunner(recording, MagicFaceReference(unet, injection_layers=(15,)))
