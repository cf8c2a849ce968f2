"""What can be recovered of a photograph from a kept concept, measured on the miniature.

    python -m benchmarks.miniature.privacy --out DIR

The attacker has the bundle, draws pictures of their own, prepares them, and trains a small network that reads one kept
token (keys and values of the layers with the finest grid) and predicts what its place in the picture looked like, and
where that place was. The network is then given kept concepts of people in looks that it has never seen. Nothing here is
specific to the miniature, except that such pictures can be drawn without end.

Writes privacy.json, privacy.md and sheet.png. privacy.json also says on which machine, when, at which commit and with
which bundle it was measured. docs/privacy.md has the findings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from magicface_rt import Concept, MagicFaceError, Reference, Session
from magicface_rt.bundle import reference_tensor_names
from magicface_rt.errors import OptionError, OutputError
from magicface_rt.images import layer_mask, mask_grid
from magicface_rt.process.interrupts import reraise_if_interrupt

from ..machine import describe
from .quality import autoencoded, open_model
from .sheets import eight_bits, tile
from .shipping import WEIGHTS
from .world import Pictures, World

ATTACKER, VICTIM = 3_000_017, 3_000_029  # worlds that the miniature never saw
STEPS = 10
BATCH, WIDTH, EPOCHS, RATE = 1024, 512, 12, 1e-3
SHOWN, TILE = 8, 96


@dataclass(frozen=True)
class Taken:
    """What was kept of one picture, and the truth about it.

    keys     float16 [T, M, C]: for each step and kept token, the keys and values of the finest layers side by side
    cells    int64 [M]: where the tokens lie on that grid, row by row
    patches  float32 [M, 3, p, p]: what the picture shows there, -1..1
    """

    keys: Tensor
    cells: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Row:
    """An attack, or something to compare it with. Figures are means over victims.

    psnr      of the recovered pixels, dB (peak to peak 2)
    named     share of victims whose recovered picture is nearer to their own photograph than to any other victim's
    distance  between a token's true place and the predicted one, cells
    """

    name: str
    psnr: float
    named: float
    distance: float | None = None


def take(session: Session, pictures: Pictures, *, steps: int, storage: str = "exact") -> list[Taken]:
    """Prepare each picture's person, everything but the background, as a concept, and read what was kept."""
    bundle = session.bundle
    finest = min(layer.factor for layer in bundle.injection_layers)
    names = [name for x in bundle.injection_layers if x.factor == finest for name in reference_tensor_names(x.index)]
    rows, columns = (side // bundle.vae_factor // finest for side in (bundle.height, bundle.width))
    side = bundle.height // rows
    taken = []
    for image, labels, caption in zip(pictures.images, pictures.labels, pictures.captions, strict=True):
        mask = labels.numpy() != 0
        concept = Concept("person", Reference(eight_bits(image), mask=mask, prompt=caption), token_index=1)
        kept = session.prepare(concept, steps=steps, storage=storage).references[0]
        keys = np.stack([np.concatenate([kept.tensors[n].step(t) for n in names], 1) for t in range(steps)])
        cells = torch.from_numpy(np.flatnonzero(layer_mask(mask_grid(mask), rows, columns)))
        taken.append(Taken(torch.from_numpy(keys).half(), cells, cut(image, side)[cells]))
    return taken


def cut(image: Tensor, side: int) -> Tensor:
    """Cut [3, h, w] into patches [cells, 3, side, side], row by row."""
    return image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


class Attack(nn.Module):
    """Predicts patches and places from the kept tokens of some steps."""

    def __init__(self, steps: Sequence[int], channels: int, grid: int, patch: int) -> None:
        super().__init__()
        self.steps, self.grid, self.patch = list(steps), grid, patch
        self.register_buffer("mean", torch.zeros(len(steps) * channels))
        self.register_buffer("spread", torch.ones(len(steps) * channels))
        self.layers = nn.Sequential(
            nn.Linear(len(steps) * channels, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.SiLU(),
            nn.Linear(WIDTH, 3 * patch * patch + 2),
        )

    def read(self, one: Taken) -> Tensor:
        """The network's input, [M, len(steps) * C]."""
        return one.keys[self.steps].float().permute(1, 0, 2).flatten(1)

    def truth(self, one: Taken) -> Tensor:
        """The wanted output, [M, 3 p p + 2]: patch and place, the latter as row and column in -1..1."""
        places = torch.stack([one.cells // self.grid, one.cells % self.grid], 1) / (self.grid - 1) * 2 - 1
        return torch.cat([one.patches.flatten(1), places], 1)

    def forward(self, tokens: Tensor) -> Tensor:
        said: Tensor = self.layers((tokens - self.mean) / self.spread)
        return said

    def train_on(self, examples: Sequence[Taken]) -> None:
        """Train with AdamW and a cosine schedule; the seed is fixed."""
        inputs = torch.cat([self.read(one) for one in examples])
        wanted = torch.cat([self.truth(one) for one in examples])
        self.mean, self.spread = inputs.mean(0), inputs.std(0).clamp_min(1e-4)
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
        total = EPOCHS * -(-len(inputs) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        order = torch.Generator().manual_seed(0)
        for _ in range(EPOCHS):
            for some in torch.randperm(len(inputs), generator=order).split(BATCH):
                loss = nn.functional.mse_loss(self(inputs[some]), wanted[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def recover(self, one: Taken) -> tuple[Tensor, Tensor]:
        """Recover patches [M, 3, p, p]; also return by how many cells each place is wrong [M]."""
        said = self(self.read(one))
        off = (said[:, -2:] - self.truth(one)[:, -2:]) * (self.grid - 1) / 2
        return said[:, :-2].unflatten(1, (3, self.patch, self.patch)).clamp(-1, 1), off.norm(dim=1)


def judged(name: str, recovered: Sequence[Tensor], victims: Sequence[Taken], photographs: Tensor) -> Row:
    """Judge how near recovered patches are to the truth. photographs: [n, cells, 3, p, p], all patches of each."""
    errors, named = [], 0
    for number, (found, one) in enumerate(zip(recovered, victims, strict=True)):
        everyone = (photographs[:, one.cells] - found).square().flatten(1).mean(1)
        errors.append(float(everyone[number]))
        named += int(everyone.argmin() == number)
    return Row(name, float(np.mean([10 * math.log10(4 / e) for e in errors])), named / len(victims))


def attacks(
    session: Session, *, examples: int, victims: int, steps: int = STEPS, say: Callable[[str], object] = print
) -> tuple[list[Row], dict[str, list[Tensor]], list[Taken], Pictures]:
    """Make every attack; return the rows of the table, the patches that each attack recovered, and the truth."""
    world = World(size=session.bundle.height, seed=ATTACKER)
    say(f"preparing {examples} pictures of the attacker's own")
    own = take(session, world.draw(range(examples)), steps=steps)
    pictures = World(size=session.bundle.height, seed=VICTIM, held_out=True).draw(range(victims))
    say(f"preparing {victims} victims, twice")
    exact = take(session, pictures, steps=steps)
    eight = take(session, pictures, steps=steps, storage="8-bit")

    patch = exact[0].patches.shape[-1]
    grid = session.bundle.height // patch
    photographs = (
        pictures.images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    )
    average = torch.cat([one.patches for one in own]).mean(0)
    middle = torch.cat([one.cells for one in own])
    middle_place = torch.stack([middle // grid, middle % grid], 1).float().mean(0)
    rows = [judged("nothing: the average patch", [average.expand_as(v.patches) for v in exact], exact, photographs)]
    guessed = [(torch.stack([v.cells // grid, v.cells % grid], 1) - middle_place).norm(dim=1).mean() for v in exact]
    rows[0] = dataclasses.replace(rows[0], distance=float(torch.stack(guessed).mean()))

    shown = {}
    last, every = [steps - 1], sorted({0, steps // 3, 2 * steps // 3, steps - 1})
    for name, which, seen in (
        ("the first step alone, nearly noise", [0], exact),
        ("a step from the middle", [steps // 2], exact),
        ("the last step alone", last, exact),
        (f"{len(every)} steps from first to last", every, exact),
        ("the same, kept in 8 bits", every, eight),
    ):
        say(f"attack: {name}")
        torch.manual_seed(0)
        attack = Attack(which, exact[0].keys.shape[2], grid, patch)
        attack.train_on(own)
        found = [attack.recover(one) for one in seen]
        row = judged(name, [patches for patches, _ in found], exact, photographs)
        rows.append(dataclasses.replace(row, distance=float(torch.stack([off.mean() for _, off in found]).mean())))
        shown[name] = [patches for patches, _ in found]
    # The most that keys, which are made from the latents, could give back without guessing.
    passed = [
        cut(image, patch)[one.cells] for image, one in zip(autoencoded(session, pictures.images), exact, strict=True)
    ]
    rows.append(judged("the model's autoencoder, for scale", passed, exact, photographs))
    return rows, shown, exact, pictures


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| seen by the attacker | PSNR, dB | own photograph is the nearest | places off by, cells |",
        "|---|---|---|---|",
    ]
    for row in rows:
        distance = "" if row.distance is None else f"{row.distance:.2f}"
        lines.append(f"| {row.name} | {row.psnr:.1f} | {row.named:.0%} | {distance} |")
    return "\n".join(lines) + "\n"


def sheet(shown: dict[str, list[Tensor]], victims: Sequence[Taken], pictures: Pictures) -> Image.Image:
    """Draw a row for each attack under the photographs: recovered patches at their true places, grey elsewhere."""
    size = pictures.images.shape[-1]
    font, line = ImageFont.load_default(13), 20
    rows = {"photographs, and what the mask keeps": [one.patches for one in victims], **shown}
    count = min(SHOWN, len(victims))
    whole = Image.new("RGB", (count * (TILE + 4) + 4, len(rows) * (TILE + line + 4) + TILE + 8), "white")
    pen = ImageDraw.Draw(whole)
    for column in range(count):
        whole.paste(tile(pictures.images[column], TILE), (4 + column * (TILE + 4), 4))
    for number, (name, recovered) in enumerate(rows.items()):
        y = TILE + 8 + number * (TILE + line + 4)
        pen.text((4, y), name, fill="black", font=font)
        for column in range(count):
            picture = tile(_placed(recovered[column], victims[column].cells, size), TILE)
            whole.paste(picture, (4 + column * (TILE + 4), y + line))
    return whole


def _placed(patches: Tensor, cells: Tensor, size: int) -> Tensor:
    side = patches.shape[-1]
    grid = size // side
    canvas = torch.full((grid * grid, 3, side, side), 0.6)
    canvas[cells] = patches
    return canvas.unflatten(0, (grid, grid)).permute(2, 0, 3, 1, 4).reshape(3, size, size)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.privacy", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("source", type=Path, nargs="?", default=WEIGHTS, help="a bundle or a diffusers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=800, help="pictures that the attacker prepares")
    parser.add_argument("--victims", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    a = parser.parse_args(argv)
    try:
        if a.examples < 2 or a.victims < 2 or a.steps < 4:
            raise OptionError("--examples and --victims have to be at least 2, --steps at least 4.")
        machine = describe()
        bundle = open_model(a.source, a.out, ("fp32",), print).bundle
        with Session(bundle, backend="onnxruntime-cpu") as session:
            rows, shown, victims, pictures = attacks(session, examples=a.examples, victims=a.victims, steps=a.steps)
        settings = {name: getattr(a, name) for name in ("examples", "victims", "steps")}
        report = {
            "machine": machine,
            "bundle": {
                "width": bundle.width,
                "height": bundle.height,
                "dtype": bundle.dtype,
                "hash": bundle.hash,
                "checkpoint": bundle.checkpoint_hash,
            },
            "settings": settings,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        text = json.dumps(report, indent=1)
        try:
            a.out.mkdir(parents=True, exist_ok=True)
            (a.out / "privacy.json").write_text(text + "\n", encoding="utf-8")
            (a.out / "privacy.md").write_text(table(rows), encoding="utf-8")
            sheet(shown, victims, pictures).save(a.out / "sheet.png", optimize=True)
        except OSError as error:
            reraise_if_interrupt(error)
            raise OutputError(f"output folder {a.out}: {error.strerror or error}.") from error
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
