"""Attacks run under limits, and what came of them is told at the end."""

from __future__ import annotations

import faulthandler
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcomes import table

ADDRESSES = 8 << 30
"""Bytes of address space that a test may take more: a header that claims terabytes becomes a MemoryError."""

END_SECONDS = 1800
"""A test that hangs outside Python, where no alarm reaches it, ends its process after so long."""


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, hard))
    faulthandler.dump_traceback_later(END_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = table()
    if lines:
        terminalreporter.section("attacks: inputs by parser and outcome")
        for line in lines:
            terminalreporter.write_line(line)
