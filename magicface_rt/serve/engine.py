"""Sessions at work on the server: a bounded queue, fair order, dynamic batches, deadlines, and an orderly end.

Knows nothing of HTTP. There is one thread for each execution context, that is, for each worker of each Session.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..errors import BackendError, Cancelled, MagicFaceError, OptionError
from ..process.host_memory import shortage
from ..request import Progress, Request
from ..session import Session
from .fair import FairQueue
from .job import EngineJob
from .refusals import cut_off, deadline_passed, draining, queue_full
from .settings import ServeSettings

__all__ = ["Engine", "EngineObserver"]

logger = logging.getLogger("magicface_rt.serve")

T = TypeVar("T")

WARMING = "the warm-up failed"


class EngineObserver:
    """Is notified of the work as it is done; this base class does nothing. Called in the engine's threads.

    What a method raises is logged and does not affect the jobs.
    """

    def batch(self, jobs: Sequence[EngineJob], seconds: float) -> None:
        """Called when jobs have been made together, before anyone receives them."""


class Engine:
    """Makes pictures and prepares concepts, on one or more Sessions of one bundle.

        engine = Engine([session], ServeSettings(queue=8))
        engine.start()
        job = engine.submit(EngineJob(Request("a man", options=Options(steps=20)), owner="me"))
        job.future.result().result.images[0].save("out.png")
        engine.drain(60)
        engine.close()

    sessions  each must have been opened with at least `workers` workers; the caller closes them
    workers   threads for each Session
    warm      what each thread does first, such as loading graphs; None for nothing

    Raises OptionError for no Session, Sessions of different bundles, or no worker.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        settings: ServeSettings | None = None,
        *,
        workers: int = 1,
        warm: Callable[[Session], object] | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        sessions = tuple(sessions)
        if not sessions or len({session.bundle.hash for session in sessions}) > 1:
            raise OptionError("an Engine needs one or more Sessions, all of one bundle.")
        if workers < 1:
            raise OptionError(f"workers is {workers}, expected a whole number from 1.")
        self.sessions = sessions
        self.bundle = sessions[0].bundle
        self.settings = settings or ServeSettings()
        self._warm = warm
        self._observer = observer or EngineObserver()
        self._queue: FairQueue[EngineJob] = FairQueue()
        self._changed = threading.Condition()
        self._running: set[EngineJob] = set()
        self._busy = 0
        self._cold = len(sessions) * workers
        self._warming = 0  # apart from `_busy`, since draining need not wait for a warm-up
        self._failure: BaseException | None = None
        self._draining = self._closed = False
        self._paused = 0
        self._exclusive = threading.Lock()
        self._seconds_per_job = 1.0
        self._threads = [
            threading.Thread(target=self._serve, args=(session,), name=f"magicface-engine-{n}-{k}", daemon=True)
            for n, session in enumerate(sessions)
            for k in range(workers)
        ]

    # ------------------------------------------------------------------------------------------------- what it is doing

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """The number of jobs that are being done."""
        return len(self._running)

    @property
    def draining(self) -> bool:
        """Whether the engine takes no more work."""
        return self._draining

    @property
    def warm(self) -> bool:
        """Whether every thread has done its warm-up."""
        return self._cold == 0

    @property
    def failure(self) -> BaseException | None:
        """Why no work can be done any more: the warm-up failed, or a thread ended unexpectedly. None otherwise."""
        return self._failure

    def retry_after(self) -> float:
        """Return the seconds until a place in the queue is likely free, estimated from how long recent jobs took."""
        return min(600.0, max(1.0, math.ceil(len(self._queue) * self._seconds_per_job / len(self._threads))))

    # ---------------------------------------------------------------------------------------------------- what one does

    def start(self) -> None:
        """Start the threads; each warms up and then takes work. If one cannot start, that becomes the `failure`."""
        try:
            for thread in self._threads:
                thread.start()
        except Exception as error:  # such as too little memory for its stack
            self._fail(WARMING, error)

    def submit(self, job: EngineJob) -> EngineJob:
        """Queue a job and return it.

        Raises:
            QueueFullError: the queue is full.
            DrainingError: no more work is taken.
        """
        with self._changed:
            if self._draining or self._failure is not None:
                raise draining()
            if len(self._queue) >= self.settings.queue:
                raise queue_full(len(self._queue), self.retry_after())
            job.enqueued = time.monotonic()
            self._queue.put(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: EngineJob, error: MagicFaceError) -> None:
        """End a job with this error: at once if it waits, at its next step if it runs."""
        job.cancel(error)
        with self._changed:
            if self._queue.remove(job):
                job.forget()
            self._changed.notify_all()

    def exclusive(self, action: Callable[[Sequence[Session]], T], end: float = math.inf) -> T:
        """Run `action` while no job and no warm-up runs; jobs in the queue go on waiting, also for threads that are
        free, and threads that have not warmed up wait as well. Blocks until what runs has ended.

        Raises:
            DrainingError: the engine was closed before that.
            DeadlineError: `end`, in time.monotonic()'s seconds, came before that. Waiting jobs begin again.
        """
        with self._exclusive:
            with self._changed:
                self._paused += 1
                self._changed.notify_all()
            try:
                with self._changed:
                    left = None if end == math.inf else max(0.0, end - time.monotonic())
                    self._changed.wait_for(lambda: self._closed or not (self._busy or self._warming), left)
                    if self._busy or self._warming:  # waiting on would hold up the end of the process, or others
                        raise cut_off() if self._closed else deadline_passed()
                return action(self.sessions)
            finally:
                with self._changed:
                    self._paused -= 1
                    self._changed.notify_all()

    def drain(self, seconds: float) -> int:
        """Take no more work, and wait up to `seconds` for the jobs there are. Returns how many were then cut off."""
        end = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue and not self._busy, max(0.0, end - time.monotonic()))
            left = [job for job in (*self._queue, *self._running) if not job.done]
        for job in left:
            self.cancel(job, cut_off())
        return len(left)

    def close(self, seconds: float = 30.0) -> bool:
        """End the threads. Returns whether all ended within `seconds`; one that is computing ends at its next step."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # ------------------------------------------------------------------------------------------------------ the threads

    def _serve(self, session: Session) -> None:
        doing = WARMING
        try:
            if not self._warm_up(session):
                return
            doing = "a thread that computes has ended"
            while self._do_next(session):
                pass
        except BaseException as error:
            self._fail(doing, error)

    def _warm_up(self, session: Session) -> bool:
        """Do what a thread does first, once nothing runs exclusively; return False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._paused)
            if self._closed:
                return False
            self._warming += 1
        warmed = False
        try:
            if self._warm is not None:
                self._warm(session)
            warmed = True
        finally:
            with self._changed:
                self._warming -= 1
                self._cold -= warmed
                self._changed.notify_all()
        return True

    def _fail(self, doing: str, error: BaseException) -> None:
        """Record that no work can be done any more, and end every job so that nobody waits in vain."""
        unexpected = error if not isinstance(error, MagicFaceError) else None
        logger.error("%s: %s", doing, error, exc_info=unexpected if shortage(error) is None else None)
        if unexpected is not None:
            error = BackendError(f"{doing}: {type(unexpected).__name__}: {unexpected}.")
            error.__cause__ = unexpected
        with self._changed:
            self._failure = error
        self.drain(0)

    def _do_next(self, session: Session) -> bool:
        """Do the next batch; return False when the engine is closed. Nothing of the batch is held afterwards."""
        batch = self._next()
        if batch is None:
            return False
        start = time.monotonic()
        try:
            self._run(session, batch)
        except BaseException:
            for job in batch:
                job.fail(cut_off())
            raise
        finally:
            seconds = time.monotonic() - start
            for job in batch:
                job.forget()
            with self._changed:
                self._seconds_per_job += 0.2 * (seconds / len(batch) - self._seconds_per_job)
                self._running.difference_update(batch)
                self._busy -= 1
                self._changed.notify_all()
        return True

    def _next(self) -> list[EngineJob] | None:
        """Wait for the next job, and return it with those that may be made together with it; None when the engine is
        closed.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or (self._queue and not self._paused))
                if self._closed:
                    return None
                first = self._queue.take()
                assert first is not None
                self._busy += 1
                self._running.add(first)
                try:
                    return [first, *self._companions(first)]
                except BaseException:
                    self._busy -= 1
                    raise

    def _companions(self, first: EngineJob) -> list[EngineJob]:
        """Take waiting requests with the same number of steps, as many as fit, for as long as the first may wait."""
        found: list[EngineJob] = []
        images = first.images
        bare = first.bare
        most = min(self.settings.batch, self.bundle.limits.images)
        until = first.enqueued + self.settings.batch_wait

        def fits(job: EngineJob) -> bool:
            return (
                job.is_request
                and not job.alone
                and job.steps == first.steps
                and images + job.images <= most
                and bare + job.bare <= self.bundle.limits.references
            )

        while first.is_request and not first.alone and images < most and not first.done:
            job = self._queue.take(fits)
            if job is not None:
                self._running.add(job)
                found.append(job)
                images += job.images
                bare += job.bare
                continue
            left = until - time.monotonic()
            if left <= 0 or self._paused or self._draining:
                break
            self._changed.wait(left)
        return found

    def _run(self, session: Session, batch: Sequence[EngineJob]) -> None:
        jobs = [job for job in batch if job.begin()]
        if not jobs:
            return

        def progress(progress: Progress) -> bool:
            for job in jobs:
                job.check_deadline()
                job.report(progress)
            return not all(job.done for job in jobs)

        start, failed = time.monotonic(), False
        try:
            if isinstance(jobs[0].work, Request):
                requests = [job.work for job in jobs if isinstance(job.work, Request)]
                results = list(session.generate_batch(requests, progress=progress))
            else:
                results = [jobs[0].work(session, progress)]
        except Cancelled as error:
            for job in jobs:
                job.fail(error)
        except BaseException as error:
            if len(jobs) == 1:
                if not isinstance(error, MagicFaceError):
                    logger.exception("a job failed")
                _clear_frames(error)
                jobs[0].fail(error if isinstance(error, Exception) else _ending(error))
                return
            failed = True
        else:
            self._observe(jobs, time.monotonic() - start)
            for job, result in zip(jobs, results, strict=True):
                job.succeed(result, sum(one.images for one in jobs))
        if failed:
            # One of the jobs is at fault, or what they need together: run each alone, for an outcome of its own. Only
            # once the error is gone: it holds the frames of the failed attempt, and they hold its keys and latents.
            for job in jobs:
                self._run(session, [job])

    def _observe(self, jobs: Sequence[EngineJob], seconds: float) -> None:
        try:
            self._observer.batch(jobs, seconds)
        except BaseException:
            logger.exception("the observer failed")


def _clear_frames(error: BaseException) -> None:
    """Drop what the frames of an attempt hold, keys and latents: whoever asks for the outcome may keep the error."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            chain += [one.__cause__, one.__context__]


def _ending(error: BaseException) -> MagicFaceError:
    """Wrap an error that would end a thread, such as SystemExit, so that it does not end whoever asks for the job's
    outcome.
    """
    ours = MagicFaceError(f"the job raised {type(error).__name__}, which ends threads: {error}.")
    ours.__cause__ = error
    return ours
