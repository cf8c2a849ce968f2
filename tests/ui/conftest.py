"""One Session for all tests of the page in a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("gradio")

from paging import Held


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Held]:
    with Held(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _free(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    found = request.getfixturevalue("session") if "session" in request.fixturenames else None
    if isinstance(found, Held):
        found.free.set()
