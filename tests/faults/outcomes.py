"""What an attack may lead to: success, or an error of our family that names what was read. No hang, no huge memory.

`judged` runs a reader on one input and counts what became of it; `loop` does so for inputs that hypothesis makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

import figures
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from messages import named_in, says_what_is_wrong
from tallies import TALLY

from magicface_rt.errors import MagicFaceError

SECONDS = 20
"""What one input may take of a processor. It is only there to end what hangs; nothing else is measured."""

WAITED_SECONDS = 120
"""The same where it waits, as for a pipe; on a busy machine what computes takes long as well."""

MEMORY = 512 << 20
"""Bytes of resident memory that one input may take, unless a test says otherwise."""

MOST_MESSAGE = 4000
"""Characters of a message, the name of the file aside: a log is no place for a file's content."""

SEED = int(os.environ.get("MAGICFACE_RT_FAULTS_SEED", "14"))
QUICK, MANY = 200, 10_000
inputs = pytest.mark.parametrize("inputs", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])

T = TypeVar("T")


class Hang(BaseException):
    """An input took longer than it may. Not an Exception, so that no reader takes it for damage."""


def judged(
    parser: str,
    read: Callable[[], T],
    *,
    names: str | Path | tuple[str, ...] | None,
    memory: int = MEMORY,
    message: int = MOST_MESSAGE,
) -> T | None:
    """What `read` returns; None where it refuses the input with an error of ours, which must hold one of `names` and
    say what is wrong with it.

    names  None for a reader that refuses nothing: there every error is a failure
    """
    wanted = () if names is None else names if isinstance(names, tuple) else (os.fspath(names),)
    assert all(name.strip() not in ("", "a", "an", "the") for name in wanted), "nothing is called so"
    TALLY[parser]["tried"] += 1
    try:
        with no_hang(), little_memory(memory):
            found = read()
    except MagicFaceError as error:
        if names is None:
            raise
        said = str(error)
        name = next((one for one in wanted if named_in(said, one)), None)
        assert name is not None, f"the message does not name {' or '.join(map(repr, wanted))}: {said[:500]}"
        assert len(said) <= message + 4 * len(name), f"{len(said)} characters: {said[:500]}"
        assert says_what_is_wrong(said, name), f"the message says nothing of {name!r}: {said[:500]}"
        TALLY[parser][type(error).__name__] += 1
        return None
    TALLY[parser]["accepted"] += 1
    return found


def loop(inputs: int, strategy: st.SearchStrategy[T], check: Callable[[T], object]) -> None:
    """`check` on so many inputs, no two of them the same: it is drawn until there are as many.

    What the strategy draws is the input itself, and not what it is made of. The seed is fixed, so that a failure comes
    again; a variable names another. A strategy that has not so many inputs fails: give it a smaller number.
    """
    seen: set[bytes] = set()
    drawn = turn = 0
    failed = False

    def run(one: T) -> None:
        nonlocal drawn, failed
        drawn += not failed
        digest = digest_of(one)
        if not failed and (digest in seen or len(seen) >= inputs):
            return
        try:
            check(one)
        except BaseException:
            failed = True  # it is made smaller now, by trying more, some of them again
            raise
        seen.add(digest)

    while len(seen) < inputs:
        before, missing = len(seen), inputs - len(seen)
        of = settings(
            max_examples=missing if turn == 0 else 2 * missing + 100,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(SEED + turn)(of(given(strategy)(run)))()
        turn += 1
        if len(seen) == before:
            pytest.fail(f"there are {len(seen)} inputs in {drawn} that were drawn, expected {inputs}; ask for fewer")
    assert len(seen) == inputs
    DISTINCT[_file()].update(inputs=inputs, drawn=drawn)
    counted = DISTINCT[_file()]
    figures.tell("inputs", _file(), f"{counted['inputs']:,} different ones, of {counted['drawn']:,} that were drawn")


DISTINCT: dict[str, Counter[str]] = defaultdict(Counter)
"""By file of tests: the inputs of its loops, which were all different, and how many were drawn for them."""


def digest_of(one: object) -> bytes:
    """The same for the same input, and for no other."""
    assert not isinstance(one, st.DataObject), "the strategy has to draw the input, or nobody knows which it was"
    content = one if isinstance(one, bytes) else repr(one).encode("utf-8", "backslashreplace")
    return hashlib.sha256(content).digest()


def _file() -> str:
    return Path(os.environ.get("PYTEST_CURRENT_TEST", "alone").partition("::")[0]).stem.removeprefix("test_")


@contextlib.contextmanager
def no_hang(seconds: float = SECONDS, waited: float = WAITED_SECONDS) -> Iterator[None]:
    """Ends what computes longer, and what waits longer."""

    def ring(number: int, _: FrameType | None) -> None:
        raise Hang(f"it took more than {f'{waited:g} s' if number == signal.SIGALRM else f'{seconds:g} s to compute'}")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, waited))
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, most in timers:
        signal.setitimer(timer, most)
    try:
        yield
    finally:
        for _, timer, _ in timers:
            signal.setitimer(timer, 0)
        for (number, _, _), handler in zip(timers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def little_memory(most: int = MEMORY) -> Iterator[None]:
    """The peak of resident memory inside is at most so many bytes above what there was before."""
    before, earlier = _resident()
    if earlier - before > most // 2:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; it takes a while, so not every time
    try:
        yield
    finally:  # a refusal counts like a success: it is bombs that are refused
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
