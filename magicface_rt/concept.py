"""Concepts and their references, and where a concept's word stands in the prompt."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .decoding import as_seen
from .errors import ConceptError, ImageError, PromptError
from .images import ImageSource, Resample, check_mask_threshold, check_resample
from .values.plain_numbers import as_float
from .values.shown import shown

__all__ = ["MAX_WEIGHT", "Concept", "NamedConcept", "PlacedConcept", "Reference", "place_concepts"]

MAX_WEIGHT = 100.0  # e^100 already drowns every other key; more only endangers 16-bit arithmetic


@dataclass(frozen=True, eq=False)
class Reference:
    """One image of a concept, its mask, and its own prompt.

        Reference("man.jpg", mask="man-mask.png", prompt="a man")
        Reference("man-cut-out.png")                                  the alpha channel is the mask
        Reference(array, mask=array.any(axis=2))                      arrays and PIL images work too
        Reference("man.jpg", mask="mask.jpg", mask_threshold=255, resample="nearest")    the authors' loader

    image           path, PIL image, or uint8 array [h,w,3] or [h,w,4]
    mask            path, PIL image, or uint8 or bool array [h,w]; white is the concept. None: the alpha channel
    prompt          what the reference shows, in the style of the target's prompt; it may be empty
    mask_threshold  1..255; mask values from here up belong to the concept
    resample        how the image is brought to the bundle's size: "lanczos" or "nearest"

    Raises `ImageError`, `PromptError` or `OptionError` for a field of the wrong kind; the files are read later.
    """

    image: ImageSource
    mask: ImageSource | None = None
    prompt: str = ""
    mask_threshold: int = 128
    resample: Resample = "lanczos"

    def __post_init__(self) -> None:
        if self.image is None or isinstance(self.image, (bool, int, float, bytes)):
            raise ImageError(f"image is {self.image!r}, expected a path, a PIL image, or a uint8 array.")
        if not isinstance(self.prompt, str):
            raise PromptError(f"a reference's prompt is {self.prompt!r}, expected text (it may be empty).")
        check_mask_threshold(self.mask_threshold)
        check_resample(self.resample)

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json for this reference.

        An image or mask is given by its path, as passed in; one in memory by its shape and the SHA-256 of its values.
        """
        return {
            "image": _described(self.image),
            "mask": None if self.mask is None else _described(self.mask),
            "prompt": self.prompt,
            "mask_threshold": int(self.mask_threshold),
            "resample": self.resample,
        }


@dataclass(frozen=True, eq=False, init=False)
class NamedConcept:
    """The part of a concept that every request gives, whether its references are images or kept keys; see `Concept`.

    Raises `ConceptError` for a field that cannot be used.
    """

    word: str
    weight: float
    token_index: tuple[int, ...] | None
    name: str
    references: tuple[Any, ...]

    def __init__(
        self, word: str, weight: float, token_index: int | Sequence[int] | None = None, name: str | None = None
    ) -> None:
        if not isinstance(word, str) or not word.strip():
            raise ConceptError(f"a concept's word is {shown(word)}, expected a word of the prompt.")
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise ConceptError(
                f"concept {shown(word)}: name is {shown(name)}, expected text, or nothing to use the word."
            )
        called = word if name is None else name
        if "\0" in called:
            raise ConceptError(
                f"concept {shown(word)}: name is {shown(called)}, expected text without NUL characters: in "
                "regions.npz a name may end there. Give another name."
            )
        object.__setattr__(self, "word", word)
        object.__setattr__(self, "weight", _checked_weight(word, weight))
        object.__setattr__(self, "token_index", _checked_token_index(word, token_index))
        object.__setattr__(self, "name", called)


