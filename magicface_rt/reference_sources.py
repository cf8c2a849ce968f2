"""Where the reference keys of a batch of requests come from: found, prepared, uploaded, or computed at each step."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .concept import Concept, NamedConcept
from .encoding import encode_image, encode_text
from .errors import DeviceMemoryError
from .kept import KeptConcept, KeptReference, MemoryPlan, Origin
from .kept.feed import ComputedKeys, Float32Array, KeyFeed, PlacedKeys, ReferencePass, Source, StoredKeys
from .kept.keeper import Keeper
from .preparing import BareReference, PlannedReferences, Preparer, find_in_store, load_bare
from .request import CheckedRequest
from .request_progress import RequestProgress
from .schedule import reference_noise
from .tokenizer import Tokenizer
from .worker_context import WorkerContext

logger = logging.getLogger("magicface_rt.session")

Together = Sequence[tuple[int, Sequence[int]]]
"""The images of a batch: the numbers of its requests, ascending, each with the indices of the request's images."""


class ReferenceSources:
    """The sources of reference keys of every request, from which batches are fed.

    by_request    for each request, for each of its concepts: the sources of its references, none for weight 0
    bare          the references that are computed at each step, beside the target, in the order of their numbers
    seeds         the seeds of their noise
    latents, text    their clean latents, float32 [R, 4, h, w], and texts, [R, 77, D], once they are encoded
    """

    def __init__(
        self, requests: Sequence[CheckedRequest], bundle: Bundle, context: WorkerContext, *, padded: bool
    ) -> None:
        """Begin with no source. `padded`: whether numbers of tokens are filled up to buckets."""
        self._requests = requests
        self._bundle = bundle
        self._context = context
        self._padded = padded
        self.by_request: list[list[list[Source]]] = []
        self.bare: list[BareReference] = []
        self.seeds: list[int] = []
        self.latents: Float32Array | None = None
        self.text: NDArray[Any] | None = None

    def computed_numbers(self, request: int) -> set[int]:
        """Return the numbers of the references of a request that are computed at each step."""
        sources = (one for of_concept in self.by_request[request] for one in of_concept)
        return {one.number for one in sources if isinstance(one, ComputedKeys)}

    def fit_in_a_pass(self, numbers: set[int]) -> bool:
        """Whether the references with these numbers can be computed together in one pass at a step."""
        if not numbers:
            return True
        largest = self._context.binding("reference_kv").largest
        tokens = [self.bare[number].tokens for number in numbers]
        counts = {"R": len(tokens), **{f"M{f}": sum(one[f] for one in tokens) for f in self._bundle.factors}}
        return all(count <= (largest(symbol) or count) for symbol, count in counts.items())

    def feed(self, together: Together) -> KeyFeed:
        """Return the feed of a batch's keys: one row for all images if it is the same for all, else a row for each."""
        rows = [self._row_keys(number) for number, _ in together]
        modes = {self._requests[number].options.weight_mode for number, _ in together}
        alphas = {self._requests[number].options.alpha for number, _ in together}
        shared = len(modes) == len(alphas) == 1 and all(row == rows[0] for row in rows)
        if shared:
            rows = rows[:1]
        else:
            rows = [row for row, (_, indices) in zip(rows, together, strict=True) for _ in indices]
        stored = any(isinstance(p.source, StoredKeys) and p.source.on_device is None for row in rows for p in row)
        computing = None
        if any(isinstance(placed.source, ComputedKeys) for row in rows for placed in row):
            rows, computing = self._with_reference_pass(rows)
        return KeyFeed(
            self._bundle,
            self._context.binding("denoise_step"),
            rows,
            computing=computing,
            padded=self._padded,
            key_uploader=self._context.key_uploader() if stored else None,
        )

    def _row_keys(self, number: int) -> list[PlacedKeys]:
        """Return the keys in the row of a request, in the order of its concepts."""
        found = []
        for k, (placed, sources) in enumerate(zip(self._requests[number].placed, self.by_request[number], strict=True)):
            if placed.concept.weight != 0:
                found += [PlacedKeys(source, k, placed.concept.weight) for source in sources]
        return found

    def _with_reference_pass(
        self, rows: Sequence[Sequence[PlacedKeys]]
    ) -> tuple[list[list[PlacedKeys]], ReferencePass]:
        """Return the rows with the sources of a pass in them, and that pass, which computes what the rows need."""
        numbers = sorted({p.source.number for row in rows for p in row if isinstance(p.source, ComputedKeys)})
        assert self.latents is not None
        assert self.text is not None
        latents, seeds = self.latents[numbers], [self.seeds[number] for number in numbers]
        schedule = self._bundle.schedule
        timesteps = [int(t) for t in schedule.timesteps(self._requests[0].options.steps)]
        shape = (1, *latents.shape[1:])

        def noised(step: int) -> Float32Array:
            noise = {seed: reference_noise(seed, step, shape) for seed in set(seeds)}
            rows_of_noise = np.concatenate([noise[seed] for seed in seeds])
            return schedule.add_noise(latents, rows_of_noise, timesteps[step])

        computing = ReferencePass(
            self._bundle,
            self._context.binding("reference_kv"),
            masks=[self.bare[number].loaded.mask_grid for number in numbers],
            text=self.text[numbers],
            noised=noised,
            timesteps=timesteps,
            padded=self._padded,
        )
        of = dict(zip(numbers, computing.sources(), strict=True))
        placed = [
            [
                PlacedKeys(of[p.source.number], p.concept, p.weight) if isinstance(p.source, ComputedKeys) else p
                for p in row
            ]
            for row in rows
        ]
        return placed, computing


