"""Prepared references in memory, the least recently used forgotten first. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection

from .awaited import Awaited
from .reference import KeptReference


class KeptStore:
    """Holds up to `limit` bytes; with 0 it holds nothing, but two requests for one reference still compute it once.

    What is forgotten while a request uses it lives until that request ends.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.RLock()  # re-entrant: a Session may be closed in between, in the same thread
        self._entries: OrderedDict[str, KeptReference] = OrderedDict()
        self._making: dict[str, _Making] = {}

    @property
    def nbytes(self) -> int:
        """The bytes that are held now."""
        with self._lock:
            return self._nbytes()

    @property
    def content_keys(self) -> tuple[str, ...]:
        """The content keys of what is held, the least recently used first."""
        with self._lock:
            return tuple(self._entries)

    def find(self, key: str) -> KeptReference | None:
        """Return the reference with that content key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def get_or_make(
        self, key: str, make: Callable[[], KeptReference], waiting: Callable[[], object] = lambda: None
    ) -> KeptReference:
        """Return the reference with that content key; `make` computes it if it is not there.

        If another thread is making it, wait for that, and call `waiting` from time to time, which may raise. If that
        thread fails, one of those that waited makes it; each gets the errors of its own attempt only.
        """
        while True:
            mine = _Making()
            try:  # before `mine` is registered (rule R2 of `interrupts`)
                with self._lock:
                    found = self._entries.get(key)
                    if found is not None:
                        self._entries.move_to_end(key)
                        return found
                    self._drop_finished()
                    making = self._making.setdefault(key, mine)
                if making is mine:
                    made = make()
                    self._add(key, made)
                    mine.made = made
                    return made
                making.wait(waiting)
                if making.made is not None:
                    return making.made
            finally:
                mine.finished = True  # before any call (rule R1)
                mine.wake()
                with self._lock:
                    self._drop_finished()

    def forget(self, keys: Collection[str] | None = None) -> None:
        """Drop the references with these content keys; None: all."""
        with self._lock:
            self._drop_finished()
            for key in tuple(self._entries) if keys is None else keys:
                self._entries.pop(key, None)

    def _add(self, key: str, made: KeptReference) -> None:
        with self._lock:
            if made.nbytes > self.limit:
                return
            while self._nbytes() + made.nbytes > self.limit:
                self._entries.popitem(last=False)
            self._entries[key] = made

    def _drop_finished(self) -> None:
        """Remove finished computations, also those whose maker was interrupted before it removed them."""
        for key, making in tuple(self._making.items()):
            if making.finished:
                self._making.pop(key, None)

    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in list(self._entries.values()))


class _Making(Awaited):
    """A computation that others wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.made: KeptReference | None = None
