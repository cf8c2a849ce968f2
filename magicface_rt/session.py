"""Session: a bundle opened on a backend, which makes pictures from a prompt and concepts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from .admission import Admission, RunningRequest
from .backends import Backend, GraphRunner, open_backend
from .backends.tensorrt import PlanStore
from .bundle import Bundle
from .concept import Concept, NamedConcept
from .errors import (
    BackendError,
    BundleError,
    Cancelled,
    ConceptError,
    OptionError,
    OtherProcessError,
    SessionClosedError,
)
from .graphs import LoadedGraphs
from .kept import KeptConcept, MemoryPlan, Origin
from .kept.keeper import Keeper, KeepSettings, checked_storage
from .kept.memory import MEMORY
from .options import Options
from .preparing import PlannedReferences, Preparer, find_in_store, load_alone, load_bare
from .process.cores import MOST_THREADS, threads_of_each
from .process.exits import end_at_exit
from .process.forks import leak_in_forks
from .process.host_memory import as_host_memory_error
from .request import (
    Progress,
    ProgressCallback,
    Request,
    check_batch,
    check_concepts,
    check_number,
    check_progress,
    check_request,
    declined,
)
from .request_progress import RequestProgress
from .results import Result
from .tokenizer import Tokenizer
from .values.plain_words import one_of
from .values.shown import shown
from .values.sizes import parse_size
from .work import Work
from .worker_context import WorkerContext, WorkerContextPool

__all__ = ["Progress", "ProgressCallback", "Request", "Session", "tokenizer_of"]

WARM_UP_STEPS = 3
"""A GPU compiles at a graph's first step and captures its first CUDA graph at the second. The other captures, for the
second latent buffer and for RBA's steps, take no compiling, and are left to the first request."""

HOLD_REFERENCES = ("vae_encoder", "reference_kv", "denoise_step")
"""The graphs whose bindings hold pixels, latents or keys of the last references that went through them."""


