"""The page's fields at the time a picture is requested, and the order that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from ..errors import AnswerError, OptionError
from ..serve.schemas import PictureOrder
from ..serve.structure import read_body
from ..tokenizer import Tokenizer
from ..values.shown import one_line
from .file_names import file_names
from .words import chosen, words_of

__all__ = ["Form", "FormConcept", "Photograph", "photographs"]

_FIELD = re.compile(r"concepts\[(\d+)\](?:\.references\[0\])?(?:\.(\w+))?")
GONE = "gone"
"""Stands for a file that has been removed from the form."""
_MOST_PROBLEM = 500
"""The most characters of a problem that the page's script reports."""
_MOST_NAME = 256
"""The most characters of a photograph's name that are read."""
_PARTS = {"image": "photograph", "mask": "mask", "prompt": "what the photograph shows", "word": "word"}


@dataclass(frozen=True)
class Photograph:
    """What the browser holds for one concept: base64 of the files' bytes, and the photograph's file name.

    image    empty if there is none
    mask     None if the photograph could not be shown, so nothing was painted
    painted  whether the mask was painted on the page, over the photograph turned upright as its EXIF orientation says
    """

    slot: int
    image: str = field(default="", repr=False)
    mask: str | None = field(default=None, repr=False)
    name: str = ""
    painted: bool = False


@dataclass(frozen=True)
class FormConcept:
    """A concept as it is filled in on the page, under the number that the page gives it."""

    photograph: Photograph
    word: str
    weight: float
    prompt: str

    @property
    def slot(self) -> int:
        return self.photograph.slot

    @property
    def untouched(self) -> bool:
        """Whether nobody has begun to fill in this concept."""
        return not (self.photograph.image or self.word.strip())


@dataclass(frozen=True)
class Form:
    """All of the page's fields."""

    prompt: str
    concepts: Sequence[FormConcept]
    settings: Mapping[str, Any]

    @property
    def used(self) -> list[FormConcept]:
        """The concepts of the request, without those that nobody has begun to fill in."""
        return [concept for concept in self.concepts if not concept.untouched]

    def order(self, tokenizer: Tokenizer) -> PictureOrder:
        """Build the body of POST /v1/images that makes the picture.

        Raises:
            OptionError: a field that is empty, or out of its range.
        """
        words = words_of(tokenizer, self.prompt)
        concepts = []
        for concept in self.used:
            word, tokens = chosen(words, concept.word)
            concepts.append(
                {
                    "references": [
                        {
                            "image": concept.photograph.image,
                            "mask": concept.photograph.mask,
                            "prompt": concept.prompt,
                        }
                    ],
                    "word": word or None,
                    "weight": concept.weight,
                    "token_index": tokens,
                }
            )
        try:
            return PictureOrder.model_validate(
                {"prompt": self.prompt, "concepts": concepts, "record_regions": True, **self.settings}
            )
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise OptionError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None

    def without_files(self) -> Form:
        """Return the form without the bytes of photographs and masks, only with their names, for what is reported and
        shown about it.
        """

        def named(one: Photograph) -> Photograph:
            return replace(one, image=GONE if one.image else "", mask=GONE if one.mask is not None else None)

        return replace(self, concepts=[replace(one, photograph=named(one.photograph)) for one in self.concepts])

    def field_label(self, name: str | None) -> str:
        """Return a field of the order in the page's words: concepts[0].references[0].mask is "Concept 1, mask"."""
        if name is None:
            return ""
        match = _FIELD.fullmatch(name)
        if match is None:
            return name.replace("_", " ").capitalize()
        used, part = self.used, match.group(2)
        number = int(match.group(1))
        slot = used[number].slot if number < len(used) else number + 1
        return f"Concept {slot}" + (f", {_PARTS.get(part, part)}" if part else "")

    def painted(self, name: str | None) -> bool:
        """Whether a field of the order is of a concept whose mask was painted on the page."""
        match = _FIELD.fullmatch(name or "")
        number = int(match.group(1)) if match else len(self.used)
        return number < len(self.used) and self.used[number].photograph.painted

    def files(self) -> list[tuple[str, str]]:
        """Return, for each concept used, the names of its photograph and mask in the calls shown."""
        return file_names((concept.slot, concept.photograph.name) for concept in self.used)


def photographs(sent: bytes) -> list[Photograph]:
    """Parse what the page's script sends: a JSON list of {slot, image, mask, name, painted}, or {problem} if it could
    not send that.

    Raises:
        OptionError: the problem; or content that the script does not send.
    """
    try:
        content = read_body(sent) if sent else []
        if isinstance(content, dict) and isinstance(content.get("problem"), str):
            raise OptionError(f"the page sent no photographs: {one_line(content['problem'][:_MOST_PROBLEM])}")
        return [_photograph(one) for one in content]
    except (AnswerError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            "the page sent something else than photographs, expected a list of them. Load it again."
        ) from error


def _photograph(one: Mapping[str, Any]) -> Photograph:
    image, mask, name, painted = one["image"], one["mask"], one["name"], one.get("painted", False)
    if not (isinstance(image, str) and isinstance(name, str) and (mask is None or isinstance(mask, str))):
        raise TypeError("image, mask and name are texts")
    if type(one["slot"]) is not int:
        raise TypeError("slot is a whole number")
    if type(painted) is not bool:
        raise TypeError("painted is true or false")
    return Photograph(one["slot"], image, mask, name[:_MOST_NAME], painted)
