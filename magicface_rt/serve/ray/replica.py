"""One replica's service: a Session and its engine in this process, over the shared folder. Nothing here imports Ray."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ...errors import Cancelled, DeadlineError, MagicFaceError
from ...session import Session
from ..engine import Engine, EngineObserver
from ..erasure import STILL_RUNS
from ..job import EngineJob
from ..local import LocalService, ServiceObserver, until
from ..problems import refusal
from ..service import Listener
from .messages import Ended, ReplicaErasure, Tally
from .shared import SharedConcepts

__all__ = ["Counts", "ErasureParts", "ReplicaService", "said"]

logger = logging.getLogger("magicface_rt.serve")


class Counts(EngineObserver, ServiceObserver):
    """Counts what was done since `take` was last called. Notified by the engine's threads and by the event loop."""

    def __init__(self, replica: str, session: Session) -> None:
        self._replica, self._session = replica, session
        self._lock = threading.Lock()
        self._clear()

    def batch(self, jobs: Sequence[EngineJob], seconds: float) -> None:
        pictures = sum(job.images for job in jobs)
        if pictures:
            with self._lock:
                self._batches.append(pictures)

    def looked_up(self, hit: bool) -> None:
        with self._lock:
            self._hits += hit
            self._misses += not hit

    def prepared(self) -> None:
        with self._lock:
            self._prepared += 1

    def take(self) -> Tally:
        """Return the counts, and start again from zero."""
        with self._lock:
            tally = Tally(
                self._replica,
                tuple(self._batches),
                self._prepared,
                self._hits,
                self._misses,
                self._session.kept_bytes,
                self._session.device_kept_bytes,
            )
            self._clear()
        return tally

    def _clear(self) -> None:
        self._batches: list[int] = []
        self._prepared = self._hits = self._misses = 0


class ReplicaService(LocalService):
    """A `LocalService` that does its part of the erasures that the roster orders."""

    def __init__(self, engine: Engine, store: SharedConcepts, *, observer: ServiceObserver | None = None) -> None:
        super().__init__(engine, store, observer=observer)
        self._shared = store
        self._erasing_changed = asyncio.Event()

    def set_erasing(self, ids: Iterable[str]) -> None:
        """Set the ids that are being erased from now on; all others are not."""
        self._shared.set_erasing(frozenset(ids))
        changed, self._erasing_changed = self._erasing_changed, asyncio.Event()
        changed.set()

    async def erase_here(self, id: str) -> ReplicaErasure:
        """End the requests that use a concept that is being erased, and release it. Files are not looked at.

        Waits for a preparation of the concept that is in progress here, for as long as a request may take.
        """
        end = time.monotonic() + self.settings.deadline
        try:
            async with super()._making_alone(id, end):
                self._shared.unmap(id)
                stopped, place = await self._let_go(id, lambda: self._shared.traces(id), end)
                held = bool(self._shared.traces(id))
                if place is None:
                    self._shared.forget(id)
                return ReplicaErasure(held, stopped, place)
        except DeadlineError:
            return ReplicaErasure(True, 0, STILL_RUNS)

    @asynccontextmanager
    async def _making_alone(self, id: str, end: float = math.inf) -> AsyncIterator[None]:
        """Do what every service does; but first wait, if the concept is being erased, until that is over everywhere."""
        while True:
            if id in self._shared.erasing:
                await until(self._erasing_changed, end)
            elif id in self._making:
                await until(self._making[id], end)
            else:
                break
        async with super()._making_alone(id, end):
            yield


class ErasureParts:
    """A replica's parts of erasures: each is done once, and said until the roster has heard it.

    do   does the part of one, given the concept's id
    say  tells the roster, given the id, the key of the erasure, and what was done
    """

    def __init__(
        self,
        do: Callable[[str], Coroutine[Any, Any, ReplicaErasure]],
        say: Callable[[str, str, ReplicaErasure], Coroutine[Any, Any, None]],
    ) -> None:
        self._do, self._say = do, say
        self._done: dict[str, asyncio.Task[ReplicaErasure]] = {}
        self._said: dict[str, asyncio.Task[None]] = {}

    def begin(self, parts: Mapping[str, str]) -> None:
        """Do the parts that the roster waits for, keys by id. Returns at once."""
        waited_for = set(parts.values())
        self._done = {key: task for key, task in self._done.items() if key in waited_for or not task.done()}
        self._said = {key: task for key, task in self._said.items() if not task.done()}
        for id, key in parts.items():
            if key not in self._said:
                self._said[key] = asyncio.ensure_future(self._do_and_say(id, key))

    async def _do_and_say(self, id: str, key: str) -> None:
        if key not in self._done:
            self._done[key] = asyncio.ensure_future(self._do(id))
        await self._say(id, key, await self._done[key])


async def said(start: Callable[[Listener], Coroutine[Any, Any, Any]], counts: Counts) -> AsyncGenerator[Any, None]:
    """Yield what a call reports, as it arrives, and finally `Ended`. Closing the generator early cancels the call."""
    news: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.ensure_future(start(news.put_nowait))
    over = object()
    task.add_done_callback(lambda _: news.put_nowait(over))
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
    try:
        while (one := await news.get()) is not over:
            yield one
        yield _ended(task, counts)
    finally:
        task.cancel()


def _ended(task: asyncio.Future[Any], counts: Counts) -> Ended:
    if task.cancelled():
        return Ended(error=Cancelled("the client has gone."), tally=counts.take())
    error = task.exception()
    if error is None:
        return Ended(task.result(), tally=counts.take())
    if isinstance(error, MagicFaceError):
        return Ended(error=error, tally=counts.take())
    if isinstance(error, MemoryError):
        return Ended(error=MemoryError(), tally=counts.take())
    logger.error("a request failed", exc_info=error)
    unexpected = refusal(500, "internal", f"An unexpected {type(error).__name__}; the service's log says more.")
    return Ended(error=unexpected, tally=counts.take())
