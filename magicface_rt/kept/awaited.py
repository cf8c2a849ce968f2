"""A result that one thread makes while others wait for it, such that no interrupt leaves them waiting for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

WAIT_SECONDS = 0.2


class Awaited:
    """A result that is awaited. `over`: it is there, or it is known that it will not be.

    Its maker sets `over` in a `finally` and then calls `wake`, in this order. Setting an attribute calls nothing, so
    Ctrl-C cannot come in between; a call may be interrupted before it does anything, and then those who wait see `over`
    a moment later.
    """

    def __init__(self) -> None:
        self.over = False
        self._woken = threading.Event()

    def wake(self) -> None:
        """Wake the waiting threads."""
        self._woken.set()

    def wait(self, waiting: Callable[[], object]) -> None:
        """Wait until it is over. `waiting` is called from time to time, and may raise."""
        while not self.over and not self._woken.wait(WAIT_SECONDS):
            waiting()
