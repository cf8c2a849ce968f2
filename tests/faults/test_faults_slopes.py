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
from memory_slopes import EXACT, Slope, allocated, empty_caches, slope_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **EXACT}


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


def check_flat(found: dict[str, Any], most: dict[str, int]) -> dict[str, Slope]:
    """The interval of each slope lies below so many bytes a turn; nothing is left open; like requests end alike."""
    for kind, outcomes in found["outcomes"].items():
        assert len(outcomes) == 1, f"{kind} ended in different ways: {outcomes}"
    assert found["ended"] == found["begun"]
    slopes = {name: slope_of(row, found["every"]) for name, row in found["readings"].items()}
    for name, slope in slopes.items():
        assert slope.high < most[name], f"{name} memory grows by {slope}; at most {most[name]:,} bytes a turn may be"
    return slopes


def tell(what: str, form: str, found: dict[str, Any], slopes: dict[str, Slope], most: dict[str, int]) -> None:
    for name in most:
        told = (
            f"{slopes[name]}, bound {most[name]:,}" if name in slopes else "not run: there is no glibc of 2.33 or later"
        )
        figures.tell("memory", f"{what}, bytes {name} a turn ({form})", told)
    figures.tell("memory", f"{what}, left open ({form})", _left_open(found))


REQUEST_BYTES = {"quick": {"allocated": 512, "anonymous": 4 << 10}, "slow": {"allocated": 256, "anonymous": 512}}
"""A request frees all that it allocates: of 135, the readings lay within 500 bytes of each other. Pages come and go."""


@pytest.mark.parametrize(("turns", "form"), [(45, "quick"), pytest.param(1000, "slow", marks=pytest.mark.slow)])
def test_memory_is_flat_over_mixed_requests(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    found = soak("requests", tiny_bundle, tmp_path, turns)
    slopes = check_flat(found, REQUEST_BYTES[form])
    ended = {outcome.partition(":")[0] for outcomes in found["outcomes"].values() for outcome in outcomes}
    assert {"Cancelled", "PromptError", "BackendError", "LookupError"} <= ended, "these are among them"
    tell("requests", form, found, slopes, REQUEST_BYTES[form])


CYCLE_BYTES = {
    "quick": {"allocated": 4 << 10, "anonymous": 64 << 10},
    "slow": {"allocated": 2 << 10, "anonymous": 16 << 10},
}
"""What each of some 200 cycles left, and what ONNX Runtime alone leaves, stands in docs/operations.md."""


@pytest.mark.parametrize(("turns", "form"), [(12, "quick"), pytest.param(198, "slow", marks=pytest.mark.slow)])
def test_memory_is_flat_over_sessions(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    found = soak("cycles", tiny_bundle, tmp_path, turns)
    slopes = check_flat(found, CYCLE_BYTES[form])
    tell("open and close", form, found, slopes, CYCLE_BYTES[form])


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


ALLOCATING = """
from memory_slopes import allocated
kept = [None] * 1000
first = [allocated() for _ in range(2)][-1]
for number in range(1000):
    kept[number] = bytes(1000)
grown = allocated() - first
kept[:] = [None] * 1000
print(grown, allocated() - first)
"""


@pytest.mark.skipif(allocated() is None, reason="there is no glibc of 2.33 or later")
def test_what_is_allocated_is_counted_exactly() -> None:
    """Where freed blocks counted as well, or Python had pools of its own, a small leak would not show."""
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATING],
        capture_output=True,
        text=True,
        cwd=Path(memory_soak.__file__).parent,
        env={**os.environ, **ENVIRONMENT},
        check=True,
    )
    grown, left = map(int, done.stdout.split())
    assert 1_000_000 < grown < 1_100_000
    assert abs(left) < 1000


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="about a cache of CPython")
def test_names_of_attributes_do_not_look_like_a_leak() -> None:
    """CPython keeps names for which attributes were looked up; numpy and ONNX Runtime make them anew each time."""
    names = [f"name {number}" for number in range(2000)]
    before = [sys.getrefcount(name) for name in names]
    for name in names:
        getattr(Path, name, None)
    del name
    assert [sys.getrefcount(name) for name in names] != before, "the cache holds none of them"
    empty_caches()
    assert [sys.getrefcount(name) for name in names] == before
