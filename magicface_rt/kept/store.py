"""Prepared references in memory, the least recently used forgotten first. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

from .reference import KeptReference

WAIT_SECONDS = 0.2


class KeptStore:
    """`limit`: bytes that it may hold; 0 holds nothing, but two requests for one reference still compute it once.

    What is forgotten while a request uses it lives until that request ends.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, KeptReference] = OrderedDict()
        self._making: dict[str, _Making] = {}

    @property
    def nbytes(self) -> int:
        """What it holds now."""
        with self._lock:
            return self._held()

    @property
    def keys(self) -> tuple[str, ...]:
        """What it holds, the least recently used first."""
        with self._lock:
            return tuple(self._entries)

    def find(self, key: str) -> KeptReference | None:
        """The reference of that content key, if it is there."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def get_or_make(
        self, key: str, make: Callable[[], KeptReference], waiting: Callable[[], object] = lambda: None
    ) -> KeptReference:
        """The reference of that content key; `make` computes it where it is not there.

        Whoever comes while another thread makes it waits for that, and calls `waiting` from time to time, which may
        raise. Should the other fail, one of those who waited makes it; each gets the errors of its own attempt only.
        """
        while True:
            with self._lock:
                found = self._entries.get(key)
                if found is not None:
                    self._entries.move_to_end(key)
                    return found
                making = self._making.get(key)
                mine = making is None
                if making is None:
                    making = self._making[key] = _Making()
            if not mine:
                while not making.done.wait(WAIT_SECONDS):
                    waiting()
                if making.made is not None:
                    return making.made
                continue
            try:
                made = make()
                self._add(key, made)
                making.made = made
                return made
            finally:
                with self._lock:
                    del self._making[key]
                making.done.set()

    def forget(self, keys: Collection[str] | None = None) -> None:
        """Drop what has these content keys; None: everything."""
        with self._lock:
            for key in tuple(self._entries) if keys is None else keys:
                self._entries.pop(key, None)

    def _add(self, key: str, made: KeptReference) -> None:
        with self._lock:
            if made.nbytes > self.limit:
                return
            while self._held() + made.nbytes > self.limit:
                self._entries.popitem(last=False)
            self._entries[key] = made

    def _held(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())


class _Making:
    """A computation that others wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.made: KeptReference | None = None
