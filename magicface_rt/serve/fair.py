"""A queue on the server in which owners take turns, and each owner's jobs keep their order. Not thread-safe."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["FairQueue"]


class Owned(Protocol):
    """What the queue requires of a job."""

    @property
    def owner(self) -> Hashable: ...


J = TypeVar("J", bound=Owned)


class FairQueue(Generic[J]):
    """A queue in which an owner with many jobs does not delay one with few: an owner goes to the back of the line when
    a job is taken in its turn.
    """

    def __init__(self) -> None:
        self._jobs: OrderedDict[Hashable, deque[J]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[J]:
        """Iterate over the jobs owner by owner, in the order of the owners' next turns."""
        for jobs in self._jobs.values():
            yield from jobs

    def put(self, job: J) -> None:
        """Add a job behind its owner's other jobs."""
        self._jobs.setdefault(job.owner, deque()).append(job)
        self._length += 1

    def take(self, fits: Callable[[J], bool] = lambda job: True) -> J | None:
        """Remove and return the next job that fits, or None if none does.

        The first jobs of all owners are tried before later ones, in the order of turns. If none of them fits, a later
        job may overtake its owner's first one. That owner then keeps its place: if it went to the back, its first job
        might never have its turn while others fit better.
        """
        for owner, jobs in self._jobs.items():
            if fits(jobs[0]):
                found = jobs[0]
                self._drop(owner, found)
                if owner in self._jobs:
                    self._jobs.move_to_end(owner)
                return found
        for owner, jobs in self._jobs.items():
            later = next((job for job in jobs if fits(job)), None)
            if later is not None:
                self._drop(owner, later)
                return later
        return None

    def remove(self, job: J) -> bool:
        """Remove a job; return whether it was there."""
        jobs = self._jobs.get(job.owner)
        if jobs is None or job not in jobs:
            return False
        self._drop(job.owner, job)
        return True

    def _drop(self, owner: Hashable, job: J) -> None:
        self._jobs[owner].remove(job)
        self._length -= 1
        if not self._jobs[owner]:
            del self._jobs[owner]
