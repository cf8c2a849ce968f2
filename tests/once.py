"""What several processes of a test run share: made by the first that wants it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the test run, made by the first of its processes that wants it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    out = base / name
    with FileLock(base / f"{name}.lock"):
        if not out.exists():
            make(out)
    return out
