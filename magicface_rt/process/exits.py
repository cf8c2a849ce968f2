"""End running computations before the process exits.

A runtime that still computes in a daemon thread while Python shuts down would end the process by SIGABRT, and anything
not yet written to files would be lost.
"""

from __future__ import annotations

import atexit
import time
import weakref
from typing import Protocol

EXIT_SECONDS = 30.0
"""How long the exit of the process waits for steps that are being computed."""


class Stoppable(Protocol):
    """An object that computes, perhaps in a daemon thread."""

    def request_stop(self) -> None:
        """Begin nothing more, and end running computations at their next step."""

    def wait_stopped(self, seconds: float) -> bool:
        """Wait at most `seconds` for running computations to end; return whether none is left."""


_opened: weakref.WeakSet[Stoppable] = weakref.WeakSet()


def end_at_exit(opened: Stoppable) -> None:
    """Register an object, for as long as it lives: what it computes is ended, and waited for, before Python exits."""
    _opened.add(opened)


@atexit.register
def _end() -> None:
    opened, end = list(_opened), time.monotonic() + EXIT_SECONDS
    for one in opened:
        one.request_stop()
    for one in opened:
        one.wait_stopped(max(0.0, end - time.monotonic()))
