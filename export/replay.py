"""Replaying a recording with any implementation of a step, and judging the result.

There are two modes. `replay_steps` starts every step from the recorded latents; the regions come from the runner's own
previous step. `replay_free` starts from x_T and uses the runner's own latents; it is for cases whose trajectory is
stable enough.

Trajectories are chaotic where labels flip. A cell whose recorded margin is under `NEAR_TIE` may flip under other
arithmetic; such a flip is reported and does not fail. It changes the rate and the next latents of its step and the
regions of the next one. So this step's guidance is then recomputed from the runner's own predictions and the recorded
regions, and judged instead, and the next step is given the recorded regions. A flip anywhere else fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from magicface_rt.errors import RecordingError

from .recordings import Recording
from .reference import (
    CONSTRAINED_BELOW,
    MagicFaceReference,
    StepInputs,
    WeightMode,
    ddim_step,
    guidance_rate,
    guide,
    noise_references,
)

Array = npt.NDArray[Any]

NEAR_TIE = 1e-4  # a margin under this may change its sign under other arithmetic
# measured over 16 recordings, PyTorch on another version: rate 7e-7, margins 2.4e-5 (relative, 2-norm)
RATE_TOLERANCE = 1e-4
MARGIN_TOLERANCE = 1e-3
WIDEST_NEAR_TIE = 1e-3  # however far the margins of a free run have moved
CONSISTENCY_TOLERANCE = 1e-5  # between arrays of a recording that follow from one another


@dataclass(frozen=True, kw_only=True)
class RunnerOutputs:
    """What an implementation computed at one step. The margins are judged if an implementation has them."""

    eps_u: Array  # (1, 4, h, w)
    eps_c: Array  # (1, 4, h, w)
    latents_out: Array  # (1, 4, h, w)
    token_label: Array  # (h/2, w/2) argmax over 77 tokens, before the foreground constraint
    regions: Array  # (N, h/2, w/2) bool, after it
    foreground: Array  # (h/2, w/2) bool
    rate: Array  # (h, w)
    margin: Array | None = None  # (h/2, w/2)
    fore_margin: Array | None = None  # (h/2, w/2)


class StepRunner(Protocol):
    """One implementation, set up for one recording: its schedule, references, prompts and options are fixed."""

    name: str

    def run(self, step: int, latents: Array, regions: Array | None) -> RunnerOutputs:
        """Run step `step` from `latents` f32 [1,4,h,w] and the previous regions bool [N,h/2,w/2] (None at step 0)."""
        ...


# -------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True, kw_only=True)
class TensorCheck:
    """The comparison of one tensor of one step with the recording."""

    name: str
    error: float  # relative, 2-norm of the difference over the 2-norm of the recorded tensor
    tolerance: float
    worst: float  # the largest difference of an element
    worst_at: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # so NaN fails


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One cell that differs. `map` is "label", "foreground" or "regions[k]"."""

    map: str
    row: int
    col: int
    recorded: int
    computed: int
    margin: float  # the recorded one that decides whether this is a near-tie
    near_tie: bool

    def __str__(self) -> str:
        kind = "near-tie" if self.near_tie else "WRONG"
        return f"{kind} {self.map}[{self.row},{self.col}] {self.recorded} -> {self.computed}, margin {self.margin:.1e}"


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The verdict on one step."""

    step: int
    timestep: int
    stage: str
    tensors: tuple[TensorCheck, ...]
    flips: tuple[Flip, ...] = ()
    recorded_regions_in: bool = False  # the step was given the recorded regions, as the previous one had a near-tie
    recorded_regions_out: bool = False  # rate and latents were judged with the recorded regions, as a near-tie flipped

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.tensors) and all(flip.near_tie for flip in self.flips)


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """The verdict on a recording. `faults` are contradictions within the recording itself."""

    case: str
    runner: str
    mode: str  # "steps" or "free"
    steps: tuple[StepReport, ...]
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.faults and bool(self.steps) and all(step.passed for step in self.steps)

    @property
    def near_ties(self) -> tuple[tuple[int, Flip], ...]:
        """(step, flip) of every near-tie that flipped."""
        return tuple((step.step, flip) for step in self.steps for flip in step.flips if flip.near_tie)

    @property
    def wrong_cells(self) -> tuple[tuple[int, Flip], ...]:
        """(step, flip) of every flip that is no near-tie."""
        return tuple((step.step, flip) for step in self.steps for flip in step.flips if not flip.near_tie)

    def worst(self) -> dict[str, tuple[int, TensorCheck]]:
        """For each tensor, the step at which its error was largest relative to its tolerance, and the check there."""
        found: dict[str, tuple[int, TensorCheck]] = {}
        for step in self.steps:
            for check in step.tensors:
                if check.name not in found or _badness(check) > _badness(found[check.name][1]):
                    found[check.name] = (step.step, check)
        return found

    def to_json(self) -> dict[str, Any]:
        """The whole report as JSON values; a figure that is not finite becomes a string."""
        return {
            "case": self.case,
            "runner": self.runner,
            "mode": self.mode,
            "passed": self.passed,
            "faults": list(self.faults),
            "worst": {name: {"step": step, **_check_json(check)} for name, (step, check) in self.worst().items()},
            "near_ties": len(self.near_ties),
            "wrong_cells": len(self.wrong_cells),
            "steps": [
                {
                    "step": step.step,
                    "timestep": step.timestep,
                    "stage": step.stage,
                    "passed": step.passed,
                    "recorded_regions_in": step.recorded_regions_in,
                    "recorded_regions_out": step.recorded_regions_out,
                    "tensors": {check.name: _check_json(check) for check in step.tensors},
                    "flips": [{**vars(flip), "margin": _finite(flip.margin)} for flip in step.flips],
                }
                for step in self.steps
            ],
        }

    def summary(self) -> list[str]:
        """A few lines for people."""
        mode = {"steps": "each step from the recorded latents", "free": "free run from x_T"}[self.mode]
        lines = [
            f"{self.case}: {self.runner}, {mode}, {len(self.steps)} steps: {'passed' if self.passed else 'FAILED'}"
        ]
        for name, (step, check) in self.worst().items():
            verdict = "" if check.passed else "  FAILED"
            lines.append(
                f"  {name:<14} worst {check.error:.1e} of {check.tolerance:.1e} allowed, at step {step}; largest "
                f"difference {check.worst:.1e} at {list(check.worst_at)}{verdict}"
            )
        if self.mode == "steps" or self.near_ties:
            lines.append(f"  near-ties flipped: {len(self.near_ties)}; wrong cells: {len(self.wrong_cells)}")
            shown = [*self.wrong_cells, *self.near_ties]
            lines += [f"    step {step}: {flip}" for step, flip in shown[:10]]
            lines += [f"    and {len(shown) - 10} more"] if len(shown) > 10 else []
        lines += [f"  recording contradicts itself: {fault}" for fault in self.faults]
        return lines


# ------------------------------------------------------------------------------------------------- the replays

ReplayCallback = Callable[[StepReport], None]
"""Called with the report of each step, when it has been judged."""


def replay_steps(
    recording: Recording, runner: StepRunner, *, steps: range | None = None, progress: ReplayCallback | None = None
) -> ReplayReport:
    """Run and judge each step from its recorded latents; `steps` picks a slice of the recorded ones.

    A slice that does not begin at 0 starts from the recorded regions, because the runner has none of its own yet.
    """
    recorded = recording.recorded
    steps = range(recording.recorded_steps) if steps is None else steps
    if not len(steps) or steps.step != 1 or steps.start < 0 or steps.stop > recording.recorded_steps:
        raise RecordingError(
            f"recording {recording.name}: {steps} is no slice of its {recording.recorded_steps} recorded steps."
        )
    reports = []
    regions, from_recording = None, False
    if steps.start > 0:
        regions, from_recording = recorded.concept_mask[steps.start - 1], True
    for i in steps:
        outputs = runner.run(i, recorded.latents_in[i], regions)
        report = _judge(recording, i, outputs, recorded_regions_in=from_recording)
        reports.append(report)
        if progress is not None:
            progress(report)
        from_recording = any(flip.near_tie and flip.map.startswith("regions") for flip in report.flips)
        regions = recorded.concept_mask[i] if from_recording else np.asarray(outputs.regions, dtype=bool)
    return ReplayReport(
        case=recording.name,
        runner=runner.name,
        mode="steps",
        steps=tuple(reports),
        faults=contradictions(recording),
    )


def replay_free(recording: Recording, runner: StepRunner, *, progress: ReplayCallback | None = None) -> ReplayReport:
    """Run from x_T with the runner's own latents and regions; the latents after every step are judged, labels are not.

    If only near-ties flipped, the step's guidance and the next step's regions are taken from the recorded regions, as
    in `replay_steps`: one such cell moves the latents a thousand times further than the arithmetic that flipped it. The
    runner's latents have drifted here, and its margins with them, so a near-tie is as wide as the margins of the cells
    that did not flip have moved in this very step, up to `WIDEST_NEAR_TIE`.

    Raises `RecordingError` for a case that gives no tolerance for a free run.
    """
    if recording.free_run_latents is None:
        raise RecordingError(f"recording {recording.name}: free_run is false; its trajectory is not stable enough.")
    reports = []
    latents, regions = recording.inputs.x_T, None
    for i in range(recording.recorded_steps):
        before, outputs = latents, runner.run(i, latents, regions)
        latents, regions = np.asarray(outputs.latents_out, dtype=np.float32), np.asarray(outputs.regions, dtype=bool)
        flips = _flips(recording, i, outputs, **_widths_after_drift(recording, i, outputs))
        resolved = bool(flips) and all(flip.near_tie for flip in flips)
        own: tuple[TensorCheck, ...] = ()
        if resolved:
            own_owners = owners_of(recording, outputs)
            _, expected = guidance_of(recording, i, outputs, own_owners, outputs.foreground, latents=before)
            own = (compare("own latents", latents, expected, recording.tolerance.latents),)
            owners = recorded_owners(recording, i)
            _, latents = guidance_of(recording, i, outputs, owners, recording.recorded.fore_mask[i], latents=before)
            regions = recording.recorded.concept_mask[i]
        expected = recording.recorded.latents_out[i]
        report = StepReport(
            step=i,
            timestep=_timestep(recording, i),
            stage=recording.stage(i),
            tensors=(*own, compare("latents", latents, expected, recording.free_run_latents)),
            flips=flips if resolved else (),
            recorded_regions_out=resolved,
        )
        reports.append(report)
        if progress is not None:
            progress(report)
    return ReplayReport(
        case=recording.name,
        runner=runner.name,
        mode="free",
        steps=tuple(reports),
        faults=contradictions(recording),
    )


def contradictions(recording: Recording) -> tuple[str, ...]:
    """List the contradictions in a recording, whose arrays must follow from one another and from case.json."""
    recorded, faults = recording.recorded, []
    expected = recording.schedule.timesteps(recording.steps)[: recording.recorded_steps]
    if not np.array_equal(recorded.timesteps, expected):
        faults.append(f"timesteps {recorded.timesteps.tolist()}, but its scheduler gives {expected.tolist()}")
    if not np.array_equal(recorded.latents_in[0], recording.inputs.x_T):
        faults.append("latents_in of step 0 is not x_T")
    for i in range(1, recording.recorded_steps):
        if not np.array_equal(recorded.latents_in[i], recorded.latents_out[i - 1]):
            faults.append(f"latents_in of step {i} is not latents_out of step {i - 1}")
    for i in range(recording.recorded_steps):
        difference = recorded.eps_c[i] - recorded.eps_u[i]
        guided = recorded.eps_u[i] + recording.guidance * recorded.rate[i] * difference
        error = relative_error(guided, recorded.eps_guided[i])
        if not error <= CONSISTENCY_TOLERANCE:
            faults.append(f"eps_guided of step {i} is {error:.1e} from what eps_u, eps_c, rate and the guidance give")
    return tuple(faults)


# ------------------------------------------------------------------------------------------------ the judgement


def relative_error(found: Array, expected: Array) -> float:
    """2-norm of the difference over the 2-norm of what was expected, in float64."""
    difference = np.linalg.norm((np.float64(found) - np.float64(expected)).ravel())
    norm = np.linalg.norm(np.float64(expected).ravel())
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return float(difference / norm)


def compare(name: str, found: Array, expected: Array, tolerance: float) -> TensorCheck:
    """Compare one tensor with the recorded one. Raises `RecordingError` for another shape."""
    found = np.asarray(found)
    if found.shape != expected.shape:
        raise RecordingError(
            f"{name}: the implementation gave shape {found.shape}, the recording has {expected.shape}."
        )
    difference = np.abs(np.float64(found) - np.float64(expected))
    at = np.unravel_index(int(np.argmax(difference)), difference.shape)  # NaN counts as the largest
    return TensorCheck(
        name=name,
        error=relative_error(found, expected),
        tolerance=tolerance,
        worst=float(difference[at]),
        worst_at=tuple(int(index) for index in at),
    )


def _judge(recording: Recording, i: int, outputs: RunnerOutputs, *, recorded_regions_in: bool) -> StepReport:
    """Judge one step that started from the recorded latents."""
    recorded, tolerance = recording.recorded, recording.tolerance
    flips = _flips(recording, i, outputs)
    checks = [
        compare("eps_u", outputs.eps_u, recorded.eps_u[i], tolerance.eps_u),
        compare("eps_c", outputs.eps_c, recorded.eps_c[i], tolerance.eps_c),
    ]
    near_tie = any(flip.near_tie for flip in flips)
    if near_tie:
        # own guidance against own regions, then the recorded guidance against the recorded regions
        own_rate, own_latents = guidance_of(recording, i, outputs, owners_of(recording, outputs), outputs.foreground)
        checks.append(compare("own rate", outputs.rate, own_rate, RATE_TOLERANCE))
        checks.append(compare("own latents", outputs.latents_out, own_latents, tolerance.latents))
        rate, latents = guidance_of(recording, i, outputs, recorded_owners(recording, i), recorded.fore_mask[i])
    else:
        rate, latents = outputs.rate, outputs.latents_out
    checks.append(compare("rate", rate, recorded.rate[i], RATE_TOLERANCE))
    checks.append(compare("latents", latents, recorded.latents_out[i], tolerance.latents))
    for name in ("margin", "fore_margin"):
        if getattr(outputs, name) is not None:
            checks.append(compare(name, getattr(outputs, name), getattr(recorded, name)[i], MARGIN_TOLERANCE))
    return StepReport(
        step=i,
        timestep=_timestep(recording, i),
        stage=recording.stage(i),
        tensors=tuple(checks),
        flips=flips,
        recorded_regions_in=recorded_regions_in,
        recorded_regions_out=near_tie,
    )


def _widths_after_drift(recording: Recording, i: int, outputs: RunnerOutputs) -> dict[str, float]:
    """The margins, of labels and of the foreground, under which this step's drift explains a flip.

    Only cells that agree with the recording count: what a flip did to its own cell must not excuse it. A runner without
    margins, and margins that are not finite, widen nothing.
    """
    recorded = recording.recorded
    of = {
        "width": (outputs.margin, recorded.margin[i], outputs.token_label, recorded.label[i]),
        "fore_width": (outputs.fore_margin, recorded.fore_margin[i], outputs.foreground, recorded.fore_mask[i]),
    }
    widths = {}
    for name, (found, expected, cells, recorded_cells) in of.items():
        moved = 0.0
        if found is not None:
            distances = np.abs(np.float64(found) - np.float64(expected))[np.asarray(cells) == recorded_cells]
            moved = float(distances.max(initial=0.0))
        widths[name] = min(max(NEAR_TIE, moved), WIDEST_NEAR_TIE) if math.isfinite(moved) else NEAR_TIE
    return widths


def _flips(
    recording: Recording, i: int, outputs: RunnerOutputs, *, width: float = NEAR_TIE, fore_width: float = NEAR_TIE
) -> tuple[Flip, ...]:
    """List the cells of label, regions and foreground that differ from the recording, and whether that is excused.

    A label is excused by a margin under `width`, the foreground by its own margin under `fore_width`, a region by the
    first or, if the constraint is active, by the second as well.
    """
    recorded = recording.recorded
    margin, fore_margin = recorded.margin[i], recorded.fore_margin[i]
    of_label, of_foreground = margin < width, fore_margin < fore_width
    constrained = recording.ca_scale < CONSTRAINED_BELOW
    of_region = of_label | of_foreground if constrained else of_label
    region_margin = np.minimum(margin, fore_margin) if constrained else margin
    maps = [
        ("label", outputs.token_label, recorded.label[i], margin, of_label),
        ("foreground", outputs.foreground, recorded.fore_mask[i], fore_margin, of_foreground),
    ]
    found = np.asarray(outputs.regions)
    if found.shape != recorded.concept_mask[i].shape:
        raise RecordingError(
            f"regions: the implementation gave shape {found.shape}, the recording has {recorded.concept_mask[i].shape}."
        )
    maps += [
        (f"regions[{k}]", found[k], expected, region_margin, of_region)
        for k, expected in enumerate(recorded.concept_mask[i])
    ]
    flips = []
    for name, computed, expected, decides, near_tie in maps:
        computed = np.asarray(computed)
        if computed.shape != expected.shape:
            raise RecordingError(
                f"{name}: the implementation gave shape {computed.shape}, the recording has {expected.shape}."
            )
        flips += [
            Flip(
                map=name,
                row=int(row),
                col=int(col),
                recorded=int(expected[row, col]),
                computed=int(computed[row, col]),
                margin=float(decides[row, col]),
                near_tie=bool(near_tie[row, col]),
            )
            for row, col in np.argwhere(computed != expected)
        ]
    return tuple(flips)


def recorded_owners(recording: Recording, i: int) -> Array:
    """Which token owns which cell, bool [77, h/2, w/2], as far as it is recorded.

    The token of a concept that has one owns the concept's recorded mask; the other tokens own by the label, which on an
    exact tie is only one of the winners. So do the tokens of a concept that has several, as a tokenizer may split its
    word: its mask does not tell them apart.
    """
    recorded = recording.recorded
    return _owners(recording, recorded.label[i], recorded.concept_mask[i], recorded.fore_mask[i])


def owners_of(recording: Recording, outputs: RunnerOutputs) -> Array:
    """Which token owns which cell by a runner's own label, regions and foreground, bool [77, h/2, w/2]."""
    return _owners(recording, outputs.token_label, outputs.regions, outputs.foreground)


