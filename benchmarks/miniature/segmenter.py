"""Find the parts of a picture, and the pattern at each place: the measuring instrument of the quality figures.

    python -m benchmarks.miniature.segmenter --checkpoint DIR --out FILE       # trains it, 5 to 10 minutes on two cores
    python -m benchmarks.miniature.segmenter --check FILE [--checkpoint DIR]   # says how good it is

    segmenter = Segmenter.load(FILE)
    segmenter.parse(images).labels         # uint8 [n,h,w], indices into world.PARTS

It is a small convolutional network, trained on drawn pictures of all styles. With a checkpoint, half of them went
through its autoencoder with noise on the latents, because that is how generated pictures look. It sees no held-out look
in training, and is judged on held-out looks only. Training has a fixed seed and saves no state: it cannot be resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from magicface_rt.errors import InputError, MagicFaceError
from magicface_rt.process.host_memory import as_host_memory_error
from magicface_rt.process.interrupts import reraise_if_interrupt

from .degrading import Autoencoder, degrade
from .world import PARTS, PATTERNS, Pictures, World

SIDE = 64  # pictures are brought to this side
WIDTHS = (16, 32, 64, 96)
MAX_BYTES = 1 << 20
TRAINING, CHECKING = 3_000_017, 3_000_029  # worlds that the miniature never saw
POOL, BATCH, RATE = 4096, 32, 2e-3
PATTERN_PARTS = (PARTS.index("hat"), PARTS.index("shirt"))
# Small parts are worth more, or the few pixels of a pair of glasses are lost among the ground's.
PART_WEIGHTS = (0.5, 1.0, 1.0, 1.5, 2.0, 1.0, 1.0, 1.5)


@dataclass(frozen=True)
class Parse:
    """What was found: labels uint8 [n,h,w]; logits of patterns float32 [n,5,h,w], for use on hat and shirt only."""

    labels: Tensor
    patterns: Tensor


class _Block(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        layers: list[nn.Module] = []
        for width in (before, after):
            layers += [nn.Conv2d(width, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        super().__init__(*layers)


class PartNet(nn.Module):
    """Four grids down and up again: [n,3,64,64] to the logits of parts [n,8,64,64] and patterns [n,5,64,64]."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_Block(*pair) for pair in zip((3, *WIDTHS), WIDTHS, strict=False))
        # Each way up takes the coarser grid beside its own.
        self.up = nn.ModuleList(
            _Block(WIDTHS[level] + WIDTHS[level + 1], WIDTHS[level]) for level in reversed(range(len(WIDTHS) - 1))
        )
        self.head = nn.Conv2d(WIDTHS[0], len(PARTS) + len(PATTERNS), 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, beside = images, []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x)
            beside.append(x)
        beside.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), beside.pop()], 1))
        found = self.head(x)
        return found[:, : len(PARTS)], found[:, len(PARTS) :]


