"""The progress of a request: reports to the caller, its early end, and the seconds spent in its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from .errors import Cancelled
from .request import Progress, ProgressCallback, check_progress, declined


class RequestProgress:
    """Reports the progress of a request and times its stages.

    `check_open` raises if the Session has been closed meanwhile. `latest`: the progress that was reported last; at
    first, that none of `steps` is done. `seconds`: by stage, as in `Timings`.
    """

    def __init__(self, progress: ProgressCallback | None, check_open: Callable[[], None], steps: int) -> None:
        """Raises OptionError if `progress` cannot serve as a callback."""
        check_progress(progress)
        self.progress = progress
        self.check_open = check_open
        self.latest = Progress(0, steps, "prepare", 0, 1)
        self.seconds: dict[str, float] = {}

    def report(self, progress: Progress) -> None:
        """Report progress to the caller's callback.

        Raises:
            Cancelled: the callback returned False.
            SessionClosedError: the Session was closed.
        """
        self.latest = progress
        self.check_open()
        if self.progress is not None and declined(self.progress(progress)):
            what = "step" if progress.stage != "prepare" else "prepared step"
            raise Cancelled(f"cancelled by the progress callback after {what} {progress.step} of {progress.steps}.")

    def report_again(self) -> None:
        """Report the latest progress once more while the request waits, so that waiting can be cancelled.

        Raises what `report` raises.
        """
        self.report(self.latest)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to a stage."""
        start = perf_counter()
        yield
        self.spent(stage, perf_counter() - start)

    def spent(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
