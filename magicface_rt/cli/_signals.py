"""Makes Ctrl-C and SIGTERM end a verb wherever they arrive, so nothing half written stays."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["came", "handlers_restored", "heard", "raise_lost"]

AGAIN_SECONDS = 0.05
"""Seconds after which a lost signal is sent again. It must not arrive before the hook that noticed the loss has
returned.
"""

_came = False


def came() -> bool:
    """Return whether Ctrl-C or SIGTERM has arrived since the verb began, whatever became of the exception that it
    raised.

    A C++ library may take that exception for an argument that does not fit, and report only that.
    """
    return _came


def raise_lost() -> None:
    """Raise KeyboardInterrupt if a signal has arrived. Call this where a verb goes on: after a signal it only gets
    there if something has swallowed the exception.
    """
    if _came:
        raise KeyboardInterrupt


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Give SIGTERM the handler back that it had before the block: `main` may be called by a program with its own."""
    earlier = signal.getsignal(signal.SIGTERM)  # None for one that was not set from Python
    try:
        yield
    finally:
        main = threading.current_thread() is threading.main_thread()  # elsewhere none was set, and none can be
        if main and earlier is not None and signal.getsignal(signal.SIGTERM) is not earlier:
            signal.signal(signal.SIGTERM, earlier)


@contextmanager
def heard() -> Iterator[None]:
    """Make SIGTERM end a verb as Ctrl-C does, and lose neither where Python cannot raise the handler's exception.

    SIGTERM goes on to raise KeyboardInterrupt afterwards, while the command line reports how the verb ended; see
    `handlers_restored`.

    In finalizers, and in callbacks of weak references and of the garbage collector, Python goes on and only reports the
    exception to `sys.unraisablehook`. The hook set here then sends the signal again. Once a signal has arrived, it
    reports nothing else.
    """
    if threading.current_thread() is not threading.main_thread():  # no handler can be set here, and none is called
        yield
        return
    global _came
    _came = False
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # else whoever started this process wants it ignored
        signal.signal(signal.SIGTERM, _interrupt)
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else ignored, or the caller's
    if default:
        signal.signal(signal.SIGINT, _interrupt)
    before, timers = sys.unraisablehook, []

    def on_unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            with suppress(RuntimeError):  # no thread can be started
                timers.append(threading.Timer(AGAIN_SECONDS, _give_again, [threading.get_ident()]))
                timers[-1].daemon = True
                timers[-1].start()
                return
        if not _came:  # after a signal, objects whose creation was interrupted may fail to finalize
            before(lost)

    sys.unraisablehook = on_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:  # the verb has ended and must not be interrupted any more
            timer.cancel()
        _came = False
        if default:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _give_again(thread: int) -> None:
    """Send a signal to the main thread again. Except on Windows, this also wakes that thread if it is waiting."""
    number = signal.SIGTERM if signal.getsignal(signal.SIGTERM) is _interrupt else signal.SIGINT
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, number)
    else:
        _thread.interrupt_main(number)


def _interrupt(number: int, frame: object) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt
