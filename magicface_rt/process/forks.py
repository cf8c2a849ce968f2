"""Objects that a forked process must not free.

A runtime's threads do not exist in a forked process, yet freeing the runtime's graphs waits for them to end, so the
process would hang at its exit. So whatever the parent had opened stays in the forked process's memory as it is.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Opened(Protocol):
    """An object that holds graphs of a runtime."""

    def native_objects(self) -> object:
        """Return everything that waits for threads when it is freed."""


_opened: weakref.WeakSet[Opened] = weakref.WeakSet()


def leak_in_forks(opened: Opened) -> None:
    """Register an object, for as long as it lives: what it holds when a process is forked is never freed there.

    That is a leak, and meant: a child that freed it would wait for ever, and the memory is the child's until it ends.
    """
    _opened.add(opened)


def _leak_in_child() -> None:
    for opened in list(_opened):
        # One extra reference, which is never released.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened.native_objects()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leak_in_child)
