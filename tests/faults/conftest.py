"""Attacks run under limits."""

from __future__ import annotations

import faulthandler
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = 8 << 30
"""Bytes of address space that a test may take more: a header that claims terabytes becomes a MemoryError."""

END_SECONDS = 1800
SLOW_END_SECONDS = 4 * 3600
"""A test that hangs outside Python, where no alarm reaches it, ends its process after so long, and with it all tests
of that process: longer than what any test takes by its own limits."""


@pytest.fixture(autouse=True)
def _limits(request: pytest.FixtureRequest) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, hard))
    slow = request.node.get_closest_marker("slow") is not None
    faulthandler.dump_traceback_later(SLOW_END_SECONDS if slow else END_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
