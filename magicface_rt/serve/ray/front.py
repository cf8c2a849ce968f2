"""The front's `Service`, behind its HTTP application: passes requests on to the replicas, and keeps nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from ...errors import Cancelled, DrainingError, EraseError, MagicFaceError, SessionClosedError
from ..concepts import StoredConcept, unknown
from ..erasure import Erasures, not_begun
from ..orders import check_named
from ..problems import refusal
from ..refusals import cut_off, deadline_passed, remaining_seconds
from ..schemas import BundleInfo, ConceptInfo, ConceptPut, Erasure, PictureOrder
from ..service import Accepted, ConceptUpload, Listener, Outcome, Service
from ..settings import ServeSettings
from .counting import FrontMetrics
from .messages import Ended, View
from .places import Places
from .shared import SharedConcepts

__all__ = ["RayService"]

logger = logging.getLogger("magicface_rt.serve")

T = TypeVar("T")

ATTEMPTS = 3
"""How often a request is given to a replica, if replicas are lost while they make it."""

LAST_WORDS = 1.0
"""Seconds that the last answer has to reach its client, once a front that is replaced has no requests left."""

ERASE_SPARE = 30.0
"""Seconds, beyond a request's limit, that an erasure has, since it waits for running batches."""


@dataclass(eq=False)
class _Call:
    """A request in progress.

    error    why this front ended it
    stopped  whether this front ended it
    begun    whether a replica is making it
    waited   seconds until it was given to a replica
    """

    method: str
    subject: Any = field(repr=False)
    owner: str
    model: str
    listener: Listener | None
    seconds: float
    error: MagicFaceError | None = None
    stopped: bool = False
    begun: bool = False
    accepted: bool = False
    waited: float = 0.0
    task: asyncio.Task[Any] | None = None

    def report_accepted(self, waiting: int) -> None:
        """Report that the request has a place in the queue; only the first call reports it."""
        if self.listener is not None and not self.accepted:
            self.listener(Accepted(waiting))
        self.accepted = True

    def stop(self, error: MagicFaceError | None = None) -> None:
        self.error, self.stopped = self.error or error, True
        if self.task is not None:
            self.task.cancel()


class _LostError(Exception):
    """The replica that was making a request has ended."""


