"""A world of portraits whose truth is known: picture, caption and the exact visible mask of every part.

    world = World(size=64)
    pictures = world.draw(range(16))          # any picture can be drawn again from its number
    pictures.images                           # float32 [16,3,64,64] in -1..1
    pictures.captions[0]                      # "a sketch of a smiling woman with long hair wearing glasses and a shirt"
    pictures.mask("hat")                      # bool [16,64,64]: the hat's visible pixels
    pictures.words("hat")                     # ["hat", None, "beanie", ...]: the word that names it, None without one

A caption tells which parts there are, their kind (long hair, cap), the expression and the drawing style. It never tells
looks, i.e. colours and patterns.
A part has one look, which holds wherever the part shows: both lenses, both sleeves and the chest, hair on both sides of
the face (and the beard), face and hand, a pattern on both sides of a hand in front of it.
The background is the ground on which parts lie, and has no word: it is what the method's start token stands for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .painting import Sheet, paint
from .shapes import PATTERNS

PARTS = ("background", "face", "hair", "beard", "glasses", "hat", "shirt", "hand")
STYLES = ("flat", "sketch", "dark", "pastel")
PEOPLE = ("man", "woman")
HAIR = ("bald", "short", "long", "curly")
HATS = ("none", "hat", "cap", "beanie", "crown")
EXPRESSIONS = ("neutral", "smiling", "sad", "surprised")
SIZES = (64, 128)

_HUES = 12  # bins of the colour circle, by which looks are held out
_DRAWS = 96  # random numbers per picture


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, with logical shifts."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


class _Draws:
    """Uniform random numbers of each picture, a function of (seed, picture number, draw number) only."""

    def __init__(self, seed: int, numbers: Tensor) -> None:
        slots = torch.arange(_DRAWS, device=numbers.device)
        z = _mix(numbers[:, None] + _signed((0x9E3779B97F4A7C15 * (seed + 1)) % (1 << 64)))
        z = _mix(z + _signed(0xD1B54A32D192ED03) * (slots + 1))
        self._values = ((z >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)  # [n,_DRAWS] in 0..1
        self._used = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 [n] in low..high."""
        value = self._values[:, self._used]
        self._used += 1
        return low + (high - low) * value

    def chance(self, probability: float) -> Tensor:
        """bool [n]."""
        return self.uniform() < probability

    def choice(self, *weights: float) -> Tensor:
        """int64 [n]: 0..len(weights)-1 with these weights."""
        edges = torch.tensor(weights, device=self._values.device).cumsum(0)
        return torch.bucketize(self.uniform() * edges[-1], edges[:-1].contiguous(), right=True)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """[n,3] in 0..1 from hue, saturation, value [n] in 0..1."""
    offsets = torch.tensor([0.0, 2 / 3, 1 / 3], device=hue.device)
    ramp = ((((hue[:, None] + offsets) % 1.0) * 6 - 3).abs() - 1).clamp(0, 1)
    return value[:, None] * (1 + saturation[:, None] * (ramp - 1))


@dataclass(frozen=True)
class Look:
    """What a caption does not tell about a part, one row per picture."""

    first: Tensor  # float32 [n,3] in 0..1
    second: Tensor  # float32 [n,3] in 0..1; the pattern's (hat, shirt) or the frame's (glasses)
    pattern: Tensor  # int64 [n], indices into PATTERNS
    period: Tensor  # float32 [n] in canvas units
    phase: Tensor  # float32 [n] in 0..1