class Segmenter:
    """A trained `PartNet`. report: what `check` found when it was made."""

    def __init__(self, network: PartNet, report: dict[str, Any]) -> None:
        self.network, self.report = network.eval().requires_grad_(False), report

    @torch.no_grad()
    def parse(self, images: Tensor, *, batch: int = 64) -> Parse:
        """Find parts and patterns. images: float32 [n,3,h,w] in -1..1, square, with a side of 64 or a multiple."""
        side = images.shape[-1]
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != side or side % SIDE:
            raise InputError(f"images are {list(images.shape)}, expected [n,3,h,h] with h a multiple of {SIDE}.")
        labels, patterns = [], []
        for some in F.adaptive_avg_pool2d(images, SIDE).split(batch):
            parts, kinds = self.network(some.contiguous(memory_format=torch.channels_last))
            labels.append(parts.argmax(1).byte())
            patterns.append(kinds)
        factor = side // SIDE
        found = torch.cat(labels).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        return Parse(found, F.interpolate(torch.cat(patterns), scale_factor=float(factor), mode="nearest"))

    def save(self, path: Path) -> int:
        """Write the weights in fp16; return the file's size in bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().half().contiguous() for name, value in self.network.state_dict().items()}
        # A single key: with several, the file's bytes would depend on their order.
        save_file(weights, path, metadata={"report": json.dumps(self.report)})
        path.chmod(0o644)
        return path.stat().st_size

    @classmethod
    def load(cls, path: Path) -> Segmenter:
        """Load a segmenter. Raises InputError for a file that is missing, or no segmenter of this form."""
        try:
            with as_host_memory_error(), safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
            network = PartNet()
            network.load_state_dict(weights)
            return cls(network, json.loads(metadata["report"]))
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
            reraise_if_interrupt(error)
            raise InputError(
                f"segmenter {path}: it cannot be read ({error}); expected a file that "
                "`python -m benchmarks.miniature.segmenter --out FILE` wrote."
            ) from error


def train(pictures: int, autoencoder: Autoencoder | None, *, seed: int = 0, say: Any = print) -> Segmenter:
    """Train a new segmenter on this many pictures, half of them from a pool that went through the autoencoder."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = PartNet().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    world = World(size=SIDE, seed=TRAINING)
    size = min(POOL, max(BATCH, pictures // 4))
    pool = world.draw(range(-size, 0))
    images = pool.images if autoencoder is None else autoencoder.pass_through(pool.images, generator)
    pool_kinds = pattern_labels(pool)
    steps, began = max(1, pictures // BATCH), time.monotonic()
    for step in range(steps):
        fresh = world.draw(range(step * BATCH // 2, (step + 1) * BATCH // 2))
        rows = torch.randint(0, size, (BATCH - BATCH // 2,), generator=generator)
        x = degrade(torch.cat([fresh.images, images[rows]]), generator)
        labels = torch.cat([fresh.labels, pool.labels[rows]]).long()
        kinds = torch.cat([pattern_labels(fresh), pool_kinds[rows]])
        share = step / steps
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
        parts, patterns = network(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(parts, labels, weight=torch.tensor(PART_WEIGHTS))
        if bool((kinds >= 0).any()):
            loss = loss + 0.5 * F.cross_entropy(patterns, kinds, ignore_index=-1)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99 or step + 1 == steps:
            say(
                f"{(step + 1) * BATCH} of {pictures} pictures, loss {loss.item():.4f}, {time.monotonic() - began:.0f} s"
            )
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    made = Segmenter(network, {})
    return Segmenter(network, {"pictures": steps * BATCH, "seed": seed, **check(made, autoencoder)})


def pattern_labels(pictures: Pictures) -> Tensor:
    """int64 [n,h,w]: the pattern's number on the pixels of hat and shirt, -1 elsewhere."""
    found = torch.full(pictures.labels.shape, -1, dtype=torch.int64)
    for number in PATTERN_PARTS:
        kind = pictures.people.looks[PARTS[number]].pattern
        found = torch.where(pictures.labels == number, kind[:, None, None], found)
    return found


def pattern_of(logits: Tensor, mask: Tensor) -> int:
    """The pattern of a region, by logits [5,h,w] of all pixels in mask [h,w] together; the mask must not be empty."""
    return int(logits[:, mask].log_softmax(0).mean(1).argmax())


def check(segmenter: Segmenter, autoencoder: Autoencoder | None, *, count: int = 512) -> dict[str, Any]:
    """Judge how well drawn pictures of held-out looks are read, as they are and after the autoencoder.

    For each of both: IoU per part over all pictures, and per pattern the share of regions in which it was recognised.
    """
    pictures = World(size=SIDE, seed=CHECKING, held_out=True).draw(range(count))
    found = {"drawn": _scores(segmenter, pictures, pictures.images)}
    if autoencoder is not None:
        images = autoencoder.pass_through(pictures.images, torch.Generator().manual_seed(1), noise=0.0)
        found["autoencoded"] = _scores(segmenter, pictures, images)
    return found


def _scores(segmenter: Segmenter, pictures: Pictures, images: Tensor) -> dict[str, Any]:
    parse = segmenter.parse(images)
    iou = {}
    for number, part in enumerate(PARTS):
        mine, true = parse.labels == number, pictures.labels == number
        iou[part] = round(((mine & true).sum() / (mine | true).sum().clamp(min=1)).item(), 4)
    hits: dict[str, list[bool]] = {name: [] for name in PATTERNS}
    for number in PATTERN_PARTS:
        kinds = pictures.people.looks[PARTS[number]].pattern.tolist()
        for row, kind in enumerate(kinds):
            mask = parse.labels[row] == number
            if bool(mask.any()) and bool((pictures.labels[row] == number).any()):
                hits[PATTERNS[kind]].append(pattern_of(parse.patterns[row], mask) == kind)
    patterns = {name: round(sum(of) / len(of), 4) for name, of in hits.items() if of}
    every = [hit for of in hits.values() for hit in of]
    return {
        "iou": iou,
        "mean_iou": round(sum(iou.values()) / len(iou), 4),
        "patterns": patterns,
        "pattern_accuracy": round(sum(every) / max(1, len(every)), 4),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.segmenter", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--checkpoint", type=Path, help="a diffusers folder, whose autoencoder degrades the pictures")
    parser.add_argument("--out", type=Path, metavar="FILE", help="train one and write it here")
    parser.add_argument("--check", type=Path, metavar="FILE", help="judge this one instead")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args(argv)
    if (a.out is None) == (a.check is None):
        parser.error("name either --out FILE, to train one, or --check FILE, to judge one")
    torch.set_num_threads(a.threads)
    try:
        autoencoder = None if a.checkpoint is None else Autoencoder.load(a.checkpoint)
        if a.check is not None:
            report = check(Segmenter.load(a.check), autoencoder)
        else:
            made = train(a.pictures, autoencoder, seed=a.seed)
            size = made.save(a.out)
            if size > MAX_BYTES:
                raise InputError(f"segmenter {a.out}: {size} bytes, expected less than {MAX_BYTES}.")
            report = made.report
            print(f"wrote {a.out}: {size / 1e3:.0f} kB")
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