class RayService(Service):
    """Sends each request to a replica that already has its concept, if one has room; otherwise to any replica that has
    room.

    pictures  the handle of the replicas' deployment
    roster    the way to the roster, a `RosterLink`
    settings  those of the replicas
    workers   batches that one replica makes at the same time
    store     the shared folder

    at_replaced  called when another front has taken this one's place and no request is left here, to release
                 connections that would otherwise stay open, and that Ray would wait for

    All calls come from one event loop.
    """

    def __init__(
        self,
        pictures: Any,
        roster: Any,
        *,
        settings: ServeSettings,
        workers: int,
        store: SharedConcepts,
        metrics: FrontMetrics,
    ) -> None:
        self.settings = settings
        self._pictures = pictures
        self._roster = roster
        self._store = store
        self._metrics = metrics
        at_once = workers * settings.batch
        self._places = Places(settings.queue, at_once=at_once, ahead=at_once)
        self._calls: set[_Call] = set()
        self._erasures = Erasures(settings.queue)
        self._view = View(0, True)
        self._idle = asyncio.Event()
        self._idle.set()
        self._files = ThreadPoolExecutor(2, thread_name_prefix="magicface-files")
        self._watching: asyncio.Task[None] | None = None
        self._began = time.time()
        self._replaced: asyncio.Task[None] | None = None
        self.at_replaced: Callable[[], object] = lambda: None
        metrics.watch_front(
            store,
            waiting=lambda: sum(not call.begun for call in list(self._calls)),  # a copy: called in another thread
            running=lambda: sum(call.begun for call in list(self._calls)),
            replicas=lambda: self._view.ready,
        )

    # ------------------------------------------------------------------------------------------------ beginning, ending

    async def start(self) -> None:
        self._watching = asyncio.ensure_future(self._watch())

    def not_ready(self) -> str | None:
        if self._places.closed:
            return "the service is ending."
        return None if self._view.ready else "no replica is warm yet."

    async def drain(self, seconds: float) -> int:
        self._places.closed = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), max(0.001, seconds))
        left = list(self._calls)
        for call in left:
            call.stop(cut_off())
        return len(left)

    async def close(self) -> None:
        await self.drain(0)
        for task in (self._watching, self._replaced):
            if task is not None:
                task.cancel()
        self._files.shutdown(wait=False, cancel_futures=True)

    # --------------------------------------------------------------------------------------------------------- requests

    async def generate(self, order: PictureOrder, *, owner: str, listener: Listener | None = None) -> Outcome:
        check_named(order)
        seconds = remaining_seconds(order.deadline, self.settings.deadline)
        model = await self._first_kept(order)
        call = _Call("generate", order, owner, model, listener, seconds)
        outcome: Outcome = await self._do(call)
        outcome = replace(outcome, timings={**outcome.timings, "queued": outcome.timings["queued"] + call.waited})
        self._metrics.made(outcome)
        return outcome

    async def put_concept(self, upload: ConceptUpload, *, owner: str) -> tuple[ConceptPut, bool]:
        found: tuple[ConceptPut, bool] = await self._do(
            _Call("put_concept", upload, owner, "", None, self.settings.deadline)
        )
        return found

    async def bundle(self) -> BundleInfo:
        if not self._view.ready:
            starting = refusal(503, "not-ready", "no replica is warm yet.")
            starting.retry_after = 1.0
            raise starting
        newest = list(self._view.ready.values())[-1]
        limits = newest.limits.model_copy(update={"queue": self.settings.queue})
        return newest.model_copy(update={"limits": limits})

    # --------------------------------------------------------------------------------------------------------- concepts

    async def concepts(self) -> list[ConceptInfo]:
        def found() -> list[ConceptInfo]:
            return [ConceptInfo.of(stored) for stored in self._store.entries()]

        return await self._in_thread(found)

    async def concept(self, id: str) -> ConceptInfo:
        def found() -> ConceptInfo:
            stored: StoredConcept = self._store.peek(id)
            return ConceptInfo.of(stored)

        return await self._in_thread(found)

    async def erase(self, id: str) -> Erasure:
        if not self._store.is_id(id):
            raise unknown(id)
        try:
            with self._erasures.one():
                report = await self._roster.actor.erase.remote(
                    id, str(self._store.folder), self.settings.deadline + ERASE_SPARE
                )
        except RayError as error:
            logger.error("the roster was lost: %s", type(error).__name__)
            self._roster.lost()
            raise EraseError(f"concept {id}: not every replica could be told. Erase it again.") from error
        if not report.begun:
            raise not_begun(id)
        left = [f"{part.place} of replica {name}" for name, part in report.parts.items() if part.place is not None]
        left += [f"replica {name}, which does not answer" for name in report.silent]
        left += [report.left] if report.left is not None else []
        if left:
            raise EraseError(f"concept {id}: something of it is left in {', '.join(left)}. Erase it again, or restart.")
        if not report.files and not any(part.found for part in report.parts.values()):
            raise unknown(id)
        return Erasure(id=id, files=report.files, stopped=sum(part.stopped for part in report.parts.values()))

    # ----------------------------------------------------------------------------------------------------------- inside

    async def _first_kept(self, order: PictureOrder) -> str:
        """Return the id by which the request is routed: the first of its concepts that is kept, or "". For a concept
        that is not kept, Ray would search for a second or two.
        """
        for use in order.concepts:
            if use.id is not None and await self._in_thread(partial(self._store.has, use.id)):
                return use.id
        return ""

    async def _do(self, call: _Call) -> Any:
        """Return the result of a call, or raise its error. Whatever ends the wait ends the call."""
        call.task = task = asyncio.ensure_future(self._in_turn(call, time.monotonic() + call.seconds))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        self._calls.add(call)
        self._idle.clear()
        try:
            await asyncio.wait({task}, timeout=call.seconds)
            if not task.done():
                raise deadline_passed()
            if call.error is not None:
                raise call.error
            return task.result()
        finally:
            call.stop()
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    async def _in_turn(self, call: _Call, end: float) -> Any:
        start = time.monotonic()
        async with self._places.taken(call.owner, call.report_accepted):
            call.waited = time.monotonic() - start
            for _ in range(ATTEMPTS):
                try:
                    ended = await self._sent(call, end - time.monotonic())
                except _LostError as lost:
                    logger.warning("a replica was lost while it made a request: %s", lost)
                    await asyncio.sleep(0.1)
                    continue
                if ended.tally is not None:
                    self._metrics.add_tally(ended.tally)
                if ended.error is not None:
                    raise ended.error
                return ended.result
        gone = refusal(503, "replica-lost", f"the request was given to {ATTEMPTS} replicas, and each has ended.")
        gone.retry_after = 1.0
        raise gone

    async def _sent(self, call: _Call, seconds: float) -> Ended:
        """Send the request to a replica and return its answer.

        Raises:
            _LostError: the replica ended before it answered.
        """
        handle = self._pictures.options(method_name=call.method, stream=True, multiplexed_model_id=call.model)
        subject = call.subject
        if isinstance(subject, PictureOrder):
            subject = subject.model_copy(update={"deadline": max(0.001, seconds)})
            call.begun = False  # until the replica reports a step
        else:
            call.begun = True  # a preparation reports no steps
        answer = handle.remote(subject, call.owner)
        ended: Ended | None = None
        try:
            async for one in answer:
                if isinstance(one, Ended):
                    ended = one
                elif isinstance(one, Accepted):
                    call.report_accepted(one.waiting)
                else:
                    call.begun = True
                    if call.listener is not None:
                        call.listener(one)
        except asyncio.CancelledError:
            if not call.stopped:  # Ray's way of saying that the replica was stopped
                raise _LostError("it stopped the request") from None
            answer.cancel()
            raise
        except RayTaskError as error:  # the replica lives, but could not read what it was sent, or the like
            logger.error("a replica failed: %s", type(error.cause).__name__)
            raise refusal(500, "internal", "An unexpected error in a replica; the service's log says more.") from None
        except (RayError, RayServeException) as error:
            if ended is None:
                raise _LostError(type(error).__name__) from error
        if ended is None:
            raise _LostError("it stopped answering")
        if isinstance(ended.error, (Cancelled, DrainingError, SessionClosedError)):  # and this front did not end it
            raise _LostError("it is being ended")
        return ended

    async def _watch(self) -> None:
        """Follow the roster: which replicas there are, and whether another front has taken over."""
        while True:
            try:
                self._view = await self._roster.actor.watch.remote(None, self._view.version)
                if self._view.front < self._began:
                    await self._roster.actor.front.remote(self._began)
            except (RayError, RayServeException, ValueError) as error:
                logger.warning("the roster does not answer: %s", type(error).__name__)
                self._roster.lost()
                await asyncio.sleep(0.5)
                continue
            self._places.replicas = len(self._view.ready)
            self._metrics.forget(self._view.ready)
            if self._view.front > self._began and self._replaced is None:
                self._replaced = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        """End a front that is being replaced, once its requests have been answered."""
        while True:
            await self._idle.wait()
            await asyncio.sleep(LAST_WORDS)
            if not self._calls:
                break
        self.at_replaced()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._files, call)
