"""Processors, and how those that compute at the same time share them."""

from __future__ import annotations

import os

__all__ = ["cores", "threads_of_each"]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(threads: int, at_once: int) -> int:
    """Threads of each of so many computations at the same time: `threads`, or their share of the cores where that is 0.
    One that is alone keeps its 0, the runtime's own choice.

    Several that each take all cores get in each other's way: benchmarks/README.md, "The service under load".
    """
    return threads if threads or at_once == 1 else max(1, cores() // at_once)
