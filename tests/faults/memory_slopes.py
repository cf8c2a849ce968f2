"""How much memory a process gains a turn, with an interval: from a row of readings, not from two points."""

from __future__ import annotations

import gc
import os
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


def slope_of(readings: Sequence[int]) -> Slope:
    """Of all readings after the warm-up. Neighbours depend on each other, so blocks of them are drawn together."""
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
    return Slope(value, float(low), float(high), len(readings))


def anonymous() -> int:
    """Bytes of this process that no file backs, when Python and the allocators have given back what they can."""
    from magicface_rt.backends.ort_arena import trim

    gc.collect()
    trim()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("RssAnon")


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
