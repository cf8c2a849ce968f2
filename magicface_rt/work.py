"""Requests with the same number of steps on their way to pictures, stage by stage, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.checks import check_finite
from .bundle import Bundle
from .denoiser import DenoisingLoop, Float32Array, Guidance
from .encoding import encode_text
from .errors import NonFiniteError
from .images import pixels_to_images
from .kept import KeptConcept
from .kept.feed import KeyFeed, Source, StoredKeys
from .kept.keeper import Keeper
from .reference_sources import ReferenceResolver, ReferenceSources
from .regions import Stage
from .request import CheckedRequest, Progress
from .request_progress import RequestProgress
from .results import Result, Timings
from .schedule import is_region_step, target_noise
from .tokenizer import Tokenizer
from .worker_context import WorkerContext


@dataclass(frozen=True)
class _Image:
    """Picture `index` of request `request`."""

    request: int
    index: int


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What the steps start from. `text`: of each request its negative prompt and its prompt, [requests, 2, 77, D]."""

    text: NDArray[Any]
    references: ReferenceSources


class Work:
    """One call of `generate` or `generate_batch`: from checked requests to their results."""

    def __init__(
        self,
        requests: Sequence[CheckedRequest],
        bundle: Bundle,
        tokenizer: Tokenizer,
        keeper: Keeper,
        context: WorkerContext,
        progress: RequestProgress,
    ) -> None:
        """Compute nothing yet. All requests must have the same number of steps."""
        self.requests = requests
        self.steps = requests[0].options.steps
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.keeper = keeper
        self.context = context
        self.progress = progress
        self.step_seconds: list[float] = []
        self.step_regions: dict[int, list[NDArray[np.uint8]]] = {}
        """For each request that asked for them, its pictures' regions [T, h/2, w/2] after every step."""

    def run(self, *, backend: str, provenance: bool) -> list[Result]:
        """Return a result for each request."""
        start = perf_counter()
        with ExitStack() as in_use:
            with self.progress.timed("loading"):
                resolver = ReferenceResolver(
                    self.requests, self.bundle, self.tokenizer, self.keeper, self.context, self.progress
                )
                described = self._described()
                resolver.check_plan()
            with self.progress.timed("text_encoding"):
                text = self._encode_prompts()
            inputs = _Inputs(text, resolver.resolve(in_use))
            references = self._with_storage(described, inputs.references)
            latents, regions = self._denoise_batches(inputs)
            del inputs  # keys that were prepared for this call alone, before the decoder needs memory
        self._check_not_modified()
        with self.progress.timed("decoding"):
            pictures = [[self._decode(one[None]) for one in found] for found in latents]
        timings = Timings(**self.progress.seconds, total=perf_counter() - start, steps=tuple(self.step_seconds))
        return [
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
                references=references[number],
            )
            for number, request in enumerate(self.requests)
        ]

    # -------------------------------------------------------------------------------------------- before the loop

    def _described(self) -> dict[int, list[dict[str, Any]]]:
        """Return what run.json says of every concept's references, by the concept's id.

        That is done when they are read, since an array or image that was given may hold something else by the time the
        pictures are made.
        """
        concepts = {id(concept): concept for request in self.requests for concept in request.concepts}
        return {key: [one.describe() for one in concept.references] for key, concept in concepts.items()}

    def _with_storage(
        self, described: Mapping[int, list[dict[str, Any]]], sources: ReferenceSources
    ) -> list[list[list[dict[str, Any]]]]:
        """Return the entries of each request's concepts, with the storage of their keys where it changes the picture: a
        Session with `keep` and 8-bit storage prepares a bare concept like one that was kept.
        """
        return [
            [
                _with_storage(described[id(concept)], of_concept)
                for concept, of_concept in zip(request.concepts, of_request, strict=True)
            ]
            for request, of_request in zip(self.requests, sources.by_request, strict=True)
        ]

    def _encode_prompts(self) -> NDArray[Any]:
        """Return the texts of every request's negative prompt and prompt, [requests, 2, 77, D]."""
        prompts = [text for request in self.requests for text in (request.options.negative_prompt, request.prompt)]
        text = encode_text(self.context, self.tokenizer, prompts)
        return text.reshape(len(self.requests), 2, *text.shape[1:])

    # -------------------------------------------------------------------------------------------------- the loop

    def _denoise_batches(self, inputs: _Inputs) -> tuple[list[Float32Array], list[NDArray[np.int64]]]:
        """Make all images, in batches as large as the bundle and its plans allow; return those of each request."""
        batches = self._batches(inputs.references)
        made = [self._denoise(inputs, batch, (n, len(batches))) for n, batch in enumerate(batches)]
        latents, regions = np.concatenate([m[0] for m in made]), np.concatenate([m[1] for m in made])
        ends = np.cumsum([request.options.images for request in self.requests])[:-1]
        return np.split(latents, ends), np.split(regions, ends)

    def _batches(self, references: ReferenceSources) -> list[list[_Image]]:
        """Split the images, in order, into batches as large as the bundle and the plans of both U-Net graphs allow."""
        images = [_Image(r, k) for r, request in enumerate(self.requests) for k in range(request.options.images)]
        size = min(self.bundle.limits.images, self.context.binding("denoise_step").largest("B") or len(images))
        computed = [references.computed_numbers(number) for number in range(len(self.requests))]
        batches: list[list[_Image]] = []
        numbers: set[int] = set()
        for image in images:
            together = numbers | computed[image.request]
            if batches and len(batches[-1]) < size and references.fit_in_a_pass(together):
                batches[-1].append(image)
                numbers = together
            else:
                batches.append([image])
                numbers = computed[image.request]
        return batches

    def _denoise(
        self, inputs: _Inputs, images: Sequence[_Image], batch_position: tuple[int, int]
    ) -> tuple[Float32Array, NDArray[np.int64]]:
        """Denoise some of the images; return latents [B, 4, h, w] and the last region labels [B, h/2, w/2].

        batch_position: the batch's number, from 0, and the number of batches, for reports of progress.
        """
        latents, labels = self._run_steps(inputs, images, batch_position)
        try:
            check_finite("denoise_step", "latents_out", latents)
        except NonFiniteError as error:
            # Device steps are unchecked for speed. Repeat them with checks to name the first graph that produced
            # non-finite values.
            self._run_steps(inputs, images, batch_position, checked=True)
            raise NonFiniteError(
                f"{error} Looked at one by one, the same steps gave numbers: the device may have erred."
            ) from error
        return latents, labels

    def _run_steps(
        self, inputs: _Inputs, images: Sequence[_Image], batch_position: tuple[int, int], *, checked: bool = False
    ) -> tuple[Float32Array, NDArray[np.int64]]:
        """Run the denoising loop. If `checked`, every step is checked, and none is timed, recorded or reported."""
        schedule, steps = self.bundle.schedule, self.steps
        together = [
            (number, [image.index for image in images if image.request == number])
            for number in sorted({image.request for image in images})
        ]
        requests = [self.requests[number] for number, _ in together]
        denoise_step, keys = self.context.binding("denoise_step"), inputs.references.feed(together)
        loop = DenoisingLoop(
            self.bundle,
            denoise_step,
            latents=self._noise(together),
            guidance=[self._guidance(inputs.text[number], number, len(indices)) for number, indices in together],
            keys=keys,
        )
        timesteps = [int(t) for t in schedule.timesteps(steps)]
        coefficients = schedule.step_coefficients(steps)
        recording = not checked and any(request.record_regions for request in requests)
        recorded: list[NDArray[np.uint8]] = []
        for i, timestep in enumerate(timesteps):
            start = perf_counter()
            stages: list[Stage] = ["rba" if is_region_step(i, steps, r.options.alpha) else "rsa" for r in requests]
            with self._naming_step(i, keys):
                loop.step(i, timestep, coefficients[i], stages)
                if i + 1 < steps:
                    loop.prepare(i + 1)
                reference_seconds = loop.wait()
                if checked:
                    loop.check()
            if checked:
                self.progress.check_open()
                continue
            seconds = perf_counter() - start
            self.progress.spent("reference_pass", reference_seconds)
            self.progress.spent("denoising", seconds - reference_seconds)
            self.step_seconds.append(seconds)
            if recording:
                recorded.append(denoise_step.read("region_label_out").astype(np.uint8))
            self.progress.report(Progress(i + 1, steps, stages[0], *batch_position))
        if recording:
            self._record(images, np.stack(recorded, axis=1))
        return loop.read()

    @contextmanager
    def _naming_step(self, step: int, keys: KeyFeed) -> Iterator[None]:
        """Name the step if a value in the block is not finite; stored keys are named before the graph they spoil."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(
                f"step {step + 1} of {self.steps}: {keys.non_finite_message(step) or error}"
            ) from error

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

    def _guidance(self, text: NDArray[Any], number: int, images: int) -> Guidance:
        """Return the guidance of a request for so many of its images. `text`: [2, 77, D]."""
        request = self.requests[number]
        options = request.options
        return Guidance(
            text=np.repeat(text[:, None], images, axis=1),
            tokens=tuple(placed.tokens for placed in request.placed),
            ca_scale=options.effective_ca_scale(len(request.placed)),
            scale=options.guidance,
            semantic=options.semantic_guidance,
            weight_mode=options.weight_mode,
        )

    # --------------------------------------------------------------------------------------------- after the loop

    def _decode(self, latents: Float32Array) -> Any:
        pixels = self.context.binding("vae_decoder").once({"latents": latents})["pixels"]
        return pixels_to_images(pixels)[0]

    def _check_not_modified(self) -> None:
        """Check that no kept concept's file was written to, since it would then hold another concept's keys."""
        for concept in (c for request in self.requests for c in request.concepts):
            if isinstance(concept, KeptConcept):
                concept.check_not_modified()


def _with_storage(described: Sequence[dict[str, Any]], sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return a concept's entries, each with the storage of its keys unless that is exact."""
    if not sources:  # weight 0
        return list(described)
    return [
        {**one, "storage": source.kept.storage}
        if isinstance(source, StoredKeys) and source.kept.storage != "exact"
        else one
        for one, source in zip(described, sources, strict=True)
    ]
