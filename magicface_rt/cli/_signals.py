"""Ctrl-C and SIGTERM end a verb wherever they come, so that nothing half written stays."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["heard"]

AGAIN_SECONDS = 0.05
"""After which what was lost comes again: as that may not be before the hook that saw it has returned."""


@contextmanager
def heard() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does, and neither is lost where Python cannot raise what their handlers raise.

    In finalizers, callbacks of weak references and those of the garbage collector it goes on, and tells only
    `sys.unraisablehook`. From there the signal is given again.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set, and none is called
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    before = sys.unraisablehook

    def told(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            with suppress(RuntimeError):  # no thread can be started
                again = threading.Timer(AGAIN_SECONDS, _thread.interrupt_main, [signal.SIGTERM])
                again.daemon = True
                again.start()
                return
        before(lost)

    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = before


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
