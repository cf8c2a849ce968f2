"""What a client is answered by something that is not the service: JSON, problems, events, headers, all spoiled."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from corruptions import edits_of, texts_of
from hypothesis import strategies as st
from outcomes import MOST_MESSAGE, inputs, little_memory, loop
from PIL import Image
from single_files import encoded

pytest.importorskip("httpx")

import httpx
from stranger import ID, KEPT, KINDS, PICTURES, PROBLEM, STREAM, WHAT, Stranger, pictures, streamed

from magicface_rt.bundle_form import MOST_PIXELS_A_SIDE
from magicface_rt.errors import AnswerError, ServiceError, UnknownConceptError, UnreachableError
from magicface_rt.serve import AsyncClient, Client, ServeSettings
from magicface_rt.serve.answers import ANSWER_BYTES
from magicface_rt.serve.app import _answer as as_answer
from magicface_rt.serve.service import Outcome
from magicface_rt.serve.wire import made_of


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
    found = stranger.asked(f"answer: {what}", call)
    assert (found is None) == (what in ("problem", "events, failed"))


@each
@inputs
def test_any_edit(what: str, inputs: int, stranger: Stranger) -> None:
    call, status, body, kind = WHAT[what]

    def check(answer: bytes) -> None:
        stranger.says(status, answer, {"content-type": KINDS[kind]})
        stranger.asked(f"answer: {what}", call)

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
        stranger.asked(f"answer: {what}", call)

    loop(inputs, texts, check)


ODD_HEADERS = [
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "x" * 5000,
    "gzip",
    "br",
    "utf-16",
    "\xff",
    "9" * 400,
    "bytes */*",
    "Wed, 21 Oct 9999 07:28:00 +9999999999999",
    "text/event-stream; charset=no-such",
    "deflate, gzip",
]


@inputs
def test_any_headers_of_an_answer(inputs: int, stranger: Stranger) -> None:
    names = ["content-type", "content-encoding", "retry-after", "content-length", "location", "set-cookie", "x" * 3000]
    headers = st.dictionaries(st.sampled_from(names), st.sampled_from(ODD_HEADERS) | st.text(max_size=12), max_size=4)
    statuses = st.sampled_from([100, 200, 201, 204, 206, 301, 307, 400, 401, 404, 418, 429, 500, 503, 599])

    def check(one: tuple[str, int, dict[str, str]]) -> None:
        what, status, of = one
        call, _, body, _ = WHAT[what]
        of = {name: value.replace("\r", " ").replace("\n", " ") for name, value in of.items()}
        stranger.says(status, body, of)
        stranger.asked("answer: headers", pictures if what == "problem" else call)

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


@pytest.mark.parametrize("progress", [None, print])
def test_an_answer_may_be_packed_as_it_was_asked_to(progress: Any, stranger: Stranger) -> None:
    body = json.dumps(PICTURES).encode() if progress is None else STREAM
    stranger.says(200, gzip.compress(body), {"content-encoding": "gzip"})
    assert stranger.client.generate("a man", progress=progress).settings == PICTURES["settings"]
    spoiled = {"not packed as it says": (body, "gzip"), "end is missing": (gzip.compress(body)[:-9], "gzip")}
    spoiled |= {"is packed as 'br', expected gzip": (body, "br"), "packed as 'gzip, gzip'": (body, "gzip, gzip")}
    for said, (sent, packed) in spoiled.items():
        stranger.says(200, sent, {"content-encoding": packed})
        with pytest.raises(AnswerError, match=said):
            stranger.client.generate("a man", progress=progress)


MIB = 1 << 20


def packed(body: bytes, times: int) -> bytes:
    """Bytes that are unpacked to so many times a body, or more, and have no end."""
    packing = zlib.compressobj(wbits=31)
    first, other = (packing.compress(body) + packing.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + other * (times - 1)


CALLS: dict[str, tuple[Callable[[Client], Any], int, bytes]] = {
    "pictures": (lambda client: client.generate("a man"), 200, b" "),
    "events": (lambda client: client.generate("a man", progress=print), 200, b"event: progress\ndata: "),
    "concepts": (lambda client: client.concepts(), 200, b'{"concepts": '),
    "problem": (lambda client: client.concept(ID), 500, b'{"detail": '),
}


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("filled", ["blanks", "lists"])
def test_of_an_answer_that_unpacks_to_more_than_it_may_have_the_rest_is_not_read(what: str, filled: str) -> None:
    """As one text, and as values, each of which takes many times its bytes when it is read."""
    call, status, begin = CALLS[what]
    stranger = Stranger(answer_bytes=8 * MIB)
    bomb = packed(begin + (b" " * MIB if filled == "blanks" else b"[]," * (MIB // 3)), 64)
    stranger.says(status, bomb, {"content-encoding": "gzip"})
    most = "8,388,608 bytes, or 699,050 values"
    with stranger.client, little_memory(32 * MIB), pytest.raises(AnswerError, match=most) as refused:
        call(stranger.client)
    assert (refused.value.status, refused.value.kind) == (status, "answer-too-large")


def ask_for_a_bomb() -> None:
    bomb = packed(bytes(MIB), 1200)
    stranger = Stranger()
    stranger.says(200, bomb, {"content-encoding": "gzip"})
    with stranger.client, little_memory(ANSWER_BYTES + 64 * MIB), pytest.raises(AnswerError, match="536,870,912 bytes"):
        stranger.client.concepts()


def test_what_an_answer_may_have_unless_told_otherwise_bounds_what_it_takes() -> None:
    """In a process of its own: it takes seconds, in which what else runs in this one would be counted too."""
    asking = multiprocessing.get_context("spawn").Process(target=ask_for_a_bomb)
    asking.start()
    asking.join(300)
    assert asking.exitcode == 0


def test_an_asynchronous_client_has_the_same_bounds() -> None:
    async def ask(progress: Any) -> None:
        sent = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(bomb))
        transport = httpx.MockTransport(lambda _: sent)
        async with AsyncClient("http://x", retries=0, answer_bytes=MIB, transport=transport) as client:
            await client.generate("a man", progress=progress)

    bomb = packed(bytes(MIB), 64)
    for progress in (None, print):
        with little_memory(32 * MIB), pytest.raises(AnswerError, match="1,048,576 bytes"):
            asyncio.run(ask(progress))


def test_the_largest_answer_of_a_service_is_read() -> None:
    """Reckoned from a smaller one of the same form: the largest picture is noise, which cannot be packed."""
    settings, scale = ServeSettings(), 8
    side, cells = MOST_PIXELS_A_SIDE // scale, MOST_PIXELS_A_SIDE // scale // 16
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(noise, "PNG")
    maps = np.full((settings.steps, settings.images, cells, cells), 6, np.uint8)
    pngs = [noise.getvalue()] * settings.images
    outcome = Outcome(pngs, maps[-1].astype(np.int64), ("man",) * 6, {}, 4, {}, maps)
    answer = as_answer(outcome)
    assert len(answer) * scale**2 < ANSWER_BYTES
    stranger = Stranger(answer_bytes=ANSWER_BYTES // scale**2)
    stranger.says(200, answer)
    with stranger.client:
        made = stranger.client.generate("a man")
    assert made.pngs == tuple(pngs)
    np.testing.assert_array_equal(made.regions_per_step, maps)


@pytest.mark.parametrize(
    ("side", "count", "said"), [(8001, 1, "more than the 64,000,000"), (7999, 5, "more than the 256,000,000")]
)
def test_a_picture_of_an_answer_of_more_pixels_than_are_read(side: int, count: int, said: str) -> None:
    """Each is some kilobytes of an answer, and would be hundreds of megabytes in memory."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    made = made_of({**PICTURES, "pictures": [base64.b64encode(file.getvalue()).decode()] * count})
    with little_memory(16 * MIB), pytest.raises(AnswerError, match=said):
        _ = made.images


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
        return httpx.Response(200, stream=httpx.ByteStream(json.dumps(KEPT).encode()))

    with Client("http://x", token="t" * 20, headers={"X-Mine": "1"}, transport=httpx.MockTransport(answers)) as client:
        client.concept(ID)
    assert (seen[0]["authorization"], seen[0]["x-mine"]) == ("Bearer " + "t" * 20, "1")


@pytest.mark.parametrize("id", ["", "x?y", "../../bundle", "a\0b", "\u00e9"])
def test_what_is_no_id_is_not_asked_for(id: str, stranger: Stranger) -> None:
    stranger.says(200, b"{}")
    for ask in (stranger.client.concept, stranger.client.erase):
        with pytest.raises(UnknownConceptError, match="is no id"):
            ask(id)
