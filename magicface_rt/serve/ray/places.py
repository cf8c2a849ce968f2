"""The front's queue: how many requests are at the replicas, and which wait for a place. Bounded; owners take turns."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..fair import FairQueue
from ..refusals import draining, queue_full

__all__ = ["Places"]


@dataclass(eq=False)
class _Ticket:
    owner: str
    turn: asyncio.Future[None]


class Places:
    """Lets as many requests through as the replicas have places; the others wait in fair order.

    queue     requests that may wait, beyond those that the replicas make at once
    replicas  how many replicas there are; may change at any time
    at_once   requests that one replica makes at once
    ahead     further requests that are already at a replica and wait there, to be made together with others

    All calls come from one event loop.
    """

    def __init__(self, queue: int, *, at_once: int, ahead: int) -> None:
        self._limit, self._at_once, self._ahead = queue, at_once, ahead
        self._replicas = 0
        self._taken = 0
        self._queue: FairQueue[_Ticket] = FairQueue()
        self._seconds = 1.0
        self.closed = False

    @property
    def admitted(self) -> int:
        """The number of requests that wait or are at a replica."""
        return self._taken + len(self._queue)

    @property
    def replicas(self) -> int:
        return self._replicas

    @replicas.setter
    def replicas(self, count: int) -> None:
        self._replicas = count
        self._let_in()

    def retry_after(self) -> float:
        """Return the seconds until a place is likely free, estimated from how long recent requests took."""
        width = max(1, self._replicas * self._at_once)
        return min(600.0, max(1.0, math.ceil(self.admitted * self._seconds / width)))

    @asynccontextmanager
    async def taken(self, owner: str, waits: Callable[[int], object]) -> AsyncIterator[None]:
        """Hold a place for the block, after waiting for one. waits: called with the number of requests ahead, if it has
        to wait.

        Raises:
            QueueFullError: the queue is full.
            DrainingError: no more work is taken.
        """
        if self.closed:
            raise draining()
        if self.admitted >= self._limit + self._replicas * self._at_once:
            raise queue_full(max(0, self.admitted - self._replicas * self._at_once), self.retry_after())
        if self._taken < self._most and not self._queue:
            self._taken += 1
        else:
            await self._wait(owner, waits)
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            yield
        finally:
            self._seconds += 0.2 * ((loop.time() - start) - self._seconds)
            self._taken -= 1
            self._let_in()

    @property
    def _most(self) -> int:
        return self._replicas * (self._at_once + self._ahead)

    async def _wait(self, owner: str, waits: Callable[[int], object]) -> None:
        ticket = _Ticket(owner, asyncio.get_running_loop().create_future())
        waits(self.admitted)
        self._queue.put(ticket)
        try:
            await ticket.turn
        except asyncio.CancelledError:
            if not self._queue.remove(ticket):  # its turn had come at the same moment
                self._taken -= 1
                self._let_in()
            raise

    def _let_in(self) -> None:
        while self._taken < self._most and (ticket := self._queue.take()) is not None:
            self._taken += 1
            if not ticket.turn.cancelled():  # else `_wait` is about to give the place back
                ticket.turn.set_result(None)
