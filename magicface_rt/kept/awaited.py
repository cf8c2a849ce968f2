"""A result that one thread makes while others wait for it, such that no interrupt leaves them waiting for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

WAIT_SECONDS = 0.2
"""How often, in seconds, a thread that waits is asked whether it still wants to."""


class Awaited:
    """A result that is awaited. `finished`: it is there, or it is known that it will not be.

    Its maker sets `finished` in a `finally` and then calls `wake` (rule R1 of `interrupts`). If `wake` is interrupted,
    waiters see `finished` after at most WAIT_SECONDS.
    """

    def __init__(self) -> None:
        self.finished = False
        self._woken = threading.Event()

    def wake(self) -> None:
        """Wake the waiting threads."""
        self._woken.set()

    def wait(self, waiting: Callable[[], object]) -> None:
        """Wait until it is finished. `waiting` is called from time to time, and may raise."""
        while not self.finished and not self._woken.wait(WAIT_SECONDS):
            waiting()
