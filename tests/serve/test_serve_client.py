"""What a caller can get wrong with the client: an error of ours that names it, before anything is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from loopback import PROMPT, concept, disc, picture

from magicface_rt import Concept, MagicFaceError, Reference
from magicface_rt.errors import AnswerError, ConceptError, OptionError, PromptError, QueueFullError, UnreachableError
from magicface_rt.serve import AsyncClient, Client

TOKEN = "correct-horse-battery-staple"
PICTURES = {"pictures": [], "regions": [], "region_names": [], "timings": {}, "batch": 1, "settings": {}}


class Sent:
    """Answers every request alike, and keeps them."""

    def __init__(self, status: int = 200, headers: Any = None, body: bytes = json.dumps(PICTURES).encode()) -> None:
        self.requests: list[httpx.Request] = []
        self._status, self._headers, self._body = status, headers, body

    def client(self, **options: Any) -> Client:
        return Client("http://x", **options, transport=httpx.MockTransport(self))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(self._status, headers=self._headers, stream=httpx.ByteStream(self._body))


def test_a_token_may_have_the_line_end_of_its_file() -> None:
    sent = Sent()
    with sent.client(token=f" {TOKEN}\r\n") as client:
        client.bundle()
    assert sent.requests[0].headers["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("token", ["", " \n", f"{TOKEN}\nanother", f"{TOKEN} x", f"{TOKEN}\N{SNOWMAN}", TOKEN.encode()])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_is_no_token_is_refused_and_not_shown(kind: Any, token: Any) -> None:
    with pytest.raises(OptionError, match=r"^token is ") as refused:
        kind("http://x", token=token)
    assert "correct-horse" not in str(refused.value)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("url", "options", "name"),
    [
        ("http://[::1", {}, "url"),
        ("http://x:port", {}, "url"),
        (None, {}, "url"),
        ("http://x", {"retries": -1}, "retries"),
        ("http://x", {"retries": 1.5}, "retries"),
        ("http://x", {"timeout": -1.0}, "timeout"),
        ("http://x", {"timeout": float("nan")}, "timeout"),
        ("http://x", {"timeout": "5"}, "timeout"),
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(kind: Any, url: Any, options: Any, name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} is "):
        kind(url, **options)


def man(word: str, prompt: str = "a man") -> Concept:
    return Concept(word, Reference(picture(1), mask=disc((10, 20, 80, 90)), prompt=prompt))


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


@pytest.mark.parametrize("progress", [None, print])
@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"guidance": float("nan")}, OptionError, "guidance is nan"),
        ({"alpha": float("inf")}, OptionError, "alpha is inf"),
        ({"alpha": np.float32("nan")}, OptionError, "alpha is nan"),
        ({"steps": {1}}, OptionError, "steps is a set"),
        ({"steps": np.array(1)}, OptionError, "steps is a ndarray"),
        ({"seed": 10**5000}, OptionError, "seed is an integer of "),
        ({"weight_mode": "b\ud800"}, OptionError, r"weight_mode has '\\ud800' at 1"),
        ({"prompt": "a man \ud800"}, PromptError, r"prompt has '\\ud800' at 6"),
        ({"prompt": b"a man"}, PromptError, "prompt is a bytes"),
        ({"prompt": object()}, PromptError, "prompt is a object"),
        ({"concepts": [{"id": "a", "weight": float("nan")}]}, ConceptError, r"concepts\[0\]\.weight is nan"),
        (
            {"concepts": [{"id": "a", "token_index": np.array([1])}]},
            ConceptError,
            r"concepts\[0\]\.token_index is a nd",
        ),
        ({"concepts": [{"id": "a\udfff"}]}, ConceptError, r"concepts\[0\]\.id has "),
        ({"concepts": [{1: "a"}]}, ConceptError, r"concepts\[0\] is a dict"),
        ({"concepts": [{"id": endless()}]}, ConceptError, r"concepts\[0\]\.id\[0\].* is a list"),
        ({"concepts": [man("m\ud800n")]}, ConceptError, r"concepts\[0\]\.word has "),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(settings: Any, error: Any, says: str, progress: Any) -> None:
    sent, order = Sent(), {"prompt": PROMPT, **settings}
    with sent.client() as client, pytest.raises(error, match=says):
        client.generate(**order, progress=progress)
    assert sent.requests == []


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (lambda client: client.put_concept(man("m\ud800n")), "word has "),
        (lambda client: client.put_concept(man("man", "a \ud800")), "prompt has "),
        (lambda client: client.put_concept(concept("man", 1), storage=None), "storage is a NoneType"),
        (lambda client: client.put_concept(concept("man", 1), steps=10**5000), "steps is an integer of "),
        (lambda client: client.put_concept(concept("man", 1), reference_seed="\ud800"), "reference_seed has "),
    ],
)
def test_what_a_form_cannot_hold_is_refused_by_name(put: Callable[[Client], Any], says: str) -> None:
    sent = Sent()
    with sent.client() as client, pytest.raises(MagicFaceError, match=says):
        put(client)
    assert sent.requests == []


def test_numbers_of_numpy_and_lists_are_sent_as_what_they_are() -> None:
    sent = Sent()
    with sent.client() as client:
        client.generate(
            "ein M\u00e4dchen", [{"id": "a", "token_index": (np.int8(3), 4)}], guidance=np.float32(7.5), seed=2**64
        )
    order = json.loads(sent.requests[0].content)
    assert order["prompt"] == "ein M\u00e4dchen"
    assert order["concepts"] == [{"id": "a", "token_index": [3, 4]}]
    assert (order["guidance"], order["seed"]) == (7.5, 2**64)
    assert sent.requests[0].headers["content-type"] == "application/json"


STEP = {"step": 1, "steps": 2, "stage": "rsa", "batch": 1, "batches": 1}
EVENTS_SENT = f"event: progress\ndata: {json.dumps(STEP)}\n\n".encode()


def generate(kind: Any, sent: Sent, progress: Any) -> Any:
    client = kind("http://x", transport=httpx.MockTransport(sent))
    if kind is Client:
        with client:
            return client.generate(PROMPT, progress=progress)

    async def run() -> Any:
        async with client:
            return await client.generate(PROMPT, progress=progress)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    "raised",
    [
        httpx.ConnectError("another service is away"),
        QueueFullError("another queue"),
        RuntimeError("x"),
        KeyError("x"),
    ],
)
def test_what_a_progress_callback_raises_comes_out_as_it_is(kind: Any, raised: Exception) -> None:
    """And the request is not sent again for it, though a lost connection would have it sent again."""
    sent = Sent(headers={"content-type": "text/event-stream"}, body=EVENTS_SENT)

    def progress(_: Any) -> None:
        raise raised

    with pytest.raises(type(raised)) as told:
        generate(kind, sent, progress)
    assert told.value is raised
    assert len(sent.requests) == 1


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_progress_callback_that_cannot_cancel_is_refused_before_anything_is_sent(kind: Any) -> None:
    async def coroutine(_: Any) -> None: ...

    sent = Sent()
    for progress in (coroutine, 5):
        with pytest.raises(OptionError, match="progress is"):
            generate(kind, sent, progress)
    assert not sent.requests


def test_a_client_that_was_closed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", None)  # nothing is tried again
    sent = Sent()
    client = sent.client()
    client.close()
    calls: tuple[Callable[[], Any], ...] = (
        client.bundle,
        lambda: client.generate(PROMPT),
        lambda: client.generate(PROMPT, progress=print),
        lambda: client.erase("a"),
    )
    for call in calls:
        with pytest.raises(UnreachableError, match="was closed"):
            call()
    assert not client.ready()

    async def use_later() -> None:
        later = AsyncClient("http://x", transport=httpx.MockTransport(sent))
        await later.close()
        with pytest.raises(UnreachableError, match="was closed"):
            await later.generate(PROMPT, progress=print)
        assert not await later.ready()

    asyncio.run(use_later())


def test_without_a_timeout_it_waits_as_long_as_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    sent = Sent(429, {"Retry-After": "7000"}, json.dumps({"kind": "queue-full", "detail": "full"}).encode())
    with sent.client(timeout=None, retries=1) as client, pytest.raises(QueueFullError):
        client.bundle()
    assert slept == [7000]


@pytest.mark.parametrize("asked", ["1e30", "1e9", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_wait_that_no_service_asks_for_is_an_answer(asked: str) -> None:
    """`time.sleep` would raise an error of its own, or sleep for years."""
    sent = Sent(503, {"Retry-After": asked}, json.dumps({"kind": "busy", "detail": "full"}).encode())
    with sent.client(timeout=None, retries=1) as client, pytest.raises(AnswerError, match="full"):
        client.bundle()
    assert len(sent.requests) == 1


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/html; charset=utf-8"}])
def test_a_page_in_place_of_events_is_told_as_one(headers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    sent = Sent(200, headers, b"<html>\n<p>sign in</p>\n</html>\n")

    async def use_later() -> None:
        async with AsyncClient("http://x", transport=httpx.MockTransport(sent)) as client:
            await client.generate(PROMPT, progress=print)

    with sent.client() as client:
        for call in (lambda: client.generate(PROMPT, progress=print), lambda: asyncio.run(use_later())):
            with pytest.raises(AnswerError, match="sign-in page") as refused:
                call()
            assert (refused.value.status, refused.value.kind) == (200, "no-answer")
    assert len(sent.requests) == 2
