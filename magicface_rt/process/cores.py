"""The processors available to this process, and how concurrent computations share them."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["MOST_THREADS", "cores", "processors", "threads_of_each"]

MOST_THREADS = 1024
"""The most threads of a computation: more than machines have cores, few enough for a runtime to accept and start."""

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""The file with a container's CPU quota, under version 2 of Linux's control groups: the processor time per period, and
the length of the period, both in microseconds."""


def processors() -> int:
    """The number of processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(quota: Path = QUOTA) -> int:
    """The number of processors this process may use, limited by a container's quota (rounded up)."""
    found = processors()
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return found if most == "max" else max(1, min(found, math.ceil(int(most) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # there is no such file here
        return found


def threads_of_each(threads: int, at_once: int) -> int:
    """Return the number of threads for each of `at_once` concurrent computations: `threads`, or, if that is 0, its
    share of the cores. A computation that is alone keeps its 0, which leaves the choice to the runtime.

    For the effect, see benchmarks/README.md, "A service under load".
    """
    return threads if threads or at_once == 1 else max(1, cores() // at_once)
