"""The fixed requests of the quality figures, by number.

    cases = draw_cases(range(200))
    cases[1].caption, cases[1].parts       # "a smiling man with short hair wearing a hat and a shirt", ("face", "hat")
    cases[1].references                    # one drawn picture for each part, with its exact mask

Even numbers have one concept, odd ones two or three. A concept is a visible part of the target and the word of the
caption that names it; its reference shows another person who has that part, of the same kind, in a look that training
never draws. All are in the flat style, in which a look's colours are painted as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sheets import eight_bits
from .world import PARTS, PATTERNS, Look, People, Pictures, World, captions

COUNT = 200
CONCEPTS = ("face", "hair", "glasses", "hat", "shirt")
PATTERNED = ("hat", "shirt")
"""The parts that may have a pattern."""

TARGETS, REFERENCES = 2_000_003, 2_000_029  # worlds that neither training nor its sheets draw
_SEVERAL = (*combinations(CONCEPTS, 2), *combinations(CONCEPTS, 3))
_STRIDE = 7  # so the first few requests have all kinds of combinations
_KINDS = {"face": "person", "hair": "hair", "glasses": "glasses", "hat": "hat"}
SAME_LOOK = {"face": ("face", "hand"), "hair": ("hair", "beard")}
"""For a part whose look holds for another part as well: all parts with that look, its own included."""


@dataclass(frozen=True)
class Case:
    """One request.

    number      also the seed of its noise
    caption     the prompt
    parts       the concepts, of `CONCEPTS`
    words       for each of them, the word of the caption that names it
    named       every part that the caption names
    target      one row: the person that the caption describes, in a look of their own
    references  a row for each concept
    """

    number: int
    size: int
    caption: str
    parts: tuple[str, ...]
    words: tuple[str, ...]
    named: tuple[str, ...]
    target: People
    references: Pictures

    def reference(self, k: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_], str]:
        """Image [h,w,3], mask [h,w] and caption of concept k's reference."""
        return eight_bits(self.references.images[k]), self.mask(k).numpy(), self.references.captions[k]

    def mask(self, k: int) -> Tensor:
        """bool [h,w]: the visible pixels of concept k in its reference."""
        return self.references.mask(self.parts[k])[k]

    def pattern(self, k: int) -> str | None:
        """The pattern of concept k's look; None for a part that never has one."""
        part = self.parts[k]
        return PATTERNS[int(self.references.people.looks[part].pattern[k])] if part in PATTERNED else None

    def drawn_again(self) -> Pictures:
        """The target as the world draws it in the references' looks: about the best that a method can do."""
        looks = dict(self.target.looks)
        for k, part in enumerate(self.parts):
            for name in SAME_LOOK.get(part, (part,)):
                looks[name] = _rows(self.references.people.looks[part], torch.tensor([k]))
        return self._draw(replace(self.target, looks=looks))

    def drawn_otherwise(self) -> Pictures:
        """The target as the world draws it in looks that are unrelated to the references."""
        return self._draw(self.target)

    def _draw(self, people: People) -> Pictures:
        return World(size=self.size, held_out=True).draw_people(people, torch.tensor([self.number]))


def parts_of(number: int) -> tuple[str, ...]:
    """The concepts of a request."""
    turn = number // 2
    return _SEVERAL[turn * _STRIDE % len(_SEVERAL)] if number % 2 else (CONCEPTS[turn % len(CONCEPTS)],)


def draw_cases(numbers: Iterable[int], *, size: int = 64) -> list[Case]:
    """The requests of these numbers, at 64 or 128 pixels; a request does not depend on which others are drawn."""
    listed = list(numbers)
    parts = [parts_of(number) for number in listed]
    targets = World(size=size, seed=TARGETS, held_out=True).people(listed)
    targets = replace(targets, style=torch.zeros_like(targets.style))
    targets = _with_parts(targets, parts, listed)
    owners = [row for row, of_row in enumerate(parts) for _ in of_row]
    which = torch.tensor([10 * listed[row] + k for row, of_row in enumerate(parts) for k in range(len(of_row))])
    people = World(size=size, seed=REFERENCES, held_out=True).people(which.tolist())
    people = _of_their_kind(people, [part for of_row in parts for part in of_row], _rows(targets, torch.tensor(owners)))
    pictures = World(size=size, held_out=True).draw_people(people, which)
    words = Pictures(torch.tensor(listed), torch.empty(0), torch.empty(0), captions(targets), targets)
    naming = {part: words.words(part) for part in PARTS[1:]}
    cases = []
    for row, number in enumerate(listed):
        mine = torch.tensor([place for place, owner in enumerate(owners) if owner == row])
        cases.append(
            Case(
                number,
                size,
                words.captions[row],
                parts[row],
                tuple(str(naming[part][row]) for part in parts[row]),
                tuple(part for part in naming if naming[part][row] is not None),
                _rows(targets, torch.tensor([row])),
                Pictures(
                    which[mine],
                    pictures.images[mine],
                    pictures.labels[mine],
                    [pictures.captions[place] for place in mine.tolist()],
                    _rows(people, mine),
                ),
            )
        )
    return cases


def _with_parts(people: People, parts: list[tuple[str, ...]], numbers: list[int]) -> People:
    """Give the people every part that is a concept."""

    def wanted(part: str) -> Tensor:
        return torch.tensor([part in of_row for of_row in parts])

    number = torch.tensor(numbers)
    return replace(
        people,
        hat=torch.where(wanted("hat") & (people.hat == 0), 1 + number % 4, people.hat),
        hair=torch.where(wanted("hair") & (people.hair == 0), 1 + number % 3, people.hair),
        glasses=people.glasses | wanted("glasses"),
    )


def _of_their_kind(people: People, parts: list[str], targets: People) -> People:
    """Give each of the references' people its part, of the target's kind (a cap for a cap)."""
    changes: dict[str, Tensor] = {"style": torch.zeros_like(people.style)}
    for part, field in _KINDS.items():
        here = torch.tensor([one == part for one in parts])
        changes[field] = torch.where(here, getattr(targets, field), getattr(people, field))
    return replace(people, **changes, beard=people.beard & (changes["person"] == 0))


def _rows(value: Any, index: Tensor) -> Any:
    """Select rows in a value, and in all that it holds, where each picture has one row."""
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, dict):
        return {name: _rows(one, index) for name, one in value.items()}
    assert isinstance(value, (People, Look))
    return type(value)(**{field.name: _rows(getattr(value, field.name), index) for field in fields(value)})
