"""One piece of work on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..concept import Concept
from ..errors import DeadlineError, MagicFaceError
from ..request import Progress, ProgressCallback, Request
from ..results import Result
from ..session import Session

__all__ = ["Done", "Job", "Task", "deadline_passed"]

Task = Callable[[Session, ProgressCallback], Any]
"""Work that is no request for pictures, such as preparing a concept; gets the Session and a callback to report to."""


@dataclass(frozen=True, eq=False)
class Done:
    """result: a `Result`, or what the task returned; queued: seconds before it began; batch: pictures of its batch."""

    result: Any
    queued: float
    batch: int


class Job:
    """A request for pictures, or a `Task`. `future` gives a `Done`, or raises.

    owner     who takes turns with the other owners
    deadline  of time.monotonic(), None for none
    alone     never in a batch with other requests
    bare      its references that are images: they go through the network together with those of its batch
    progress  called in the engine's thread after each step; must not raise

    It may be cancelled from any thread. Its future fails at once then, and the work stops at its next step, or goes on
    without it where others are made in the same batch.
    """

    def __init__(
        self,
        work: Request | Task,
        *,
        owner: str = "",
        deadline: float | None = None,
        alone: bool = False,
        progress: Callable[[Progress], object] | None = None,
    ) -> None:
        self.owner = owner
        self.deadline = deadline
        self.alone = alone
        self.future: Future[Done] = Future()
        self.enqueued = self.begun = time.monotonic()
        self._work: Request | Task | None = work
        self._progress = progress
        self.steps = work.options.steps if isinstance(work, Request) else 0
        self.images = work.options.images if isinstance(work, Request) else 0
        self.bare = 0
        if isinstance(work, Request):
            self.bare = sum(len(c.references) for c in work.concepts if isinstance(c, Concept) and c.weight != 0)

    @property
    def work(self) -> Request | Task:
        """What is to be done; gone when the job has ended."""
        assert self._work is not None
        return self._work

    @property
    def is_request(self) -> bool:
        return self.images > 0

    @property
    def done(self) -> bool:
        """Whether its future has an outcome."""
        return self.future.done()

    def begin(self) -> bool:
        """Its work starts now, unless it has ended already."""
        self.begun = time.monotonic()
        self.check_deadline()
        return not self.done

    def report(self, progress: Progress) -> None:
        """A step is done."""
        if self._progress is not None and not self.done:
            self._progress(progress)

    def check_deadline(self) -> None:
        """End it where its time is up."""
        if self.deadline is not None and not self.done and time.monotonic() >= self.deadline:
            self.cancel(deadline_passed())

    def cancel(self, error: MagicFaceError) -> None:
        """End it with that error; nothing where it has ended."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """The outcome is an error, unless there is one already."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def succeed(self, result: Result | Any, batch: int) -> None:
        """The outcome is a result, unless there is an outcome already."""
        with suppress(InvalidStateError):
            self.future.set_result(Done(result, self.begun - self.enqueued, batch))

    def forget(self) -> None:
        """Let go of what was to be done: images and keys are in it."""
        self._work = None
        self._progress = None


def deadline_passed() -> DeadlineError:
    """To raise when a request's time is up."""
    return DeadlineError(
        "the deadline passed before the request was done. Allow more time, or ask for fewer steps or pictures."
    )
