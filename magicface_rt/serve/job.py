"""One piece of work on its way through the server's engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..concept import Concept
from ..errors import MagicFaceError
from ..request import Progress, ProgressCallback, Request
from ..results import Result
from ..session import Session
from .refusals import deadline_passed

__all__ = ["Done", "EngineJob", "Task"]

Task = Callable[[Session, ProgressCallback], Any]
"""Work other than a request for pictures, such as preparing a concept. Gets the Session, and a callback for its
progress.
"""


@dataclass(frozen=True, eq=False)
class Done:
    """The outcome of a job that succeeded.

    result  a `Result`, or what the task returned
    queued  seconds that the job waited before it began
    batch   pictures in its batch
    """

    result: Any
    queued: float
    batch: int


class EngineJob:
    """A request for pictures, or a `Task`. `future` resolves to a `Done`, or raises.

    owner     who the job belongs to; owners take turns
    deadline  in time.monotonic()'s seconds, None for none
    alone     never in a batch with other requests
    bare      the number of its references that are images: they go through the network together with those of its batch
    progress  called in the engine's thread after each step; must not raise

    A job may be cancelled from any thread. Its future then fails at once, and the work stops at its next step; if
    others are being made in the same batch, it goes on for them.
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
        """What is to be done. Not available after `forget`."""
        assert self._work is not None
        return self._work

    @property
    def is_request(self) -> bool:
        return self.images > 0

    @property
    def done(self) -> bool:
        """Whether the job's future has an outcome."""
        return self.future.done()

    def begin(self) -> bool:
        """Note that the work starts now. Returns False if it should not start because the job has already ended."""
        self.begun = time.monotonic()
        self.check_deadline()
        return not self.done

    def report(self, progress: Progress) -> None:
        """Report a finished step to the job's `progress`."""
        if self._progress is not None and not self.done:
            self._progress(progress)

    def check_deadline(self) -> None:
        """End the job if its deadline has passed."""
        if self.deadline is not None and not self.done and time.monotonic() >= self.deadline:
            self.cancel(deadline_passed())

    def cancel(self, error: MagicFaceError) -> None:
        """End the job with this error; does nothing if it has ended."""
        self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Set an error as the outcome, unless there is one already."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def succeed(self, result: Result | Any, batch: int) -> None:
        """Set a result as the outcome, unless there is one already."""
        with suppress(InvalidStateError):
            self.future.set_result(Done(result, self.begun - self.enqueued, batch))

    def forget(self) -> None:
        """Release the work, which holds images and keys."""
        self._work = None
        self._progress = None
