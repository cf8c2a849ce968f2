"""What a forked process may not free.

A runtime's threads are not there in a process that was forked, and it waits for their end where its graphs are freed:
the process would hang as it ends. So what its parent had opened stays in a forked process's memory as it is.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Protocol


class Opened(Protocol):
    """What holds graphs of a runtime."""

    def natively_held(self) -> object:
        """All that waits for threads where it is freed."""


_opened: weakref.WeakSet[Opened] = weakref.WeakSet()


def keep_in_forks(opened: Opened) -> None:
    """For as long as it lives: what it holds when a process is forked is never freed there."""
    _opened.add(opened)


def _leave() -> None:
    for opened in list(_opened):
        # One reference more than there are, which nobody gives back.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened.natively_held()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
