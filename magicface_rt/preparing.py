"""Bare concepts' references: read from their files, and prepared for all steps where they are to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bundle import Bundle
from .concept import Concept, NamedConcept
from .course import Course
from .encoding import encode_image, encode_text, load_references
from .images import LoadedReference
from .kept import KeptConcept, KeptReference, Origin
from .kept.keeper import Keeper
from .kept.memory import Tokens
from .kept.origin import content_key
from .kept.preparation import EncodedReference, prepare_reference, token_counts
from .kept.reference import Storage
from .request import Progress
from .tokenizer import Tokenizer
from .workplace import Workplace


@dataclass(frozen=True, eq=False)
class BareReference:
    """A reference of a bare concept, read from its files. `tokens`: kept tokens by factor."""

    loaded: LoadedReference
    prompt: str
    tokens: dict[int, int]


class Preparer:
    """Prepares references at one workplace."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, keeper: Keeper, place: Workplace, course: Course) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.keeper = keeper
        self.place = place
        self.course = course

    def prepare(
        self, references: Sequence[BareReference], origin: Origin, storage: Storage, *, workspace: int | None = None
    ) -> list[KeptReference]:
        """Keys of all steps, out of the store where they are there."""
        total = origin.steps * len(references)
        kept = []
        for number, bare in enumerate(references):
            key = content_key(origin, bare.loaded, bare.prompt, storage)

            def make(bare: BareReference = bare, key: str = key, before: int = number * origin.steps) -> KeptReference:
                with self.course.timed("image_encoding"):
                    latents = encode_image(self.place, self.bundle, bare.loaded)
                with self.course.timed("text_encoding"):
                    text = encode_text(self.place, self.tokenizer, [bare.prompt])
                binding = self.place.binding("reference_kv")
                symbols = ["R", *(f"M{factor}" for factor in self.bundle.factors)]
                largest = {symbol: binding.largest(symbol) for symbol in symbols}
                with self.course.timed("reference_pass"):
                    return prepare_reference(
                        self.bundle,
                        binding,
                        EncodedReference(bare.loaded, bare.prompt, latents, text),
                        origin,
                        key,
                        storage=storage,
                        rows=self.keeper.rows(bare.tokens, origin.steps, largest, workspace),
                        report=lambda done: self.course.report(Progress(before + done, total, "prepare", 0, 1)),
                    )

            kept.append(self.keeper.store.get_or_make(key, make))
        return kept


def load_bare(concept: Concept, bundle: Bundle) -> list[BareReference]:
    """A concept's references, read from their files and checked."""
    loaded = load_references(concept, bundle)
    return [
        BareReference(one, reference.prompt, token_counts(one, bundle))
        for one, reference in zip(loaded, concept.references, strict=True)
    ]


def tokens_of(concept: NamedConcept, bare: Sequence[BareReference]) -> list[Tokens]:
    """A concept's references as the memory plan sees them."""
    used = concept.weight != 0
    if isinstance(concept, KeptConcept):
        return [Tokens(r.tokens, "file" if r.mapped else "memory", r.nbytes, used) for r in concept.references]
    return [Tokens(reference.tokens, "no", 0, used) for reference in bare]
