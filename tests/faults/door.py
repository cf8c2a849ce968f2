"""The whole HTTP application but the network: behind it a service that reads a request, and says that it is full."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

from messages import says_what_is_wrong
from outcomes import little_memory, no_hang
from PIL import Image
from single_files import encoded
from tallies import TALLY

from magicface_rt import Bundle
from magicface_rt.errors import StoreFullError
from magicface_rt.serve import ServeSettings
from magicface_rt.serve.app import build_app
from magicface_rt.serve.orders import check_named, parse_order, read_upload
from magicface_rt.serve.service import ConceptUpload, Service
from magicface_rt.session import tokenizer_of

BOUNDARY = "frontier"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"
SETTINGS = ServeSettings(pixels=10_000, body_bytes=400_000, bodies_bytes=800_000, body_seconds=5)
IMAGE, MASK = encoded("PNG"), encoded("PNG", Image.new("L", (48, 40), 255))
FULL = 507
FINE = {FULL, 400, 404, 406, 408, 413, 415, 422}
"""What an attacker may be answered; a 500 or a 503 would say that the service is at fault."""


class Full(Service):
    """Reads what it is asked for, and makes nothing."""

    def __init__(self, bundle: Bundle, settings: ServeSettings) -> None:
        self.session: Any = SimpleNamespace(bundle=bundle, tokenizer=tokenizer_of(bundle))
        self.settings = settings

    def not_ready(self) -> str | None:
        return None

    async def bundle(self) -> Any:
        raise AssertionError("no request of these tests asks for it")

    async def generate(self, order: Any, *, owner: str, listener: Any = None) -> Any:
        check_named(order)

        def no_concept(id: str) -> Any:
            raise StoreFullError("it would be read now")

        parse_order(order, no_concept, self.session, self.settings)
        raise StoreFullError("it would be made now")

    async def put_concept(self, upload: ConceptUpload, *, owner: str) -> Any:
        read_upload(upload, self.session, self.settings)
        raise StoreFullError("it would be prepared now")

    async def concepts(self) -> Any:
        raise AssertionError("no request of these tests asks for it")

    async def concept(self, id: str) -> Any:
        raise AssertionError("no request of these tests asks for it")

    async def erase(self, id: str) -> Any:
        raise AssertionError("no request of these tests asks for it")


class Door:
    """The application, asked without a network. Pieces: of a body, as they would come."""

    def __init__(self, bundle: Bundle, settings: ServeSettings = SETTINGS, **who: Any) -> None:
        self.app = build_app(Full(bundle, settings), settings=settings, **who)
        self.loop = asyncio.new_event_loop()

    def ask(
        self,
        method: str,
        path: str,
        kind: str,
        pieces: Sequence[bytes],
        headers: Sequence[tuple[bytes, bytes]] = (),
        *,
        host: bytes | None = b"x",
    ) -> tuple[int, bytes]:
        """`kind` and `host`: headers of their own, before the others, where they are not empty."""
        first = [(b"host", host)] if host else []
        if kind:
            first.append((b"content-type", kind.encode("latin-1")))
        return self.loop.run_until_complete(self._ask(method, path, pieces, [*first, *headers]))

    async def _ask(
        self, method: str, path: str, pieces: Sequence[bytes], headers: Sequence[tuple[bytes, bytes]]
    ) -> tuple[int, bytes]:
        left = list(pieces)
        answer: list[Any] = []

        async def receive() -> dict[str, Any]:
            if left:
                return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}
            await asyncio.sleep(3600)  # a client that waits for its answer
            raise AssertionError

        async def send(message: Any) -> None:
            answer.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "headers": headers,
        }
        await self.app(scope, receive, send)
        return answer[0]["status"], b"".join(part.get("body", b"") for part in answer[1:])


def part(name: str, content: bytes, more: bytes = b"") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n'.encode()
    return head + more + b"\r\n" + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
SOUND = part("image", IMAGE) + part("mask", MASK) + part("prompt", b"a man") + part("steps", b"2") + END


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


ORDER: dict[str, Any] = {
    "prompt": "a man with a hat",
    "concepts": [
        {"word": "man", "weight": 2.5, "references": [{"image": text(IMAGE), "mask": text(MASK), "prompt": "a man"}]},
        {"word": "hat", "token_index": 5, "references": [{"image": text(IMAGE), "mask": text(MASK)}]},
    ],
    "seed": 3,
    "steps": 2,
    "response": "json",
    "stream": False,
}


NAMED = {
    "json": ("the body",),
    "body": ("the body", "the key "),
    "form": ("the multipart body",),
    "body-too-large": ("the body",),
    "body-timeout": ("the body",),
    "no-such-path": ("at '/",),
    "method-not-allowed": ("at '/",),
}
"""By kind of problem what it names where it is about no field of the request."""


def answered(
    parser: str, ask: Callable[[], tuple[int, bytes]], memory: int = 256 << 20, *, fine: Collection[int] = FINE
) -> int:
    """The status of an answer that says in the form of a problem which field or what else is wrong, and in few words
    how.
    """
    TALLY[parser]["tried"] += 1
    with no_hang(), little_memory(memory):
        status, body = ask()
    assert status in fine, (status, body[:500])
    told = json.loads(body)
    assert told["status"] == status
    assert len(told["detail"]) < 4000
    assert len(body) < 20_000
    if status != FULL:  # where it was accepted, what stands behind has the word
        assert says_what_is_wrong(told["detail"]), told
        for one in told.get("errors", ()):
            assert says_what_is_wrong(f"{one['field']}: {one['detail']}"), told
        assert told.get("field") or any(name in told["detail"] for name in NAMED.get(told["kind"], ())), told
    TALLY[parser]["accepted" if status == FULL else str(status)] += 1
    return status
