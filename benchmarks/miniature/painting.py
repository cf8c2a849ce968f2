"""Paint people: the parts in painter's order, and the four drawing styles.

Every part is one signed distance: its coverage paints the part, its sign claims the pixel in the label map, its
absolute value draws the outline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shapes import (
    FAR,
    angle,
    arc,
    box,
    canvas,
    capsule,
    coverage,
    ellipse,
    pattern,
    present,
    triangle_wave,
)

if TYPE_CHECKING:
    from .world import Look, People

_LABEL = {"background": 0, "face": 1, "hair": 2, "beard": 3, "glasses": 4, "hat": 5, "shirt": 6, "hand": 7}
# Per style (flat, sketch, dark, pastel): how colours are bent (weight, then what they are mixed with), the same for
# the ground, the outline's colour, opacity and width, and the softness of edges in pixels of a 64-pixel sheet.
_WEIGHT = (1.0, 0.6, 0.52, 0.55)
_MIXED_WITH = ((0.0, 0.0, 0.0), (0.97, 0.95, 0.9), (0.02, 0.02, 0.1), (1.0, 1.0, 1.0))
_GROUND_WEIGHT = (1.0, 0.08, 0.25, 0.35)
_LINE_COLOUR = ((0.05, 0.05, 0.08), (0.12, 0.12, 0.15), (0.0, 0.0, 0.04), (1.0, 1.0, 1.0))
_LINE_OPACITY = (0.35, 0.95, 0.5, 0.35)
_LINE_WIDTH = (0.035, 0.05, 0.04, 0.05)
_SOFT = (1.0, 1.0, 1.0, 2.5)


class Sheet:
    """The canvas: its grid, the styles of its pictures, and a method that paints one distance over what is there."""

    def __init__(self, size: int, style: Tensor) -> None:
        def table(rows: tuple[object, ...]) -> Tensor:
            values = torch.tensor(rows, device=style.device, dtype=torch.float32)[style]
            return values.view(len(style), -1, 1, 1)

        self.size, self.pixel = size, 2.0 / size
        self.x, self.y = canvas(size, style.device)
        self.line_colour, self.line_width = table(_LINE_COLOUR), table(_LINE_WIDTH)[:, 0]
        self.line_opacity = table(_LINE_OPACITY)[:, 0]
        self.weight, self.mixed_with, self.ground_weight = table(_WEIGHT), table(_MIXED_WITH), table(_GROUND_WEIGHT)
        self.edge = torch.maximum(table(_SOFT)[:, 0] * (2.0 / 64), torch.tensor(self.pixel, device=style.device))
        self.edge = torch.where(table(_SOFT)[:, 0] == 1.0, self.pixel, self.edge)
        self.images = torch.zeros(len(style), 3, size, size, device=style.device)
        self.labels = torch.zeros(len(style), size, size, device=style.device, dtype=torch.uint8)

    def styled(self, colour: Tensor) -> Tensor:
        """Bend a colour, [n,3,...], by the style."""
        return torch.lerp(self.mixed_with, colour, self.weight)

    def fill(self, look: Look) -> Tensor:
        """Styled colours of a part at every pixel, [n,3,size,size] or, if no picture has a pattern, [n,3,1,1]."""
        first = self.styled(look.first[:, :, None, None])
        if not bool(look.pattern.any()):
            return first
        kind, period, phase = (t.view(-1, 1, 1) for t in (look.pattern, look.period, look.phase))
        share = pattern(self.x, self.y, kind, period, phase, self.pixel)
        return torch.lerp(first, self.styled(look.second[:, :, None, None]), share[:, None])

    def paint(self, distance: Tensor, colour: Tensor, part: str | None = None, *, line: float = 1.0) -> None:
        """Paint where `distance` is negative, and claim these pixels for `part`; with `line` 0 there is no outline."""
        self.images = torch.lerp(self.images, colour, coverage(distance, self.edge)[:, None])
        if line:
            stroke = coverage(distance.abs() - self.line_width / 2, self.pixel) * (self.line_opacity * line)
            self.images = torch.lerp(self.images, self.line_colour, stroke[:, None])
        if part is not None:
            self.labels.masked_fill_(distance < 0, _LABEL[part])


def paint(sheet: Sheet, people: People) -> tuple[Tensor, Tensor]:
    """Paint people; return images float32 [n,3,size,size] in -1..1 and labels uint8 [n,size,size]."""
    at = {name: value.view(-1, 1, 1) for name, value in people.measures.items()}
    x, y = sheet.x - at["cx"], sheet.y - at["cy"]  # the head's own coordinates
    looks = people.looks
    _ground(sheet, looks["background"])
    head = _head(x, y, at)
    back, front = _hair(x, y, at, people, head)
    hair, skin, shirt = (sheet.fill(looks[part]) for part in ("hair", "face", "shirt"))
    sheet.paint(back, hair, "hair")
    sheet.paint(_torso(sheet, x, at), shirt, "shirt")
    sheet.paint(_neck(x, y, at), skin, "face")
    locks = present(_locks(x, y, at), _is(people.hair, 2))
    sheet.paint(locks, hair, "hair")
    ears = torch.minimum(
        *(ellipse(x, y, s * at["width"] * 0.98, torch.full_like(s, 0.02), 0.09, 0.12) for s in _sides(x))
    )
    sheet.paint(torch.minimum(head, present(ears, _is(people.hair, 0))), skin, "face")
    sheet.paint(_beard(x, y, at, head, people), hair, "beard", line=0.5)
    _features(sheet, x, y, at, people)
    sheet.paint(front, hair, "hair", line=0.4)
    _glasses(sheet, x, y, at, people)
    _hat(sheet, x, y, at, people)
    _hand(sheet, at, people, skin, shirt)
    return sheet.images.clamp_(0, 1).mul_(2).sub_(1), sheet.labels


def _is(kind: Tensor, value: int) -> Tensor:
    return (kind == value).view(-1, 1, 1)


def _sides(x: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones(x.shape[0], 1, 1, device=x.device)
    return -one, one


def _ground(sheet: Sheet, look: Look) -> None:
    """Paint the background, from one colour at the top to a darker one at the bottom."""
    first, second = look.first[:, :, None, None], look.second[:, :, None, None]
    colour = torch.lerp(first, second, (sheet.y * 0.5 + 0.5))
    sheet.images = torch.lerp(sheet.mixed_with, colour, sheet.ground_weight)


def _head(x: Tensor, y: Tensor, at: dict[str, Tensor]) -> Tensor:
    """An ellipse that narrows (or widens) towards the chin."""
    narrow = 1.0 - at["jaw"] * (y / at["height"]).clamp(0, 1)
    zero = torch.zeros_like(at["cx"])
    return ellipse(x / narrow, y, zero, zero, at["width"], at["height"])


def _neck(x: Tensor, y: Tensor, at: dict[str, Tensor]) -> Tensor:
    zero = torch.zeros_like(at["cx"])
    return box(x, y, zero, at["height"] * 1.0 + at["collar"] * 0.5, 0.15, 0.2 + at["collar"] * 0.5, 0.08)


def _torso(sheet: Sheet, x: Tensor, at: dict[str, Tensor]) -> Tensor:
    zero = torch.zeros_like(at["cx"])
    chest = ellipse(x, sheet.y, zero, zero + 1.22, at["shoulders"], 0.68)
    return torch.minimum(chest, box(x, sheet.y, zero, zero + 1.1, at["shoulders"] * 0.98, 0.3, 0.1))


def _hair(x: Tensor, y: Tensor, at: dict[str, Tensor], people: People, head: Tensor) -> tuple[Tensor, Tensor]:
    """The hair behind the face, and the fringe in front of it."""
    zero = torch.zeros_like(at["cx"])
    wide, high = at["width"] * 1.3 * at["volume"], at["height"] * 1.2
    cap = ellipse(x, y, zero, zero - 0.06, wide, high)
    short = torch.maximum(cap, y - 0.2)
    curl = 0.05 * torch.sin(angle(x, y) * 11 * 6.2832)
    curly = torch.maximum(ellipse(x, y, zero, zero - 0.08, wide * 1.18, high * 1.1) - curl, y - 0.38 - curl)
    kind = people.hair.view(-1, 1, 1)
    back = torch.where(
        kind == 1,
        short,
        torch.where(kind == 3, curly, torch.where(kind == 2, torch.minimum(cap, _locks(x, y, at)), FAR)),
    )
    hairline = y + at["height"] * at["fringe"] - 0.1 * (x / at["width"]).square()
    front = torch.maximum(torch.maximum(hairline, head - 0.02), present(cap, kind > 0))
    return back, front


def _locks(x: Tensor, y: Tensor, at: dict[str, Tensor]) -> Tensor:
    """Two strands that fall beside the face onto the shoulders."""
    zero = torch.zeros_like(at["cx"])
    wide = at["width"] * 1.3 * at["volume"]
    return box(x.abs(), y, wide * 0.78, zero + at["length"] / 2 - 0.02, wide * 0.26, at["length"] / 2 + 0.06, 0.09)


def _beard(x: Tensor, y: Tensor, at: dict[str, Tensor], head: Tensor, people: People) -> Tensor:
    upper = 0.12 * (1 - (x / at["width"]).square() * 1.6) + 0.08 - y
    return present(torch.maximum(head - 0.03, upper), people.beard.view(-1, 1, 1))


def _features(sheet: Sheet, x: Tensor, y: Tensor, at: dict[str, Tensor], people: People) -> None:
    """Paint eyes, brows, nose and mouth, which count as the face."""
    zero = torch.zeros_like(at["cx"])
    n, device = len(people.style), x.device

    def ink(r: float, g: float, b: float) -> Tensor:
        return sheet.styled(torch.tensor([r, g, b], device=device).view(1, 3, 1, 1).expand(n, 3, 1, 1))

    man, surprised = _is(people.person, 0), _is(people.expression, 3)
    eye_x, eye_y = at["width"] * 0.47, zero - 0.06
    open_ = torch.where(surprised, 0.1, 0.075)
    mirrored = x.abs()
    sheet.paint(ellipse(mirrored, y, eye_x, eye_y, 0.1, open_), ink(0.97, 0.97, 0.97), line=0.6)
    pupil = torch.minimum(*(ellipse(x, y, s * eye_x + at["gaze"], eye_y, 0.052, 0.06) for s in _sides(x)))
    sheet.paint(pupil, ink(0.05, 0.04, 0.05), line=0)
    brow = arc(mirrored, y, eye_x, eye_y - 0.16, 0.12, zero - 0.03, torch.where(man, 0.055, 0.03))
    sheet.paint(brow, sheet.styled(people.looks["hair"].first[:, :, None, None] * 0.45), line=0)
    nose = ellipse(x, y, zero, zero + 0.1, 0.045, 0.05)
    sheet.paint(nose, sheet.styled(people.looks["face"].first[:, :, None, None] * 0.78), line=0)
    mouth_y = at["height"] * 0.54
    bend = torch.where(_is(people.expression, 1), 0.11, torch.where(_is(people.expression, 2), -0.1, 0.0))
    thick = torch.where(man, 0.05, 0.075)
    curve = arc(x, y, zero, mouth_y - bend / 2, at["width"] * 0.45, bend, thick)
    mouth = torch.where(surprised, ellipse(x, y, zero, mouth_y, 0.085, 0.11), curve)
    lips = torch.where(man[..., None], ink(0.45, 0.16, 0.14), ink(0.85, 0.12, 0.2))
    sheet.paint(mouth, lips, line=0)


def _glasses(sheet: Sheet, x: Tensor, y: Tensor, at: dict[str, Tensor], people: People) -> None:
    """Paint tinted lenses in a frame, with one look on both sides of the nose."""
    zero = torch.zeros_like(at["cx"])
    wear, look = people.glasses.view(-1, 1, 1), people.looks["glasses"]
    mirrored, middle = x.abs(), torch.maximum(at["width"] * 0.5, at["lens"] + 0.025)
    round_ = ellipse(mirrored, y, middle, zero - 0.05, at["lens"], at["lens"])
    square = box(mirrored, y, middle, zero - 0.05, at["lens"] * 1.02, at["lens"] * 0.8, 0.04)
    lens = torch.where(people.round_lenses.view(-1, 1, 1), round_, square)
    bridge = box(x, y, zero, zero - 0.07, middle, 0.028, 0.01)
    temples = box(mirrored, y, at["width"] * 0.95, zero - 0.07, 0.1, 0.028, 0.01)
    frame = torch.minimum(lens - 0.02, torch.minimum(bridge, temples))
    sheet.paint(present(frame, wear), sheet.styled(look.second[:, :, None, None]), "glasses", line=0.6)
    sheet.paint(present(lens + 0.03, wear), sheet.styled(look.first[:, :, None, None]), line=0)


def _hat(sheet: Sheet, x: Tensor, y: Tensor, at: dict[str, Tensor], people: People) -> None:
    """hat: brim and crown; cap: dome and visor; beanie: dome, fold and bobble; crown: points. All sit on the brow."""
    zero = torch.zeros_like(at["cx"])
    base, wide = -at["height"] * 0.52, at["width"] * 1.12
    tall = 0.4 * at["tall"]
    brim = box(x, y, zero, base, wide * 1.42 * at["brim"], 0.075, 0.06)
    hat = torch.minimum(brim, box(x, y, zero, base - tall / 2, wide * (0.9 + 0.12 * (y - base)), tall / 2 + 0.06, 0.09))
    dome = torch.maximum(ellipse(x, y, zero, base + 0.04, wide * 1.12, 0.5 * at["tall"]), y - base - 0.04)
    visor = box(x * at["side"], y, zero + wide * 0.95, base, wide * 0.75, 0.07, 0.06)
    cap = torch.minimum(dome, visor)
    bobble = ellipse(x, y, zero, base - 0.5 * at["tall"], 0.13, 0.13)
    fold = box(x, y, zero, base - 0.02, wide * 1.2, 0.1, 0.06)
    beanie = torch.minimum(torch.minimum(dome, bobble), fold)
    points = base - 0.16 - 0.26 * at["tall"] * triangle_wave(x / (wide * 0.72) + 0.5)
    crown = torch.maximum(torch.maximum(x.abs() - wide * 1.08, y - base - 0.03), (points - y) * 0.6)
    kind = people.hat.view(-1, 1, 1)
    shape = torch.where(
        kind == 1, hat, torch.where(kind == 2, cap, torch.where(kind == 3, beanie, torch.where(kind == 4, crown, FAR)))
    )
    sheet.paint(shape, sheet.fill(people.looks["hat"]), "hat")


def _hand(sheet: Sheet, at: dict[str, Tensor], people: People, skin: Tensor, shirt: Tensor) -> None:
    """Paint a raised hand in front of the chest, in a sleeve that carries the shirt's look."""
    x, y, raised = sheet.x * at["side"], sheet.y, people.hand.view(-1, 1, 1)
    hx, hy = at["hand_x"], at["hand_y"]
    sleeve = capsule(x, y, hx + 0.12, torch.full_like(hx, 1.25), hx + 0.02, hy + 0.3, 0.16)
    sheet.paint(present(sleeve, raised), shirt, "shirt")
    hand = ellipse(x, y, hx, hy, 0.14, 0.15)
    for tip_x, tip_y in ((-0.15, -0.2), (-0.05, -0.27), (0.06, -0.26), (0.15, -0.19), (-0.22, -0.02)):
        hand = torch.minimum(hand, capsule(x, y, hx, hy, hx + tip_x, hy + tip_y, 0.045))
    sheet.paint(present(hand, raised), skin, "hand")
