"""How much memory a process gains a turn, with an interval: from a row of readings, not from two points."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WARM_UP = 0.25
"""Part of a row that is left out: caches fill, pools find their size."""

DRAWS, SEED = 2000, 14
SHARE = 95
"""Percent: of the bootstrap's slopes, those in the middle are the interval."""


@dataclass(frozen=True)
class Slope:
    """Bytes a turn: least squares, and the interval that a moving-block bootstrap of what is left gives."""

    value: float
    low: float
    high: float
    turns: int

    def __str__(self) -> str:
        return f"{self.value:+,.0f} bytes ({self.low:+,.0f} to {self.high:+,.0f}), {self.turns:,} turns"


def slope_of(readings: Sequence[int], every: int = 1) -> Slope:
    """Of readings `every` so many turns, without the warm-up.

    Neighbours depend on each other, so blocks of them are drawn together.
    """
    rows = np.asarray(readings[int(WARM_UP * len(readings)) :], np.float64)
    count = len(rows)
    turns = np.arange(count) - (count - 1) / 2
    square = float(np.square(turns).sum())
    value = float(turns @ rows) / square
    left = rows - rows.mean() - value * turns
    block = max(2, round(count**0.5))
    starts = np.random.default_rng(SEED).integers(0, count - block + 1, (DRAWS, -(-count // block)))
    drawn = left[(starts[:, :, None] + np.arange(block)).reshape(DRAWS, -1)[:, :count]]
    low, high = np.percentile(value + drawn @ turns / square, [(100 - SHARE) / 2, (100 + SHARE) / 2])
    return Slope(value / every, float(low) / every, float(high) / every, len(readings) * every)


def empty_caches() -> None:
    """Free what Python can: cycles, its free lists, and its cache of attributes.

    CPython keeps the last names for which it looked up attributes of types, up to 4,096. Many of them are strings that
    numpy and ONNX Runtime make anew for every look-up, so hundreds of cycles or requests pass until the cache is full,
    and until then it looks like a leak: some 5 KB a cycle at first, spread over many pages.
    """
    clear = getattr(sys, "_clear_internal_caches", None) or getattr(sys, "_clear_type_cache", None)
    if clear is not None:
        clear()
    gc.collect()


def make_room_for_names() -> None:
    """Let CPython's table of interned strings grow once, beforehand.

    Names come and go in it, such as the parts of paths, and when its places are used up, it takes one of double size:
    half a megabyte more from one request to the next, in one step that says nothing of the others.
    """
    names = [sys.intern(f"a name among many, {number}") for number in range(100_000)]
    del names


def anonymous() -> int:
    """Bytes of this process that no file backs, when Python and the allocators have given back what they can."""
    from magicface_rt.backends.ort_arena import trim

    empty_caches()
    trim()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("RssAnon")


class _Mallinfo2(ctypes.Structure):
    """What glibc tells of its allocator, of all threads together; in bytes, but for the numbers of blocks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


EXACT = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
"""The environment in which `allocated` is exact: Python asks glibc for every object, and no thread keeps freed blocks
for itself, which glibc would count as in use (up to 7 of each of 64 sizes, some 240 KB a thread).
"""


def allocated() -> int | None:
    """Bytes that this process has asked its allocator for and has not freed, when Python has freed what it can.

    Unlike `anonymous` it does not depend on which pages these bytes lie on, so a turn that keeps nothing adds exactly
    nothing; see `EXACT`. None where there is no glibc of 2.33 or later.
    """
    empty_caches()
    try:
        ask = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    ask.restype = _Mallinfo2
    told = ask()
    return int(told.uordblks + told.hblkhd)


def held() -> dict[str, list[str]]:
    """What a process may leave open: file descriptors with what they are of, Python's threads, the system's threads."""
    descriptors = []
    for number in os.listdir("/proc/self/fd"):
        try:
            descriptors.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # that of the listing itself
            continue
    return {
        "descriptors": sorted(descriptors),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": [str(len(os.listdir("/proc/self/task")))],
    }
