"""What an attack may lead to: success, or an error of our family that names what was read. No hang, no huge memory.

`judged` runs a reader on one input and counts what became of it; `loop` does so for inputs that hypothesis makes.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tallies import TALLY

from magicface_rt.errors import MagicFaceError

SECONDS = 20
"""What one input may take. It is only there to end what hangs; nothing else is measured."""

MEMORY = 512 << 20
"""Bytes of resident memory that one input may take, unless a test says otherwise."""

MOST_MESSAGE = 4000
"""Characters of a message, the name of the file aside: a log is no place for a file's content."""

SEED = int(os.environ.get("MAGICFACE_RT_FAULTS_SEED", "14"))
QUICK, MANY = 200, 10_000
inputs = pytest.mark.parametrize("inputs", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])

T = TypeVar("T")


class Hang(BaseException):
    """An input took longer than `SECONDS`. Not an Exception, so that no reader takes it for damage."""


def judged(parser: str, read: Callable[[], T], *, names: str | Path, memory: int = MEMORY) -> T | None:
    """What `read` returns; None where it refuses the input with an error of ours, which must hold `names`."""
    TALLY[parser]["tried"] += 1
    try:
        with no_hang(), little_memory(memory):
            found = read()
    except MagicFaceError as error:
        message, name = str(error), os.fspath(names)
        # Some messages show a path as Python does, which escapes what cannot be printed.
        assert name in message or repr(name)[1:-1] in message, f"the message does not name {name!r}: {message[:500]}"
        assert len(message) <= MOST_MESSAGE + 4 * len(name), f"{len(message)} characters: {message[:500]}"
        assert len(message) > len(name) + 10, f"the message says nothing: {message}"
        TALLY[parser][type(error).__name__] += 1
        return None
    TALLY[parser]["accepted"] += 1
    return found


def loop(inputs: int, strategy: st.SearchStrategy[T], check: Callable[[T], object]) -> None:
    """`check` on so many inputs. The seed is fixed, so that a failure comes again; a variable names another."""

    @seed(SEED)
    @settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(one: T) -> None:
        check(one)

    run()


@contextlib.contextmanager
def no_hang(seconds: float = SECONDS) -> Iterator[None]:
    """Ends what takes longer, also where it waits for a pipe."""

    def ring(_: int, __: FrameType | None) -> None:
        raise Hang(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def little_memory(most: int = MEMORY) -> Iterator[None]:
    """The peak of resident memory inside is at most so many bytes above what there was before."""
    before, earlier = _resident()
    if earlier - before > most // 2:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; it takes a while, so not every time
    yield
    peak = _resident()[1] - before
    assert peak <= most, f"{peak >> 20} MiB were taken, at most {most >> 20} are expected"


def _resident() -> tuple[int, int]:
    """Bytes of this process, now and at its peak."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) << 10
    return found["VmRSS"], found["VmHWM"]