def _look(draws: _Draws, part: int, held_out: bool, *patterns: float) -> Look:
    """Draw one look per picture.

    For every (part, pattern, second hue), or (part, lightness) if it is plain, one of twelve first hues is held out for
    evaluation.
    """
    kind = draws.choice(*patterns)
    second_bin = (draws.uniform() * _HUES).floor().long()
    light = draws.uniform(0.35, 1.0)
    beside = torch.where(kind == 0, (light * _HUES).floor().long(), second_bin)
    kept = _mix(beside + 16 * kind + 256 * part + 77).remainder(_HUES)
    step = 1 + (draws.uniform() * (_HUES - 1)).floor().long()
    first_bin = (kept if held_out else kept + step) % _HUES
    first = _rgb((first_bin + draws.uniform()) / _HUES, draws.uniform(0.5, 1.0), light)
    contrast = torch.where(light > 0.68, light - draws.uniform(0.3, 0.45), light + draws.uniform(0.3, 0.45)).clamp(0, 1)
    second = _rgb((second_bin + draws.uniform()) / _HUES, draws.uniform(0.3, 1.0), contrast)
    return Look(first, second, kind, draws.uniform(0.28, 0.38), draws.uniform())


@dataclass(frozen=True)
class People:
    """Everything that determines the pictures: kinds int64 [n], flags bool [n], measures float32 [n], looks."""

    style: Tensor
    person: Tensor
    hair: Tensor
    hat: Tensor
    expression: Tensor
    glasses: Tensor
    round_lenses: Tensor
    beard: Tensor
    hand: Tensor
    swap: Tensor  # the caption's order of what is worn
    unstyled: Tensor  # a flat picture's caption starts with the person
    measures: dict[str, Tensor]
    looks: dict[str, Look]


def _people(seed: int, numbers: Tensor, held_out: bool) -> People:
    draws = _Draws(seed, numbers)
    style, person = draws.choice(0.4, 0.2, 0.2, 0.2), draws.choice(0.5, 0.5)
    hair = draws.choice(0.1, 0.3, 0.35, 0.25)
    hat = draws.choice(0.4, 0.2, 0.14, 0.14, 0.12)
    expression = draws.choice(0.25, 0.35, 0.2, 0.2)
    glasses, round_lenses = draws.chance(0.45), draws.chance(0.5)
    beard, hand = draws.chance(0.35) & (person == 0), draws.chance(0.3)
    swap, unstyled = draws.chance(0.5), draws.chance(0.5)
    looks = {
        "hair": _look(draws, 2, held_out, 1.0),
        "glasses": _look(draws, 4, held_out, 1.0),
        "hat": _look(draws, 5, held_out, 0.5, 0.18, 0.14, 0.18, 0.0),
        "shirt": _look(draws, 6, held_out, 0.3, 0.2, 0.15, 0.15, 0.2),
    }
    tone = draws.uniform()
    skin = _rgb(draws.uniform(0.03, 0.09), 0.25 + 0.4 * tone, 1.0 - 0.62 * tone)
    ground = _rgb(draws.uniform(), draws.uniform(0.05, 0.5), draws.uniform(0.3, 0.95))
    zero = torch.zeros_like(tone)
    looks["face"] = looks["hand"] = Look(skin, skin, zero.long(), zero + 1, zero)
    looks["beard"] = looks["hair"]
    looks["background"] = Look(ground, (ground * draws.uniform(0.55, 1.0)[:, None]), zero.long(), zero + 1, zero)
    side = torch.where(draws.chance(0.5), 1.0, -1.0)
    measures = {
        "cx": draws.uniform(-0.1, 0.1) - 0.1 * side * hand,
        "cy": draws.uniform(-0.04, 0.06),
        "width": draws.uniform(0.39, 0.45),
        "height": draws.uniform(0.45, 0.51),
        "jaw": torch.where(person == 0, draws.uniform(-0.12, 0.04), draws.uniform(0.1, 0.24)),
        "volume": draws.uniform(1.0, 1.15),
        "fringe": draws.uniform(0.5, 0.68),
        "length": draws.uniform(0.62, 0.85),
        "brim": draws.uniform(0.9, 1.1),
        "tall": draws.uniform(0.85, 1.1),
        "lens": draws.uniform(0.155, 0.185),
        "shoulders": draws.uniform(0.78, 0.98),
        "collar": draws.uniform(0.0, 0.14),
        "side": side,
        "hand_x": draws.uniform(0.42, 0.68),
        "hand_y": draws.uniform(0.5, 0.66),
        "gaze": draws.uniform(-0.03, 0.03),
    }
    return People(
        style, person, hair, hat, expression, glasses, round_lenses, beard, hand, swap, unstyled, measures, looks
    )


