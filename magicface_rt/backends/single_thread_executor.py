"""Makes all calls of a backend in one thread of its own, for a runtime that requires that."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, ParamSpec, Protocol, TypeVar

from ..errors import OtherProcessError

P = ParamSpec("P")
Result = TypeVar("Result")


class Invoker(Protocol):
    """Calls a function, here and now or in a thread of its own, and returns its result or raises its exception."""

    def __call__(self, function: Callable[P, Result], /, *args: P.args, **kwargs: P.kwargs) -> Result: ...


def call_directly(function: Callable[P, Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
    """Call a function in the caller's thread."""
    return function(*args, **kwargs)


class SingleThreadExecutor:
    """Makes calls from any threads one after the other in a single one, which starts with the first of them.

    It ends with `close`, with this object, or with the program. A call from within a call is made at once. In a process
    that was forked there is no such thread: a call raises `OtherProcessError`, and `close` does nothing.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()

    def __call__(self, function: Callable[P, Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        if os.getpid() != self._process:  # before any lock is taken, which may be held for ever
            raise OtherProcessError(
                f"{self._name} computes in a thread of process {self._process}, and process {os.getpid()} was forked "
                "from that. Open a backend and a Session in each process."
            )
        if threading.current_thread() is self._thread:
            return function(*args, **kwargs)
        call = _Call(lambda: function(*args, **kwargs))
        try:
            self._put(call)
            call.done.wait()
        except BaseException:
            # After Ctrl-C the call goes on in its thread, so nothing that it uses may be freed before it ends.
            # `abandon` waits for that, or withdraws a call that has not begun.
            call.abandon()
            raise
        try:
            return call.result()  # type: ignore[no-any-return]
        finally:
            # The traceback of an exception keeps this frame alive; without `del` it would keep the call's arguments
            # too.
            del call

    def _put(self, call: _Call) -> None:
        with self._lock:
            if self._thread is None:
                self._calls = SimpleQueue()
                self._thread = threading.Thread(target=_work, args=(self._calls,), name=self._name, daemon=True)
                weakref.finalize(self, self._calls.put, None)
            if self._thread.ident is None:
                self._thread.start()
            self._calls.put(call)

    def close(self) -> None:
        """End the thread, after the calls that were made. May be called twice; another call starts another thread."""
        if os.getpid() != self._process:
            return
        with self._lock:
            thread, self._thread = self._thread, None
            self._calls.put(None)
        if thread is not None and thread.ident is not None:
            thread.join()


class _Call:
    def __init__(self, function: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self._function: Callable[[], Any] | None = function
        self._lock = threading.Lock()
        self._begun = False
        self._abandoned = False
        self._value: Any = None
        self._error: BaseException | None = None

    def make(self) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._begun = True
        assert self._function
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self._function = None
            self.done.set()

    def abandon(self) -> None:
        """Wait for the call to end if it has begun; otherwise it is not made any more."""
        with self._lock:
            self._abandoned = True
            begun = self._begun
        if begun:
            self.done.wait()

    def result(self) -> Any:
        error, self._error = self._error, None
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del error


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.make()
        del call  # or what it used would be held until the next one comes
