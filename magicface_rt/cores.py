"""Processors, and how those that compute at the same time share them."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["MOST_THREADS", "cores", "processors", "threads_of_each"]

MOST_THREADS = 1024
"""Of one computation. More than any machine has cores for, and fewer than a runtime refuses, or cannot start."""

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of a container, where Linux has version 2 of control groups: microseconds of processors in so many of the clock."""


def processors() -> int:
    """Those on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(quota: Path = QUOTA) -> int:
    """Those that this process may use, a container's quota counted in whole ones."""
    found = processors()
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return found if most == "max" else max(1, min(found, math.ceil(int(most) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no such thing here
        return found


def threads_of_each(threads: int, at_once: int) -> int:
    """Threads of each of so many computations at the same time: `threads`, or their share of the cores where that is 0.
    One that is alone keeps its 0, the runtime's own choice.

    What comes of it: benchmarks/README.md, "A service under load".
    """
    return threads if threads or at_once == 1 else max(1, cores() // at_once)