@dataclass(frozen=True, eq=False, init=False)
class Concept(NamedConcept):
    """A thing to carry over: a word of the prompt, a weight, and one or more references.

        Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man"), weight=2.5)
        Concept("red hat", front, side)                               several words, several references
        Concept("man", front, token_index=7, name="the second man")   when the word stands in the prompt twice

    word         word or words of the prompt; the first place where they stand is taken
    references   tuple of `Reference`, at least one
    weight       strength, finite, -100..100; 0 hides the references
    token_index  token positions in the prompt, used instead of looking for the word; 0 is the start token, so 1 is the
                 first. A warning is issued if tokens other than the word's stand there
    name         what legends and messages call it; the word, unless given

    Raises `ConceptError` for a field that cannot be used.
    """

    references: tuple[Reference, ...]

    def __init__(
        self,
        word: str,
        *reference: Reference,
        references: Iterable[Reference] = (),
        weight: float = 3.0,
        token_index: int | Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(word, weight, token_index, name)
        object.__setattr__(self, "references", _checked_references(word, (*reference, *references)))


@dataclass(frozen=True)
class PlacedConcept:
    """A concept and its token positions in the encoded prompt, ascending, each 1..76."""

    concept: NamedConcept
    tokens: tuple[int, ...]


class _Tokenizer(Protocol):
    """The part of `magicface_rt.tokenizer.Tokenizer` that placing concepts needs."""

    def tokens(self, prompt: str) -> tuple[str, ...]: ...

    def find_word(self, prompt: str, word: str) -> tuple[int, ...]: ...


def place_concepts(
    prompt: str, concepts: Sequence[NamedConcept], tokenizer: _Tokenizer, limit: int
) -> tuple[PlacedConcept, ...]:
    """Find every concept's tokens in the prompt; the order of the concepts is kept.

    Raises `ConceptError` for more than `limit` concepts, a token index outside the prompt, and two concepts on one
    token; `PromptError` for a prompt that is too long or does not hold a concept's word.
    """
    concepts = tuple(concepts)
    if len(concepts) > limit:
        names = ", ".join(repr(concept.name) for concept in concepts)
        raise ConceptError(
            f"{len(concepts)} concepts were given ({names}); the bundle takes at most {limit}. "
            "Leave some out, or export a bundle for more concepts."
        )
    tokens = tokenizer.tokens(prompt)
    placed: list[PlacedConcept] = []
    owner: dict[int, NamedConcept] = {}
    for concept in concepts:
        positions = _positions(prompt, concept, tokenizer, tokens)
        for position in positions:
            if position in owner:
                raise ConceptError(
                    f"concepts {owner[position].name!r} and {concept.name!r} both stand on token {position} "
                    f"({tokens[position]!r}) of the prompt {prompt!r}. Give one of them another word, or its "
                    f"token_index: the tokens are {_numbered(tokens)}."
                )
            owner[position] = concept
        placed.append(PlacedConcept(concept, positions))
    return tuple(placed)


def _positions(prompt: str, concept: NamedConcept, tokenizer: _Tokenizer, tokens: tuple[str, ...]) -> tuple[int, ...]:
    if concept.token_index is None:
        try:
            return tokenizer.find_word(prompt, concept.word)
        except PromptError as error:
            raise PromptError(f"concept {concept.name!r}: {error}") from error
    last = len(tokens) - 2  # the start and end tokens belong to no concept
    for index in concept.token_index:
        if not 1 <= index <= last:
            expected = f"1..{last}: the tokens are {_numbered(tokens)}" if last else "nothing: the prompt is empty"
            raise ConceptError(
                f"concept {concept.name!r}: token_index {index} is outside the prompt {prompt!r}; expected {expected}."
            )
    return concept.token_index


def _numbered(tokens: tuple[str, ...]) -> str:
    return ", ".join(f"{position} {token!r}" for position, token in list(enumerate(tokens))[1:-1])


def _described(source: ImageSource) -> str | dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    values = np.ascontiguousarray(np.asarray(as_seen(source) if isinstance(source, Image.Image) else source))
    return {"shape": list(values.shape), "sha256": hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()}


def _checked_references(word: str, references: tuple[Reference, ...]) -> tuple[Reference, ...]:
    if not references:
        raise ConceptError(
            f"concept {shown(word)} has no reference. Give at least one: Concept({word!r}, Reference(...))."
        )
    for position, reference in enumerate(references):
        if not isinstance(reference, Reference):
            raise ConceptError(
                f"concept {shown(word)}: reference {position + 1} is a {type(reference).__name__}, expected a "
                "Reference. Wrap an image in one: Reference(image, mask=...)."
            )
    return references


def _checked_weight(word: str, weight: float) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer, np.floating)):
        raise ConceptError(f"concept {shown(word)}: weight is {shown(weight)}, expected a number.")
    if not abs(weight) <= MAX_WEIGHT:
        raise ConceptError(
            f"concept {shown(word)}: weight is {shown(weight)}, expected a finite number from -{MAX_WEIGHT:g} to "
            f"{MAX_WEIGHT:g}. Usual weights are 2 to 4."
        )
    return as_float(weight)


def _checked_token_index(word: str, token_index: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if token_index is None:
        return None
    single = isinstance(token_index, (int, np.integer))
    indices = (token_index,) if single else token_index
    if isinstance(indices, (str, bytes)) or not isinstance(indices, Iterable):
        raise ConceptError(
            f"concept {shown(word)}: token_index is {shown(token_index)}, expected a whole number or several."
        )
    checked = []
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 1:
            raise ConceptError(
                f"concept {shown(word)}: token_index is {shown(token_index)}, expected whole numbers from 1 "
                "(0 is the start token)."
            )
        checked.append(int(index))
    if not checked:
        raise ConceptError(f"concept {shown(word)}: token_index is empty, expected at least one position.")
    return tuple(sorted(set(checked)))
