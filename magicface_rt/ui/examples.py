"""The gallery: ready-made requests, from pictures that come with the package (pictures/SOURCES.md)."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from PIL import Image

__all__ = ["EXAMPLES", "Example", "ExampleConcept", "bridged", "thumbnail"]

THUMBNAIL = 160
"""The side of a thumbnail, in pixels."""


@dataclass(frozen=True)
class ExampleConcept:
    """A word of the example's prompt, with the picture and mask that it stands for."""

    word: str
    picture: str
    mask: str
    prompt: str
    weight: float


@dataclass(frozen=True)
class Example:
    """A complete request. `shows`: what one can see in it."""

    title: str
    shows: str
    prompt: str
    concepts: tuple[ExampleConcept, ...]
    alpha: float = 0.4
    seed: int = 7


_WOMAN = ExampleConcept("woman", "woman.jpg", "woman-mask.png", "a woman", 2.5)
_HAT = ExampleConcept("hat", "hat.jpg", "hat-mask.png", "a hat", 2.0)

EXAMPLES = (
    Example("One concept", "A drawn hat, and where it goes.", "a dog with a hat", (_HAT,)),
    Example(
        "Two concepts",
        "A photograph and a drawing: each keeps to its own region in the second stage.",
        "a woman with a hat in the snow",
        (_WOMAN, _HAT),
    ),
    Example(
        "Without the second stage",
        "The same with alpha 1: every place may look at both to the end, and they mix.",
        "a woman with a hat in the snow",
        (_WOMAN, _HAT),
        alpha=1.0,
    ),
)


def bridged(example: Example) -> str:
    """Return the example's photographs and masks in the form that the page's script takes."""
    return json.dumps(
        [
            {"slot": slot, "name": one.picture, "image": _encoded(one.picture), "mask": _encoded(one.mask)}
            for slot, one in enumerate(example.concepts, 1)
        ]
    )


@cache
def thumbnail(example: Example) -> str:
    """Return a data URL of a small picture: the masked parts side by side on a plain background."""
    sheet = Image.new("RGB", (THUMBNAIL * len(example.concepts), THUMBNAIL), (236, 238, 240))
    for place, one in enumerate(example.concepts):
        with Image.open(io.BytesIO(_read(one.picture))) as picture, Image.open(io.BytesIO(_read(one.mask))) as mask:
            size = (THUMBNAIL, THUMBNAIL)
            sheet.paste(picture.convert("RGB").resize(size), (THUMBNAIL * place, 0), mask.convert("L").resize(size))
    file = io.BytesIO()
    sheet.save(file, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _encoded(name: str) -> str:
    return base64.b64encode(_read(name)).decode("ascii")


@cache
def _read(name: str) -> bytes:
    return (files(__package__) / "pictures" / name).read_bytes()
