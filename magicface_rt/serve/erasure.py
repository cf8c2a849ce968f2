"""Server side of an erasure: finds what is still held of an erased concept, and gets rid of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import DeadlineError, QueueFullError
from ..kept import KeptConcept
from ..session import Session

__all__ = ["STILL_RUNS", "Erasures", "Trace", "not_begun", "scrub"]

STILL_RUNS = "what still ran when the deadline passed"
"""A place, in words, where something of an erased concept may be."""


class Erasures:
    """Counts the erasures in progress. They are apart from the queue, which may be full of requests that they end."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one more erasure while the block runs.

        Raises:
            QueueFullError: as many erasures as allowed are in progress.
        """
        if self._count >= self._most:
            raise QueueFullError(
                f"{self._count} erasures are waited for, which is the limit. Try again later.", retry_after=1.0
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


def not_begun(id: str) -> DeadlineError:
    """Make the error for a deadline that passed before anything was erased."""
    return DeadlineError(f"concept {id}: whoever makes or erases it had not ended by the deadline. Erase it again.")


class Trace:
    """Watches the memory of a concept's keys without holding it; of several, where its file was replaced."""

    def __init__(self, *concepts: KeptConcept) -> None:
        owners = [
            _owner(array)
            for concept in concepts
            for reference in concept.references
            for stored in reference.tensors.values()
            for array in stored.arrays.values()
        ]
        self._arrays = [weakref.ref(owner) for owner in {id(owner): owner for owner in owners}.values()]

    def alive(self) -> int:
        """Return how many of the concept's arrays, or of the memory maps of its file, are still in memory."""
        if any(ref() is not None for ref in self._arrays):
            gc.collect()  # an error that was raised may hold frames that hold the concept
        return sum(ref() is not None for ref in self._arrays)


def scrub(sessions: Sequence[Session]) -> str | None:
    """Make Sessions drop their references. Returns where something may be left, in words, or None.

    While requests of a Session run, what they hold is left, and is dropped when they have ended. What a Session keeps
    by itself is dropped entirely, because it may hold the same photographs prepared in other ways, under other keys. It
    comes back from the store of concepts, or is prepared again.
    """
    gone = [session.forget() for session in sessions]
    return None if all(gone) else "a Session that makes pictures for others than this service"


def _owner(array: np.ndarray[Any, Any]) -> Any:
    """Return the array whose memory a view looks into; for a mapped file, the map."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
