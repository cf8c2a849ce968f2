"""What answers a client in place of the service, and what the client may make of it."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from messages import says_what_is_wrong
from outcomes import MOST_MESSAGE, little_memory, no_hang
from single_files import encoded
from tallies import TALLY

from magicface_rt import Progress
from magicface_rt.errors import MagicFaceError, ServiceError
from magicface_rt.serve import Client
from magicface_rt.serve.answers import ANSWER_BYTES
from magicface_rt.serve.wire import KeptId, Made

ID = "1" * 64
KEPT = {"id": ID, "word": "man", "steps": 2, "reference_seed": 0, "bytes": 5, "created": "2026-01-01T00:00:00Z"}
PICTURES: dict[str, Any] = {
    "pictures": [base64.b64encode(encoded("PNG")).decode()],
    "regions": [[[0, 1], [1, 0]]],
    "region_names": ["man"],
    "timings": {"denoising": 1.5, "queued": 0.0},
    "batch": 1,
    "settings": {"seed": 3},
    "regions_per_step": [[[[0, 1], [1, 0]]]],
}
PROBLEM = {
    "type": "about:blank",
    "title": "Too Many Requests",
    "status": 429,
    "kind": "queue-full",
    "field": "prompt",
    "detail": "32 requests wait, which are as many as may. Come back later.",
}
STEP = {"step": 1, "steps": 2, "stage": "rsa", "batch": 0, "batches": 1}


def sse(*events: tuple[str, Any]) -> bytes:
    return b"".join(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode() for name, data in events)


STREAM = sse(("accepted", {"waiting": 0}), ("progress", STEP), ("pictures", PICTURES))
FAILED = sse(("progress", STEP), ("problem", PROBLEM))
ANSWERERS = ("http://x", "the service", "the connection", "a picture that came")
KINDS = {"json": "application/json", "events": "text/event-stream"}


@dataclass
class Stranger:
    """Answers in place of a service: always the same."""

    answer_bytes: int = ANSWER_BYTES
    client: Client = field(init=False)
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # retries would only ask for the same again
        self.client = Client(
            "http://x", retries=0, answer_bytes=self.answer_bytes, transport=httpx.MockTransport(self._answer)
        )

    def _answer(self, _: httpx.Request) -> httpx.Response:
        headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in self.headers.items()]
        return httpx.Response(self.status, headers=headers, stream=httpx.ByteStream(self.body))

    def says(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers or {}

    def asked(self, parser: str, call: Callable[[Client], Any]) -> Any:
        """What the client gives; None where it raises an error of ours, which must name what answered and say what is
        wrong with that, or tell what the answer says of a problem.
        """
        TALLY[parser]["tried"] += 1
        try:
            with no_hang(), little_memory(256 << 20):
                found = call(self.client)
        except MagicFaceError as error:
            TALLY[parser][type(error).__name__] += 1
            said = str(error)
            assert len(said) <= MOST_MESSAGE, said[:500]
            told = isinstance(error, ServiceError) and said.removeprefix(f"{error.field}: ").strip()
            if not told or not any(detail.strip().startswith(told) for detail in self._details()):
                assert any(name in said for name in ANSWERERS), said[:500]
                assert says_what_is_wrong(said), said[:500]
            return None
        TALLY[parser]["accepted"] += 1
        return found

    def _details(self) -> Iterator[str]:
        """What the answer says of a problem, as JSON or as an event, where it says anything."""
        texts, data = list[bytes](), list[bytes]()
        for line in self.body.split(b"\n"):
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:])
            elif not line:
                texts.append(b"\n".join(data))
                data.clear()
        # A body is read as JSON, in UTF-16 or with surrogates too, and an event as text.
        for text in (self.body, *(text.decode("utf-8", "replace") for text in texts)):
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(text)
                if isinstance(found, dict) and isinstance(found.get("detail"), str):
                    yield found["detail"]


def pictures(client: Client) -> Any:
    return sound(client.generate("a man", [ID]))


def sound(made: Made) -> Any:
    assert type(made.batch) is int
    assert all(type(name) is str for name in made.region_names)
    assert isinstance(made.timings, dict)
    assert isinstance(made.settings, dict)
    assert made.regions.dtype == np.int64
    return made.images


def kept(*concepts: KeptId) -> Any:
    for one in concepts:
        assert (type(one.id), type(one.steps), type(one.reference_seed), type(one.nbytes)) == (str, int, int, int)
        assert one.word is None or type(one.word) is str
    return concepts


def streamed(client: Client) -> Any:
    def told(step: Progress) -> None:
        assert all(type(count) is int for count in (step.step, step.steps, step.batch, step.batches))
        assert type(step.stage) is str

    return sound(client.generate("a man", [ID], progress=told))


def problem(client: Client) -> Any:
    with pytest.raises(ServiceError) as raised:
        client.generate("a man")
    assert raised.value.field is None or isinstance(raised.value.field, str)
    assert raised.value.retry_after is None or raised.value.retry_after >= 0
    raise raised.value


WHAT: dict[str, tuple[Callable[[Client], Any], int, bytes, str]] = {
    "pictures": (pictures, 200, json.dumps(PICTURES).encode(), "json"),
    "events": (streamed, 200, STREAM, "events"),
    "events, failed": (streamed, 200, FAILED, "events"),
    "concept": (lambda client: kept(client.concept(ID)), 200, json.dumps(KEPT).encode(), "json"),
    "concepts": (lambda client: kept(*client.concepts()), 200, json.dumps({"concepts": [KEPT, KEPT]}).encode(), "json"),
    "problem": (problem, 429, json.dumps(PROBLEM).encode(), "json"),
}
