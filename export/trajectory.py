"""A bundle beside the PyTorch reference over a whole request: step by step from the same latents, and end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from magicface_rt.backends import Backend
from magicface_rt.bundle import Bundle
from magicface_rt.concept import Concept, Reference
from magicface_rt.denoiser import Denoiser, Guidance, ReferenceSet
from magicface_rt.images import LoadedReference, load_reference, pixels_to_images
from magicface_rt.options import Options
from magicface_rt.regions import MaskedReference
from magicface_rt.schedule import is_region_step, reference_noise, target_noise
from magicface_rt.session import Session
from magicface_rt.tokenizer import Tokenizer

from .checkpoint import Checkpoint
from .graph_parity import FLOAT32_TOLERANCE
from .graphs import Form, VaeDecoder, VaeEncoder
from .reference import MagicFaceReference, StepOutputs, generate_latents
from .replay import NEAR_TIE, relative_error

END_TO_END_TOLERANCE = 2e-3
"""Relative 2-norm of the latents after a free run in float32 in which no label flipped: errors of 1e-6 a step grow.
The picture, in 8-bit values that may round either way, is allowed twice that."""

AFTER_A_FLIP = 2e-2
"""Where the last regions differ. A near-tie that flips moves the latents by about 2e-3, a wrong setting by far more."""

OTHER_STEPS = 2
"""Steps of the second request: one in each stage."""

PROMPT = "a man with a hat"
"""Holds the words of `drawn_concepts`."""


@dataclass(frozen=True)
class TrajectoryReport:
    """`errors` and `tolerance` by name; a name without a tolerance is reported, not judged. `flips`: labels that
    differ in cells that are no near-ties."""

    name: str
    errors: dict[str, float]
    tolerance: dict[str, float]
    flips: int = 0
    near_ties: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return not self.flips and all(self.errors[name] <= limit for name, limit in self.tolerance.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "errors": self.errors,
            "tolerance": self.tolerance,
            "flips": self.flips,
            "near_ties": self.near_ties,
            "notes": list(self.notes),
        }

    def summary(self) -> list[str]:
        lines = [f"  {self.name}: {'passed' if self.passed else 'FAILED'}"]
        for name, error in self.errors.items():
            limit = f"of {self.tolerance[name]:.1e} allowed" if name in self.tolerance else "(reported, not judged)"
            lines.append(f"    {name:<8} {error:.1e} {limit}")
        if self.flips or self.near_ties:
            lines.append(f"    labels: {self.flips} differ, and {self.near_ties} near-ties")
        return [*lines, *(f"    {note}" for note in self.notes)]


def compare_trajectory(
    bundle: Bundle, backend: Backend, reference: MagicFaceReference, checkpoint: Checkpoint, steps: int
) -> list[TrajectoryReport]:
    """Two requests with two concepts: the usual one over `steps` steps, and a short one with the switches turned.

    For a float32 bundle everything is judged. A 16-bit one is judged graph by graph, where its yardstick is measured;
    here its distances are reported.
    """
    requests = {
        "": Options(steps=steps, seed=7),
        "weight mode scale, alpha 0, no semantic guidance, ": Options(
            steps=OTHER_STEPS, seed=8, weight_mode="scale", alpha=0.0, semantic_guidance=False, ca_scale=0.9
        ),
    }
    with Session(bundle, backend=backend) as session:
        return [
            report
            for name, options in requests.items()
            for report in _compare_request(name, session, reference, checkpoint, options)
        ]


def _compare_request(
    name: str, session: Session, reference: MagicFaceReference, checkpoint: Checkpoint, options: Options
) -> list[TrajectoryReport]:
    bundle, concepts = session.bundle, drawn_concepts()
    loaded = [load_reference(c.references[0], name=c.name) for c in concepts]
    recorded, pixels, _ = run_pytorch(bundle, reference, checkpoint, session.tokenizer, concepts, loaded, options)
    step_report = _step_by_step(name, session, recorded, concepts, loaded, options)
    result = session.generate(PROMPT, concepts, options=options)
    final = recorded[-1]
    labels = np.zeros_like(result.regions[0])
    for k, region in enumerate(final.regions.numpy()):
        labels[region] = k + 1
    flipped = int((labels != result.regions[0]).sum())
    errors = {
        "latents": relative_error(result.latents, final.latents.numpy()),
        "picture": relative_error(np.asarray(result.images[0]), pixels),
    }
    note = (f"{flipped} cells end in another region",) if flipped else ()
    allowed = AFTER_A_FLIP if flipped else END_TO_END_TOLERANCE
    tolerance = {"latents": allowed, "picture": 2 * allowed} if bundle.dtype == "float32" else {}
    title = f"{name}end to end, {options.steps} steps, 8-bit picture"
    end_to_end = TrajectoryReport(title, errors, tolerance, notes=note)
    return [step_report, end_to_end]


def drawn_concepts() -> list[Concept]:
    """Two drawn references: nothing is learnt from them, they only have to differ inside and outside their masks."""
    rng = np.random.default_rng(3)
    concepts = []
    for word, box, weight in (("man", (60, 40, 200, 240), 2.5), ("hat", (30, 100, 220, 170), 2.0)):
        picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.BICUBIC)
        mask = Image.new("L", (256, 256))
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        concepts.append(Concept(word, Reference(picture, mask=mask, prompt=f"a {word}"), weight=weight))
    return concepts


def run_pytorch(
    bundle: Bundle,
    reference: MagicFaceReference,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    concepts: Sequence[Concept],
    loaded: Sequence[LoadedReference],
    options: Options,
) -> tuple[list[StepOutputs], np.ndarray, float]:
    """The request in PyTorch alone.

    Returns every step's outputs, the picture's 8-bit values [H, W, 3], and the seconds spent outside the loop.
    """
    start = perf_counter()
    form = Form.of(bundle, torch.float32)
    prompts = [options.negative_prompt, PROMPT, *(c.references[0].prompt for c in concepts)]
    ids = torch.from_numpy(np.stack([tokenizer.encode(p) for p in prompts]))
    shape = (1, bundle.latent_channels, bundle.rows, bundle.columns)
    with torch.no_grad():
        text = checkpoint.load_text_encoder(torch.float32)(input_ids=ids).last_hidden_state  # [2 + R, 77, D]
        pixels = torch.from_numpy(np.concatenate([x.pixels(bundle.height, bundle.width) for x in loaded]))
        z0 = VaeEncoder(checkpoint.load_vae(torch.float32), form).eval()(pixels)  # [R, 4, h, w]
    noise = np.stack([np.repeat(reference_noise(0, i, shape), len(z0), 0) for i in range(options.steps)])
    outside = perf_counter() - start
    outputs = list(
        generate_latents(
            reference,
            x_T=torch.from_numpy(target_noise(options.seed, 0, shape)),
            text=text[:2],
            z0=z0,
            noise=torch.from_numpy(noise),
            reference_text=text[2:],
            reference_masks=torch.from_numpy(np.stack([x.mask_grid for x in loaded]).astype(bool)),
            weights=torch.tensor([c.weight for c in concepts]),
            concept_of_reference=range(len(concepts)),
            tokens=[tokenizer.find_word(PROMPT, c.word) for c in concepts],
            schedule=checkpoint.schedule,
            ca_scale=options.effective_ca_scale(len(concepts)),
            alpha=options.alpha,
            guidance=options.guidance,
            weight_mode=options.weight_mode,
            semantic_guidance=options.semantic_guidance,
        )
    )
    start = perf_counter()
    with torch.no_grad():
        decoded = VaeDecoder(checkpoint.load_vae(torch.float32), form).eval()(outputs[-1].latents)
    picture = np.asarray(pixels_to_images(decoded.numpy())[0], np.float32)
    return outputs, picture, outside + perf_counter() - start


def _step_by_step(
    request: str,
    session: Session,
    recorded: Sequence[StepOutputs],
    concepts: Sequence[Concept],
    loaded: Sequence[LoadedReference],
    options: Options,
) -> TrajectoryReport:
    """Every step of the bundle from PyTorch's latents and PyTorch's regions of the step before."""
    bundle, tokenizer = session.bundle, session.tokenizer
    denoiser = Denoiser(bundle, session.runner("reference_kv"), session.runner("denoise_step"))
    masked = [MaskedReference(x.mask_grid, k, concepts[k].weight) for k, x in enumerate(loaded)]
    references = ReferenceSet.of(bundle, masked)
    prompts = [options.negative_prompt, PROMPT, *(c.references[0].prompt for c in concepts)]
    text = session.runner("text_encoder").run({"token_ids": np.stack([tokenizer.encode(p) for p in prompts])})["text"]
    pixels = np.concatenate([x.pixels(bundle.height, bundle.width) for x in loaded])
    z0 = session.runner("vae_encoder").run({"pixels": pixels})["latents"]
    guidance = Guidance(
        text=text[:2, None],
        tokens=[tokenizer.find_word(PROMPT, c.word) for c in concepts],
        ca_scale=options.effective_ca_scale(len(concepts)),
        scale=options.guidance,
        semantic=options.semantic_guidance,
        weight_mode=options.weight_mode,
    )
    shape = (1, bundle.latent_channels, bundle.rows, bundle.columns)
    latents = target_noise(options.seed, 0, shape)
    label = np.zeros((1, bundle.rows // 2, bundle.columns // 2), np.int64)
    worst = {"eps_u": 0.0, "eps_c": 0.0}
    flips = near_ties = 0
    coefficients = bundle.schedule.step_coefficients(options.steps)
    for i, timestep in enumerate(map(int, bundle.schedule.timesteps(options.steps))):
        noised = bundle.schedule.add_noise(z0, reference_noise(options.reference_seed, i, shape), timestep)
        out = denoiser.step(
            latents,
            timestep,
            coefficients[i],
            stage="rba" if is_region_step(i, options.steps, options.alpha) else "rsa",
            region_label=label,
            references=references,
            reference_kv=denoiser.reference_kv(references, noised, timestep, text[2:]),
            guidance=guidance,
            outputs=("eps", "token_label"),
        )
        expected = recorded[i]
        worst["eps_u"] = max(worst["eps_u"], relative_error(out["eps"][0], expected.eps_u.numpy()))
        worst["eps_c"] = max(worst["eps_c"], relative_error(out["eps"][1], expected.eps_c.numpy()))
        differs = out["token_label"][0] != expected.token_label.numpy()
        near = differs & (expected.margin.numpy() < NEAR_TIE)
        flips, near_ties = flips + int((differs & ~near).sum()), near_ties + int(near.sum())
        latents = expected.latents.numpy()
        label = np.zeros_like(label)
        for k, region in enumerate(expected.regions.numpy()):
            label[0][region] = k + 1
    name = f"{request}step by step, {options.steps} steps"
    if bundle.dtype != "float32":
        note = f"{flips} labels differ from float32 PyTorch's outside near-ties; judged graph by graph instead"
        return TrajectoryReport(name, worst, {}, near_ties=near_ties, notes=(note,))
    return TrajectoryReport(name, worst, dict.fromkeys(worst, FLOAT32_TOLERANCE), flips, near_ties)
