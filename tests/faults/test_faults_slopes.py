"""What is asked for a thousand times takes no more than at first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import figures
import memory_soak
import numpy as np
import pytest
from killing import unlimited
from memory_slopes import Slope, slope_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def soak(what: str, bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, memory_soak.__file__, what, str(bundle), str(folder), str(turns)],
        preexec_fn=unlimited,  # with a limit of addresses its threads would share one heap, and usually they do not
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check_flat(found: dict[str, Any], most: int) -> Slope:
    """The interval of the slope lies below so many bytes a turn; nothing is left open; like requests end alike."""
    for kind, outcomes in found["outcomes"].items():
        assert len(outcomes) == 1, f"{kind} ended in different ways: {outcomes}"
    assert found["ended"] == found["begun"]
    slope = slope_of(found["readings"])
    assert slope.high < most, f"memory grows by {slope}; at most {most:,} bytes a turn may be"
    return slope


REQUEST_BYTES = {"quick": 64 << 10, "slow": 4 << 10}
"""A picture of the tiny bundle is 196,608 bytes: to keep one of a few requests shows in either."""


@pytest.mark.parametrize(("turns", "form"), [(40, "quick"), pytest.param(1000, "slow", marks=pytest.mark.slow)])
def test_memory_is_flat_over_mixed_requests(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    found = soak("requests", tiny_bundle, tmp_path, turns)
    slope = check_flat(found, REQUEST_BYTES[form])
    ended = {outcome.partition(":")[0] for outcomes in found["outcomes"].values() for outcome in outcomes}
    assert {"Cancelled", "PromptError", "BackendError", "LookupError"} <= ended, "these are among them"
    figures.tell("memory", f"requests, bytes a request ({form})", f"{slope}, bound {REQUEST_BYTES[form]:,}")
    figures.tell("memory", f"requests, left open ({form})", _left_open(found))


CYCLE_BYTES = {"quick": 4 << 20, "slow": 32 << 10}
"""The tiny bundle's weights are 13.5 MB."""


@pytest.mark.parametrize(("turns", "form"), [(10, "quick"), pytest.param(200, "slow", marks=pytest.mark.slow)])
def test_memory_is_flat_over_sessions(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    found = soak("cycles", tiny_bundle, tmp_path, turns)
    slope = check_flat(found, CYCLE_BYTES[form])
    figures.tell("memory", f"open and close, bytes a cycle ({form})", f"{slope}, bound {CYCLE_BYTES[form]:,}")
    figures.tell("memory", f"open and close, left open ({form})", _left_open(found))


def _left_open(found: dict[str, Any]) -> str:
    counts = {name: len(entries) if name != "tasks" else int(entries[0]) for name, entries in found["ended"].items()}
    told = f"{counts['descriptors']} descriptors, {counts['threads']} Python threads, {counts['tasks']} system threads"
    return f"{told} after the first of each kind and at the end"


def test_a_slope_is_found_with_its_interval() -> None:
    """The measure itself: flat noise holds 0, growth is found, and a single step is not taken for either."""
    draw = np.random.default_rng(0)
    noise = np.convolve(draw.normal(0, 20_000, 1004), np.ones(5) / 5, "valid")  # neighbours depend on each other
    flat, grown = slope_of(list(map(int, 1e8 + noise))), slope_of(list(map(int, 1e8 + noise + 500 * np.arange(1000))))
    assert flat.low < 0 < flat.high < 100
    assert 400 < grown.low < 500 < grown.high < 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = slope_of([7] * 40)
    assert (constant.low, constant.value, constant.high) == (0, 0, 0)
