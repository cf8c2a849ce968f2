"""The `Service` of a single server process: an Engine, a store of concepts, and a few threads for everything but
computing.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from ..errors import (
    BundleError,
    Cancelled,
    DeadlineError,
    DrainingError,
    ErasedError,
    EraseError,
    MagicFaceError,
    QueueFullError,
    UnknownConceptError,
)
from ..kept import KeptConcept
from ..kept.keeper import checked_storage
from ..kept.memory import stored_bytes
from ..provenance import software
from ..request import Progress, ProgressCallback
from ..results import Result, encode_png
from ..session import Session
from ..soft_warnings import MagicFaceWarning, collect_warnings, warn
from ..values.shown import shown
from .concepts import NO_WORD, ConceptStore, StoredConcept, concept_id, without_source
from .engine import Engine
from .erasure import STILL_RUNS, Erasures, Trace, not_begun, scrub
from .job import Done, EngineJob
from .orders import check_named, parse_order, pixels_of, read_upload
from .problems import at, refusal
from .refusals import deadline_passed, draining, queue_full, remaining_seconds
from .schemas import BundleInfo, BundleLimits, ConceptInfo, ConceptPut, Erasure, PictureOrder, Warned
from .service import Accepted, ConceptUpload, Listener, Outcome, Service

__all__ = ["LocalService", "ServiceObserver", "until"]

logger = logging.getLogger("magicface_rt.serve")

T = TypeVar("T")

ERASE_ATTEMPTS = 20
ERASE_PAUSE = 0.05

LOOK_SECONDS = 10.0
"""How often the service checks whether another process has erased a concept that is in memory here, and whether its
bundle was written to.
"""


class ServiceObserver:
    """Is notified about concepts and pictures; this base class does nothing. Called in the event loop's thread."""

    def looked_up(self, hit: bool) -> None:
        """Called when a concept was looked up by its id or its content; `hit`: whether it was there."""

    def prepared(self) -> None:
        """Called when a concept was prepared, that is, its references went through the network."""

    def made(self, outcome: Outcome) -> None:
        """Called when the pictures of a request have been made."""


