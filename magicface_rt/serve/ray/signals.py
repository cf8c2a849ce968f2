"""The signals that end and update a service, noted until somebody looks. No Ray here."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["Signals"]

logger = logging.getLogger("magicface_rt.serve")


class Signals:
    """SIGINT, SIGTERM and SIGHUP as counts, for a loop that looks at them."""

    def __init__(self, told: Callable[[str], object] = logger.info) -> None:
        self.stops = 0
        self.updates = 0
        self._told = told
        self._news = threading.Event()

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
        """Until one comes, or so long."""
        self._news.wait(seconds)
        self._news.clear()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self.updates += 1
        elif self.stops:
            self.stops += 1
            self._told(f"{name} again: ending now")
        else:
            self.stops = 1
            self._told(f"{name}: ending when the requests that are being done have their answers")
        self._news.set()
