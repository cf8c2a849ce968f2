"""Tests that need a GPU. Each is skipped, with the reason, where what it needs does not work."""

from __future__ import annotations

from pathlib import Path

import pytest

from magicface_rt.backends import why_not
from magicface_rt.backends.device import Device
from magicface_rt.errors import MagicFaceError


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> Device:
    """The first GPU."""
    try:
        return Device(0)
    except MagicFaceError as error:
        pytest.skip(str(error))


@pytest.fixture
def needs_backend(request: pytest.FixtureRequest) -> str:
    """The backend of the test's parameter, if it works here."""
    name = str(request.param)
    if reason := why_not(name):
        pytest.skip(f"{name}: {reason}")
    return name
