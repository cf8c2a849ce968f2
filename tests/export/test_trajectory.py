"""Does `verify` notice a wrong graph, and a Session that drives right graphs wrongly?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from magicface_rt import Concept, Options, Result, Session
from magicface_rt.export import reference as oracle
from magicface_rt.export import trajectory
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.reference import MagicFaceReference
from magicface_rt.export.replay import relative_error
from magicface_rt.export.trajectory import drawn_concepts
from magicface_rt.schedule import target_noise

STEPS = Options(steps=3, seed=7)


class Changed(Session):
    """A Session that makes something else of every request."""

    change: dict[str, Any]

    def generate(self, prompt: str, concepts: Any = (), **given: Any) -> Result:  # type: ignore[override]
        options = given.pop("options")
        concepts = [replace(c, weight=c.weight * self.change.get("weights", 1.0)) for c in concepts]
        if self.change.get("swapped"):
            first, second = concepts
            concepts = [replace(first, references=second.references), replace(second, references=first.references)]
        settings = {k: v for k, v in self.change.items() if k not in ("weights", "swapped")}
        return super().generate(prompt, concepts, options=options, **settings)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> MagicFaceReference:
    return MagicFaceReference(checkpoint.load_unet(torch.float32))


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Changed]:
    with Changed(tiny_bundle, backend="onnxruntime-cpu", threads=1) as opened:
        opened.change = {}
        yield opened


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, True),
        pytest.param({"weights": 1.05}, False, marks=pytest.mark.slow),
        ({"guidance": 7.6}, False),
        pytest.param({"alpha": 0.7}, False, marks=pytest.mark.slow),
        ({"swapped": True}, False),
        pytest.param({"reference_seed": 1}, False, marks=pytest.mark.slow),
        pytest.param({"semantic_guidance": False}, False, marks=pytest.mark.slow),
        pytest.param({"seed": 8}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_session_that_does_something_else_is_noticed(
    session: Changed, reference: MagicFaceReference, checkpoint: Checkpoint, change: dict[str, Any], passes: bool
) -> None:
    session.change = change
    steps, same, _ = trajectory._compare_request("request", session, reference, checkpoint, STEPS)
    assert steps.passed, "\n".join(steps.summary())
    assert same.passed is passes, "\n".join(same.summary())


@torch.no_grad()
def test_without_concepts_it_is_plain_stable_diffusion_once_semantic_guidance_is_off(
    session: Changed, checkpoint: Checkpoint
) -> None:
    session.change = {}
    options = replace(STEPS, negative_prompt="rain")
    ids = torch.from_numpy(np.stack([session.tokenizer.encode(text) for text in ("rain", trajectory.PROMPT)])).long()
    unet, text = checkpoint.load_unet(), checkpoint.load_text_encoder()(ids)[0]
    scheduler = DDIMScheduler.from_config(session.bundle.schedule.to_config())
    scheduler.set_timesteps(options.steps)
    bundle = session.bundle
    latents = torch.from_numpy(target_noise(options.seed, 0, (1, bundle.latent_channels, bundle.rows, bundle.columns)))
    for timestep in scheduler.timesteps:
        eps_u, eps_c = unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
        latents = scheduler.step(eps_u + options.guidance * (eps_c - eps_u), timestep, latents).prev_sample

    def made(**settings: Any) -> np.ndarray:
        return session.generate(trajectory.PROMPT, options=replace(options, **settings)).latents

    off = made(semantic_guidance=False)
    assert relative_error(off, latents.numpy()) < trajectory.END_TO_END_TOLERANCE
    others = {"ca_scale": 0.5, "alpha": 0.0, "weight_mode": "scale", "reference_seed": 1}
    np.testing.assert_array_equal(off, made(semantic_guidance=False, **others))
    assert relative_error(made(), latents.numpy()) > 10 * trajectory.END_TO_END_TOLERANCE


def rate_times(factor: float, plain: Any = oracle.guidance_rate) -> Any:
    return lambda *a, **k: plain(*a, **k) * factor


def rate_smoothed_twice(plain: Any = oracle.guidance_rate) -> Any:
    return lambda *a, **k: oracle.smooth(plain(*a, **k)[None])[0]


def rate_clamped_higher(plain: Any = oracle.guidance_rate) -> Any:
    return lambda *a, **k: plain(*a, **k).clamp(min=0.85)


@pytest.mark.parametrize(
    "rate", [rate_times(1.002), rate_smoothed_twice(), rate_clamped_higher()], ids=["factor", "twice", "clamp"]
)
def test_guidance_that_differs_a_little_from_pytorch_is_noticed(
    session: Changed, reference: MagicFaceReference, monkeypatch: pytest.MonkeyPatch, rate: Any
) -> None:
    """Which of the two sides is wrong does not matter, so the oracle is spoiled: it needs no other bundle."""
    from magicface_rt.export.bundle_runner import BundleStepRunner
    from magicface_rt.export.replay import replay_steps

    monkeypatch.setattr(oracle, "guidance_rate", rate)
    concepts: list[Concept] = drawn_concepts()
    recording, _ = trajectory.record("request", session, concepts, STEPS, reference)
    monkeypatch.undo()
    runner = BundleStepRunner(recording, session.bundle, session.backend, runner=session.runner)
    report = replay_steps(recording, runner)
    assert not report.passed
    assert any(check.name in ("rate", "latents") and not check.passed for _, check in report.worst().values())


def test_a_concept_that_has_no_region_changes_nothing_in_the_verdict(
    session: Changed, reference: MagicFaceReference, checkpoint: Checkpoint
) -> None:
    session.change = {}
    options = replace(STEPS, ca_scale=1.0)  # every other word competes fully, so regions shrink
    reports = trajectory._compare_request("request", session, reference, checkpoint, options)
    assert all(report.passed for report in reports), [line for r in reports for line in r.summary()]
