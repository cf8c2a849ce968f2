"""The contact sheet of the quality figures: references with their masks, plain, RSA only, two-stage, regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .pictures import PictureFolder
from .requests import Case
from .sheets import coloured, tile
from .variants import DEFAULT, PLAIN, RSA
from .world import PARTS

TILE, GAP, LINE, MARGIN = 128, 6, 18, 10
REFERENCES = 3  # columns
MADE = ((PLAIN, "plain model"), (RSA, "RSA only"), (DEFAULT, "two-stage"))


def sheet(cases: Sequence[Case], folder: PictureFolder) -> Image.Image:
    """Draw a row for each request, with those of its pictures that exist."""
    columns = REFERENCES + len(MADE) + 1
    width = 2 * MARGIN + columns * TILE + (columns - 1) * GAP + GAP
    height = 2 * MARGIN + LINE + len(cases) * (LINE + TILE + GAP)
    whole = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(13)

    def left(column: int) -> int:
        return MARGIN + column * (TILE + GAP) + (GAP if column >= REFERENCES else 0)

    headings = {0: "references and masks", **{REFERENCES + i: label for i, (_, label) in enumerate(MADE)}}
    for column, heading in {**headings, columns - 1: "two-stage: regions"}.items():
        pen.text((left(column), MARGIN), heading, fill="black", font=font)
    for row, case in enumerate(cases):
        y = MARGIN + LINE + row * (LINE + TILE + GAP)
        pen.text((MARGIN, y), f"{case.number}: {case.caption}", fill="#444444", font=font)
        y += LINE
        for k, part in enumerate(case.parts):
            picture = _masked(case.references.images[k], case.mask(k), part)
            whole.paste(picture, (left(k), y))
            _named(pen, left(k), y, part, font)
        for column, (name, _) in enumerate(MADE, REFERENCES):
            if folder.has(name, case.number):
                whole.paste(tile(folder.image(name, case.number), TILE), (left(column), y))
        if folder.has(DEFAULT, case.number):
            drawn = _regions(folder.image(DEFAULT, case.number), folder.regions(DEFAULT, case.number), case.parts)
            whole.paste(drawn, (left(columns - 1), y))
    return whole


def _masked(image: Tensor, mask: Tensor, part: str) -> Image.Image:
    """Draw the reference, dimmed outside its mask, with the mask's edge in the part's colour."""
    picture = np.asarray(tile(torch.where(mask, image, 0.35 * image + 0.65), TILE)).copy()
    enlarged = np.asarray(Image.fromarray(mask.numpy()).resize((TILE, TILE), Image.Resampling.NEAREST))
    edge = np.zeros_like(enlarged)
    edge[1:] |= enlarged[1:] != enlarged[:-1]
    edge[:, 1:] |= enlarged[:, 1:] != enlarged[:, :-1]
    picture[edge] = _colour(part)
    return Image.fromarray(picture)


def _regions(image: Tensor, regions: Tensor, parts: Sequence[str]) -> Image.Image:
    """Draw the regions over the picture, in the colours of their parts."""
    numbers = torch.tensor([-1, *(PARTS.index(part) for part in parts)])[regions]
    side = image.shape[-1] // regions.shape[-1]
    fill = coloured(numbers[None])[0].repeat_interleave(side, 1).repeat_interleave(side, 2)
    inside = (numbers >= 0).repeat_interleave(side, 0).repeat_interleave(side, 1)
    return tile(torch.where(inside, 0.45 * image + 0.55 * fill, 0.6 * image - 0.2), TILE)


def _colour(part: str) -> tuple[int, int, int]:
    red, green, blue = ((coloured(torch.tensor([[[PARTS.index(part)]]])) + 1) * 127.5).round().int().flatten().tolist()
    return red, green, blue


def _named(pen: ImageDraw.ImageDraw, x: int, y: int, part: str, font: object) -> None:
    pen.rectangle((x, y + TILE - 17, x + 8 + 7 * len(part), y + TILE - 1), fill="black")
    pen.text((x + 4, y + TILE - 17), part, fill=_colour(part), font=font)