def _owners(recording: Recording, label: Array, regions: Array, foreground: Array) -> Array:
    owners = np.arange(77)[:, None, None] == np.asarray(label)[None]  # (77, h/2, w/2)
    if recording.ca_scale < CONSTRAINED_BELOW:
        owners &= np.asarray(foreground, dtype=bool)
    for region, tokens in zip(np.asarray(regions, dtype=bool), recording.tokens, strict=True):
        if len(tokens) == 1:
            owners[tokens[0]] = region
    return owners


def guidance_of(
    recording: Recording,
    i: int,
    outputs: RunnerOutputs,
    owners: Array,
    foreground: Array,
    *,
    latents: Array | None = None,
) -> tuple[Array, Array]:
    """Compute rate [h, w] and next latents [1, 4, h, w] of step i from the runner's predictions and the given owners.

    `latents`: those that entered the step; the recorded ones if not given.
    """
    eps_u, eps_c = torch.from_numpy(np.float32(outputs.eps_u)), torch.from_numpy(np.float32(outputs.eps_c))
    if recording.semantic_guidance:
        rate = guidance_rate(
            eps_u,
            eps_c,
            owners=torch.from_numpy(owners),
            foreground=torch.from_numpy(np.array(foreground, dtype=bool)),
            guidance=recording.guidance,
        )
    else:
        rate = torch.ones(recording.latent_size)
    entered = torch.from_numpy(recording.recorded.latents_in[i] if latents is None else latents)
    coefficients = recording.schedule.step_coefficients(recording.steps)[i].tolist()
    following = ddim_step(entered, guide(eps_u, eps_c, rate, recording.guidance), coefficients)
    return rate.numpy(), following.numpy()


