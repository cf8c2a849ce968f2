"""Whether memory grows with the requests that were made: a slope with its interval, not two points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
WARMING = 0.2
"""The first part, in which caches and arenas fill, is left out."""
GROWTH = 0.02
"""The most growth that counts as flat: a part of the memory itself, over as many requests again."""


@dataclass(frozen=True)
class Flatness:
    """The slope of a service's memory.

    bytes_per_request, low, high: the slope with its 95 % interval over the samples that count; typical_bytes: their
    median.
    """

    requests: int
    bytes_per_request: float
    low: float
    high: float
    typical_bytes: float
    samples: tuple[tuple[int, int], ...]

    @property
    def flat(self) -> bool:
        """Whether memory would grow by at most GROWTH in as many requests again, even at the interval's upper end."""
        return self.high * self.requests <= GROWTH * self.typical_bytes


def flatness(samples: Sequence[tuple[int, int]]) -> Flatness:
    """Fit the slope by least squares over samples of (requests made, bytes).

    The interval is a bootstrap of blocks: what a process holds now is close to what it held a moment ago, so resampling
    single samples would make the interval too narrow.

    Raises:
        ValueError: fewer than ten samples are left without the first part.
    """
    requests = max(made for made, _ in samples)
    counted = [(made, size) for made, size in samples if made > WARMING * requests]
    if len(counted) < 10:
        raise ValueError(f"{len(counted)} samples are too few for a slope; 10 are needed.")
    made, sizes = np.array(counted, float).T
    slope = _slope(made, sizes)
    residuals = sizes - np.polyval(np.polyfit(made, sizes, 1), made)
    block = max(2, round(len(made) ** 0.5))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(made), (RESAMPLES, -(-len(made) // block)))
    drawn = ((starts[:, :, None] + np.arange(block)) % len(made)).reshape(RESAMPLES, -1)[:, : len(made)]
    slopes = slope + np.array([_slope(made, residuals[indices]) for indices in drawn])
    low, high = np.percentile(slopes, [2.5, 97.5])
    return Flatness(requests, slope, float(low), float(high), float(np.median(sizes)), tuple(samples))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    centred = x - x.mean()
    return float(centred @ (y - y.mean()) / (centred @ centred))
