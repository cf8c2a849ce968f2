"""One Session for all servers of a test module, and one to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from loopback import Gated, Oracle


@pytest.fixture(scope="module")
def oracle(tiny_bundle: Path) -> Iterator[Oracle]:
    with Oracle(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Gated]:
    with Gated(tiny_bundle, backend="onnxruntime-cpu", workers=2, check_hashes=False, threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    if "session" in request.fixturenames:
        request.getfixturevalue("session").reset()
    yield
    if "session" in request.fixturenames:
        request.getfixturevalue("session").reset()
