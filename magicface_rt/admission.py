"""Who may compute, and when what all share may be freed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .errors import OptionError

T = TypeVar("T")

WAIT_SECONDS = 0.2
"""How often, in seconds, a request that waits for a slot is asked whether it still wants one."""

POLL_SECONDS = 0.01
"""How often, in seconds, `drained` looks whether anyone is left."""


class Admission:
    """Lets requests into as many slots as there are workers, runs single actions on what they share, and frees that
    once it is closed and nobody uses it. Thread-safe.

    workers      how many requests may compute at the same time
    check_open   raises if no request may begin any more; called before any lock is taken, and again under it
    on_finished  called exclusively, after a request, with what was noted for it meanwhile
    on_idle      called exclusively, once or more, when this is closed and nobody uses what requests share

    `close` and `exclusively` may be called in the middle of anything here in the same thread, as signal handlers and
    finalizers do. KeyboardInterrupt may arise where `interrupts` says; whatever it ends leaves its slot.
    """

    def __init__(
        self,
        workers: int,
        check_open: Callable[[], None],
        on_finished: Callable[[RunningRequest], None],
        on_idle: Callable[[], None],
    ) -> None:
        self.closed = False
        self._workers = workers
        self._check_open = check_open
        self._on_finished = on_finished
        self._on_idle = on_idle
        self._lock = threading.RLock()  # re-entrant: see above
        self._in_exclusive = False
        self._thread_state = threading.local()
        self._running: dict[RunningRequest, None] = {}
        self._finished: dict[RunningRequest, None] = {}
        self._users: dict[object, None] = {}
        self._slot_freed = threading.Event()

    @property
    def running(self) -> list[RunningRequest]:
        """The requests that have a slot."""
        return list(self._running)

    @contextmanager
    def slot(self, waiting: Callable[[], object]) -> Iterator[None]:
        """Occupy a slot for the block. While all are taken, `waiting` is called from time to time, and may raise.

        Raises:
            OptionError: this thread has a slot already, for which it would wait for ever.
            whatever `check_open` and `waiting` raise.
        """
        if getattr(self._thread_state, "busy", False):
            raise OptionError("generate was called from within a progress callback of the same Session.")
        self._check_open()
        mine = RunningRequest()
        try:  # before `mine` is registered (rule R2 of `interrupts`)
            self._thread_state.busy = True
            while True:
                with self._lock:
                    self._check_open()
                    if len(self._running) < self._workers:
                        self._running[mine] = None  # the last statement of the guarded block (rule R1)
                        break
                    self._slot_freed.clear()
                self._slot_freed.wait(WAIT_SECONDS)
                waiting()
            yield
        finally:
            self._thread_state.busy = False
            if mine in self._running:
                try:
                    with self._lock:
                        self._finished[mine] = None  # counted off before any call (rule R1)
                        del self._running[mine]
                        self._slot_freed.set()
                        self.exclusively(_do_nothing)
                finally:
                    if mine in self._running:  # it was interrupted while it waited for the lock
                        self._finished[mine] = None
                        del self._running[mine]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep what requests share from being freed for the block, which needs no slot and waits for nobody.

        Raises what `check_open` raises.
        """
        self._check_open()
        mine = object()
        try:  # before `mine` is registered (rule R2 of `interrupts`)
            with self._lock:
                self._check_open()
                self._users[mine] = None  # the last statement of the guarded block (rule R1)
            yield
        finally:
            self._users.pop(mine, None)  # a method of C (rule R3)
            if self.closed:
                self.exclusively(_do_nothing)

    def exclusively(self, action: Callable[[], T]) -> T:
        """Run an action on what all requests share, while no other does and none is admitted; return its result.

        `close` may be called in the middle of it in the same thread: the outermost action then frees everything when it
        ends. Requests that have finished are settled first, also those whose thread was interrupted before it did so.
        """
        with self._lock:
            before, self._in_exclusive = self._in_exclusive, True
            try:
                if not before:
                    self._settle_finished()
                return action()
            finally:
                try:
                    if self.closed and not before and not self._running and not self._users:
                        self._on_idle()
                finally:
                    self._in_exclusive = before

    def close(self) -> None:
        """Admit nobody any more, and free what all share if nobody uses it; otherwise the last one that does frees it.

        May be called twice, from any thread. If Ctrl-C ends the last request while it waits to be counted off, the next
        call frees it.
        """
        self.closed = True
        self.exclusively(_do_nothing)

    def drained(self, seconds: float) -> bool:
        """Wait at most `seconds` until nobody uses what requests share; return whether nobody does."""
        end = time.monotonic() + seconds
        while (self._running or self._users) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if not self._lock.acquire(timeout=max(0.0, end - time.monotonic())):  # a thread frees what they shared
            return False
        self._lock.release()
        return not self._running and not self._users

    def _settle_finished(self) -> None:
        """Report the requests that have finished."""
        for request in list(self._finished):
            self._on_finished(request)
            del self._finished[request]


class RunningRequest:
    """A request that has a slot, and what was forgotten meanwhile, since the request may put it back."""

    def __init__(self) -> None:
        self.forgotten: set[str] = set()
        self.forgotten_all = False

    def note(self, keys: frozenset[str] | None) -> None:
        """Note that these content keys were forgotten; None: all that is kept."""
        if keys is None:
            self.forgotten_all = True
        else:
            self.forgotten |= keys


def _do_nothing() -> None:
    """An action that changes nothing."""
