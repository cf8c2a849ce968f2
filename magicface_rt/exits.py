"""What ends before the process does.

A runtime that computes in a daemon thread as Python ends would end the process by SIGABRT, and what is not yet written
to files would be lost.
"""

from __future__ import annotations

import atexit
import time
import weakref
from typing import Protocol

EXIT_SECONDS = 30.0
"""How long the end of the process waits for steps that are being computed."""


class Ending(Protocol):
    """What computes, perhaps in a daemon thread."""

    def end_soon(self) -> None:
        """Begins nothing any more, and ends what it computes at its next step."""

    def ended(self, seconds: float) -> bool:
        """Whether it computes nothing any more, after so many seconds at most."""


_opened: weakref.WeakSet[Ending] = weakref.WeakSet()


def end_at_exit(opened: Ending) -> None:
    """For as long as it lives: what it computes ends, and is waited for, before Python ends."""
    _opened.add(opened)


@atexit.register
def _end() -> None:
    opened, end = list(_opened), time.monotonic() + EXIT_SECONDS
    for one in opened:
        one.end_soon()
    for one in opened:
        one.ended(max(0.0, end - time.monotonic()))
