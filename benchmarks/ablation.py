"""What each setting does to a picture: sweeps over alpha, weight, weight mode, semantic guidance, injection layers.

    python -m benchmarks.ablation CHECKPOINT --out DIR [--job FILE] [--steps 20] [--clip DIR] [--dino DIR] [--face DIR]

Pictures are computed with the PyTorch reference, so with any checkpoint, but slowly. One setting is changed at a time,
and each is tried with every seed: the job's and the three after it, unless --seeds names others. The first pictures
have the job's own settings. Writes ablation.csv and ablation.md (mean and standard deviation over the seeds),
pictures.csv (each picture for itself), sheet.png, and the pictures.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from magicface_rt import Concept, Options
from magicface_rt.errors import MagicFaceError, OptionError, OutputError
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.reference import DEFAULT_INJECTION_LAYERS
from magicface_rt.images import region_overlay
from magicface_rt.jobs import load_job
from magicface_rt.process.interrupts import reraise_if_interrupt

from .ablation_table import summaries, text
from .encoders import Encoders
from .sweeping import SEEDS, Ablation, Picture, Row, Sweeps, Variant, ranges
from .workload import PROMPT, drawn_concepts

Say = Callable[[str], object]


def run(ablation: Ablation, variants: Sequence[Variant], encoders: Encoders, out: Path, say: Say) -> list[Row]:
    """Compute every variant, write the files that the module's docstring names, and return the rows.

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
            rows += [replace(row, scores=scores[row.concept]) for row in found]
            pictures.append(picture)
            picture.image.save(out / f"{number:03d}.png")
            _write(out / "pictures.csv", [row.cells() for row in rows])  # each time: hours may be cut short
        _write(out / "ablation.csv", [one.cells() for one in summaries(rows)])
        (out / "ablation.md").write_text(text(rows, encoders.missing), encoding="utf-8")
        seeds = len({variant.seed for variant in variants})
        sheet(pictures, [c.name for c in ablation.concepts], seeds if seeds > 1 else 4).save(out / "sheet.png")
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"the ablation cannot be written into {out}: {error}.") from error
    return rows


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sheet(pictures: Sequence[Picture], names: Sequence[str], columns: int) -> Image.Image:
    """Draw a sheet of all pictures, each with its regions over it and its setting under it.

    With a column for each seed, a row shows one setting.
    """
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
    parser.add_argument("--seeds", help=f"a picture of each variant with each; the job's and the {SEEDS - 1} after it")
    parser.add_argument("--alphas", default=",".join(map(str, default.alphas)))
    parser.add_argument("--weights", default=",".join(map(str, default.weights)))
    parser.add_argument("--weight-modes", default=",".join(default.weight_modes))
    parser.add_argument("--semantic", default="on,off")
    parser.add_argument("--layers", default=";".join(map(ranges, default.layers)), help="sets, such as 10-15;13-15")
    for name in ("clip", "dino", "face"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="an encoder's folder")
    a = parser.parse_args(argv)
    try:
        prompt, concepts, options = _request(a.job, a.steps)
        sweeps = Sweeps(
            tuple(map(float, _words(a.alphas))),
            tuple(map(float, _words(a.weights))),
            tuple(_words(a.weight_modes)),
            tuple(_switch(word) for word in _words(a.semantic)),
            _layers(a.layers),
        )
        seeds = _seeds(options.seed) if a.seeds is None else tuple(map(int, _words(a.seeds)))
        if not seeds:
            raise OptionError("--seeds is empty, expected at least one whole number.")
        encoders = Encoders({"clip": a.clip, "dino": a.dino, "face": a.face})
        base = Variant(
            options.alpha, None, options.weight_mode, options.semantic_guidance, DEFAULT_INJECTION_LAYERS, seeds[0]
        )
        variants = sweeps.variants(base, seeds)
        ablation = Ablation(Checkpoint.open(a.checkpoint), prompt, concepts, options, a.size)
        run(ablation, variants, encoders, a.out, print)
        print((a.out / "ablation.md").read_text(encoding="utf-8"), end="")
    except MagicFaceError as error:
        print(f"error: {error}")
        return error.exit_code
    except ValueError as error:
        reraise_if_interrupt(error)
        print(f"error: {error}")
        return 2
    return 0


def _request(job: Path | None, steps: int | None) -> tuple[str, Sequence[Concept], Options]:
    if job is None:
        return PROMPT, drawn_concepts(2, 0.3), Options(steps=20 if steps is None else steps)
    found = load_job(job)
    return found.prompt, found.concepts, replace(found.options, steps=found.options.steps if steps is None else steps)


def _seeds(first: int) -> tuple[int, ...]:
    """The first seed and those after it; after the largest comes 0."""
    return tuple((first + k) % 2**64 for k in range(SEEDS))


def _switch(word: str) -> bool:
    if word not in ("on", "off"):
        raise OptionError(f"--semantic has {word!r}, expected on or off.")
    return word == "on"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    raise SystemExit(main())
