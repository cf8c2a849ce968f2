"""What each setting does to a picture: sweeps over alpha, weight, weight mode, semantic guidance, injection layers.

    python -m benchmarks.ablation CHECKPOINT --out DIR [--job FILE] [--steps 20] [--clip DIR] [--dino DIR] [--face DIR]

Computed with the PyTorch reference, so with any checkpoint, and slowly. One setting is changed at a time; the first
picture is the job's own. Writes ablation.csv, ablation.md, sheet.png, and the pictures.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from magicface_rt import Concept, Options
from magicface_rt.concept import place_concepts
from magicface_rt.errors import InputError, MagicFaceError, OutputError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.graphs import Form, VaeDecoder, VaeEncoder
from magicface_rt.export.reference import DEFAULT_INJECTION_LAYERS, generate_latents
from magicface_rt.images import LoadedReference, load_reference, pixels_to_images, region_overlay
from magicface_rt.jobs import load_job
from magicface_rt.regions import MAX_CONCEPTS
from magicface_rt.schedule import reference_noise, target_noise
from magicface_rt.tokenizer import Tokenizer

from .encoders import COLUMNS, Encoders
from .watching import Seen, WatchedReference
from .workload import PROMPT, drawn_concepts

Say = Callable[[str], object]


@dataclass(frozen=True)
class Variant:
    """One setting of everything that is swept. weight: of every concept, None for the job's own."""

    alpha: float
    weight: float | None
    weight_mode: str
    semantic_guidance: bool
    layers: tuple[int, ...]
    seed: int
    changed: str = "as given"


@dataclass(frozen=True)
class Sweeps:
    """The values of each setting, besides the job's own."""

    alphas: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 1.0)
    weights: tuple[float, ...] = (0.0, 1.0, 2.5, 4.0)
    weight_modes: tuple[str, ...] = ("bias", "scale")
    semantic: tuple[bool, ...] = (True, False)
    layers: tuple[tuple[int, ...], ...] = (DEFAULT_INJECTION_LAYERS, (13, 14, 15), (10, 11, 12), tuple(range(16)))

    def variants(self, base: Variant, seeds: Sequence[int]) -> list[Variant]:
        """The job's own, then one change at a time, each once, for every seed."""
        changes: list[tuple[str, dict[str, Any]]] = [("as given", {})]
        changes += [(f"alpha {value:g}", {"alpha": value}) for value in self.alphas]
        changes += [(f"weight {value:g}", {"weight": value}) for value in self.weights]
        changes += [(f"weight mode {value}", {"weight_mode": value}) for value in self.weight_modes]
        changes += [(f"semantic guidance {'on' if v else 'off'}", {"semantic_guidance": v}) for v in self.semantic]
        changes += [(f"layers {_ranges(value)}", {"layers": value}) for value in self.layers]
        found: list[Variant] = []
        for seed in seeds:
            known = set()
            for name, change in changes:
                variant = replace(base, **change, seed=seed)
                if variant not in known:
                    known.add(variant)
                    found.append(replace(variant, changed=name))
        return found


@dataclass(frozen=True)
class Row:
    """What one concept was in one picture. None: it had no region, or an encoder is missing.

    coverage: its part of the cells, mean over the RBA steps; last_coverage: after the last step; mass: of attention on
    its references, in its region, mean over steps and injection layers; mass_everywhere: of all tokens; distance: of
    features, see `watching.Seen`; steps_without_region: of the run's steps, those after which it had none.
    """

    variant: Variant
    concept: str
    coverage: float | None
    last_coverage: float
    mass: float | None
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
            "layers": _ranges(v.layers),
            "concept": self.concept,
            "coverage": self.coverage,
            "last_coverage": self.last_coverage,
            "mass": self.mass,
            "mass_everywhere": self.mass_everywhere,
            "distance": self.distance,
            "steps_without_region": self.steps_without_region,
            "steps": self.steps,
            **{column: self.scores.get(column) for column in COLUMNS},
        }


@dataclass(frozen=True)
class Picture:
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
        side = size or 8 * int(checkpoint.configs["unet"].get("sample_size", 64))
        if side % 64:
            raise InputError(f"size is {side}, expected a multiple of 64.")
        # SD's VAE halves three times, as the latents' 8 pixels a side say.
        self.form = Form(side, side, 8, torch.float32, checkpoint.text_width)
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
        """One picture and a row for each concept, without scores."""
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
        in_rba = [i for i in range(1, steps) if i > int(variant.alpha * steps + 1e-9)]
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
                    _mean(_sum_of(layer, mine) for step in seen for layer in step.mass_everywhere),
                    _mean(layer[r] for step in seen for layer in step.distance for r in mine),
                    int((shares[:, k] == 0).sum()),
                    steps,
                    {},
                )
            )
        return rows

    def cut_outs(self, picture: Picture) -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
        """By concept: its region's bounding box in the picture, and its first reference's mask's. No region: absent."""
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


