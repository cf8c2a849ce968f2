"""A concept whose references are kept keys instead of images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..concept import Concept, NamedConcept
from ..errors import KeptConceptError
from ..values.shown import shown
from .origin import Origin
from .reference import KeptReference

MAX_NOTE = 2000


def check_note(note: object, word: str) -> None:
    """Raise `KeptConceptError` if this cannot be the note of a kept concept, which is named by its word."""
    if note is not None and (not isinstance(note, str) or not 1 <= len(note) <= MAX_NOTE):
        found = f"{len(note)} characters" if isinstance(note, str) else shown(note)
        raise KeptConceptError(
            f"kept concept {word!r} has a note of {found}, expected a text of 1 to {MAX_NOTE} characters, or None."
        )


@dataclass(frozen=True, eq=False, init=False)
class KeptConcept(NamedConcept):
    """A concept that was prepared: `generate` takes it as it takes a `Concept`.

        kept = session.prepare(Concept("man", Reference("man.jpg", mask="man-mask.png")), steps=20)
        session.generate("a man in the rain", [kept], steps=20, seed=7)
        session.generate("an old man", [kept.renamed(weight=2.0)], steps=20)
        kept.save("man.concept")
        KeptConcept.load("man.concept")

    It serves one bundle, number of steps and `reference_seed`. Word, weight and token_index may be changed.

    references  tuple of `KeptReference`
    origin      what the keys were made for
    source      the concept it was made from, None if it came from a file
    pictures    what a file with images holds: `image_0`, uint8 [h,w,3], and `mask_0`, uint8 [128,128], ...
    note        text that goes with it, such as who agreed to what, see `noted`; None if there is none
    """

    references: tuple[KeptReference, ...]
    origin: Origin
    source: Concept | None
    pictures: Mapping[str, NDArray[np.uint8]]
    note: str | None

    def __init__(
        self,
        word: str,
        references: Sequence[KeptReference],
        origin: Origin,
        *,
        weight: float = 3.0,
        token_index: int | Sequence[int] | None = None,
        name: str | None = None,
        source: Concept | None = None,
        pictures: Mapping[str, NDArray[np.uint8]] | None = None,
        note: str | None = None,
    ) -> None:
        super().__init__(word, weight, token_index, name)
        references = tuple(references)
        check_note(note, word)
        if not references:
            raise KeptConceptError(f"kept concept {word!r} has no reference, expected at least one.")
        if source is not None and len(source.references) != len(references):
            raise KeptConceptError(
                f"kept concept {word!r} has {len(references)} references, and its source {len(source.references)}; "
                "expected as many."
            )
        object.__setattr__(self, "references", references)
        object.__setattr__(self, "origin", origin)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "pictures", dict(pictures or {}))
        object.__setattr__(self, "note", note)

    @property
    def steps(self) -> int:
        """The number of steps that it serves."""
        return self.origin.steps

    @property
    def reference_seed(self) -> int:
        """The seed of the noise put on its references."""
        return self.origin.reference_seed

    @property
    def nbytes(self) -> int:
        """Bytes of its keys, in memory or in its file."""
        return sum(reference.nbytes for reference in self.references)

    def check_not_modified(self) -> None:
        """Check that no file of its keys was written to since it was loaded. Takes microseconds.

        Raises:
            KeptConceptError: a file was, or cannot be examined.
        """
        for file in {reference.file for reference in self.references if reference.file is not None}:
            file.check_not_modified()

    @property
    def error(self) -> float:
        """What 8-bit storage cost: the relative 2-norm of the worst tensor, 0 for exact storage."""
        return max(reference.error for reference in self.references)

    def renamed(
        self,
        word: str | None = None,
        *,
        weight: float | None = None,
        token_index: int | Sequence[int] | None = None,
        name: str | None = None,
    ) -> KeptConcept:
        """Return the same keys under another word, weight, token_index or name; what is not given stays.

        A new word drops the old token_index and name.

        Raises:
            ConceptError: a value that cannot be used.
        """
        same = word is None
        return self._like(
            word=self.word if word is None else word,
            weight=self.weight if weight is None else weight,
            token_index=self.token_index if token_index is None and same else token_index,
            name=self.name if name is None and same else name,
        )

    def noted(self, note: str | None) -> KeptConcept:
        """Return a copy with a note of at most 2000 characters: whose likeness it is, who agreed to what, until when.

        It is kept in the file as it is, for people to read (`magicface-rt inspect`); nothing here acts on it.

        Raises:
            KeptConceptError: the note is not a text of that length.
        """
        return self._like(note=note)

    def _like(self, **changes: Any) -> KeptConcept:
        """Return a copy with some fields changed."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return KeptConcept(**{**fields, **changes})

    def save(self, path: str | os.PathLike[str], *, with_image: bool = False, overwrite: bool = False) -> Path:
        """Write a file, which appears complete or not at all, and return its path; for a link, that is where it leads.

        with_image  store the reference images and masks as well; they are not needed for pictures. They are read from
                    the concept's `source` once more, or from the file that it was loaded from

        Raises:
            KeptConceptError: it came from a file that was written to since; or, with `with_image`, the images are not
                there, because it came from a file without them, or are no longer those that the keys were made from.
            ImageError, MaskError: with `with_image`, an image or mask can no longer be read.
            OutputError: the file exists (without `overwrite`) or cannot be written.
        """
        from .files import save

        return save(self, Path(path), with_image=with_image, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check_hashes: bool = True) -> KeptConcept:
        """Open a file. Its keys stay there, mapped into memory, until a step needs them.

        check_hashes  read the whole file once and compare it with its manifest, about a second per gigabyte. Without,
                      the header, the manifest and the size are checked, and a changed bit in the keys goes unseen.

        Do not change a file in place while it is loaded: requests with it are then refused, and cutting it short ends
        the process. `save` puts a new one in its place, which is safe.

        Raises:
            KeptConceptError: the file does not exist, has another format version, is damaged, or is cut short.
        """
        from .files import load

        return load(Path(path), check_hashes=check_hashes)

    def to_dict(self) -> dict[str, Any]:
        """Return its description, as JSON can hold it."""
        return {
            "word": self.word,
            "name": self.name,
            "weight": self.weight,
            "token_index": None if self.token_index is None else list(self.token_index),
            "references": [
                {
                    "key": reference.key,
                    "prompt": reference.prompt,
                    "storage": reference.storage,
                    "tokens": {str(factor): count for factor, count in reference.tokens.items()},
                    "error": reference.error,
                }
                for reference in self.references
            ],
            "origin": self.origin.to_dict(),
            "note": self.note,
        }
