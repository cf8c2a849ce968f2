"""Knows the replicas, and erases a concept in all of them.

Ray Serve sends a request to one replica, but an erasure has to reach every one, including those that are starting, or
that were told to end and still finish requests. So each replica registers before it can hold anything, and from then on
keeps asking the roster what is being erased. The answer is a state and not an event: what a replica missed, it sees the
next time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ...errors import OutputError, ServiceError, UnknownConceptError
from ..concepts import FolderConcepts
from ..schemas import BundleInfo
from .messages import ErasureReport, ReplicaErasure, View

__all__ = ["Roster"]

logger = logging.getLogger("magicface_rt.serve")

WATCH_SECONDS = 5.0
"""The longest that a watcher is kept waiting if nothing changes."""

PING_SECONDS = 1.0
"""How often replicas are checked while an answer is missing; otherwise they are checked a tenth as often."""

SETTLING_SECONDS = 5.0
"""How long a new roster waits for replicas that it does not know. A roster that replaces a lost one knows none until
they have noticed, which takes half a second if nothing delays them.
"""


@dataclass
class _Member:
    handle: Any
    info: BundleInfo | None = None


@dataclass
class _Erasure:
    """An erasure that goes on. `key`: none other has it, of the same id or of another roster."""

    waiting: set[str]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    parts: dict[str, ReplicaErasure] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Roster:
    """The roster of one application, in an actor of its own. All methods run in one event loop.

    gone  returns, for a replica's handle, whether that replica is dead for certain. One that merely does not answer is
          not: its memory may still hold what is to be erased
    """

    def __init__(self, gone: Callable[[Any], Awaitable[bool]]) -> None:
        self._gone = gone
        self._members: dict[str, _Member] = {}
        self._erasures: dict[str, _Erasure] = {}
        self._version = 1
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._front = 0.0
        self._looked = 0.0
        self._settled = time.monotonic() + SETTLING_SECONDS

    # ------------------------------------------------------------------------------------------------------- replicas

    async def register(self, name: str, handle: Any) -> None:
        """Add a replica that is starting. From now on no erasure ends without it."""
        self._members[name] = _Member(handle)
        for one in self._erasures.values():
            one.waiting.add(name)
        self._touch()

    async def ready(self, name: str, info: BundleInfo) -> None:
        """Note that a replica is warm."""
        if name in self._members:
            self._members[name].info = info
            self._failure = None
            self._touch()

    async def leave(self, name: str) -> None:
        """Remove a replica that ends and holds nothing any more."""
        self._drop(name)

    async def failed(self, error: Exception) -> None:
        """Note why a replica could not start."""
        self._failure = error

    async def failure(self) -> Exception | None:
        """Return why the last replica that failed could not start; None if none failed, or one became ready since."""
        return self._failure

    async def watch(self, name: str | None, seen: int) -> View:
        """Return what is known, as soon as it is newer than `seen`, or after a while. name: of the replica that asks;
        None for any other caller.
        """
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
            erasing=frozenset(self._erasures),
            parts={id: one.key for id, one in self._erasures.items() if name in one.waiting},
            ready={name: member.info for name, member in self._members.items() if member.info is not None},
            front=self._front,
        )

    async def front(self, began: float) -> None:
        """Note that a front began at this time; fronts that began earlier are about to end."""
        if began > self._front:
            self._front = began
            self._touch()

    async def replicas(self) -> list[str]:
        """Return the names of the registered replicas, warm or not."""
        return list(self._members)

    # --------------------------------------------------------------------------------------------------------- erasing

    async def erase(self, id: str, folder: str, seconds: float) -> ErasureReport:
        """Erase a concept: its file in the shared folder, and what every replica holds. Returns when all living
        replicas have done their part, or after `seconds`.

        The file is removed first, so that nobody finds it, and once more at the end, because a replica that was
        preparing the concept may have written it meanwhile. A new roster first gives the replicas of an earlier one
        time to register.
        """
        end = time.monotonic() + seconds
        while id in self._erasures:
            try:
                await asyncio.wait_for(self._erasures[id].over.wait(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                return ErasureReport(begun=False)
        one = self._erasures[id] = _Erasure(set(self._members))
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
            return ErasureReport(files + late, dict(one.parts), tuple(sorted(one.waiting)), left)
        finally:
            del self._erasures[id]
            one.over.set()
            self._touch()

    async def done(self, name: str, id: str, key: str, part: ReplicaErasure) -> None:
        """Note that a replica has done its part of an erasure. `key`: as the replica was told it."""
        one = self._erasures.get(id)
        if one is not None and one.key == key and name in one.waiting:
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
            for one in self._erasures.values():
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
    """Remove a concept's files. Returns how many were removed, and where one is left, in words, or None."""
    files = 0
    try:
        store = FolderConcepts(folder, remove_abandoned=False)
        with contextlib.suppress(UnknownConceptError):
            files = store.erase(id)
        return files, store.left(id)
    except (ServiceError, OutputError) as error:
        return files, str(error)