def _timestep(recording: Recording, i: int) -> int:
    return int(recording.schedule.timesteps(recording.steps)[i])


def _badness(check: TensorCheck) -> float:
    ratio = check.error / check.tolerance
    return math.inf if math.isnan(ratio) else ratio


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _check_json(check: TensorCheck) -> dict[str, Any]:
    return {
        "error": _finite(check.error),
        "tolerance": check.tolerance,
        "passed": check.passed,
        "worst": _finite(check.worst),
        "worst_at": list(check.worst_at),
    }


# ---------------------------------------------------------------------------------------- the PyTorch reference


class ReferenceStepRunner:
    """The PyTorch reference as a `StepRunner`: each call runs one `MagicFaceReference.step` on recorded inputs."""

    name = "PyTorch reference"

    def __init__(
        self,
        recording: Recording,
        reference: MagicFaceReference | None = None,
        *,
        weight_mode: WeightMode = "bias",
    ) -> None:
        """`reference`: one with the recording's own model and injection layers; made from its folder if not given."""
        self.recording = recording
        self.weight_mode: WeightMode = weight_mode
        if reference is None:
            reference = MagicFaceReference(recording.load_unet(), injection_layers=recording.injection_layers)
        if reference.injection_layers != recording.injection_layers:
            raise RecordingError(
                f"recording {recording.name}: injects in {list(recording.injection_layers)}, the reference given "
                f"in {list(reference.injection_layers)}."
            )
        self.reference = reference
        self.timesteps = recording.schedule.timesteps(recording.steps).tolist()
        self.coefficients = recording.schedule.step_coefficients(recording.steps).tolist()

    def step_inputs(self, step: int, latents: Array, regions: Array | None) -> StepInputs:
        """The inputs of one step as the reference takes them."""
        recording, inputs = self.recording, self.recording.inputs
        z0, noise = torch.from_numpy(inputs.ref_z0), torch.from_numpy(inputs.ref_noise[step])
        return StepInputs(
            latents=torch.from_numpy(np.array(latents, dtype=np.float32)),
            timestep=self.timesteps[step],
            text=torch.from_numpy(np.concatenate([inputs.neg_embeds, inputs.target_embeds])),
            references=noise_references(recording.schedule, z0, noise, self.timesteps[step]),
            reference_text=torch.from_numpy(inputs.ref_embeds),
            reference_masks=torch.from_numpy(inputs.ref_masks),
            weights=torch.tensor(recording.weights, dtype=torch.float32),
            concept_of_reference=recording.concept_of_reference,
            tokens=recording.tokens,
            stage=recording.stage(step),
            regions=None if regions is None else torch.from_numpy(np.array(regions, dtype=bool)),
            ca_scale=recording.ca_scale,
            guidance=recording.guidance,
            coefficients=self.coefficients[step],
            semantic_guidance=recording.semantic_guidance,
            weight_mode=self.weight_mode,
        )

    def run(self, step: int, latents: Array, regions: Array | None) -> RunnerOutputs:
        outputs = self.reference.step(self.step_inputs(step, latents, regions))
        return RunnerOutputs(
            eps_u=outputs.eps_u.numpy(),
            eps_c=outputs.eps_c.numpy(),
            latents_out=outputs.latents.numpy(),
            token_label=outputs.token_label.numpy(),
            regions=outputs.regions.numpy(),
            foreground=outputs.foreground.numpy(),
            rate=outputs.rate.numpy(),
            margin=outputs.margin.numpy(),
            fore_margin=outputs.fore_margin.numpy(),
        )