class _Use:
    """A request's use of concepts, from the moment it names them until its answer is complete."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = frozenset(ids)
        self.error: MagicFaceError | None = None
        self.job: EngineJob | None = None
        self.over = asyncio.Event()

    def check(self) -> None:
        """Raise the error with which the request was stopped, if it was."""
        if self.error is not None:
            raise self.error


class LocalService(Service):
    """A service in this process. It takes over the Engine and the store of concepts, and closes both when it is closed;
    the Sessions remain the caller's.

    All calls come from one event loop.
    """

    def __init__(self, engine: Engine, store: ConceptStore, *, observer: ServiceObserver | None = None) -> None:
        self.engine = engine
        self.store = store
        self.settings = engine.settings
        self._observer = observer or ServiceObserver()
        self._session = engine.sessions[0]
        self._decoders = ThreadPoolExecutor(self.settings.decoders, thread_name_prefix="magicface-decode")
        # Separate, so that finished pictures do not wait behind uploads.
        self._encoders = ThreadPoolExecutor(self.settings.decoders, thread_name_prefix="magicface-encode")
        # Separate, so that on a slow disk reads do not wait behind writes or erasures.
        self._files = ThreadPoolExecutor(2, thread_name_prefix="magicface-files")
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="magicface-write")
        self._erasers = ThreadPoolExecutor(2, thread_name_prefix="magicface-erase")
        # Separate, since it may wait for a whole batch, and whatever shared its thread would wait as well.
        self._alone = ThreadPoolExecutor(1, thread_name_prefix="magicface-alone")
        self._uses: set[_Use] = set()
        self._late: set[_Use] = set()  # those of a concept that another process has erased
        self._stale = False  # whether Sessions may hold something of such a concept
        self._erasures = Erasures(self.settings.queue)
        self._making: dict[str, asyncio.Event] = {}
        self._unfinished: dict[str, Trace] = {}
        self._held_pixels = 0
        self._arriving = 0
        self._closed = False
        self._looking: asyncio.Task[None] | None = None
        self._spoilt: BundleError | None = None

    # ------------------------------------------------------------------------------------------------ beginning, ending

    async def start(self) -> None:
        self.engine.start()
        self._looking = asyncio.ensure_future(self._look())

    def failure(self) -> BaseException | None:
        return self.engine.failure or self._spoilt

    def not_ready(self) -> str | None:
        if self._spoilt is not None:
            return "a file of its bundle was written to."
        if self.engine.failure is not None:
            return "a thread that computes has ended." if self.engine.warm else "the warm-up failed."
        if self.engine.draining:
            return "the service is ending."
        return None if self.engine.warm else "the service is warming up."

    async def drain(self, seconds: float) -> int:
        # A thread for each call, since a second call ends what the first one waits for.
        return await _in_own_thread("magicface-drain", lambda: self.engine.drain(seconds))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
        await _in_own_thread("magicface-close", self.engine.close)
        for pool in (self._alone, self._decoders, self._encoders, self._files, self._writers, self._erasers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    # --------------------------------------------------------------------------------------------------------- pictures

    async def generate(self, order: PictureOrder, *, owner: str, listener: Listener | None = None) -> Outcome:
        end = time.monotonic() + remaining_seconds(order.deadline, self.settings.deadline)
        check_named(order)
        with collect_warnings() as warned, self._using([use.id for use in order.concepts if use.id is not None]) as use:
            with self._taken():
                kept = {id: await self._kept(id, k, end) for k, id in self._ids(order)}
                use.check()
                request, pixels = await self._by(
                    end, self._decoders, parse_order, order, kept.__getitem__, self._session, self.settings
                )
                kept.clear()
            request, alone = replace(request, record_regions=order.record_regions), order.alone
            del order  # and with it the files of its images
            use.check()
            with self._holding(pixels):
                job = EngineJob(request, owner=owner, deadline=end, alone=alone, progress=_relay(listener))
                del request
                done = await self._done(job, use, listener)
            outcome: Outcome = await self._in(self._encoders, _outcome, done, _warnings_for_answer(warned))
            del done
            use.check()
        self._observer.made(outcome)
        return outcome

    async def bundle(self) -> BundleInfo:
        bundle, settings = self._session.bundle, self.settings
        return BundleInfo(
            hash=bundle.hash,
            architecture=bundle.architecture,
            dtype=bundle.dtype,
            height=bundle.height,
            width=bundle.width,
            backend=self._session.backend.name,
            software=software(),
            default_steps=settings.default_steps,
            limits=BundleLimits(
                concepts=bundle.limits.concepts,
                references=bundle.limits.references,
                images=settings.images,
                steps=settings.steps,
                pixels=settings.pixels,
                body_bytes=settings.body_bytes,
                deadline=settings.deadline,
                queue=settings.queue,
            ),
        )

    # --------------------------------------------------------------------------------------------------------- concepts

    async def put_concept(self, upload: ConceptUpload, *, owner: str) -> tuple[ConceptPut, bool]:
        end = time.monotonic() + self.settings.deadline
        with at("storage"):
            storage = checked_storage(upload.storage)
        word = upload.word

        with ExitStack() as resources:
            warned = resources.enter_context(collect_warnings())
            place = resources.enter_context(ExitStack())  # in the queue, until the Engine has it
            place.enter_context(self._taken())
            concept, bare, origin = await self._by(
                end, self._decoders, read_upload, upload, self._session, self.settings
            )
            del upload  # and with it the files of its images
            resources.enter_context(self._holding(pixels_of(concept)))

            def keys() -> list[str]:
                return [one.key(origin, storage) for one in bare]

            def prepare(session: Session, progress: ProgressCallback) -> KeptConcept:
                made = session.prepare(
                    concept,
                    steps=origin.steps,
                    reference_seed=origin.reference_seed,
                    storage=storage,
                    progress=progress,
                )
                return without_source(made, word)

            id = concept_id(await self._by(end, self._decoders, keys))
            async with self._making_alone(id, end):
                found = await self._found(id)
                self._observer.looked_up(found is not None)
                if found is not None:
                    _warn_of_word(found.concept, word)
                    return _put(found, warned), False
                nbytes = sum(stored_bytes(self._session.bundle, one.tokens, origin.steps, storage) for one in bare)
                room = asyncio.ensure_future(self._in(self._files, self.store.reserve, id, nbytes))
                resources.callback(_give_back, room)  # even if nobody waits for it any more
                await _to_its_end(room)
                with self._using([]) as use:
                    done = await self._done(EngineJob(prepare, owner=owner, deadline=end), use, None, place)
                self._observer.prepared()
                putting = asyncio.ensure_future(self._in(self._writers, self.store.put, id, done.result))
                return _put(await _to_its_end(putting), warned), True

    async def concepts(self) -> list[ConceptInfo]:
        return [ConceptInfo.of(stored) for stored in await self._in(self._files, self.store.entries)]

    async def concept(self, id: str) -> ConceptInfo:
        return ConceptInfo.of(await self._in(self._files, self.store.get, id))

    async def erase(self, id: str) -> Erasure:
        end = time.monotonic() + self.settings.deadline
        files = stopped = 0
        async with AsyncExitStack() as resources:
            resources.enter_context(self._erasures.one())
            try:
                await resources.enter_async_context(self._making_alone(id, end))
            except DeadlineError:
                raise not_begun(id) from None
            for attempt in range(ERASE_ATTEMPTS):
                try:
                    gone, ended = await self._erase_once(id, end)
                except UnknownConceptError:
                    if not attempt:
                        raise
                    return Erasure(id=id, files=files, stopped=stopped)
                files, stopped = files + gone, stopped + ended
                if await self._in(self._erasers, self.store.left, id) is None:
                    return Erasure(id=id, files=files, stopped=stopped)
                await asyncio.sleep(ERASE_PAUSE)
        raise refusal(
            409, "concept-put-again", f"concept {id}: another process puts it as it is erased. Erase it again."
        )

    # ----------------------------------------------------------------------------------------------------------- inside

    async def _erase_once(self, id: str, end: float) -> tuple[int, int]:
        """Return how many files were removed, and how many requests were ended. Another process may have put the
        concept again since.
        """
        held = self.store.held(id)  # also of a file that can no longer be read, or was replaced
        found = await self._found(id) or self.store.held(id)
        kept = [one.concept for one in (held, found) if one is not None]
        trace = self._unfinished.get(id) if found is None else Trace(*kept)
        del held, found, kept
        if trace is not None:
            self._unfinished[id] = trace
        files = 0
        erasing = asyncio.ensure_future(self._in(self._erasers, self.store.erase, id))
        try:
            files = await _to_its_end(erasing)
        except UnknownConceptError:
            if trace is None:
                raise
        if trace is None and files:  # of a file that cannot be read, Sessions may hold keys although nothing here does
            trace = self._unfinished[id] = Trace()
        stopped, place = await self._let_go(id, lambda: [] if trace is None else [trace], end)
        if place is not None:
            raise EraseError(f"concept {id}: something of it is left in {place}. Erase it again, or restart.")
        self._unfinished.pop(id, None)
        return files, stopped

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Hold a place in the queue while the block decodes a request's images, before the Engine has the request.

        Raises:
            QueueFullError: the queue is full.
            DrainingError: no more work is taken.
        """
        if self.engine.draining:
            raise draining()
        waiting = self.engine.waiting + self._arriving
        if waiting >= self.settings.queue:
            raise queue_full(waiting, self.engine.retry_after())
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    async def _by(self, end: float, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a call in a thread of a pool. A call that has not begun when the deadline passes, or
        when its awaiter is cancelled, is not made.

        Raises:
            DeadlineError: the deadline has passed.
        """
        task = asyncio.ensure_future(self._in(pool, call, *arguments))
        try:
            await asyncio.wait({task}, timeout=_left(end))
            if not task.done():
                raise deadline_passed()
            return task.result()
        finally:
            task.cancel()

    @staticmethod
    def _ids(order: PictureOrder) -> Iterator[tuple[int, str]]:
        return ((k, use.id) for k, use in enumerate(order.concepts) if use.id is not None)

    async def _kept(self, id: str, position: int, end: float) -> KeptConcept:
        with at(f"concepts[{position}].id"):
            try:
                found: StoredConcept = await self._by(end, self._files, self.store.get, id)
            except UnknownConceptError:
                self._observer.looked_up(False)
                raise
        self._observer.looked_up(True)
        return found.concept

    async def _found(self, id: str) -> StoredConcept | None:
        """Return the concept with this id, or None if there is none or it is damaged."""
        try:
            return await self._in(self._files, self.store.get, id)
        except UnknownConceptError:
            return None

    async def _done(self, job: EngineJob, use: _Use, listener: Listener | None, place: ExitStack | None = None) -> Done:
        """Queue a job and wait for it; whatever ends the wait ends the job. place: the place in the queue that the
        request has held so far.
        """
        if place is not None:
            place.close()
        before = self.engine.waiting
        self.engine.submit(job)
        use.job = job
        if listener is not None:
            listener(Accepted(before))
        future = asyncio.wrap_future(job.future)
        future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody may be left to ask
        assert job.deadline is not None
        try:
            while not future.done():  # the loop's timer may fire a little early
                await asyncio.wait({future}, timeout=max(0.001, job.deadline - time.monotonic()))
                job.check_deadline()
            return future.result()
        finally:
            self.engine.cancel(job, Cancelled("the client has gone."))
            use.job = None

    async def _look(self) -> None:
        """Regularly check files, even when no request does: release concepts that other processes have erased, and fail
        the service once its bundle was written to, since no request can be done any more then.
        """
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._in(self._files, self.store.used)
                await self._drop_vanished()
            except Exception as error:  # such as a folder that cannot be read now; try again next time
                logger.warning("erased concepts were not looked for, or not dropped: %s", type(error).__name__)
            try:
                said = await self._in(self._files, self._session.bundle.modified_error)
                if said is not None:
                    self._spoilt = BundleError(said)
            except MagicFaceError as error:  # likewise
                logger.warning("%s", error)

    async def _drop_vanished(self) -> None:
        """Make the Sessions drop what other processes have erased: now, and again whenever a request that uses it has
        ended, since it may have waited until now, and put the keys back when it ran.
        """
        vanished = self.store.take_vanished()
        self._late |= {use for use in self._uses if not vanished.isdisjoint(use.ids)}
        ended = {use for use in self._late if use.over.is_set()}
        self._late -= ended
        self._stale = self._stale or bool(vanished or ended)
        if self._stale:
            # Not in `_alone`, where it would wait for what runs: a Session that is busy drops the rest by itself, when
            # the requests that run now have ended.
            self._stale = False  # an erasure may say so again meanwhile
            try:
                await asyncio.to_thread(scrub, self.engine.sessions)
            except BaseException:
                self._stale = True
                raise

    async def _scrubbed(self, end: float) -> str | None:
        """Once the running batches have ended, make the Sessions drop what is no longer kept. Returns where something
        is left.

        Raises:
            DeadlineError: `end` came before that.
        """
        return await self._by(end, self._alone, self.engine.exclusive, scrub, end)

    async def _let_go(self, id: str, traces: Callable[[], Sequence[Trace]], end: float) -> tuple[int, str | None]:
        """End every request that uses a concept that can no longer be found, wait for them to end, and release its
        memory. Returns how many requests there were, and where something is left, in words, or None.

        `traces` is called when those requests have ended: one that was reading the file may have added its own. Without
        any, Sessions hold nothing of the concept, and drop nothing. If the deadline passes first, they drop it later.
        """
        using = [use for use in self._uses if id in use.ids]
        for use in using:
            use.error = ErasedError(f"the concept {id} was erased while this request used it.")
            if use.job is not None:
                self.engine.cancel(use.job, use.error)
        place = None
        try:
            for use in using:
                await until(use.over, end)
            if traces():
                place = await self._scrubbed(end)
        except DeadlineError:
            place = STILL_RUNS
            self._stale = True
        for trace in traces():
            place = place or await self._still_in_memory(trace)
        return len(using), place

    @staticmethod
    async def _still_in_memory(trace: Trace) -> str | None:
        """Return where keys of an erased concept still are, in words, or None. Looks several times, since answers that
        are being sent may hold them for a moment.
        """
        for _ in range(ERASE_ATTEMPTS):
            alive = await asyncio.to_thread(trace.alive)
            if not alive:
                return None
            await asyncio.sleep(ERASE_PAUSE)
        return f"memory ({alive} arrays)"

    @asynccontextmanager
    async def _making_alone(self, id: str, end: float = math.inf) -> AsyncIterator[None]:
        """While the block runs, nobody else in this service makes or erases the concept with this id.

        Raises:
            DeadlineError: `end` came before that.
        """
        while id in self._making:
            await until(self._making[id], end)
        over = self._making[id] = asyncio.Event()
        try:
            yield
        finally:
            del self._making[id]
            over.set()

    @contextmanager
    def _using(self, ids: Sequence[str]) -> Iterator[_Use]:
        use = _Use(ids)
        self._uses.add(use)
        try:
            yield use
        finally:
            self._uses.discard(use)
            use.over.set()

    @contextmanager
    def _holding(self, pixels: int) -> Iterator[None]:
        if self._held_pixels and self._held_pixels + pixels > self.settings.held_pixels:
            raise QueueFullError(
                f"the images of the requests that wait have {self._held_pixels:,} pixels, and this one's {pixels:,}; "
                f"{self.settings.held_pixels:,} are held at most. Try again later.",
                retry_after=self.engine.retry_after(),
            )
        self._held_pixels += pixels
        try:
            yield
        finally:
            self._held_pixels -= pixels

    async def _in(self, pool: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any) -> T:
        if self._closed:
            raise DrainingError("the service has ended.", retry_after=1.0)
        context = contextvars.copy_context()  # so that warnings raised there are collected here
        return await asyncio.get_running_loop().run_in_executor(pool, context.run, call, *arguments)


async def until(event: asyncio.Event, end: float) -> None:
    """Wait for an event.

    Raises:
        DeadlineError: `end`, in time.monotonic()'s seconds, came first.
    """
    try:
        await asyncio.wait_for(event.wait(), _left(end))
    except asyncio.TimeoutError:
        raise deadline_passed() from None


def _left(end: float) -> float | None:
    """Return the seconds left until `end`, or None for no limit."""
    return None if end == math.inf else max(0.0, end - time.monotonic())


async def _in_own_thread(name: str, work: Callable[[], T]) -> T:
    """Return the result of `work`, run in a new thread. If no thread can be started, for lack of memory, run it in this
    one, which holds up everything else: otherwise a service that is told to end never would.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        done = asyncio.get_running_loop().run_in_executor(pool, work)
    except RuntimeError:
        return work()
    finally:
        pool.shutdown(wait=False)
    return await done


async def _to_its_end(task: asyncio.Future[T]) -> T:
    """Wait for something that cannot be stopped, such as a thread that writes, even if this call is cancelled: the next
    caller would otherwise find it still running.
    """
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


def _give_back(room: asyncio.Future[Callable[[], object]]) -> None:
    """Give back the room that was reserved in a store, if it was reserved."""
    if not room.cancelled() and room.exception() is None:
        room.result()()


def _relay(listener: Listener | None) -> Callable[[Progress], object] | None:
    """Wrap a listener so that, called from another thread, it runs in this event loop."""
    if listener is None:
        return None
    loop = asyncio.get_running_loop()
    heard = listener

    def relay(progress: Progress) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(heard, progress)

    return relay


def _warnings_for_answer(warned: Sequence[MagicFaceWarning]) -> list[Warned]:
    """Return the warnings for the answer. The log gets only their kinds, since the rest quotes the request."""
    if warned:
        logger.warning("a request was warned of: %s", ", ".join(sorted({one.kind for one in warned})))
    return Warned.all_of(warned)


def _put(stored: StoredConcept, warned: Sequence[MagicFaceWarning]) -> ConceptPut:
    return ConceptPut(**ConceptInfo.of(stored).model_dump(), warnings=_warnings_for_answer(warned))


def _warn_of_word(concept: KeptConcept, word: str | None) -> None:
    """Warn if a concept that was already kept has another word than the upload: the first one's word stays."""
    if word in (None, concept.word):
        return
    found = "without a word" if concept.word == NO_WORD else f"with the word {shown(concept.word)}"
    with at("word"):
        warn(
            "word-kept",
            f"it was put {found} before, and that stays; this upload has the word {shown(word)}. Say the word in each "
            "request that uses it.",
        )


def _outcome(done: Done, warnings: Sequence[Warned]) -> Outcome:
    result: Result = done.result
    return Outcome(
        pngs=[encode_png(image) for image in result.images],
        regions=result.regions,
        names=result.concept_names,
        timings={**result.timings.to_dict(), "queued": done.queued},
        batch=done.batch,
        settings=result.to_dict(),
        regions_per_step=result.regions_per_step,
        warnings=warnings,
    )
