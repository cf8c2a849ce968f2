"""The signals that end and update a service, recorded until they are looked at. Nothing here imports Ray."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Signals"]

logger = logging.getLogger("magicface_rt.serve")


class Signals:
    """Counts SIGINT and SIGTERM as `stops` and SIGHUP as `updates`, for a loop that looks at them and calls `wait`.

    A handler may interrupt any code, including code that it would call itself, so it takes no lock and prints nothing.
    """

    def __init__(self, report: Callable[[str], object] = logger.info) -> None:
        self.stops = 0
        self.updates = 0
        self._report = report
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()  # its `put` is reentrant

    @contextlib.contextmanager
    def caught(self) -> Iterator[Signals]:
        """Handle the signals for the block; only in the main thread."""
        before = {
            number: signal.signal(number, self._noted) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Wait for a signal, but at most `seconds`, and report those that have arrived."""
        with contextlib.suppress(queue.Empty):
            self._tell(self._news.get(timeout=seconds))
            while True:
                self._tell(self._news.get_nowait())

    def _tell(self, text: str) -> None:
        if text:
            self._report(text)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        name, text = signal.Signals(number).name, ""
        if number == signal.SIGHUP:
            self.updates += 1
        elif self.stops:
            self.stops += 1
            text = f"{name} again: ending now"
        else:
            self.stops = 1
            text = f"{name}: ending when the requests that are being done have their answers"
        self._news.put(text)