class Session:
    """An open bundle, from which pictures are made.

        with Session("bundles/sd15-512") as session:
            man = Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man"), weight=2.5)
            result = session.generate("a man in the rain", [man], seed=7)
            result.images[0].save("out.png")

    bundle     folder made by `magicface-rt export`
    backend    a name of `backends.BACKENDS`, or a `Backend` object, which stays the caller's to close; "auto" takes the
               fastest that works here
    workers    how many requests may compute at the same time; others wait. Each has memory of its own
    threads    0..1024; threads of one request's computation on the CPU; 0: the workers share the cores
    check_hashes    read every file once and compare it with the manifest
    provenance      whether pictures record how they were made (PNG text and XMP)
    device          the GPU's ordinal
    store           engine store that holds the bundle's plans; "tensorrt" and "tensorrt-rtx" need it
    build_missing   build plans that the store does not hold, for "tensorrt" and "tensorrt-rtx"; else a missing plan is
                    an error
    target          what missing plans are built for, None for this GPU
    cuda_graphs     on a GPU, capture a step's work once and launch it as one thing afterwards. Those providers of ONNX
                    Runtime that compile do not
    keep            bytes (or "4GiB") of memory in which prepared references are kept for later requests, found again by
                    their content. None: a bare concept's references run beside the target at every request
    memory          where the reference keys of a request are: "keep" (all steps on the device), "stream" (on the host,
                    copied ahead of need), "recompute" (nowhere: references run beside the target), or "auto"; see
                    `plan`
    budget          bytes that the peak of `plan` may reach, on the device if there is one. None: what is free there
    storage         how references are kept: "exact", or "8-bit" for about half the bytes of 16-bit keys
    pad_keys        fill the numbers of reference tokens up to buckets, so that a GPU's captured graphs serve all masks.
                    None: with the TensorRT flavours, which capture anew as often as they must

    A Session may be used by many threads. An error, a cancelled request or Ctrl-C leaves it usable. It belongs to the
    process that opened it: each process must open its own, even one that was forked.

    Raises `BundleError` for a folder that is not an intact bundle, `BackendMissingError` if the backend is missing,
    `DeviceError` if the GPU is missing or has too little memory, `PlanError` for a missing plan. Plans are looked up at
    once, and read when a graph is first needed; see `warm_up`.
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
        keep: int | str | None = None,
        memory: str = "auto",
        budget: int | str | None = None,
        storage: str = "exact",
        pad_keys: bool | None = None,
    ) -> None:
        KeepSettings.of(keep, memory, budget, storage, bool(pad_keys))
        _check_numbers(workers, threads, device)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, check_hashes=check_hashes)
        self.tokenizer = tokenizer_of(self.bundle)
        self.provenance = provenance
        self._owns_backend = not isinstance(backend, Backend)
        self.backend = self._open_backend(
            backend,
            threads=threads_of_each(threads, workers),
            store=store,
            device=device,
            build_missing=build_missing,
            target=target,
            cuda_graphs=cuda_graphs,
        )
        padded = self.backend.free_device_memory() is not None if pad_keys is None else pad_keys
        self._keeper = Keeper(self.bundle, self.backend, KeepSettings.of(keep, memory, budget, storage, padded))
        self._process = os.getpid()
        self._admission = Admission(workers, self._check_open, self._drop_forgotten_again, self._free)
        self._graphs = LoadedGraphs(self.bundle, self.backend, self._check_open)
        self._worker_contexts = WorkerContextPool(self._get_or_load)
        leak_in_forks(self)
        end_at_exit(self)

    def _open_backend(self, backend: str | Backend, **settings: Any) -> Backend:
        """Return the backend, opened with these settings of `open_backend` if it is a name, after it has checked the
        bundle.
        """
        opened = backend if isinstance(backend, Backend) else open_backend(backend, **settings, bundle=self.bundle)
        try:
            opened.check(self.bundle)
        except BaseException:
            if self._owns_backend:
                opened.close()
            raise
        return opened

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs. May be called more than once, from any thread, and from a signal handler or a finalizer.

        A request that is running ends with `SessionClosedError` at its next step, or once the graph that it loads is
        there; one that waits for a worker, or for another thread that loads a graph, ends with it soon. This waits for
        none of them: what they use is freed once they have ended. In a process forked from the Session's own this frees
        nothing, since it is not that process's to free.
        """
        if os.getpid() != self._process:  # the runtime's threads are not there, and a lock may be held for ever
            return
        self._admission.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker_contexts"):  # else it was not opened
            self.close()

    def request_stop(self) -> None:
        """End running requests at their next step, and begin no more; see `exits.Stoppable`."""
        self._admission.closed = True

    def wait_stopped(self, seconds: float) -> bool:
        """Wait at most `seconds` for running requests to end; return whether none is left; see `exits.Stoppable`."""
        if os.getpid() != self._process:
            return True
        return self._admission.drained(seconds)

    def _free(self) -> None:
        """Free what requests share. May be called twice."""
        self._worker_contexts.close()
        self._keeper.close()
        self._graphs.close()
        if self._owns_backend:
            self.backend.close()

    def warm_up(self, prompt: str = "", concepts: Sequence[NamedConcept] = (), **settings: Any) -> None:
        """Load the graphs that a request like this needs and run three of its steps, so that the first need not wait
        until they are loaded and compiled.

        GPU backends compile and capture for particular shapes, so give the concepts and settings of a typical request.
        A kept concept supplies its number of steps and `reference_seed` if the settings do not name them.

        Raises what `generate` raises.
        """
        concepts = check_concepts(concepts)
        kept = next((concept for concept in concepts if isinstance(concept, KeptConcept)), None)
        typical = {"steps": WARM_UP_STEPS}
        if kept is not None:
            typical = {"steps": kept.steps, "reference_seed": kept.reference_seed}
        progress: ProgressCallback | None = settings.pop("progress", None)
        check_progress(progress)
        enough = False

        def few(now: Progress) -> bool:
            nonlocal enough
            if progress is not None and declined(progress(now)):
                return False
            enough = now.stage != "prepare" and WARM_UP_STEPS <= now.step < now.steps
            return not enough

        try:
            self.generate(prompt, concepts, progress=few, **{**typical, **settings})
        except Cancelled:
            if not enough:
                raise
            self._warm_decoder()

    def _warm_decoder(self) -> None:
        """Decode one image of zeros, since a request that stopped early has not reached the decoder."""
        latents = np.zeros((1, self.bundle.latent_channels, self.bundle.rows, self.bundle.columns), np.float32)
        progress = RequestProgress(None, self._check_open, 1)
        with self._worker_slot(progress), self._borrow_context(progress) as context:
            context.binding("vae_decoder").once({"latents": latents})

    def generate(
        self,
        prompt: str,
        concepts: Sequence[NamedConcept] = (),
        *,
        options: Options | None = None,
        progress: ProgressCallback | None = None,
        record_regions: bool = False,
        **settings: Any,
    ) -> Result:
        """Make pictures of the prompt with the concepts in them.

        The settings are those of `Options` (`seed=7, steps=20, ...`), or an `Options` object, or both: a setting
        given by name wins. Without concepts this is Stable Diffusion with semantic guidance, and plain Stable
        Diffusion with `semantic_guidance=False`. A concept is a `Concept` or a `KeptConcept`, in any mixture. With
        `record_regions` the result holds the regions after every step as well; the pictures are the same.

        Raises:
            InputError: a setting, prompt, concept, image or mask that cannot be used; nothing has been computed.
            KeptConceptError: a kept concept of another bundle, schedule, number of steps or reference_seed; or its file
                was written to since it was loaded.
            BudgetError: the references need more memory than the budget allows.
            BundleError: a file of the bundle was written to since it was opened; or one was replaced or removed, and a
                graph was still to be loaded.
            Cancelled: `progress` returned False.
            NonFiniteError: a graph produced NaN or infinity.
            HostMemoryError: there is too little memory on the host.
            SessionClosedError: the session is closed.
            OtherProcessError: this process was forked from the one that opened the Session.
        """
        chosen = Options.of(options, settings)
        return self.generate_batch([Request(prompt, concepts, chosen, record_regions)], progress=progress)[0]

    def generate_batch(self, requests: Sequence[Request], *, progress: ProgressCallback | None = None) -> list[Result]:
        """Make the pictures of several requests together, each as it would be made alone.

        Prompts, concepts, seeds and all other settings may differ, except the number of steps. Requests with the same
        concepts, weights and switches share one copy of the reference keys. Every result has the timings of the whole
        batch.

        Raises:
            OptionError: the requests differ in `steps`; there are none; one is not a `Request`.
            whatever `generate` raises.
        """
        requests = check_batch(requests)
        request_progress = RequestProgress(progress, self._check_open, requests[0].options.steps)
        with self._worker_slot(request_progress):
            checked = [check_request(request, self.bundle, self.tokenizer) for request in requests]
            with self._borrow_context(request_progress) as context:
                work = Work(checked, self.bundle, self.tokenizer, self._keeper, context, request_progress)
                return work.run(backend=self.backend.name, provenance=self.provenance)

    def prepare(
        self,
        concept: Concept,
        *,
        steps: int = 50,
        reference_seed: int = 0,
        storage: str | None = None,
        workspace: int | str | None = None,
        progress: ProgressCallback | None = None,
    ) -> KeptConcept:
        """Compute a concept's keys for all steps once, for any number of pictures with that many steps.

        storage    "exact", or "8-bit", which takes a quarter of the bytes of 32-bit keys and half of those of 16-bit
                   ones; the result's `error` says what it cost. The Session's own, unless given
        workspace  bytes that a pass through the network may take; with more, more steps share a pass. Unless given,
                   512 MiB, or a quarter of the Session's budget where that is less
        progress   called after every pass, with the stage "prepare"; return False to cancel

        Keys that are in the Session's store already are not computed again.

        Raises:
            InputError: a setting, image or mask that cannot be used.
            Cancelled: `progress` returned False.
            NonFiniteError: a graph produced NaN or infinity.
        """
        if not isinstance(concept, Concept):
            raise ConceptError(f"concept is a {type(concept).__name__}, expected a Concept; a kept one is prepared.")
        options = Options(steps=steps, reference_seed=reference_seed)
        form = self._keeper.settings.storage if storage is None else checked_storage(storage)
        room = None if workspace is None else parse_size(workspace, "workspace")
        request_progress = RequestProgress(progress, self._check_open, options.steps * len(concept.references))
        with self._worker_slot(request_progress):
            origin = Origin.of(self.bundle, options.steps, options.reference_seed)
            loaded = load_alone(concept, origin, self.bundle, self.tokenizer)
            with self._borrow_context(request_progress) as context:
                preparer = Preparer(self.bundle, self.tokenizer, self._keeper, context, request_progress)
                kept = preparer.prepare(concept, loaded, origin, form, workspace=room)
        return KeptConcept(
            concept.word,
            kept,
            origin,
            weight=concept.weight,
            token_index=concept.token_index,
            name=concept.name,
            source=concept,
        )

    def plan(
        self,
        concepts: Sequence[NamedConcept],
        steps: int = 50,
        images: int = 1,
        *,
        memory: str | None = None,
        budget: int | str | None = None,
    ) -> MemoryPlan:
        """Say what the references of a request would need, in each mode, and which mode would be taken.

        Reads the images and masks, runs no graph. `memory` and `budget` replace the Session's own.

        Raises:
            InputError: a setting, concept, image or mask that cannot be used.
            BudgetError: no mode fits into the budget.
        """
        if memory is not None and not one_of(memory, MEMORY):
            raise OptionError(f"memory is {shown(memory)}, expected one of {', '.join(MEMORY)}.")
        options = Options(steps=steps, images=images)
        self.bundle.schedule.timesteps(options.steps)
        self._check_open()
        listed, references = PlannedReferences(), 0
        for concept in check_concepts(concepts):
            if isinstance(concept, KeptConcept):
                seed = concept.reference_seed
                concept.origin.check(Origin.of(self.bundle, options.steps, seed), concept.name)
                listed.add(concept)
            elif isinstance(concept, Concept):
                bare = load_bare(concept, self.bundle)
                origin = Origin.of(self.bundle, options.steps, options.reference_seed)
                listed.add(concept, bare, find_in_store(self._keeper, bare, origin))
            references += len(concept.references)
        check_number(references, self.bundle)
        return self._keeper.plan(
            listed.references,
            steps=options.steps,
            images=options.images,
            content_keys=listed.content_keys,
            memory=memory,
            budget=None if budget is None else parse_size(budget, "budget"),
        )

    def forget(self, keys: Iterable[str] | None = None) -> bool:
        """Drop references: their keys in the store and on the device, and what the graphs' buffers hold of the last
        references that went through them. Graphs stay loaded.

        keys  content keys, `[one.key for one in kept.references]` of a `KeptConcept`; others stay. None: all that is
              kept. A key that is not there is no error

        Returns whether nothing of them is left in this Session. Running requests go on with what they have: then it is
        False, and the rest is dropped when they have ended. A `KeptConcept` that the caller holds keeps its keys, and
        files stay. Memory is freed but not overwritten. A later request with the same images prepares them again.

        Raises:
            OptionError: `keys` is not a collection of texts.
        """
        chosen = None if keys is None else _checked_content_keys(keys)
        self._check_process()

        def forget() -> bool:
            running = self._admission.running
            for request in running:
                request.note(chosen)
            return self._drop_references(chosen) and not running

        return self._admission.exclusively(forget)

    @property
    def kept_bytes(self) -> int:
        """Bytes of references that `keep` holds on the host."""
        return self._keeper.store.nbytes

    @property
    def device_kept_bytes(self) -> int:
        """Bytes of reference keys in the device's memory."""
        return self._keeper.on_device.nbytes

    def unload(self, *graphs: str) -> None:
        """Free graphs that are not needed for now; they are loaded again when they are.

        With kept concepts "reference_kv" and "vae_encoder" are idle, and the former holds most of a U-Net's weights.

        Raises:
            BundleError: the bundle has no such graph.
            OptionError: a request is running, or an argument is not a name.
        """
        for position, graph in enumerate(graphs):
            if not isinstance(graph, str):
                raise OptionError(
                    f"graphs[{position}] is {shown(graph)}, expected a graph's name. Give each as an argument of its "
                    'own: unload("reference_kv", "vae_encoder").'
                )
            self.bundle.graph(graph)
        self._check_process()

        def unload() -> None:
            if self._admission.running:
                raise OptionError("graphs cannot be unloaded while a request is running; wait for it to end.")
            for graph in graphs:
                self._worker_contexts.drop(graph)
                self._graphs.unload(graph)

        self._admission.exclusively(unload)

    def runner(self, graph: str) -> GraphRunner:
        """Return a graph of the bundle, which is loaded on first use.

        Graphs are loaded one at a time. Closing the Session ends waiting for another thread that loads one.

        Raises:
            BundleError: the bundle has no such graph, or a file of it was replaced since it was opened.
            SessionClosedError: the session is closed.
            OtherProcessError: this process was forked from the one that opened the Session.
        """
        return self._get_or_load(graph, self._check_open)

    def _get_or_load(self, graph: str, waiting: Callable[[], object]) -> GraphRunner:
        """Return a graph; see `LoadedGraphs.get_or_load`. Nothing that is shared is freed before that has ended."""
        with self._admission.in_use():
            return self._graphs.get_or_load(graph, waiting)

    def _drop_references(self, keys: frozenset[str] | None) -> bool:
        """Drop what is kept of references with these content keys (None: of all), and what the buffers of idle graphs
        hold of any. Return whether nothing of them is left.
        """
        for graph in HOLD_REFERENCES:
            self._worker_contexts.drop(graph)
        return self._keeper.forget(keys)

    def _drop_forgotten_again(self, request: RunningRequest) -> None:
        """Drop what was forgotten while a request ran that has finished since, because it may have put it back."""
        if request.forgotten_all or request.forgotten:
            self._drop_references(None if request.forgotten_all else frozenset(request.forgotten))

    @contextmanager
    def _worker_slot(self, progress: RequestProgress) -> Iterator[None]:
        """Occupy one of the workers for the block. While all are busy, the first progress is reported repeatedly."""
        with self._admission.slot(progress.report_again), as_host_memory_error():
            yield

    @contextmanager
    def _borrow_context(self, progress: RequestProgress) -> Iterator[WorkerContext]:
        """Provide a worker context for the block. If the runtime fails, what no request uses is freed on the device.

        Backends may have mapped the bundle's files, and then compute with whatever was written to them; so that is
        checked before and after the block.
        """
        try:
            with self._worker_contexts.take(progress.report_again) as context, as_host_memory_error():
                self.bundle.check_not_modified()
                yield context
                self.bundle.check_not_modified()
        except BackendError:
            self._keeper.on_device.free_unused()
            raise

    def _check_open(self) -> None:
        self._check_process()
        if self._admission.closed:
            raise SessionClosedError("this Session is closed; open a new one to generate.")

    def _check_process(self) -> None:
        """Raise OtherProcessError in a forked process. Called before any lock is taken: it may be held for ever."""
        if os.getpid() != self._process:
            raise OtherProcessError(
                f"this Session was opened in process {self._process}, and process {os.getpid()} was forked from that. "
                "What a runtime computes with does not survive a fork: open a Session in each process."
            )

    def native_objects(self) -> object:
        """Return everything that waits for threads when it is freed; see `forks.Opened`."""
        return (*list(self._graphs.runners.values()), self._worker_contexts, self.backend)

    def __reduce__(self) -> NoReturn:
        raise OtherProcessError(
            "a Session cannot be copied or sent to another process; send the bundle's path, and open one there."
        )


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    """Return the tokenizer of a bundle from which pictures can be made.

    Raises:
        BundleError: the bundle has no tokenizer, or no text encoder.
    """
    if "text_encoder" not in bundle.graphs or "file" not in bundle.tokenizer:
        raise BundleError(
            f"bundle {bundle.path}: it holds a U-Net alone, with no text encoder or tokenizer. "
            "Export a whole checkpoint to generate pictures."
        )
    return Tokenizer.from_file(
        bundle.path / bundle.tokenizer["file"],
        pad_token_id=int(bundle.tokenizer["pad_token_id"]),
        max_length=int(bundle.tokenizer["max_length"]),
    )


def _checked_content_keys(keys: Iterable[str]) -> frozenset[str]:
    listed = None if isinstance(keys, str) or not isinstance(keys, Iterable) else list(keys)
    if listed is None or not all(isinstance(key, str) for key in listed):
        raise OptionError(
            f"keys is a {type(keys).__name__}, expected content keys, which are texts: give "
            "[reference.key for reference in kept.references]."
        )
    return frozenset(listed)


def _check_numbers(workers: int, threads: int, device: int) -> None:
    """Raise OptionError unless each is a whole number in its range."""
    for name, value, least in (("workers", workers, 1), ("threads", threads, 0), ("device", device, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} is {shown(value)}, expected a whole number from {least}.")
    if threads > MOST_THREADS:
        raise OptionError(f"threads is {shown(threads)}, expected a whole number from 0 to {MOST_THREADS}.")
