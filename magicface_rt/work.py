"""Requests with the same number of steps on their way to pictures, stage by stage, in batches."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.checks import check_finite
from .bundle import Bundle
from .concept import Concept, NamedConcept
from .course import Course
from .denoiser import DenoisingLoop, Float32Array, Guidance
from .encoding import encode_image, encode_text
from .errors import DeviceMemoryError, NonFiniteError
from .images import pixels_to_images
from .kept import KeptConcept, KeptReference, MemoryPlan, Origin
from .kept.feed import ComputedKeys, KeyFeed, PlacedKeys, ReferencePass, Source, StoredKeys
from .kept.keeper import Keeper
from .preparing import BareReference, PlannedReferences, Preparer, find_in_store, load_bare
from .regions import Stage
from .request import CheckedRequest, Progress
from .results import Result, Timings
from .schedule import is_region_step, reference_noise, target_noise
from .tokenizer import Tokenizer
from .workplace import Workplace

logger = logging.getLogger("magicface_rt.session")


@dataclass(frozen=True)
class _Image:
    """Picture `index` of request `request`."""

    request: int
    index: int


@dataclass
class _References:
    """The sources of the references of every request and concept; and, of the references that are computed at each
    step, the seeds of their noise, clean latents [R, 4, h, w] and texts [R, 77, D].
    """

    sources: list[list[list[Source]]]
    bare: list[BareReference] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    latents: Float32Array | None = None
    text: NDArray[Any] | None = None


class Work:
    """One call of `generate` or `generate_batch`."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        keeper: Keeper,
        place: Workplace,
        course: Course,
    ) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.keeper = keeper
        self.place = place
        self.course = course
        self.preparer = Preparer(bundle, tokenizer, keeper, place, course)
        self.held: dict[tuple[int, int], list[KeptReference | None]] = {}
        """What the store had of a bare concept when the request was planned, by the concept's id and reference_seed."""
        self.step_seconds: list[float] = []
        self.step_regions: dict[int, list[NDArray[np.uint8]]] = {}
        """For each request that asked for them, its pictures' regions [T, h/2, w/2] after every step."""

    def run(self, requests: Sequence[CheckedRequest], *, backend: str, provenance: bool) -> list[Result]:
        """Return a result for each request; all must have the same number of steps."""
        start = perf_counter()
        self.requests = requests
        self.steps = requests[0].options.steps
        with ExitStack() as held:
            with self.course.timed("loading"):
                loaded = self._load()
                described = self._described()
                listed = self._listed(loaded)
                if self.keeper.plans_without_graphs:
                    self._plan(listed)  # refuses what does not fit, before a graph is loaded
            with self.course.timed("text_encoding"):
                prompts = [text for r in requests for text in (r.options.negative_prompt, r.prompt)]
                text = encode_text(self.place, self.tokenizer, prompts)
                self.text = text.reshape(len(requests), 2, *text.shape[1:])  # [requests, 2, 77, D]
            references = self._references(loaded, listed, held)
            latents, regions = self._denoise_batches(references)
        self._check_unwritten()
        results = []
        with self.course.timed("decoding"):
            pictures = [[self._decode(one[None]) for one in found] for found in latents]
        timings = Timings(**self.course.seconds, total=perf_counter() - start, steps=tuple(self.step_seconds))
        for number, request in enumerate(requests):
            results.append(
                Result(
                    images=pictures[number],
                    regions=regions[number],
                    latents=latents[number],
                    prompt=request.prompt,
                    concepts=request.concepts,
                    options=request.options,
                    token_indices=tuple(placed.tokens for placed in request.placed),
                    timings=timings,
                    bundle_hash=self.bundle.hash,
                    backend=backend,
                    provenance=provenance,
                    regions_per_step=self._regions_per_step(number),
                    references=[described[id(concept)] for concept in request.concepts],
                )
            )
        return results

    # -------------------------------------------------------------------------------------------- before the loop

    def _load(self) -> dict[int, list[BareReference]]:
        """Load the references of every bare concept, by the concept's id."""
        found: dict[int, list[BareReference]] = {}
        for concept in (c for request in self.requests for c in request.concepts):
            if isinstance(concept, Concept) and id(concept) not in found:
                found[id(concept)] = load_bare(concept, self.bundle)
        return found

    def _described(self) -> dict[int, list[dict[str, Any]]]:
        """Return what run.json says of every concept's references, by the concept's id.

        That is done when they are read, since an array or image that was given may hold something else by the time the
        pictures are made.
        """
        concepts = {id(concept): concept for request in self.requests for concept in request.concepts}
        return {key: [one.describe() for one in concept.references] for key, concept in concepts.items()}

    def _references(
        self, loaded: dict[int, list[BareReference]], listed: PlannedReferences, held: ExitStack
    ) -> _References:
        """Prepare the references that are to be prepared, and return where the keys of every concept come from."""
        self._take_room(preparing=any(one.stored_in == "nowhere" and one.used for one in listed.references))
        plan = self._plan(listed)
        self.keeper.make_room(plan, self._identities())
        by_concept: dict[tuple[int, int], list[Source]] = {}
        kept_sources: dict[Hashable, StoredKeys] = {}
        references = _References([])
        for request in self.requests:
            of_request = []
            for concept in request.concepts:
                which = id(concept), request.options.reference_seed
                if which not in by_concept and concept.weight != 0:
                    if isinstance(concept, Concept) and plan.mode == "recompute" and None in self.held[which]:
                        by_concept[which] = self._computed(loaded[id(concept)], references, which[1])
                    else:
                        kept = self._prepared(concept, loaded, which[1])
                        by_concept[which] = [self._stored(one, plan, kept_sources) for one in kept]
                of_request.append(by_concept.get(which, []))
            references.sources.append(of_request)
        if plan.mode == "keep":
            self._put_on_device(list(kept_sources.values()), held)
        if references.bare:
            self._encode(references)
        return references

    def _computed(self, loaded: Sequence[BareReference], references: _References, seed: int) -> list[Source]:
        """Add references that are computed at each step, and return their sources."""
        first = len(references.bare)
        references.bare += loaded
        references.seeds += [seed] * len(loaded)
        return [ComputedKeys(first + number, bare.tokens) for number, bare in enumerate(loaded)]

    def _prepared(
        self, concept: NamedConcept, loaded: dict[int, list[BareReference]], seed: int
    ) -> Sequence[KeptReference]:
        if isinstance(concept, KeptConcept):
            return concept.references
        if None not in (held := self.held[id(concept), seed]):
            return [one for one in held if one is not None]
        origin = Origin.of(self.bundle, self.steps, seed)
        return self.preparer.prepare(concept, loaded[id(concept)], origin, self.keeper.settings.storage)

    def _listed(self, loaded: dict[int, list[BareReference]]) -> PlannedReferences:
        """Return all references as a plan sees them. What the store has of them now is noted, and used."""
        listed = PlannedReferences()
        for request in self.requests:
            seed = request.options.reference_seed
            origin = Origin.of(self.bundle, self.steps, seed)
            for concept in request.concepts:
                which, bare = (id(concept), seed), loaded.get(id(concept), ())
                if which not in self.held:
                    self.held[which] = find_in_store(self.keeper, bare, origin)
                listed.add(concept, bare, self.held[which], seed)
        return listed

    def _plan(self, listed: PlannedReferences) -> MemoryPlan:
        images = sum(request.options.images for request in self.requests)
        return self.keeper.plan(
            listed.references,
            steps=self.steps,
            images=images,
            content_keys=listed.content_keys,
            keys_per_image=len(self.requests) > 1,
        )

    def _take_room(self, *, preparing: bool) -> None:
        """On a device, let the network take its memory before the plan divides what is left among the keys."""
        if self.keeper.backend.free_device_memory() is not None:
            for graph in ("denoise_step", "vae_decoder", *(("vae_encoder", "reference_kv") if preparing else ())):
                self.place.binding(graph)

    def _identities(self) -> set[Hashable]:
        """Return the identities of the references that are used and were prepared before."""
        found: set[Hashable] = set()
        for request in self.requests:
            for concept in request.concepts:
                if concept.weight != 0:
                    which = id(concept), request.options.reference_seed
                    kept = concept.references if isinstance(concept, KeptConcept) else self.held[which]
                    found |= {one.identity for one in kept if one is not None}
        return found

    def _stored(self, kept: KeptReference, plan: MemoryPlan, sources: dict[Hashable, StoredKeys]) -> StoredKeys:
        """Return a prepared reference as a source, on the host as the plan's mode requires. It is known by its
        identity, since its key is only what its file says.
        """
        if kept.identity not in sources:
            read = plan.mode == "keep" and self.place.shelf() is None
            sources[kept.identity] = StoredKeys(kept.in_memory() if read else kept)
        return sources[kept.identity]

    def _put_on_device(self, sources: Sequence[StoredKeys], held: ExitStack) -> None:
        """Put the keys of all steps on the device until the end of `held`. If some do not fit, all are streamed,
        unless `memory="keep"` was asked for: that raises DeviceMemoryError.
        """
        shelf, on_device = self.place.shelf(), self.keeper.on_device
        if shelf is None:
            return
        # Those that are there already come first, or the others might take their room.
        ordered = sorted(sources, key=lambda source: not on_device.has(source.kept))

        def waiting() -> None:
            self.course.report(Progress(0, self.steps, "prepare", 0, 1))

        try:
            with ExitStack() as taken:
                for source in ordered:
                    use = on_device.use(source.kept, shelf, self.bundle, self.steps, waiting)
                    source.on_device = taken.enter_context(use)
                held.enter_context(taken.pop_all())
        except DeviceMemoryError as error:
            if self.keeper.settings.memory == "keep":
                raise
            for source in sources:
                source.on_device = None
            logger.warning("the device has no room for all steps of the references, so they are streamed: %s", error)

    def _encode(self, references: _References) -> None:
        with self.course.timed("image_encoding"):
            references.latents = np.concatenate(
                [encode_image(self.place, self.bundle, bare.loaded) for bare in references.bare]
            )  # [R, 4, h, w]
        with self.course.timed("text_encoding"):
            prompts = [bare.prompt for bare in references.bare]
            references.text = encode_text(self.place, self.tokenizer, prompts)  # [R, 77, D]

    def _check_unwritten(self) -> None:
        """Check that no kept concept's file was written to, since it would then hold another concept's keys."""
        for concept in (c for request in self.requests for c in request.concepts):
            if isinstance(concept, KeptConcept):
                concept.check_unwritten()

    # -------------------------------------------------------------------------------------------------- the loop

    def _denoise_batches(self, references: _References) -> tuple[list[Float32Array], list[NDArray[np.int64]]]:
        """Make all images, in batches as large as the bundle and its plans allow; return those of each request."""
        batches = self._batches(references)
        made = [self._denoise(references, batch, (n, len(batches))) for n, batch in enumerate(batches)]
        latents, regions = np.concatenate([m[0] for m in made]), np.concatenate([m[1] for m in made])
        ends = np.cumsum([request.options.images for request in self.requests])[:-1]
        return np.split(latents, ends), np.split(regions, ends)

    def _batches(self, references: _References) -> list[list[_Image]]:
        """Split the images, in order, into batches as large as the bundle and the plans of both U-Net graphs allow."""
        images = [_Image(r, k) for r, request in enumerate(self.requests) for k in range(request.options.images)]
        size = min(self.bundle.limits.images, self.place.binding("denoise_step").largest("B") or len(images))
        computed = [
            {one.number for sources in of_request for one in sources if isinstance(one, ComputedKeys)}
            for of_request in references.sources
        ]
        batches: list[list[_Image]] = []
        numbers: set[int] = set()
        for image in images:
            together = numbers | computed[image.request]
            if batches and len(batches[-1]) < size and self._fit_in_a_pass(references, together):
                batches[-1].append(image)
                numbers = together
            else:
                batches.append([image])
                numbers = computed[image.request]
        return batches

    def _fit_in_a_pass(self, references: _References, numbers: set[int]) -> bool:
        """Whether these references can be computed together in one pass at a step."""
        if not numbers:
            return True
        largest = self.place.binding("reference_kv").largest
        tokens = [references.bare[number].tokens for number in numbers]
        counts = {"R": len(tokens), **{f"M{f}": sum(one[f] for one in tokens) for f in self.bundle.factors}}
        return all(count <= (largest(symbol) or count) for symbol, count in counts.items())

    def _denoise(
        self, references: _References, images: Sequence[_Image], place: tuple[int, int]
    ) -> tuple[Float32Array, NDArray[np.int64]]:
        """Denoise some of the images; return latents [B, 4, h, w] and the last region labels [B, h/2, w/2]."""
        latents, labels = self._steps(references, images, place)
        try:
            check_finite("denoise_step", "latents_out", latents)
        except NonFiniteError as error:
            # On a device the steps were not checked: go through them again, to the first graph that made such values.
            self._steps(references, images, None)
            raise NonFiniteError(
                f"{error} Looked at one by one, the same steps gave numbers: the device may have erred."
            ) from error
        return latents, labels

    def _steps(
        self, references: _References, images: Sequence[_Image], place: tuple[int, int] | None
    ) -> tuple[Float32Array, NDArray[np.int64]]:
        """Run the denoising loop. Without a `place` every step is checked, and none is timed or reported."""
        schedule, steps = self.bundle.schedule, self.steps
        together = [
            (number, [image.index for image in images if image.request == number])
            for number in sorted({image.request for image in images})
        ]
        requests = [self.requests[number] for number, _ in together]
        denoise_step, keys = self.place.binding("denoise_step"), self._keys(references, together)
        loop = DenoisingLoop(
            self.bundle,
            denoise_step,
            latents=self._noise(together),
            guidance=[self._guidance(number, len(indices)) for number, indices in together],
            keys=keys,
        )
        timesteps = [int(t) for t in schedule.timesteps(steps)]
        coefficients = schedule.step_coefficients(steps)
        recording = place is not None and any(request.record_regions for request in requests)
        recorded: list[NDArray[np.uint8]] = []
        for i, timestep in enumerate(timesteps):
            start = perf_counter()
            stages: list[Stage] = ["rba" if is_region_step(i, steps, r.options.alpha) else "rsa" for r in requests]
            with self._naming(i, keys):
                loop.step(i, timestep, coefficients[i], stages)
                if i + 1 < steps:
                    loop.prepare(i + 1)
                reference_seconds = loop.wait()
                if place is None:
                    loop.check()
            if place is None:
                self.course.check_open()
                continue
            seconds = perf_counter() - start
            self.course.spent("reference_pass", reference_seconds)
            self.course.spent("denoising", seconds - reference_seconds)
            self.step_seconds.append(seconds)
            if recording:
                recorded.append(denoise_step.read("region_label_out").astype(np.uint8))
            self.course.report(Progress(i + 1, steps, stages[0], *place))
        if recording:
            self._record(images, np.stack(recorded, axis=1))
        return loop.read()

    @contextmanager
    def _naming(self, step: int, keys: KeyFeed) -> Iterator[None]:
        """Name the step if a value in the block is not finite; stored keys are named before the graph they spoil."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1} of {self.steps}: {keys.spoiled(step) or error}") from error

    def _record(self, images: Sequence[_Image], regions: NDArray[np.uint8]) -> None:
        """Keep the regions [B, T, h/2, w/2] of the pictures whose requests asked for them."""
        for image, of_steps in zip(images, regions, strict=True):
            if self.requests[image.request].record_regions:
                self.step_regions.setdefault(image.request, []).append(of_steps)

    def _regions_per_step(self, number: int) -> NDArray[np.uint8] | None:
        """Return the regions of a request, [T, B, h/2, w/2]; None if it did not ask for them."""
        found = self.step_regions.get(number)
        return None if found is None else np.stack(found, axis=1)

    def _noise(self, together: Sequence[tuple[int, list[int]]]) -> Float32Array:
        shape = (1, self.bundle.latent_channels, self.bundle.rows, self.bundle.columns)
        seeds = [(self.requests[number].options.seed, index) for number, indices in together for index in indices]
        return np.concatenate([target_noise(seed, index, shape) for seed, index in seeds])

    def _guidance(self, number: int, images: int) -> Guidance:
        request = self.requests[number]
        options = request.options
        return Guidance(
            text=np.repeat(self.text[number][:, None], images, axis=1),
            tokens=tuple(placed.tokens for placed in request.placed),
            ca_scale=options.effective_ca_scale(len(request.placed)),
            scale=options.guidance,
            semantic=options.semantic_guidance,
            weight_mode=options.weight_mode,
        )

    def _keys(self, references: _References, together: Sequence[tuple[int, list[int]]]) -> KeyFeed:
        """Return the feed of keys: one row for all images if it is the same for all, otherwise a row for each."""
        rows = [self._placed(references, number) for number, _ in together]
        modes = {self.requests[number].options.weight_mode for number, _ in together}
        alphas = {self.requests[number].options.alpha for number, _ in together}
        shared = len(modes) == len(alphas) == 1 and all(row == rows[0] for row in rows)
        if shared:
            rows = rows[:1]
        else:
            rows = [row for row, (_, indices) in zip(rows, together, strict=True) for _ in indices]
        stored = any(isinstance(p.source, StoredKeys) and p.source.on_device is None for row in rows for p in row)
        computing = None
        if any(isinstance(placed.source, ComputedKeys) for row in rows for placed in row):
            rows, computing = self._computing(references, rows)
        return KeyFeed(
            self.bundle,
            self.place.binding("denoise_step"),
            rows,
            computing=computing,
            padded=self.keeper.settings.pad_keys,
            shelf=self.place.shelf() if stored else None,
        )

    def _placed(self, references: _References, number: int) -> list[PlacedKeys]:
        found = []
        for k, (placed, sources) in enumerate(
            zip(self.requests[number].placed, references.sources[number], strict=True)
        ):
            if placed.concept.weight != 0:
                found += [PlacedKeys(source, k, placed.concept.weight) for source in sources]
        return found

    def _computing(
        self, references: _References, rows: Sequence[Sequence[PlacedKeys]]
    ) -> tuple[list[list[PlacedKeys]], ReferencePass]:
        """Return the rows with the sources of a pass in them, and that pass, which computes what the rows need."""
        numbers = sorted({p.source.number for row in rows for p in row if isinstance(p.source, ComputedKeys)})
        assert references.latents is not None
        assert references.text is not None
        latents, seeds = references.latents[numbers], [references.seeds[number] for number in numbers]
        timesteps = [int(t) for t in self.bundle.schedule.timesteps(self.steps)]
        shape = (1, *latents.shape[1:])

        def noised(step: int) -> Float32Array:
            noise = {seed: reference_noise(seed, step, shape) for seed in set(seeds)}
            rows_of_noise = np.concatenate([noise[seed] for seed in seeds])
            return self.bundle.schedule.add_noise(latents, rows_of_noise, timesteps[step])

        computing = ReferencePass(
            self.bundle,
            self.place.binding("reference_kv"),
            masks=[references.bare[number].loaded.mask_grid for number in numbers],
            text=references.text[numbers],
            noised=noised,
            timesteps=timesteps,
            padded=self.keeper.settings.pad_keys,
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

    # --------------------------------------------------------------------------------------------- after the loop

    def _decode(self, latents: Float32Array) -> Any:
        pixels = self.place.binding("vae_decoder").once({"latents": latents})["pixels"]
        return pixels_to_images(pixels)[0]
