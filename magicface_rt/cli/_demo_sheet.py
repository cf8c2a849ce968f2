"""The demo's contact sheet: what went in, what the model makes without it, and what came out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from magicface_rt import Concept, Result
from magicface_rt.images import LoadedReference, load_reference
from magicface_rt.provenance import ProvenancePicture

TILES = "tiles"
"""The key of the list of what is on the sheet, which is added to the picture's provenance. A demo recognises an earlier
sheet by it.
"""

TILE, GAP, LINE = 256, 12, 22
_DIMMED = 0.3  # what is left of a reference's contrast outside its mask


def contact_sheet(concepts: Sequence[Concept], plain: Result, made: Result) -> Image.Image:
    """Draw the concepts' first references, dimmed outside their masks, and the first pictures of both results. The
    sheet says how it was made if the picture does.

    Raises:
        ImageError, MaskError: a reference cannot be read.
    """
    tiles = [
        *(
            (f"reference: {concept.word}", _masked(load_reference(concept.references[0], name=concept.name)))
            for concept in concepts
        ),
        ("without references", plain.images[0]),
        ("with them", made.images[0]),
        ("regions", made.overlay()),
    ]
    pictures = [(label, _enlarged(picture)) for label, picture in tiles]
    height = max(picture.height for _, picture in pictures)
    sheet = Image.new("RGB", (GAP + len(tiles) * (TILE + GAP), 2 * GAP + LINE + height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, (label, picture) in enumerate(pictures):
        left = GAP + column * (TILE + GAP)
        pen.text((left, GAP), label, fill="black", font=font)
        sheet.paste(picture, (left, GAP + LINE))
    if not isinstance(made.images[0], ProvenancePicture):
        return sheet
    labels = [label for label, _ in tiles]
    return ProvenancePicture.of(sheet, {**made.images[0].provenance, TILES: labels})


def _masked(reference: LoadedReference) -> Image.Image:
    image = np.asarray(reference.image, np.float32)
    mask = Image.fromarray(reference.mask_grid * np.uint8(255)).resize(reference.image.size, Image.Resampling.NEAREST)
    inside = np.asarray(mask)[..., None] > 0
    return Image.fromarray(np.where(inside, image, _DIMMED * image + (1 - _DIMMED) * 255).round().astype(np.uint8))


def _enlarged(picture: Image.Image) -> Image.Image:
    """Scale a picture to the width of a tile; a small picture keeps its pixels visible."""
    how = Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((TILE, max(1, round(picture.height * TILE / picture.width))), how)
