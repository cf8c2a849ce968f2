"""Who the replicas are, and erasing a concept in all of them.

Ray Serve sends a request to one replica; an erasure has to reach every one, also those that are starting, or that are
told to end and still finish requests. So each replica registers before it can hold anything, and from then on asks the
roster again and again what is being erased. That is a state and not an event: what was missed is seen the next time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ...errors import OutputError, ServiceError, UnknownConceptError
from ..concepts import FolderConcepts
from ..schemas import BundleInfo
from .messages import Part, Verdict, View

__all__ = ["Roster"]

logger = logging.getLogger("magicface_rt.serve")

WATCH_SECONDS = 5.0
"""How long a watcher is kept waiting where nothing changes."""

PING_SECONDS = 1.0
"""How often replicas are looked at: while an answer is missing; otherwise ten times as rarely."""

SETTLING_SECONDS = 5.0
"""How long a new roster waits for replicas that it does not know. One that takes the place of a lost roster knows none
until they have noticed, which takes them half a second where nothing holds them up."""


@dataclass
class _Member:
    handle: Any
    info: BundleInfo | None = None


@dataclass
class _Condemned:
    waiting: set[str]
    parts: dict[str, Part] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Roster:
    """One for each application, in an actor of its own. All methods run in one event loop.

    gone  says of a replica's handle whether that replica is dead for certain. One that only does not answer is not:
          its memory may still hold what is to be erased
    """

    def __init__(self, gone: Callable[[Any], Awaitable[bool]]) -> None:
        self._gone = gone
        self._members: dict[str, _Member] = {}
        self._condemned: dict[str, _Condemned] = {}
        self._version = 1
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._front = 0.0
        self._looked = 0.0
        self._settled = time.monotonic() + SETTLING_SECONDS

    # ------------------------------------------------------------------------------------------------------- replicas

    async def register(self, name: str, handle: Any) -> None:
        """A replica begins. From now on no erasure is done without it."""
        self._members[name] = _Member(handle)
        for one in self._condemned.values():
            one.waiting.add(name)
        self._touch()

    async def ready(self, name: str, info: BundleInfo) -> None:
        """A replica is warm."""
        if name in self._members:
            self._members[name].info = info
            self._failure = None
            self._touch()

    async def leave(self, name: str) -> None:
        """A replica ends, and holds nothing any more."""
        self._drop(name)

    async def failed(self, error: Exception) -> None:
        """A replica could not start, and why."""
        self._failure = error

    async def failure(self) -> Exception | None:
        """Why the replica that failed last could not start; None where none did."""
        return self._failure

    async def watch(self, name: str | None, seen: int) -> View:
        """What is known, as soon as it is newer than `seen`, or after a while. name: None for whoever is no replica."""
        end = time.monotonic() + WATCH_SECONDS
        while self._version == seen and (left := end - time.monotonic()) > 0:
            changed = self._changed
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), left)
        if name is None and time.monotonic() - self._looked > 10 * PING_SECONDS:
            await self._drop_the_dead(set(self._members))
        return View(
            version=self._version,
            known=name is None or name in self._members,
            condemned=frozenset(self._condemned),
            ready={name: member.info for name, member in self._members.items() if member.info is not None},
            front=self._front,
        )

    async def front(self, began: float) -> None:
        """A front is there, since that time; one that began earlier is about to end."""
        if began > self._front:
            self._front = began
            self._touch()

    async def replicas(self) -> list[str]:
        """Names of those that are registered, warm or not."""
        return list(self._members)

    # --------------------------------------------------------------------------------------------------------- erasing

    async def erase(self, id: str, folder: str, seconds: float) -> Verdict:
        """Erase a concept: its file in the shared folder, and in every replica. Returns when all that live have done
        their part, or after so many seconds.

        The file goes first, so that nobody finds it; and once more in the end, because a replica that was preparing
        the concept may have written it meanwhile. A roster that has just been made gives replicas of an earlier one
        the time to register.
        """
        end = time.monotonic() + seconds
        while id in self._condemned:
            try:
                await asyncio.wait_for(self._condemned[id].over.wait(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                return Verdict(begun=False)
        one = self._condemned[id] = _Condemned(set(self._members))
        self._touch()
        try:
            files, _ = await asyncio.to_thread(_remove, folder, id)
            while (one.waiting or time.monotonic() < self._settled) and time.monotonic() < end:
                changed = self._changed
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), PING_SECONDS)
                    continue
                await self._drop_the_dead(set(one.waiting))
            late, left = await asyncio.to_thread(_remove, folder, id)
            return Verdict(files + late, dict(one.parts), tuple(sorted(one.waiting)), left)
        finally:
            del self._condemned[id]
            one.over.set()
            self._touch()

    async def done(self, name: str, id: str, part: Part) -> None:
        """A replica has done its part."""
        one = self._condemned.get(id)
        if one is not None and name in one.waiting:
            one.parts[name] = part
            one.waiting.discard(name)
            self._touch()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _touch(self) -> None:
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _drop(self, name: str) -> None:
        if self._members.pop(name, None) is not None:
            for one in self._condemned.values():
                one.waiting.discard(name)
            self._touch()

    async def _drop_the_dead(self, names: set[str]) -> None:
        self._looked = time.monotonic()
        found = [(name, self._members[name].handle) for name in names if name in self._members]
        for (name, _), gone in zip(found, await asyncio.gather(*(self._gone(h) for _, h in found)), strict=True):
            if gone:
                logger.warning("replica %s has ended without a word", name)
                self._drop(name)


def _remove(folder: str, id: str) -> tuple[int, str | None]:
    """How many files went, and where one is left, in words."""
    files = 0
    try:
        store = FolderConcepts(folder)
        with contextlib.suppress(UnknownConceptError):
            files = store.erase(id)
        return files, store.left(id)
    except (ServiceError, OutputError) as error:
        return files, str(error)
