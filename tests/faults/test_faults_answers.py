"""What a client is answered by something that is not the service: JSON, problems, events, headers, all spoiled."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from corruptions import edits_of, texts_of
from hypothesis import strategies as st
from outcomes import MOST_MESSAGE, inputs, loop
from single_files import encoded

pytest.importorskip("httpx")

import httpx
from stranger import ID, KEPT, KINDS, PICTURES, PROBLEM, STREAM, WHAT, Stranger, asked, pictures, streamed

from magicface_rt.errors import AnswerError, ServiceError, UnknownConceptError, UnreachableError
from magicface_rt.serve import Client


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    one = Stranger()
    yield one
    one.client.close()


each = pytest.mark.parametrize("what", WHAT)


@each
def test_a_sound_answer(what: str, stranger: Stranger) -> None:
    call, status, body, kind = WHAT[what]
    stranger.says(status, body, {"content-type": KINDS[kind]})
    found = asked(f"answer: {what}", lambda: call(stranger.client))
    assert (found is None) == (what in ("problem", "events, failed"))


@each
@inputs
def test_any_edit(what: str, inputs: int, stranger: Stranger) -> None:
    call, status, body, kind = WHAT[what]

    def check(answer: bytes) -> None:
        stranger.says(status, answer, {"content-type": KINDS[kind]})
        asked(f"answer: {what}", lambda: call(stranger.client))

    loop(inputs, edits_of(body), check)


@pytest.mark.parametrize("what", ["pictures", "concept", "problem", "events"])
@inputs
def test_any_other_value(what: str, inputs: int, stranger: Stranger) -> None:
    call, status, body, kind = WHAT[what]
    texts = texts_of(PICTURES if what == "events" else json.loads(body))
    if what == "events":
        names = st.sampled_from([b"pictures", b"progress", b"problem", b"accepted"])
        texts = st.tuples(names, texts).map(lambda one: b"event: " + one[0] + b"\ndata: " + one[1] + b"\n\n")

    def check(answer: bytes) -> None:
        stranger.says(status, answer, {"content-type": KINDS[kind]})
        asked(f"answer: {what}", lambda: call(stranger.client))

    loop(inputs, texts, check)


ODD_HEADERS = ["", "0", "-1", "1e999", "nan", "x" * 5000, "gzip", "br", "utf-16", "\xff", "9" * 400, "bytes */*"]
ODD_HEADERS += ["Wed, 21 Oct 9999 07:28:00 +9999999999999", "text/event-stream; charset=no-such", "deflate, gzip"]


@inputs
def test_any_headers(inputs: int, stranger: Stranger) -> None:
    names = ["content-type", "content-encoding", "retry-after", "content-length", "location", "set-cookie", "x" * 3000]
    headers = st.dictionaries(st.sampled_from(names), st.sampled_from(ODD_HEADERS) | st.text(max_size=12), max_size=4)
    statuses = st.sampled_from([100, 200, 201, 204, 206, 301, 307, 400, 401, 404, 418, 429, 500, 503, 599])

    def check(one: tuple[str, int, dict[str, str]]) -> None:
        what, status, of = one
        call, _, body, _ = WHAT[what]
        of = {name: value.replace("\r", " ").replace("\n", " ") for name, value in of.items()}
        stranger.says(status, body, of)
        asked("answer: headers", lambda: pictures(stranger.client) if what == "problem" else call(stranger.client))

    loop(inputs, st.tuples(st.sampled_from(sorted(WHAT)), statuses, headers), check)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"[" * 200_000),
        (502, b"<html>" * 100_000),
        (429, json.dumps({**PROBLEM, "detail": "x" * 1_000_000}).encode()),
        (429, json.dumps({**PROBLEM, "detail": {"a": 5}, "field": [1], "kind": 5}).encode()),
        (400, b'{"detail": "\xff"}'),
        (400, b""),
    ],
    ids=["deep", "a page", "long", "no texts", "no UTF-8", "nothing"],
)
def test_a_problem_that_is_none(status: int, body: bytes, stranger: Stranger) -> None:
    stranger.says(status, body, {"retry-after": "Wed, 21 Oct 9999 07:28:00 +9999999999999"})
    with pytest.raises(ServiceError) as raised:
        stranger.client.generate("a man")
    assert raised.value.status == status
    assert 10 < len(str(raised.value)) <= MOST_MESSAGE


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("problem", "{}"),
        ("problem", "5"),
        ("problem", '{"status": "x"}'),
        ("problem", '{"status": 1e999}'),
        ("pictures", "[" * 100_000),
        ("pictures", "{}"),
        ("pictures", '{"pictures": [5]}'),
        ("progress", "[1]"),
        ("progress", '{"colour": 5}'),
    ],
)
def test_events_that_the_service_does_not_send(name: str, data: str, stranger: Stranger) -> None:
    stranger.says(200, f"event: {name}\ndata: {data}\n\n".encode(), {"content-type": "text/event-stream"})
    with pytest.raises(AnswerError, match="does not send"):
        streamed(stranger.client)


def test_cookies_of_something_on_the_way_are_not_kept(stranger: Stranger) -> None:
    """One that httpx cannot send would have every later request fail."""
    stranger.says(200, json.dumps(KEPT).encode(), {"set-cookie": "a=\x90"})
    assert stranger.client.concept(ID).id == stranger.client.concept(ID).id == ID


def test_an_error_of_the_callback_stays_what_it_is(stranger: Stranger) -> None:
    """It is the caller's, and not the answer's."""
    stranger.says(200, STREAM, {"content-type": "text/event-stream"})

    def fails(_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        stranger.client.generate("a man", progress=fails)


@pytest.mark.parametrize("content", [b"", b"GIF89a", encoded("PNG")[:-30]], ids=["nothing", "a GIF", "cut"])
def test_a_picture_that_is_none(content: bytes, stranger: Stranger) -> None:
    answer = {**PICTURES, "pictures": [base64.b64encode(content).decode()]}
    stranger.says(200, json.dumps(answer).encode(), {"content-type": "application/json"})
    made = stranger.client.generate("a man")
    with pytest.raises(AnswerError, match="no PNG that can be read"):
        _ = made.images


def test_an_answer_that_is_not_packed_as_it_says(stranger: Stranger) -> None:
    stranger.says(200, json.dumps(PICTURES).encode(), {"content-encoding": "gzip"})
    for progress in (None, print):
        with pytest.raises(AnswerError, match="not packed as it says"):
            stranger.client.generate("a man", progress=progress)


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (httpx.ConnectError, 3),
        (httpx.RemoteProtocolError, 3),
        (httpx.ReadTimeout, 1),
        (httpx.UnsupportedProtocol, 1),
        (httpx.InvalidURL, 1),
    ],
)
@pytest.mark.parametrize("progress", [None, print])
def test_only_a_lost_connection_is_tried_again(
    error: Any, times: int, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answer that takes too long the service would make all of it again."""
    asked: list[str] = []

    def fails(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        raise error("mine")

    monkeypatch.setattr("time.sleep", lambda _: None)
    client = Client("http://x", retries=2, transport=httpx.MockTransport(fails))
    with client, pytest.raises(UnreachableError, match="mine"):
        client.generate("a man", progress=progress)
    assert asked == ["/v1/images"] * times


def test_a_token_goes_with_headers_of_the_callers_own() -> None:
    seen: list[httpx.Headers] = []

    def answers(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return httpx.Response(200, json=KEPT)

    with Client("http://x", token="t" * 20, headers={"X-Mine": "1"}, transport=httpx.MockTransport(answers)) as client:
        client.concept(ID)
    assert (seen[0]["authorization"], seen[0]["x-mine"]) == ("Bearer " + "t" * 20, "1")


@pytest.mark.parametrize("id", ["", "x?y", "../../bundle", "a\0b", "\u00e9"])
def test_what_is_no_id_is_not_asked_for(id: str, stranger: Stranger) -> None:
    stranger.says(200, b"{}")
    for ask in (stranger.client.concept, stranger.client.erase):
        with pytest.raises(UnknownConceptError, match="is no id"):
            ask(id)
