"""Read the references of bare concepts from their files, and prepare those that are to be kept for all steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from .bundle import Bundle
from .concept import Concept, NamedConcept
from .encoding import encode_image, encode_text, load_references
from .errors import NonFiniteError
from .images import LoadedReference, pixels_to_images
from .kept import KeptConcept, KeptReference, Origin
from .kept.keeper import Keeper
from .kept.memory import PlannedReference
from .kept.origin import content_key
from .kept.preparation import EncodedReference, prepare_reference, token_counts
from .kept.reference import Storage
from .request import Progress, check_concept, check_number
from .request_progress import RequestProgress
from .tokenizer import Tokenizer
from .worker_context import WorkerContext


@dataclass(frozen=True, eq=False)
class BareReference:
    """A reference of a bare concept, read from its files. `tokens`: kept tokens by factor."""

    loaded: LoadedReference
    prompt: str
    tokens: dict[int, int]

    def key(self, origin: Origin, storage: Storage) -> str:
        """The content key by which a store knows its keys."""
        return content_key(origin, self.loaded, self.prompt, storage)


class Preparer:
    """Prepares references in one worker context."""

    def __init__(
        self, bundle: Bundle, tokenizer: Tokenizer, keeper: Keeper, context: WorkerContext, progress: RequestProgress
    ) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.keeper = keeper
        self.context = context
        self.progress = progress

    def prepare(
        self,
        concept: NamedConcept,
        references: Sequence[BareReference],
        origin: Origin,
        storage: Storage,
        *,
        workspace: int | None = None,
    ) -> list[KeptReference]:
        """Return the keys of a concept's references for all steps, taking from the store those that it has.

        While another request prepares one of them, progress is reported repeatedly at the step where this one waits, so
        that waiting can be cancelled.
        """
        total = origin.steps * len(references)
        kept = []
        for number, bare in enumerate(references):
            key, before = bare.key(origin, storage), number * origin.steps
            make = partial(self._prepare_one, bare, origin, storage, key, workspace, before, total)
            try:
                kept.append(
                    self.keeper.store.get_or_make(key, make, partial(self._report_prepared_steps, before, total))
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"concept {concept.name!r}: {error}") from error
        return kept

    def _prepare_one(
        self,
        bare: BareReference,
        origin: Origin,
        storage: Storage,
        key: str,
        workspace: int | None,
        before: int,
        total: int,
    ) -> KeptReference:
        """Compute a reference's keys for all steps. `before` of `total` steps were prepared for references before."""
        self.keeper.check_room(bare.tokens, origin.steps, storage)
        with self.progress.timed("image_encoding"):
            latents = encode_image(self.context, self.bundle, bare.loaded)
        with self.progress.timed("text_encoding"):
            text = encode_text(self.context, self.tokenizer, [bare.prompt])
        binding = self.context.binding("reference_kv")
        symbols = ["R", *(f"M{factor}" for factor in self.bundle.factors)]
        largest = {symbol: binding.largest(symbol) for symbol in symbols}
        with self.progress.timed("reference_pass"):
            prepared = prepare_reference(
                self.bundle,
                binding,
                EncodedReference(bare.loaded, bare.prompt, latents, text),
                origin,
                key,
                storage=storage,
                rows=self.keeper.rows(bare.tokens, origin.steps, largest, workspace),
                report=lambda done: self._report_prepared_steps(before + done, total),
            )
        self.bundle.check_not_modified()  # otherwise the store would hold keys made with other weights
        return prepared

    def _report_prepared_steps(self, done: int, total: int) -> None:
        """Report that `done` of the `total` steps of all references are prepared; called again while this waits."""
        self.progress.report(Progress(done, total, "prepare", 0, 1))


def load_bare(concept: Concept, bundle: Bundle) -> list[BareReference]:
    """Read and check a concept's references, with their images in the size in which the VAE will see them.

    A photograph of 16 megapixels takes 64 MB, which no memory plan accounts for; so it is released as soon as it has
    been read.
    """
    loaded = [_in_size(one, bundle) for one in load_references(concept, bundle)]
    return [
        BareReference(one, reference.prompt, token_counts(one, bundle))
        for one, reference in zip(loaded, concept.references, strict=True)
    ]


def load_alone(concept: Concept, origin: Origin, bundle: Bundle, tokenizer: Tokenizer) -> list[BareReference]:
    """Like `load_bare`, for a concept that is prepared by itself; refuses all that can be refused before computing."""
    check_concept(concept, origin, tokenizer)
    check_number(len(concept.references), bundle)
    return load_bare(concept, bundle)


def _in_size(loaded: LoadedReference, bundle: Bundle) -> LoadedReference:
    """Return the reference with its image in the bundle's size. Every use sees the same pixels as before: resizing an
    image to the size it has changes nothing.
    """
    return replace(loaded, image=pixels_to_images(loaded.pixels(bundle.height, bundle.width))[0])


def find_in_store(keeper: Keeper, references: Sequence[BareReference], origin: Origin) -> list[KeptReference | None]:
    """For each of a bare concept's references, return what the Session's store has, or None."""
    if not keeper.settings.keep:
        return [None] * len(references)
    return [keeper.store.find(bare.key(origin, keeper.settings.storage)) for bare in references]


class PlannedReferences:
    """The references of requests as the memory plan sees them, each listed once, however many concepts share it."""

    def __init__(self) -> None:
        self._found: dict[object, PlannedReference] = {}
        self.content_keys: list[str] = []

    def add(
        self,
        concept: NamedConcept,
        bare: Sequence[BareReference] = (),
        from_store: Sequence[KeptReference | None] = (),
        seed: int = 0,
    ) -> None:
        """Add a concept's references. `bare`, `from_store`: a bare concept's references, and what the store has of
        them.
        """
        used = concept.weight != 0
        if isinstance(concept, KeptConcept):
            for one in concept.references:
                self._add_kept(one, used)
            return
        for reference, found in zip(bare, from_store, strict=True):
            if found is not None:
                self._add_kept(found, used)
            else:
                self._add((reference, seed), PlannedReference(reference.tokens, "nowhere", 0, used))

    @property
    def references(self) -> list[PlannedReference]:
        return list(self._found.values())

    def _add_kept(self, one: KeptReference, used: bool) -> None:
        self.content_keys.append(one.key)
        stored_in: Literal["memory", "file"] = "file" if one.mapped else "memory"
        self._add(one.identity, PlannedReference(one.tokens, stored_in, one.nbytes, used))

    def _add(self, key: object, reference: PlannedReference) -> None:
        if key not in self._found or reference.used:
            self._found[key] = reference
