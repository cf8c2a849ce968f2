"""The signals that end and update a service, noted until somebody looks. No Ray here."""

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
    """SIGINT, SIGTERM and SIGHUP as counts, for a loop that looks at them and calls `wait`.

    A handler runs in the middle of anything, also of what it would call itself: it takes no lock and prints nothing.
    """

    def __init__(self, told: Callable[[str], object] = logger.info) -> None:
        self.stops = 0
        self.updates = 0
        self._told = told
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()  # whose `put` may interrupt itself

    @contextlib.contextmanager
    def caught(self) -> Iterator[Signals]:
        """For the block, in the main thread."""
        before = {
            number: signal.signal(number, self._noted) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Until one comes, or so long; tells of those that have come."""
        with contextlib.suppress(queue.Empty):
            self._tell(self._news.get(timeout=seconds))
            while True:
                self._tell(self._news.get_nowait())

    def _tell(self, text: str) -> None:
        if text:
            self._told(text)

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
