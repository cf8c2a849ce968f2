"""What a Session still holds of an erased concept, and getting rid of it."""

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
"""Where something of an erased concept may be, in words."""


class Erasures:
    """Counts those that are going on. They are apart from the queue, which may be full of what is to be ended."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """One more, for the block.

        Raises:
            QueueFullError: as many are going on as may.
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
    """To raise where the deadline passed before anything was erased."""
    return DeadlineError(f"concept {id}: whoever makes or erases it had not ended by the deadline. Erase it again.")


class Trace:
    """Watches the memory of a concept's keys without holding it."""

    def __init__(self, concept: KeptConcept) -> None:
        owners = [
            _owner(array)
            for reference in concept.references
            for stored in reference.tensors.values()
            for array in stored.arrays.values()
        ]
        self._arrays = [weakref.ref(owner) for owner in {id(owner): owner for owner in owners}.values()]

    def alive(self) -> int:
        """How many of its arrays, or of the maps of its file, are still in memory."""
        if any(ref() is not None for ref in self._arrays):
            gc.collect()  # an error that was raised may hold frames, and these the concept
        return sum(ref() is not None for ref in self._arrays)


def scrub(sessions: Sequence[Session]) -> str | None:
    """Have Sessions let go of references while no job of theirs runs. Returns where something may be left, in words.

    What a Session keeps by itself is dropped as a whole, because it may hold the same photographs prepared in other
    ways, under other keys; it comes back from the store of concepts, or is prepared again.
    """
    gone = [session.forget() for session in sessions]
    return None if all(gone) else "a Session that makes pictures for others than this service"


def _owner(array: np.ndarray[Any, Any]) -> Any:
    """The array whose memory a view looks into; of a mapped file, the map."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
