"""Measure how similar a picture is to its references, by what a segmenter finds in it.

Colours are compared in CIELAB, where a distance of 1 is just visible and two looks of the world lie tens apart.
A concept's pixels in the picture are those in which the segmenter sees its part; in the reference they are the drawn
truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .requests import SAME_LOOK, Case
from .segmenter import Parse, pattern_of
from .wordmaps import part_shares
from .world import PARTS, PATTERNS

LEAST_SHARE = 24 / 64**2
"""Share of the picture's pixels below which a part counts as missing. The world's smallest visible part has twice
that."""

FAR = 50.0
"""The palette distance at which a look counts as another one altogether: fidelity 0."""

_DIRECTIONS, _QUANTILES = 32, 64


@dataclass(frozen=True)
class ConceptScore:
    """One concept in one picture.

    found      the part is there at all
    colour     distance of the mean colours; this and the next two are None if the part was not found
    palette    distance of the colours' distributions: sliced Wasserstein, scaled so that a shift by d is d
    others     the smallest palette distance to another concept's reference; None with one concept
    fidelity   1 - palette / FAR, not below 0; 0 if the part was not found
    own        palette is the smallest among the request's references; None with one concept
    spill      how much of the look is on parts that were found and are no concept: the mean over these parts of
               1 - distance / FAR, not below 0; None if there is no such part
    pattern    the reference's pattern was recognised; None for a part without patterns
    patterned  the same; None also if the reference's pattern is plain
    iou        of the method's region with the part, on the regions' grid; None without regions
    """

    part: str
    found: bool
    colour: float | None
    palette: float | None
    others: float | None
    fidelity: float
    own: float | None
    spill: float | None
    pattern: float | None
    patterned: float | None
    iou: float | None


@dataclass(frozen=True)
class Score:
    """The scores of one picture. caption: F1 of the parts found against those that the caption names."""

    number: int
    concepts: tuple[ConceptScore, ...]
    caption: float


def score(case: Case, image: Tensor, parse: Parse, regions: Tensor | None = None) -> Score:
    """Score a picture.

    image: float32 [3,h,w] in -1..1; parse: of this picture only; regions: int64 [r,c], k + 1 where concept k is, or
    None.
    """
    labels, patterns = parse.labels[0], parse.patterns[0]
    colours = lab(image)
    looks = [lab(case.references.images[k])[:, case.mask(k)].T for k in range(len(case.parts))]
    concepts = []
    for k, part in enumerate(case.parts):
        mask = labels == PARTS.index(part)
        found = bool(mask.float().mean() >= LEAST_SHARE)
        mine = colours[:, mask].T
        distances = [palette_distance(mine, look) for look in looks] if found else []
        others = min((d for j, d in enumerate(distances) if j != k), default=None)
        kind = case.pattern(k)
        same = None if kind is None else float(found and PATTERNS[pattern_of(patterns, mask)] == kind)
        concepts.append(
            ConceptScore(
                part,
                found,
                (mine.mean(0) - looks[k].mean(0)).norm().item() if found else None,
                distances[k] if found else None,
                others,
                max(0.0, 1 - distances[k] / FAR) if found else 0.0,
                None if len(looks) == 1 else float(found and min(distances) == distances[k]),
                _spill(colours, labels, looks[k], beside=_free_parts(case, part)),
                same,
                None if kind == "plain" else same,
                None if regions is None else region_iou(regions == k + 1, labels, part),
            )
        )
    return Score(case.number, tuple(concepts), caption_agreement(labels, case.named))


def _free_parts(case: Case, part: str) -> list[str]:
    """The parts that should show nothing of a concept's look."""
    bound = {name for concept in (*case.parts, part) for name in SAME_LOOK.get(concept, (concept,))}
    return [name for name in PARTS[1:] if name not in bound]


def _spill(colours: Tensor, labels: Tensor, look: Tensor, *, beside: Sequence[str]) -> float | None:
    masks = [labels == PARTS.index(part) for part in beside]
    there = [colours[:, mask].T for mask in masks if bool(mask.float().mean() >= LEAST_SHARE)]
    return sum(max(0.0, 1 - palette_distance(one, look) / FAR) for one in there) / len(there) if there else None


def caption_agreement(labels: Tensor, named: Sequence[str]) -> float:
    """F1 of the parts found in labels [h,w] against those that are named; the background has no name."""
    found = {part for n, part in enumerate(PARTS) if n and bool((labels == n).float().mean() >= LEAST_SHARE)}
    return 2 * len(found & set(named)) / max(1, len(found) + len(named))


def region_iou(region: Tensor, labels: Tensor, part: str) -> float:
    """Intersection over union of a region, bool [r,r], with the cells in which labels [h,w] are mostly the part's.

    "Mostly": no other part has more of the cell. A part without such a cell gets the one that holds most of it. 0 if
    the region, the part or both are empty.
    """
    side = region.shape[-1]
    shares = part_shares(labels[None], side)[0]  # [cells,parts]
    number = PARTS.index(part)
    true = shares.argmax(1) == number
    if not bool(true.any()) and bool((shares[:, number] > 0).any()):
        true[shares[:, number].argmax()] = True
    mine = region.flatten()
    return ((mine & true).sum() / (mine | true).sum().clamp(min=1)).item()


def lab(images: Tensor) -> Tensor:
    """CIELAB (D65) of sRGB images [...,3,h,w] in -1..1."""
    rgb = (images.clamp(-1, 1) + 1) / 2
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = linear.new_tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    white = linear.new_tensor([0.95047, 1.0, 1.08883]).view(3, 1, 1)
    xyz = torch.einsum("ij,...jhw->...ihw", to_xyz, linear) / white
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def palette_distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein-1 distance of two sets of colours, float32 [n,3] and [m,3], with at least one colour each.

    In three dimensions the mean, over all directions, of a shift's length along them is half its length; hence the 2.
    """
    places = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    first, second = (torch.quantile(x @ _directions(), places, dim=0) for x in (a, b))  # [quantiles,directions]
    return 2 * (first - second).abs().mean().item()


@cache
def _directions() -> Tensor:
    """[3,directions]: points spread evenly over a half sphere (both halves measure the same)."""
    i = torch.arange(_DIRECTIONS) + 0.5
    z = i / _DIRECTIONS
    turn = i * math.pi * (3 - math.sqrt(5))
    around = (1 - z * z).sqrt()
    return F.normalize(torch.stack([around * turn.cos(), around * turn.sin(), z]), dim=0)
