"""Variants of one request, each with one setting changed, and what each does to the concepts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from magicface_rt import Concept, Options
from magicface_rt.concept import place_concepts
from magicface_rt.errors import InputError, OptionError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.graphs import Form, VaeDecoder, VaeEncoder
from magicface_rt.export.reference import DEFAULT_INJECTION_LAYERS, generate_latents
from magicface_rt.images import LoadedReference, load_reference, pixels_to_images
from magicface_rt.regions import MAX_CONCEPTS
from magicface_rt.schedule import is_region_step, reference_noise, target_noise
from magicface_rt.tokenizer import Tokenizer

from .encoders import COLUMNS
from .watching import DISTANCE_LAYERS, Seen, WatchedReference

SEEDS = 4
"""How many seeds each variant's pictures have by default: several, because one picture says little about a setting."""


@dataclass(frozen=True)
class Variant:
    """One setting of everything that is swept. weight: of every concept, None for the job's own weights.

    Raises:
        OptionError: a value that `Options` refuses, or a weight that is not finite.
    """

    alpha: float
    weight: float | None
    weight_mode: str
    semantic_guidance: bool
    layers: tuple[int, ...]
    seed: int
    changed: str = "as given"

    def __post_init__(self) -> None:
        Options(alpha=self.alpha, weight_mode=self.weight_mode, seed=self.seed)  # type: ignore[arg-type]
        if self.weight is not None and not math.isfinite(self.weight):
            raise OptionError(f"weight is {self.weight}, expected a finite number.")


@dataclass(frozen=True)
class Sweeps:
    """The values of each setting, besides the job's own."""

    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 1.0)
    weights: tuple[float, ...] = (0.0, 1.0, 2.5, 4.0)
    weight_modes: tuple[str, ...] = ("bias", "scale")
    semantic: tuple[bool, ...] = (True, False)
    layers: tuple[tuple[int, ...], ...] = (DEFAULT_INJECTION_LAYERS, (13, 14, 15), (10, 11, 12), tuple(range(16)))

    def variants(self, base: Variant, seeds: Sequence[int]) -> list[Variant]:
        """The job's own settings, then one change at a time, each once; each comes with every seed before the next."""
        changes: list[tuple[str, dict[str, Any]]] = [("as given", {})]
        changes += [(f"alpha {value:g}", {"alpha": value}) for value in self.alphas]
        changes += [(f"weight {value:g}", {"weight": value}) for value in self.weights]
        changes += [(f"weight mode {value}", {"weight_mode": value}) for value in self.weight_modes]
        changes += [(f"semantic guidance {'on' if v else 'off'}", {"semantic_guidance": v}) for v in self.semantic]
        changes += [(f"layers {ranges(value)}", {"layers": value}) for value in self.layers]
        named: dict[Variant, str] = {}
        for name, change in changes:
            named.setdefault(replace(base, **change), name)
        return [
            replace(variant, changed=name, seed=seed)
            for variant, name in named.items()
            for seed in dict.fromkeys(seeds)
        ]


@dataclass(frozen=True)
class Row:
    """Figures of one concept in one picture. None: it had no region, or an encoder is missing.

    coverage: its part of the cells, mean over the RBA steps; last_coverage: the same after the last step; mass:
    attention on its references in its region, mean over steps and the variant's injection layers; mass_by_reference: on
    each of them; mass_everywhere: of all tokens; distance: of features, mean over steps and `watching.DISTANCE_LAYERS`,
    which are the same for all variants, see `watching.Seen`; steps_without_region: number of the run's steps after
    which it had no region.
    """

    variant: Variant
    concept: str
    coverage: float | None
    last_coverage: float
    mass: float | None
    mass_by_reference: tuple[float | None, ...]
    mass_everywhere: float | None
    distance: float | None
    steps_without_region: int
    steps: int
    scores: dict[str, float]

    def cells(self) -> dict[str, Any]:
        v = self.variant
        return {
            "changed": v.changed,
            "seed": v.seed,
            "alpha": v.alpha,
            "weight": "as given" if v.weight is None else v.weight,
            "weight_mode": v.weight_mode,
            "semantic_guidance": v.semantic_guidance,
            "layers": ranges(v.layers),
            "concept": self.concept,
            "coverage": self.coverage,
            "last_coverage": self.last_coverage,
            "mass_layers": ranges(v.layers),
            "mass": self.mass,
            "mass_by_reference": " ".join("-" if m is None else f"{m:.6g}" for m in self.mass_by_reference),
            "mass_everywhere": self.mass_everywhere,
            "distance_layers": ranges(DISTANCE_LAYERS),
            "distance": self.distance,
            "steps_without_region": self.steps_without_region,
            "steps": self.steps,
            **{column: self.scores.get(column) for column in COLUMNS},
        }


@dataclass(frozen=True)
class Picture:
    """A picture, and the regions [h/2, w/2] after its last step: k + 1 for concept k, 0 for none."""

    variant: Variant
    image: Image.Image
    regions: np.ndarray  # int64 [h/2, w/2]


