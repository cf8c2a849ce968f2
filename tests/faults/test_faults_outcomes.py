"""The judge of all attacks, judged: what it lets pass and what not, and whether its inputs are as many as it says."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figures import FIGURES
from hypothesis import strategies as st
from outcomes import DISTINCT, Hang, digest_of, judged, loop, no_hang
from shares import Share

from magicface_rt.errors import AnswerError, ImageError, MagicFaceError

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
        ("image 'man.png' has some trouble today, only so much is known.", "says nothing"),
        ("image 'man.png': it has too many of them, and not enough of the others.", "says nothing"),
        ("image 'man.png' cannot be used at all. Take another one.", "says nothing"),
        ("image 'man.png' cannot be read: OSError: . Take another one.", "says nothing"),
        ("image 'man.png' failed, and nothing more is known. Look at the log.", "says nothing"),
        ("image 'man.png': something has changed, and it ends here.", "says nothing"),
        ("image 'man.png' is larger than it may be.", "says nothing"),
        ("image 'man.png' is larger than 64,000,000 bytes.", ""),
        ("image 'man.png' is missing. Copy it again.", ""),
        ("image 'man.png' is no PNG.", ""),
        ("image 'man.png' cannot be read: [Errno 40] Too many levels of symbolic links.", ""),
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


@pytest.mark.parametrize("names", ["", "the ", ("man.png", "")])
def test_a_name_that_stands_in_every_message_is_none(names: Any) -> None:
    with pytest.raises(AssertionError, match="nothing is called so"):
        judged("judge", lambda: 5, names=names)


def test_one_of_several_names_is_enough() -> None:
    def refuses() -> None:
        raise ImageError(SAID)

    assert judged("judge", refuses, names=("woman.jpg", "man.png")) is None
    with pytest.raises(AssertionError, match=r"does not name 'woman\.jpg' or 'girl\.jpg'"):
        judged("judge", refuses, names=("woman.jpg", "girl.jpg"))


def test_a_reader_that_refuses_nothing_has_no_name_to_say() -> None:
    def refuses() -> None:
        raise ImageError(SAID)

    assert judged("judge", lambda: 5, names=None) == 5
    with pytest.raises(ImageError):
        judged("judge", refuses, names=None)


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


@pytest.mark.parametrize(
    ("status", "problem", "passes"),
    [
        (422, {"kind": "option", "field": "steps", "detail": "steps is 0, expected a whole number from 1."}, True),
        (422, {"kind": "option", "detail": "steps is 0, expected a whole number from 1."}, False),
        (422, {"kind": "option", "field": "", "detail": "steps is 0, expected a whole number from 1."}, False),
        (422, {"kind": "option", "field": "steps", "detail": "there is something wrong with it."}, False),
        (413, {"kind": "body-too-large", "detail": "the body has more bytes; at most 5 are taken."}, True),
        (413, {"kind": "body-too-large", "detail": "it has more bytes; at most 5 are taken."}, False),
        (507, {"kind": "store-full", "detail": "it would be made now"}, True),
        (500, {"kind": "option", "field": "steps", "detail": "steps is 0, expected a whole number from 1."}, False),
        (
            422,
            {
                "kind": "body",
                "field": "a",
                "detail": "a: it is missing; a value is expected.",
                "errors": [{"field": "b", "detail": "It is not good"}],
            },
            False,
        ),
    ],
)
def test_a_problem_has_to_name_a_field_or_a_thing_and_to_say_what_is_wrong(
    status: int, problem: dict[str, Any], passes: bool
) -> None:
    pytest.importorskip("fastapi")
    from door import answered

    body = json.dumps({"status": status, **problem}).encode()
    if passes:
        assert answered("judge", lambda: (status, body)) == status
    else:
        with pytest.raises(AssertionError):
            answered("judge", lambda: (status, body))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (AnswerError("prompt: 32 requests wait.", field="prompt", status=429), True),
        (AnswerError("prompt: 33 requests wait.", field="prompt", status=429), False),
        (AnswerError("the answer of http://x/v1 is not packed as it says (its end is missing)."), True),
        (AnswerError("the answer of http://x/v1 was no good at all."), False),
        (AnswerError("it is not packed as it says (its end is missing)."), False),
        (AnswerError("", field="prompt"), False),
    ],
)
def test_a_client_has_to_tell_what_was_said_or_what_is_wrong_with_the_answer(error: AnswerError, passes: bool) -> None:
    pytest.importorskip("httpx")
    from stranger import Stranger, sse

    def fails(_: object) -> None:
        raise error

    stranger = Stranger()
    for body in (b'{"detail": "32 requests wait."}', sse(("problem", {"detail": "32 requests wait."}))):
        stranger.says(429, body)
        if passes:
            assert stranger.asked("judge", fails) is None
        else:
            with pytest.raises(AssertionError):
                stranger.asked("judge", fails)
    stranger.client.close()


def test_a_share_is_of_the_whole_run_and_the_same_in_every_run() -> None:
    taken = []
    for _ in range(2):
        share = Share(20, subject="judge", what="judged")
        taken.append([number for number in range(4000) if share.takes(number)])
        assert not any(share.takes(number) for number in range(4000)), "what came once is not taken again"
        assert (share.came, share.taken) == (4000, len(taken[-1]))
    assert taken[0] == taken[1]
    for part in range(4):
        assert 25 <= sum(part * 1000 <= number < part * 1000 + 1000 for number in taken[0]) <= 75
    FIGURES["shares"].pop("judge")


def test_never_much_more_than_a_share_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the digests are: here all of them are chosen."""
    monkeypatch.setattr("shares.digest_of", lambda number: (20 * number).to_bytes(8, "big"))
    share = Share(20, subject="judge", what="judged")
    assert sum(share.takes(number) for number in range(4000)) == 5 + 2 * 4000 // 20
    FIGURES["shares"].pop("judge")


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
