"""The judge of all attacks, judged: what it lets pass and what not, and whether its inputs are as many as it says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from outcomes import DISTINCT, Hang, digest_of, judged, loop, no_hang

from magicface_rt.errors import ImageError, MagicFaceError

LITTLE = 64 << 20
SAID = "image 'man.png' has 5 pixels, expected at least 9. Take a larger one."


def taken() -> None:
    np.ones(400 << 20, np.uint8)


def test_what_is_returned_and_what_is_refused() -> None:
    def refuses() -> None:
        raise ImageError(SAID)

    assert judged("judge", lambda: 5, names="man.png") == 5
    assert judged("judge", refuses, names="man.png") is None


@pytest.mark.parametrize("error", [None, ImageError(SAID), MagicFaceError(SAID)])
def test_much_memory_fails_whether_it_is_accepted_or_refused(error: Exception | None) -> None:
    """Bombs are refused: it is there that memory is to be looked at."""

    def reads() -> None:
        taken()
        if error is not None:
            raise error

    with pytest.raises(AssertionError, match="MiB were taken"):
        judged("judge", reads, names="man.png", memory=LITTLE)
    judged("judge", reads, names="man.png", memory=1 << 30)


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), KeyError("a"), SystemExit(2)])
def test_any_other_error_is_a_failure(error: BaseException) -> None:
    def reads() -> None:
        raise error

    with pytest.raises(type(error)):
        judged("judge", reads, names="man.png")


@pytest.mark.parametrize(
    ("message", "fails"),
    [
        (SAID, ""),
        ("image 'man.png': it is nested too deeply. Give another.", ""),
        ("image 'woman.jpg' has 5 pixels, expected at least 9. Take a larger one.", "does not name"),
        ("man.png", "says nothing"),
        ("error: man.png man.png man.png man.png", "says nothing"),
        ("image 'man.png' is wrong.", "says nothing"),
        ("man.png: 1234567890 1234567890 0x7f 0x7f", "says nothing"),
        (f"{SAID} {'x' * 5000}", "characters"),
    ],
)
def test_a_message_has_to_name_the_file_and_to_say_what_is_wrong_with_it(message: str, fails: str) -> None:
    def reads() -> None:
        raise ImageError(message)

    if fails:
        with pytest.raises(AssertionError, match=fails):
            judged("judge", reads, names="man.png")
    else:
        assert judged("judge", reads, names="man.png") is None


def test_a_name_that_cannot_be_printed_may_stand_as_python_shows_it() -> None:
    name = Path("a\nb")

    def reads() -> None:
        raise ImageError(f"image {str(name)!r} has 5 pixels, expected at least 9. Take a larger one.")

    assert judged("judge", reads, names=name) is None


def computes() -> None:
    while True:
        pass


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(Hang, match=r"0\.05 s$"), no_hang(waited=0.05):
        time.sleep(600)
    with pytest.raises(Hang, match=r"0\.05 s to compute"), no_hang(0.05):
        computes()


# ------------------------------------------------------------------------------------------------------------- inputs


def tried(inputs: int, strategy: st.SearchStrategy[Any]) -> list[Any]:
    found: list[Any] = []
    loop(inputs, strategy, found.append)
    return found


@pytest.mark.parametrize("inputs", [1, 100, 300])
def test_as_many_inputs_as_were_asked_for_no_two_of_them_the_same(inputs: int) -> None:
    before = DISTINCT["faults_outcomes"].copy()
    found = tried(inputs, st.lists(st.integers(0, 3), min_size=5, max_size=5).map(tuple))
    assert len(set(found)) == len(found) == inputs
    assert DISTINCT["faults_outcomes"]["inputs"] - before["inputs"] == inputs
    assert DISTINCT["faults_outcomes"]["drawn"] - before["drawn"] >= inputs


def test_few_of_what_is_drawn_are_enough_where_more_can_be_drawn() -> None:
    """Four of five are the same."""
    strategy = st.tuples(st.integers(0, 4), st.integers(0, 400)).map(lambda two: two[1] if two[0] == 0 else 0)
    assert len(set(tried(200, strategy))) == 200


def test_a_strategy_that_has_no_more_is_a_failure() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"there are 5 inputs in .* expected 6; ask for fewer"):
        tried(6, st.integers(0, 4))
    assert len(tried(5, st.integers(0, 4))) == 5


def test_what_is_drawn_is_the_input() -> None:
    with pytest.raises(AssertionError, match="has to draw the input"):
        tried(5, st.data())


def test_an_input_that_fails_is_made_smaller_and_shown() -> None:
    failed: list[int] = []

    def check(number: int) -> None:
        if number >= 1000:
            failed.append(number)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop(20, st.integers(0, 10**6), check)
    assert failed[-1] == min(failed) == 1000


def test_digests_are_those_of_the_input() -> None:
    assert digest_of(b"a") == digest_of(b"a") != digest_of(b"b")
    assert digest_of({"a": [1]}) == digest_of({"a": [1]}) != digest_of({"a": [1.0]})
    assert digest_of("\ud800") != digest_of("\\ud800")