def run(ablation: Ablation, variants: Sequence[Variant], encoders: Encoders, out: Path, say: Say) -> list[Row]:
    """Every variant; writes what the module's head names.

    Raises:
        OutputError: the folder cannot be written.
    """
    rows: list[Row] = []
    pictures = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, variant in enumerate(variants):
            say(f"{number + 1} of {len(variants)}: seed {variant.seed}, {variant.changed}")
            picture, found = ablation.picture(variant)
            scores = encoders.scores(picture.image, ablation.prompt, *ablation.cut_outs(picture))
            rows += [replace(row, scores=scores) for row in found]
            pictures.append(picture)
            picture.image.save(out / f"{number:03d}.png")
        with (out / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0].cells()))
            writer.writeheader()
            writer.writerows(row.cells() for row in rows)
        (out / "ablation.md").write_text(text(rows, encoders), encoding="utf-8")
        sheet(pictures, [c.name for c in ablation.concepts]).save(out / "sheet.png")
    except OSError as error:
        raise OutputError(f"the ablation cannot be written into {out}: {error}.") from error
    return rows


def text(rows: Sequence[Row], encoders: Encoders) -> str:
    """A Markdown table; says which columns are missing, and what would fill them."""
    head = ["changed", "seed", "concept", "coverage", "last_coverage", "mass", "mass_everywhere", "distance"]
    head += ["steps_without_region", *(column for column in COLUMNS if column not in encoders.missing)]
    lines = ["# Ablation", "", "One setting changed at a time. A dash: the concept had no region to measure in.", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = row.cells()
        lines.append(f"| {' | '.join(_shown(cells[name]) for name in head)} |")
    if encoders.missing:
        options = sorted({f"--{COLUMNS[column]} DIR" for column in encoders.missing})
        lines += ["", f"Missing columns: {', '.join(encoders.missing)}. They need encoders: {', '.join(options)}."]
    return "\n".join(lines) + "\n"


def sheet(pictures: Sequence[Picture], names: Sequence[str], columns: int = 4) -> Image.Image:
    """Every picture with its regions drawn over it, and its setting under it."""
    width, line = 256, 20
    font = ImageFont.load_default(13)
    tiles = []
    for picture in pictures:
        drawn = region_overlay(picture.image, picture.regions, names)
        tiles.append(drawn.resize((width, round(drawn.height * width / drawn.width)), Image.Resampling.LANCZOS))
    height = max(tile.height for tile in tiles) + 2 * line
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * (width + 8) + 8, rows * (height + 8) + 8), "white")
    pen = ImageDraw.Draw(whole)
    for i, (tile, picture) in enumerate(zip(tiles, pictures, strict=True)):
        x, y = 8 + i % columns * (width + 8), 8 + i // columns * (height + 8)
        whole.paste(tile, (x, y))
        pen.text((x, y + tile.height + 2), picture.variant.changed, fill="black", font=font)
        pen.text((x, y + tile.height + 2 + line - 3), f"seed {picture.variant.seed}", fill="#555555", font=font)
    return whole


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


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ranges(layers: Sequence[int]) -> str:
    """(10, 11, 12, 15) -> "10-12+15"."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return "+".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "none"


def _layers(text: str) -> tuple[tuple[int, ...], ...]:
    from magicface_rt.cli.export import parse_layers

    return tuple(parse_layers(part.replace("+", ",")) for part in text.split(";") if part.strip())


def main(argv: Sequence[str] | None = None) -> int:
    default = Sweeps()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=str(__doc__).splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--job", type=Path, help="prompt, concepts and settings; drawn concepts without it")
    parser.add_argument("--steps", type=int, help="instead of the job's")
    parser.add_argument("--size", type=int, help="of the picture; the checkpoint's own without it")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--alphas", default=",".join(map(str, default.alphas)))
    parser.add_argument("--weights", default=",".join(map(str, default.weights)))
    parser.add_argument("--weight-modes", default=",".join(default.weight_modes))
    parser.add_argument("--semantic", default="on,off")
    parser.add_argument("--layers", default=";".join(map(_ranges, default.layers)), help="sets, such as 10-15;13-15")
    for name in ("clip", "dino", "face"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="an encoder's folder")
    a = parser.parse_args(argv)
    try:
        prompt, concepts, options = _request(a.job, a.steps)
        sweeps = Sweeps(
            tuple(map(float, _words(a.alphas))),
            tuple(map(float, _words(a.weights))),
            tuple(_words(a.weight_modes)),
            tuple(word == "on" for word in _words(a.semantic)),
            _layers(a.layers),
        )
        seeds = tuple(map(int, _words(a.seeds)))
        encoders = Encoders({"clip": a.clip, "dino": a.dino, "face": a.face})
        base = Variant(
            options.alpha, None, options.weight_mode, options.semantic_guidance, DEFAULT_INJECTION_LAYERS, seeds[0]
        )
        ablation = Ablation(Checkpoint.open(a.checkpoint), prompt, concepts, options, a.size)
        run(ablation, sweeps.variants(base, seeds), encoders, a.out, print)
        print((a.out / "ablation.md").read_text(encoding="utf-8"), end="")
    except MagicFaceError as error:
        print(f"error: {error}")
        return error.exit_code
    except ValueError as error:
        print(f"error: {error}")
        return 2
    return 0


def _request(job: Path | None, steps: int | None) -> tuple[str, Sequence[Concept], Options]:
    if job is None:
        return PROMPT, drawn_concepts(2, 0.3), Options(steps=steps or 20)
    found = load_job(job)
    return found.prompt, found.concepts, replace(found.options, steps=steps or found.options.steps)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    raise SystemExit(main())