def _caption(
    style: str,
    person: str,
    hair: str,
    hat: str,
    expression: str,
    *,
    glasses: bool,
    beard: bool,
    hand: bool,
    swap: bool,
    unstyled: bool,
) -> str:
    opening = {
        "flat": "" if unstyled else "a picture of ",
        "sketch": "a sketch of ",
        "dark": "a dark picture of ",
        "pastel": "a pastel of ",
    }[style]
    mood = "" if expression == "neutral" else expression + " "
    has = [] if hair == "bald" else [f"{hair} hair"]
    has += ["a beard"] if beard else []
    worn = ([] if hat == "none" else [f"a {hat}"]) + (["glasses"] if glasses else [])
    worn = (worn[::-1] if swap else worn) + ["a shirt"]
    text = f"{opening}a {mood}{'bald ' if hair == 'bald' else ''}{person}"
    text += f" with {' and '.join(has)}" if has else ""
    return text + f" wearing {' and '.join(worn)}" + (" waving a hand" if hand else "")


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures with their truth."""

    numbers: Tensor  # int64 [n]
    images: Tensor  # float32 [n,3,size,size] in -1..1
    labels: Tensor  # uint8 [n,size,size]: the visible part of each pixel, an index into PARTS
    captions: list[str]
    people: People

    def mask(self, part: str) -> Tensor:
        """bool [n,size,size]: the part's visible pixels."""
        return self.labels == PARTS.index(part)

    def words(self, part: str) -> list[str | None]:
        """For each picture, the word of its caption that names the part; None if it has no such word."""
        people, n = self.people, len(self.captions)
        if part == "face":
            return [PEOPLE[i] for i in people.person.tolist()]
        if part == "hat":
            return [HATS[i] if i else None for i in people.hat.tolist()]
        if part == "hair":
            return ["hair" if i else None for i in people.hair.tolist()]
        if part in ("glasses", "beard", "hand"):
            return [part if flag else None for flag in getattr(people, part).tolist()]
        return ["shirt" if part == "shirt" else None] * n


@dataclass(frozen=True)
class World:
    """Draws pictures by number. `held_out` looks never occur in the pictures drawn without it."""

    size: int = 64
    seed: int = 0
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size: {self.size}, expected one of {SIZES}")

    def people(self, numbers: Iterable[int], *, device: str | torch.device = "cpu") -> People:
        """What the pictures of these numbers show, without drawing them."""
        return _people(self.seed, torch.as_tensor(list(numbers), dtype=torch.int64, device=device), self.held_out)

    def draw(self, numbers: Iterable[int], *, device: str | torch.device = "cpu") -> Pictures:
        """The pictures of these numbers, drawn on `device`."""
        index = torch.as_tensor(list(numbers), dtype=torch.int64, device=device)
        return self.draw_people(_people(self.seed, index, self.held_out), index)

    def draw_people(self, people: People, numbers: Tensor) -> Pictures:
        """Draw given people, e.g. some that were changed on purpose."""
        images, labels = paint(Sheet(self.size, people.style), people)
        return Pictures(numbers, images, labels, captions(people), people)


def captions(people: People) -> list[str]:
    """One caption per picture."""
    rows = zip(
        *(t.tolist() for t in (people.style, people.person, people.hair, people.hat, people.expression)),
        *(t.tolist() for t in (people.glasses, people.beard, people.hand, people.swap, people.unstyled)),
        strict=True,
    )
    return [
        _caption(STYLES[s], PEOPLE[p], HAIR[h], HATS[k], EXPRESSIONS[e], glasses=g, beard=b, hand=w, swap=o, unstyled=u)
        for s, p, h, k, e, g, b, w, o, u in rows
    ]


__all__ = [
    "EXPRESSIONS",
    "HAIR",
    "HATS",
    "PARTS",
    "PATTERNS",
    "PEOPLE",
    "SIZES",
    "STYLES",
    "Look",
    "People",
    "Pictures",
    "World",
    "captions",
]