class ReferenceResolver:
    """Reads the references of a batch of requests, plans their memory, and makes their keys available.

    All requests must have the same number of steps. `check_plan` computes nothing and comes first; `resolve` may load
    graphs and run them.
    """

    def __init__(
        self,
        requests: Sequence[CheckedRequest],
        bundle: Bundle,
        tokenizer: Tokenizer,
        keeper: Keeper,
        context: WorkerContext,
        progress: RequestProgress,
    ) -> None:
        """Read the references of every bare concept from their files, and find those that the store has.

        Raises:
            ImageError, MaskError: an image or mask that cannot be used.
        """
        self._requests = requests
        self._steps = requests[0].options.steps
        self._bundle = bundle
        self._tokenizer = tokenizer
        self._keeper = keeper
        self._context = context
        self._progress = progress
        self._loaded: dict[int, list[BareReference]] = {}
        """The references of every bare concept, by the concept's id."""
        self._from_store: dict[tuple[int, int], list[KeptReference | None]] = {}
        """What the store had of a bare concept when it was looked through, by the concept's id and reference_seed."""
        self._planned = PlannedReferences()
        self._load()
        self._find_in_store()

    def check_plan(self) -> None:
        """Refuse what does not fit, as far as that is known before a graph is loaded.

        Raises:
            BudgetError: no mode fits into the budget.
            HostMemoryError: there is too little memory on the host.
        """
        if self._keeper.plans_without_graphs:
            self._plan()

    def resolve(self, in_use: ExitStack) -> ReferenceSources:
        """Prepare the references that are to be prepared, and return where the keys of every concept come from.

        Keys on a device are in use, and stay there, until the end of `in_use`.

        Raises:
            BudgetError, HostMemoryError: as `check_plan`; on a device, now that graphs have taken their memory.
            DeviceMemoryError: the device has too little, and `memory="keep"` was asked for.
            BackendError, NonFiniteError: a graph failed, or gave what is not finite.
            Cancelled, SessionClosedError: as `RequestProgress.report`.
        """
        self._take_room()
        return self._resolve_references(self._plan(), in_use)

    # ------------------------------------------------------------------------------------------- before any graph

    def _load(self) -> None:
        for concept in (c for request in self._requests for c in request.concepts):
            if isinstance(concept, Concept) and id(concept) not in self._loaded:
                self._loaded[id(concept)] = load_bare(concept, self._bundle)

    def _find_in_store(self) -> None:
        """Note what the store has, which is used from then on, and list all references for the plan."""
        for request in self._requests:
            seed = request.options.reference_seed
            origin = Origin.of(self._bundle, self._steps, seed)
            for concept in request.concepts:
                which, bare = (id(concept), seed), self._loaded.get(id(concept), ())
                if which not in self._from_store:
                    self._from_store[which] = find_in_store(self._keeper, bare, origin)
                self._planned.add(concept, bare, self._from_store[which], seed)

    def _plan(self) -> MemoryPlan:
        return self._keeper.plan(
            self._planned.references,
            steps=self._steps,
            images=sum(request.options.images for request in self._requests),
            content_keys=self._planned.content_keys,
            keys_per_image=len(self._requests) > 1,
        )

    # -------------------------------------------------------------------------------------------------- resolving

    def _take_room(self) -> None:
        """On a device, let the network take its memory before the plan divides what is left among the keys."""
        if self._keeper.backend.free_device_memory() is None:
            return
        preparing = any(one.stored_in == "nowhere" and one.used for one in self._planned.references)
        for graph in ("denoise_step", "vae_decoder", *(("vae_encoder", "reference_kv") if preparing else ())):
            self._context.binding(graph)

    def _resolve_references(self, plan: MemoryPlan, in_use: ExitStack) -> ReferenceSources:
        self._keeper.make_room(plan, self._identities())
        by_concept: dict[tuple[int, int], list[Source]] = {}
        stored: dict[Hashable, StoredKeys] = {}
        found = ReferenceSources(self._requests, self._bundle, self._context, padded=self._keeper.settings.pad_keys)
        for request in self._requests:
            of_request = []
            for concept in request.concepts:
                which = id(concept), request.options.reference_seed
                if which not in by_concept and concept.weight != 0:
                    if isinstance(concept, Concept) and plan.mode == "recompute" and None in self._from_store[which]:
                        by_concept[which] = self._add_computed(concept, which[1], found)
                    else:
                        kept = self._kept_references(concept, which[1])
                        by_concept[which] = [self._stored_source(one, plan, stored) for one in kept]
                of_request.append(by_concept.get(which, []))
            found.by_request.append(of_request)
        if plan.mode == "keep":
            self._put_on_device(list(stored.values()), in_use)
        if found.bare:
            self._encode(found)
        return found

    def _identities(self) -> set[Hashable]:
        """Return the identities of the references that are used and were prepared before."""
        found: set[Hashable] = set()
        for request in self._requests:
            for concept in request.concepts:
                if concept.weight != 0:
                    which = id(concept), request.options.reference_seed
                    kept = concept.references if isinstance(concept, KeptConcept) else self._from_store[which]
                    found |= {one.identity for one in kept if one is not None}
        return found

    def _add_computed(self, concept: Concept, seed: int, to: ReferenceSources) -> list[Source]:
        """Add a concept's references as ones that are computed at each step, and return their sources."""
        loaded, first = self._loaded[id(concept)], len(to.bare)
        to.bare += loaded
        to.seeds += [seed] * len(loaded)
        return [ComputedKeys(first + number, bare.tokens) for number, bare in enumerate(loaded)]

    def _kept_references(self, concept: NamedConcept, seed: int) -> Sequence[KeptReference]:
        """Return a concept's keys for all steps: its own, those that the store had, or ones that are prepared now."""
        if isinstance(concept, KeptConcept):
            return concept.references
        if None not in (from_store := self._from_store[id(concept), seed]):
            return [one for one in from_store if one is not None]
        preparer = Preparer(self._bundle, self._tokenizer, self._keeper, self._context, self._progress)
        origin = Origin.of(self._bundle, self._steps, seed)
        return preparer.prepare(concept, self._loaded[id(concept)], origin, self._keeper.settings.storage)

    def _stored_source(self, kept: KeptReference, plan: MemoryPlan, sources: dict[Hashable, StoredKeys]) -> StoredKeys:
        """Return a prepared reference as a source, on the host as the plan's mode requires. It is known by its
        identity, since its key is only what its file says.
        """
        if kept.identity not in sources:
            read = plan.mode == "keep" and self._context.key_uploader() is None
            sources[kept.identity] = StoredKeys(kept.in_memory() if read else kept)
        return sources[kept.identity]

    def _put_on_device(self, sources: Sequence[StoredKeys], in_use: ExitStack) -> None:
        """Put the keys of all steps on the device until the end of `in_use`. If some do not fit, all are streamed,
        unless `memory="keep"` was asked for: that raises DeviceMemoryError.
        """
        key_uploader, on_device = self._context.key_uploader(), self._keeper.on_device
        if key_uploader is None:
            return
        # Those that are there already come first, or the others might take their room.
        ordered = sorted(sources, key=lambda source: not on_device.has(source.kept))

        try:
            with ExitStack() as taken:
                for source in ordered:
                    use = on_device.use(
                        source.kept, key_uploader, self._bundle, self._steps, self._progress.report_again
                    )
                    source.on_device = taken.enter_context(use)
                in_use.enter_context(taken.pop_all())
        except DeviceMemoryError as error:
            if self._keeper.settings.memory == "keep":
                raise
            for source in sources:
                source.on_device = None
            logger.warning("the device has no room for all steps of the references, so they are streamed: %s", error)

    def _encode(self, references: ReferenceSources) -> None:
        """Encode the references that are computed at each step."""
        with self._progress.timed("image_encoding"):
            references.latents = np.concatenate(
                [encode_image(self._context, self._bundle, bare.loaded) for bare in references.bare]
            )  # [R, 4, h, w]
        with self._progress.timed("text_encoding"):
            prompts = [bare.prompt for bare in references.bare]
            references.text = encode_text(self._context, self._tokenizer, prompts)  # [R, 77, D]
