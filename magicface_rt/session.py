"""Session: a bundle opened on a backend, from a prompt and concepts to pictures."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, GraphRunner, open_backend
from .backends.checks import check_finite
from .backends.tensorrt import PlanStore
from .bundle import Bundle
from .concept import Concept, PlacedConcept, place_concepts
from .denoiser import DenoisingLoop, Float32Array, Guidance, ReferenceSet
from .errors import (
    BundleError,
    Cancelled,
    ConceptError,
    MaskError,
    NonFiniteError,
    OptionError,
    SessionClosedError,
)
from .images import LoadedReference, MagicFaceWarning, layer_mask, load_reference, pixels_to_images
from .options import Options
from .regions import MaskedReference, Stage
from .results import Result, Timings
from .schedule import is_region_step, reference_noise, target_noise
from .tokenizer import Tokenizer
from .workplace import Workplace, Workplaces

MAX_SCALE_WEIGHT = 10.0
"""Forbidden keys stand 1000 below the others on the logits; a factor of 100 could lift them over that."""


@dataclass(frozen=True)
class Progress:
    """Where a request stands: `step` of `steps` is done, in batch `batch` of `batches`."""

    step: int
    steps: int
    stage: Stage
    batch: int
    batches: int


ProgressCallback = Callable[[Progress], object]
"""Called after every step; return False to cancel."""


@dataclass(frozen=True)
class _Prepared:
    """The references of one request, as the step needs them."""

    references: ReferenceSet
    latents: Float32Array
    text: NDArray[Any]
    tokens: tuple[tuple[int, ...], ...]


class Session:
    """A bundle, opened.

        with Session("bundles/sd15-512") as session:
            man = Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man"), weight=2.5)
            result = session.generate("a man in the rain", [man], seed=7)
            result.images[0].save("out.png")

    bundle     folder made by `magicface-rt export`
    backend    a name of `backends.BACKENDS`, or a `Backend` object, which stays the caller's to close; "auto" takes the
               fastest that works here
    workers    how many requests may compute at the same time; more wait. On a GPU each has memory of its own
    threads    threads of one request's computation on the CPU, 0 for the runtime's own choice
    check_hashes    read every file once and compare it with the manifest
    provenance      pictures say how they were made (PNG text and XMP)
    device          the GPU's ordinal
    store           engine store that holds the bundle's plans; "tensorrt" and "tensorrt-rtx" need it
    build_missing   build plans that the store does not hold; else a missing plan is an error
    target          what missing plans are built for, None for this GPU
    cuda_graphs     on a GPU, capture a step's work once and launch it as one thing afterwards

    A Session may be used by many threads. An error, a cancelled request or Ctrl-C leaves it usable.

    Raises `BundleError` for a folder that is no intact bundle, `BackendMissingError` where the backend is not there,
    `DeviceError` where the GPU is not. Plans are read when a graph is first needed, see `warm_up`.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        backend: str | Backend = "auto",
        workers: int = 1,
        threads: int = 0,
        check_hashes: bool = True,
        provenance: bool = True,
        device: int = 0,
        store: PlanStore | Path | str | None = None,
        build_missing: bool = False,
        target: Any = None,
        cuda_graphs: bool = True,
    ) -> None:
        for name, value, least in (("workers", workers, 1), ("threads", threads, 0), ("device", device, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} is {value!r}, expected a whole number from {least}.")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, check_hashes=check_hashes)
        if "text_encoder" not in self.bundle.graphs or "file" not in self.bundle.tokenizer:
            raise BundleError(
                f"bundle {self.bundle.path}: it holds a U-Net alone, with no text encoder or tokenizer. "
                "Export a whole checkpoint to generate pictures."
            )
        self.tokenizer = Tokenizer.from_file(
            self.bundle.path / self.bundle.tokenizer["file"],
            pad_token_id=int(self.bundle.tokenizer["pad_token_id"]),
            max_length=int(self.bundle.tokenizer["max_length"]),
        )
        self.provenance = provenance
        self._owns_backend = not isinstance(backend, Backend)
        self.backend: Backend
        if isinstance(backend, Backend):
            self.backend = backend
        else:
            self.backend = open_backend(
                backend,
                threads=threads,
                store=store,
                device=device,
                build_missing=build_missing,
                target=target,
                cuda_graphs=cuda_graphs,
                bundle=self.bundle,
            )
        self._workers = threading.BoundedSemaphore(workers)
        self._running = 0
        self._here = threading.local()
        self._loading = threading.Lock()
        self._runners: dict[str, GraphRunner] = {}
        self._workplaces = Workplaces(self.runner)
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs. May be called twice, and from any thread.

        A request that is running ends with `SessionClosedError` at its next step; what it uses is freed when it has.
        """
        with self._loading:
            self._closed = True
            self._free_if_idle()

    def _free_if_idle(self) -> None:
        if self._running == 0:
            self._workplaces.close()
            for runner in self._runners.values():
                runner.close()
            self._runners.clear()
            if self._owns_backend:
                self.backend.close()

    def warm_up(self, prompt: str = "", concepts: Sequence[Concept] = (), **settings: Any) -> None:
        """Load every graph and run a few steps, so that the first request does not wait for that.

        GPU backends compile and capture for shapes; give the concepts and settings of a typical request.

        Raises what `generate` raises.
        """
        self.generate(prompt, concepts, **{"steps": 4, **settings})

    def generate(
        self,
        prompt: str,
        concepts: Sequence[Concept] = (),
        *,
        options: Options | None = None,
        progress: ProgressCallback | None = None,
        **settings: Any,
    ) -> Result:
        """Make pictures of the prompt with the concepts in them.

        The settings are those of `Options` (`seed=7, steps=20, ...`), or an `Options` object, or both: a setting
        given by name wins. Without concepts this is plain Stable Diffusion.

        Raises:
            InputError: a setting, prompt, concept, image or mask that cannot be used; nothing has been computed.
            Cancelled: `progress` returned False.
            NonFiniteError: a graph produced NaN or infinity.
            SessionClosedError: the session is closed.
        """
        chosen = Options(**{**(options.to_dict() if options else {}), **settings})
        with self._worker():
            request = _Request(self, prompt, tuple(concepts), chosen, progress)
            with self._workplaces.take() as place:
                return request.run(place)

    def runner(self, graph: str) -> GraphRunner:
        """A graph of the bundle, loaded on first use."""
        with self._loading:
            self._check_open()
            if graph not in self._runners:
                self._runners[graph] = self.backend.load(self.bundle, graph)
            return self._runners[graph]

    @contextmanager
    def _worker(self) -> Iterator[None]:
        if getattr(self._here, "busy", False):
            raise OptionError("generate was called from within a progress callback of the same Session.")
        self._check_open()
        with self._workers:
            with self._loading:
                self._check_open()
                self._running += 1
            self._here.busy = True
            try:
                yield
            finally:
                self._here.busy = False
                with self._loading:
                    self._running -= 1
                    if self._closed:
                        self._free_if_idle()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("this Session is closed; open a new one to generate.")


class _Request:
    """One call of `generate`, stage by stage."""

    def __init__(
        self,
        session: Session,
        prompt: str,
        concepts: tuple[Concept, ...],
        options: Options,
        progress: ProgressCallback | None,
    ) -> None:
        self.session = session
        self.bundle = session.bundle
        self.prompt = prompt
        self.options = options
        self.progress = progress
        self.placed = place_concepts(prompt, concepts, session.tokenizer, self.bundle.limits.concepts)
        self._check_early()
        self.seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []

    def _check_early(self) -> None:
        """What would otherwise be refused only after minutes of work."""
        self.bundle.schedule.timesteps(self.options.steps)
        for text in (self.options.negative_prompt, *(r.prompt for p in self.placed for r in p.concept.references)):
            self.session.tokenizer.encode(text)
        for placed in self.placed:
            weight = placed.concept.weight
            if self.options.weight_mode == "scale" and abs(weight) > MAX_SCALE_WEIGHT:
                raise ConceptError(
                    f"concept {placed.concept.name!r}: weight is {weight:g}; with weight_mode='scale' it multiplies "
                    f"logits, and is expected from -{MAX_SCALE_WEIGHT:g} to {MAX_SCALE_WEIGHT:g}."
                )

    def run(self, place: Workplace) -> Result:
        start = perf_counter()
        self.place = place
        with self._timed("loading"):
            loaded = self._load_references()
        with self._timed("text_encoding"):
            text = self._encode_text([self.options.negative_prompt, self.prompt])  # [2, 77, D]
        prepared = self._prepare(loaded)
        latents, regions = self._denoise_batches(prepared, text)
        with self._timed("decoding"):
            images = [image for one in latents for image in self._decode(one[None])]
        return Result(
            images=images,
            regions=regions,
            latents=latents,
            prompt=self.prompt,
            concepts=[placed.concept for placed in self.placed],
            options=self.options,
            token_indices=prepared.tokens,
            timings=Timings(**self.seconds, total=perf_counter() - start, steps=tuple(self.step_seconds)),
            bundle_hash=self.bundle.hash,
            backend=self.session.backend.name,
            provenance=self.session.provenance,
        )

    # ------------------------------------------------------------------------------------------- before the loop

    def _load_references(self) -> list[tuple[PlacedConcept, LoadedReference, str]]:
        """Every reference with its concept and its prompt, checked against the bundle's limits and grids."""
        loaded = []
        for placed in self.placed:
            concept = placed.concept
            for number, reference in enumerate(concept.references, 1):
                which = f", reference {number}" if len(concept.references) > 1 else ""
                one = load_reference(reference, name=f"concept {concept.name!r}{which}")
                self._check_mask(one)
                loaded.append((placed, one, reference.prompt))
        if len(loaded) > self.bundle.limits.references:
            raise ConceptError(
                f"{len(loaded)} references were given; the bundle takes at most {self.bundle.limits.references}. "
                "Leave some out, or export a bundle for more references."
            )
        return loaded

    def _check_mask(self, loaded: LoadedReference) -> None:
        """A mask may vanish on a coarse grid (the method then skips it there, which is said), but not on all."""
        grids = [self.bundle.grid(factor) for factor in self.bundle.factors]
        empty = [grid for grid in grids if not layer_mask(loaded.mask_grid, *grid).any()]
        if empty and len(empty) < len(grids):
            where = " and ".join(f"{rows} x {columns}" for rows, columns in empty)
            warnings.warn(
                f"{loaded.name}: the mask vanishes on the {where} grid, and the layers there do not see it.",
                MagicFaceWarning,
                stacklevel=2,
            )
        if len(empty) == len(grids):
            finest = max(grids)
            raise MaskError(
                f"{loaded.name}: the mask vanishes on every grid the injection layers work on (the finest is "
                f"{finest[0]} x {finest[1]}); it is too small to be seen. Use a larger mask or a closer crop."
            )

    def _encode_text(self, prompts: Sequence[str]) -> NDArray[Any]:
        """Prompts to embeddings [n, 77, D]."""
        ids = np.stack([self.session.tokenizer.encode(prompt) for prompt in prompts])
        encoder = self.place.binding("text_encoder")
        size = encoder.largest("B") or len(ids)
        return np.concatenate(
            [encoder.once({"token_ids": ids[i : i + size]})["text"] for i in range(0, len(ids), size)]
        )

    def _prepare(self, loaded: Sequence[tuple[PlacedConcept, LoadedReference, str]]) -> _Prepared:
        concepts = [placed.concept for placed in self.placed]
        tokens = tuple(placed.tokens for placed in self.placed)
        numbers = {id(concept): number for number, concept in enumerate(concepts)}
        masked = [
            MaskedReference(one.mask_grid, numbers[id(placed.concept)], placed.concept.weight)
            for placed, one, _ in loaded
        ]
        references = ReferenceSet.of(self.bundle, masked)
        if not loaded:
            nothing = np.zeros((0, self.bundle.latent_channels, self.bundle.rows, self.bundle.columns), np.float32)
            return _Prepared(references, nothing, np.zeros(0), tokens)
        with self._timed("image_encoding"):
            latents = np.concatenate([self._encode_image(one) for _, one, _ in loaded])  # [R, 4, h, w]
        with self._timed("text_encoding"):
            text = self._encode_text([prompt for _, _, prompt in loaded])  # [R, 77, D]
        return _Prepared(references, latents, text, tokens)

    def _encode_image(self, loaded: LoadedReference) -> Float32Array:
        pixels = loaded.pixels(self.bundle.height, self.bundle.width)
        return self.place.binding("vae_encoder").once({"pixels": pixels})["latents"]

    # -------------------------------------------------------------------------------------------------- the loop

    def _denoise_batches(self, prepared: _Prepared, text: NDArray[Any]) -> tuple[Float32Array, NDArray[np.int64]]:
        """All images of the request, as many of them together as the bundle and its plan take."""
        size = min(self.bundle.limits.images, self.place.binding("denoise_step").largest("B") or self.options.images)
        indices = range(self.options.images)
        batches = [indices[i : i + size] for i in range(0, len(indices), size)]
        made = [self._denoise(prepared, text, batch, (n, len(batches))) for n, batch in enumerate(batches)]
        return np.concatenate([m[0] for m in made]), np.concatenate([m[1] for m in made])

    def _denoise(
        self, prepared: _Prepared, text: NDArray[Any], images: Sequence[int], place: tuple[int, int]
    ) -> tuple[Float32Array, NDArray[np.int64]]:
        """Latents [B, 4, h, w] and the last region labels [B, h/2, w/2] of some of the images."""
        latents, labels = self._steps(prepared, text, images, place)
        try:
            check_finite("denoise_step", "latents_out", latents)
        except NonFiniteError:
            # On a device the steps went unseen: go through them again, until the first graph that made them is found.
            self._steps(prepared, text, images, None)
            raise
        return latents, labels

    def _steps(
        self, prepared: _Prepared, text: NDArray[Any], images: Sequence[int], place: tuple[int, int] | None
    ) -> tuple[Float32Array, NDArray[np.int64]]:
        """The denoising loop. Without a `place` every step is checked, and none is timed or reported."""
        options, schedule = self.options, self.bundle.schedule
        shape = (1, self.bundle.latent_channels, self.bundle.rows, self.bundle.columns)
        loop = DenoisingLoop(
            self.bundle,
            self.place.binding("reference_kv"),
            self.place.binding("denoise_step"),
            latents=np.concatenate([target_noise(options.seed, index, shape) for index in images]),
            references=prepared.references,
            reference_text=prepared.text,
            guidance=Guidance(
                text=np.repeat(text[:, None], len(images), axis=1),
                tokens=prepared.tokens,
                ca_scale=options.effective_ca_scale(len(prepared.tokens)),
                scale=options.guidance,
                semantic=options.semantic_guidance,
                weight_mode=options.weight_mode,
            ),
        )
        timesteps = [int(t) for t in schedule.timesteps(options.steps)]
        coefficients = schedule.step_coefficients(options.steps)

        def noised(i: int) -> Float32Array | None:
            if not len(prepared.latents) or i == options.steps:
                return None
            noise = reference_noise(options.reference_seed, i, shape)
            return schedule.add_noise(prepared.latents, noise, timesteps[i])

        ahead = noised(0)
        for i, timestep in enumerate(timesteps):
            start = perf_counter()
            stage: Stage = "rba" if is_region_step(i, options.steps, options.alpha) else "rsa"
            loop.step(timestep, coefficients[i], stage, ahead)
            ahead = noised(i + 1)  # while the device works
            reference_seconds = loop.wait()
            if place is None:
                loop.check()
                self.session._check_open()
                continue
            seconds = perf_counter() - start
            self._spent("reference_pass", reference_seconds)
            self._spent("denoising", seconds - reference_seconds)
            self.step_seconds.append(seconds)
            self._report(Progress(i + 1, options.steps, stage, *place))
        return loop.read()

    def _report(self, progress: Progress) -> None:
        self.session._check_open()
        if self.progress is not None and self.progress(progress) is False:
            raise Cancelled(f"cancelled by the progress callback after step {progress.step} of {progress.steps}.")

    # --------------------------------------------------------------------------------------------- after the loop

    def _decode(self, latents: Float32Array) -> Sequence[Any]:
        pixels = self.place.binding("vae_decoder").once({"latents": latents})["pixels"]
        return pixels_to_images(pixels)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self._spent(stage, perf_counter() - start)

    def _spent(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
