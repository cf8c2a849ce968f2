"""What is said of a handful of timings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .results import Figures

RESAMPLES = 4000
MIN_SAMPLES = 3


def figures(samples: Sequence[float]) -> Figures:
    """Raises ValueError for no samples."""
    if not samples:
        raise ValueError("no samples")
    values = np.asarray(samples, float)
    median = float(np.median(values))
    low, high = np.percentile(values, [25, 75])
    return Figures(
        median=median,
        p95=float(np.percentile(values, 95)),
        fastest=float(values.min()),
        slowest=float(values.max()),
        spread=float(high - low) / median if median else 0.0,
        samples=tuple(map(float, values)),
    )


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, paired: bool, confidence: float, seed: int
) -> tuple[float, float | None, float | None]:
    """The ratio and its bootstrap interval (percentiles); no interval where a side has fewer than three.

    paired: sample i of both was taken in round i, so that rounds are drawn anew, not samples: what slowed the machine
    in a round slowed both.
    """
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    ratio = float(np.median(a) / np.median(b))
    if min(len(a), len(b)) < MIN_SAMPLES:
        return ratio, None, None
    rng = np.random.default_rng(seed)
    i = rng.integers(0, len(a), (RESAMPLES, len(a)))
    j = i if paired and len(a) == len(b) else rng.integers(0, len(b), (RESAMPLES, len(b)))
    drawn = np.median(a[i], axis=1) / np.median(b[j], axis=1)
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return ratio, float(low), float(high)