class Ablation:
    """A checkpoint, a prompt and its concepts, loaded once; `picture` makes one variant."""

    def __init__(
        self, checkpoint: Checkpoint, prompt: str, concepts: Sequence[Concept], options: Options, size: int | None
    ) -> None:
        self.checkpoint, self.prompt, self.options = checkpoint, prompt, options
        self.unet = checkpoint.load_unet(torch.float32)
        factor = checkpoint.vae_factor
        side = factor * int(checkpoint.configs["unet"].get("sample_size", 64)) if size is None else size
        if side <= 0 or side % 64:
            raise InputError(f"size is {side}, expected a multiple of 64.")
        self.form = Form(side, side, factor, torch.float32, checkpoint.text_width)
        self.shape = (1, self.form.latent_channels, self.form.rows, self.form.columns)
        self.tokenizer = _tokenizer(checkpoint)
        placed = place_concepts(prompt, tuple(concepts), self.tokenizer, MAX_CONCEPTS)
        if not placed:
            raise InputError("the job has no concepts, so there is nothing to ablate.")
        self.concepts = [one.concept for one in placed]
        self.tokens = [one.tokens for one in placed]
        self.owners = [k for k, concept in enumerate(self.concepts) for _ in concept.references]
        self.loaded = [load_reference(r, name=c.name) for c in self.concepts for r in c.references]
        vae = checkpoint.load_vae(torch.float32)
        self.decoder = VaeDecoder(vae, self.form).eval()
        prompts = [options.negative_prompt, prompt, *(r.prompt for c in self.concepts for r in c.references)]
        ids = torch.from_numpy(np.stack([self.tokenizer.encode(p) for p in prompts]))
        with torch.no_grad():
            self.text = checkpoint.load_text_encoder(torch.float32)(input_ids=ids).last_hidden_state
            pixels = np.concatenate([x.pixels(side, side) for x in self.loaded])
            self.z0 = VaeEncoder(vae, self.form).eval()(torch.from_numpy(pixels))

    def picture(self, variant: Variant) -> tuple[Picture, list[Row]]:
        """Make one picture, and a row for each concept, without scores."""
        reference = WatchedReference(self.unet, injection_layers=variant.layers)
        steps, options = self.options.steps, self.options
        noise = [
            np.repeat(reference_noise(options.reference_seed, i, self.shape), len(self.z0), 0) for i in range(steps)
        ]
        weights = [self.concepts[k].weight if variant.weight is None else variant.weight for k in self.owners]
        seen: list[Seen] = []
        regions: list[np.ndarray] = []
        for out in generate_latents(
            reference,
            x_T=torch.from_numpy(target_noise(variant.seed, 0, self.shape)),
            text=self.text[:2],
            z0=self.z0,
            noise=torch.from_numpy(np.stack(noise)),
            reference_text=self.text[2:],
            reference_masks=torch.from_numpy(np.stack([x.mask_grid for x in self.loaded]).astype(bool)),
            weights=torch.tensor(weights, dtype=torch.float32),
            concept_of_reference=self.owners,
            tokens=self.tokens,
            schedule=self.checkpoint.schedule,
            ca_scale=options.effective_ca_scale(len(self.concepts)),
            alpha=variant.alpha,
            guidance=options.guidance,
            weight_mode=variant.weight_mode,  # type: ignore[arg-type]
            semantic_guidance=variant.semantic_guidance,
        ):
            seen.append(reference.seen)
            regions.append(out.regions.numpy())
        with torch.no_grad():
            image = pixels_to_images(self.decoder(out.latents).numpy())[0]
        label = np.zeros(regions[-1].shape[1:], np.int64)
        for k, region in enumerate(regions[-1]):
            label[region] = k + 1
        return Picture(variant, image, label), self._rows(variant, seen, np.stack(regions))

    def _rows(self, variant: Variant, seen: Sequence[Seen], regions: np.ndarray) -> list[Row]:
        """regions: bool [T, N, h/2, w/2]"""
        steps = len(regions)
        shares = regions.mean((2, 3))  # (T, N)
        in_rba = [i for i in range(1, steps) if is_region_step(i, steps, variant.alpha)]
        rows = []
        for k, concept in enumerate(self.concepts):
            mine = [r for r, owner in enumerate(self.owners) if owner == k]
            # What RBA step i uses are the regions of step i - 1.
            used = shares[[i - 1 for i in in_rba], k]
            rows.append(
                Row(
                    variant,
                    concept.name,
                    float(used.mean()) if len(used) else None,
                    float(shares[-1, k]),
                    _mean(_sum_of(layer, mine) for step in seen for layer in step.mass),
                    tuple(_mean(layer[r] for step in seen for layer in step.mass) for r in mine),
                    _mean(_sum_of(layer, mine) for step in seen for layer in step.mass_everywhere),
                    _mean(layer[r] for step in seen for layer in step.distance for r in mine),
                    int((shares[:, k] == 0).sum()),
                    steps,
                    {},
                )
            )
        return rows

    def cut_outs(self, picture: Picture) -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
        """Cut-outs by concept: the box around its region in the picture, and the box around its first reference's mask.

        A concept is absent if its region, or the mask, is empty.
        """
        mine, theirs = {}, {}
        for k, concept in enumerate(self.concepts):
            box = _box(picture.regions == k + 1, picture.image.size)
            if box:
                mine[concept.name] = picture.image.crop(box)
            first: LoadedReference = self.loaded[self.owners.index(k)]
            box = _box(first.mask_grid > 0, first.image.size)
            if box:
                theirs[concept.name] = first.image.crop(box)
        return mine, theirs


def ranges(layers: Sequence[int]) -> str:
    """(10, 11, 12, 15) -> "10-12+15"."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return "+".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "none"


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(checkpoint.tokenizer_json, encoding="utf-8")
        return Tokenizer.from_file(file, pad_token_id=checkpoint.pad_token_id, max_length=checkpoint.max_length)


def _box(mask: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The bounding box of a mask's cells, in pixels of a picture of that size."""
    if not mask.any():
        return None
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = size[0] / mask.shape[1], size[1] / mask.shape[0]
    return int(cols[0] * x), int(rows[0] * y), round((cols[-1] + 1) * x), round((rows[-1] + 1) * y)


def _sum_of(values: Sequence[float | None], which: Sequence[int]) -> float | None:
    chosen = [values[i] for i in which]
    return None if any(value is None for value in chosen) else float(sum(v for v in chosen if v is not None))


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None
