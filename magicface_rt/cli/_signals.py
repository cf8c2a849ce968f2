"""Ctrl-C and SIGTERM end a verb wherever they come, so that nothing half written stays."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["came", "heard", "raise_lost"]

AGAIN_SECONDS = 0.05
"""After which what was lost comes again: as that may not be before the hook that saw it has returned."""

_came = False


def came() -> bool:
    """Whether Ctrl-C or SIGTERM has come since the verb began, whatever became of what that raised.

    A library in C++ may take it for an argument that does not fit, and tell only that.
    """
    return _came


def raise_lost() -> None:
    """To be called where a verb goes on: it does not after a signal, unless something has swallowed that."""
    if _came:
        raise KeyboardInterrupt


@contextmanager
def heard() -> Iterator[None]:
    """SIGTERM ends a verb as Ctrl-C does, and neither is lost where Python cannot raise what the handler raises.

    Afterwards the caller's handlers are there again.

    In finalizers, callbacks of weak references and those of the garbage collector it goes on, and tells only
    `sys.unraisablehook`. From there the signal is given again; and nothing else is told after one has come.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set, and none is called
        yield
        return
    global _came
    _came = False
    earlier = signal.getsignal(signal.SIGTERM)
    if earlier is not signal.SIG_IGN:  # as whoever started this wants it
        signal.signal(signal.SIGTERM, _interrupt)
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored, or the caller's
    if default:
        signal.signal(signal.SIGINT, _interrupt)
    before, timers = sys.unraisablehook, []

    def told(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            with suppress(RuntimeError):  # no thread can be started
                timers.append(threading.Timer(AGAIN_SECONDS, _give_again, [threading.get_ident()]))
                timers[-1].daemon = True
                timers[-1].start()
                return
        if not _came:  # else what was interrupted as it was made cannot be finalized well
            before(lost)

    sys.unraisablehook = told
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:  # what has ended is not interrupted any more
            timer.cancel()
        _came = False
        if earlier is not None and earlier is not signal.SIG_IGN:  # None: set by something that is not Python
            signal.signal(signal.SIGTERM, earlier)
        if default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _give_again(thread: int) -> None:
    """To the main thread, which it also wakes where it waits for something, but on Windows."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, signal.SIGTERM)
    else:
        _thread.interrupt_main(signal.SIGTERM)


def _interrupt(number: int, frame: object) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt
