"""The baselines compute what they are timed for: they replay a recording, and run the rows that theory counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.baselines.authors import Authors
from benchmarks.baselines.plain import Plain
from benchmarks.baselines.step import Baseline
from benchmarks.baselines.strong import Strong
from magicface_rt.export.recordings import Recording
from magicface_rt.export.replay import ReferenceStepRunner, replay_free, replay_steps
from tests.locations import DATA, GOLDENS

SHIPPED = DATA / "recordings" / "guidance-3"
CASES = sorted(path.parent for path in GOLDENS.glob("*/case.json"))


def runner(kind: type[Baseline], recording: Recording) -> tuple[Baseline, ReferenceStepRunner]:
    baseline = kind(recording.load_unet(), injection_layers=recording.injection_layers)
    return baseline, ReferenceStepRunner(recording, baseline)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "rows"), [(Authors, lambda n: 2 * (1 + n)), (Strong, lambda n: 2 + n)])
def test_a_baseline_replays_a_recording_with_the_rows_of_theory(kind: type[Baseline], rows: Any) -> None:
    recording = Recording.load(SHIPPED)
    baseline, steps = runner(kind, recording)
    report = replay_steps(recording, steps)
    assert report.passed, "\n".join(report.summary())
    assert {step.stage for step in report.steps} == {"rsa", "rba"}
    assert baseline.rows_run == recording.recorded_steps * rows(len(recording.weights))


@pytest.mark.parametrize("kind", [Authors, Strong])
def test_a_baseline_with_another_weight_fails_the_recording(kind: type[Baseline]) -> None:
    from dataclasses import replace

    recording = Recording.load(SHIPPED)
    _, steps = runner(kind, replace(recording, weights=(6.0, 2.0)))
    assert not replay_steps(recording, steps, steps=range(2)).passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Authors, Strong])
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_a_baseline_replays_every_recording(kind: type[Baseline], case: Any) -> None:
    recording = Recording.load(case)
    _, steps = runner(kind, recording)
    assert replay_steps(recording, steps).passed
    if recording.free_run:
        assert replay_free(recording, steps).passed


def test_the_injected_attention_of_the_strong_baseline_takes_a_fused_kernel() -> None:
    """With three dimensions, or another mask, PyTorch would write the logits out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    recording = Recording.load(SHIPPED)
    _, steps = runner(Strong, recording)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert replay_steps(recording, steps).passed


def test_plain_stable_diffusion_is_what_the_schedule_says() -> None:
    """Two rows a step, and the DDIM step of the SDK's own schedule."""
    recording = Recording.load(SHIPPED)
    plain = Plain(recording.load_unet(), recording.schedule, recording.steps)
    text = torch.from_numpy(np.concatenate([recording.inputs.neg_embeds, recording.inputs.target_embeds]))
    latents = torch.from_numpy(recording.inputs.x_T)
    after = plain.step(0, latents, text, 3.0)
    assert plain.rows_run == 2
    timestep = int(recording.schedule.timesteps(recording.steps)[0])
    assert int(plain.scheduler.timesteps[0]) == timestep
    with torch.no_grad():
        u, c = plain.unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
    a, b = recording.schedule.step_coefficients(recording.steps)[0].tolist()
    torch.testing.assert_close(after, a * latents + b * (u + 3.0 * (c - u)), rtol=1e-5, atol=1e-5)
