"""Bodies are read whole, within limits of bytes and time, before a route sees them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..errors import Cancelled, DrainingError, ServiceError
from .problems import Problem, refused
from .settings import ServeSettings

__all__ = ["Bodies", "Share", "replayed", "send_problem", "take_body"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARD_SECONDS = 5.0
DISCARD_TIMES = 4
"""A client that sends too much is heard out this long and this many times the limit, so that it reads the answer; one
that is cut off at once sees a broken connection instead.
"""


class Share:
    """What a body has of the bytes that all bodies may have. Given back once, in the event loop of the application."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()
        self._nbytes = 0

    def take(self, nbytes: int) -> None:
        """Raises AnswerError, 503, where all together would have too many."""
        self._bodies.take(nbytes)
        self._nbytes += nbytes

    def give_back(self) -> None:
        """Nothing of the body is held any more; nothing happens the second time."""
        self._bodies.held -= self._nbytes
        self._nbytes = 0

    def lasts_as_long_as(self, holder: object) -> None:
        """Give it back when an object goes that was made of the body; the answer may take much longer."""
        weakref.finalize(holder, self._give_back_soon).atexit = False

    def handed_on(self) -> Share:
        """What this one has, as another, which is not given back when the request has been answered."""
        other = Share(self._bodies)
        other._nbytes, self._nbytes = self._nbytes, 0
        return other

    def _give_back_soon(self) -> None:  # in whatever thread the object's last user was
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.give_back)


class Bodies:
    """An ASGI application around another, which gets each body in one piece, and its `Share` as the state `share`.

    held  bytes that all bodies have now
    told  the kind of each problem that it answers itself
    ending  set when no more is waited for: the rest of a body would come to nothing
    """

    def __init__(
        self,
        app: App,
        settings: ServeSettings,
        told: Callable[[str], object] = lambda kind: None,
        ending: asyncio.Event | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._told = told
        self._ending = ending or asyncio.Event()
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, share = bytearray(), Share(self)
        scope.setdefault("state", {})["share"] = share
        try:
            try:
                if not await self._read(scope, receive, body, share):
                    return
                _check_not_packed(scope, body)
            except ServiceError as error:
                self._told(error.kind)
                await send_problem(Problem.of(error), send)
                return
            whole = replayed(bytes(body), receive)
            body.clear()  # not two of it
            await self._app(scope, whole, send)
        finally:
            share.give_back()

    def take(self, nbytes: int) -> None:
        """See `Share.take`."""
        if self.held + nbytes > self._settings.bodies_bytes:
            busy = refused(503, "busy", "too many uploads are being read. Try again later.")
            busy.retry_after = 1.0
            raise busy
        self.held += nbytes

    async def _read(self, scope: Scope, receive: Receive, body: bytearray, share: Share) -> bool:
        """Fill the body; whether the client is still there."""
        settings = self._settings
        end = time.monotonic() + settings.body_seconds
        declared = _content_length(scope)
        if declared is not None and declared > settings.body_bytes:
            await self._discard(receive)
            raise self._too_large(f"{declared:,}")
        while True:
            message = await self._next(receive, end)
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > settings.body_bytes:
                if message.get("more_body", False):
                    await self._discard(receive)
                raise self._too_large("more")
            share.take(len(chunk))
            body += chunk
            if not message.get("more_body", False):
                return True

    async def _next(self, receive: Receive, end: float) -> Message:
        """What comes next. Raises AnswerError, 408, or DrainingError where that is not waited for any more."""
        coming, ending = asyncio.ensure_future(receive()), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait(
                {coming, ending}, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                return coming.result()
            if ending.done():
                raise DrainingError("the service is ending, and the body has not come.", retry_after=1.0)
            raise refused(408, "body-timeout", f"the body did not come within {self._settings.body_seconds:g} s.")
        finally:
            coming.cancel()
            ending.cancel()

    def _too_large(self, found: str) -> ServiceError:
        limit = self._settings.body_bytes
        return refused(413, "body-too-large", f"the body has {found} bytes; at most {limit:,} are taken.")

    async def _discard(self, receive: Receive) -> None:
        """Hear out the rest, within limits, and hold none of it."""
        end, left = time.monotonic() + DISCARD_SECONDS, DISCARD_TIMES * self._settings.body_bytes
        while left > 0:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


async def take_body(receive: Receive) -> bytes:
    """The body that what stands behind `Bodies` gets, which nobody else holds then.

    Raises:
        Cancelled: the client has gone.
    """
    pieces, more = list[bytes](), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Cancelled("the client has gone.")
        pieces.append(message.pop("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)  # of one piece that piece itself, and no copy


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body, which was read already, in one piece, and then whatever else there is."""
    whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal whole
        if whole is not None:
            message, whole = whole, None
            return message
        return await receive()

    return replay


async def send_problem(problem: Problem, send: Send) -> None:
    """Answer with a problem, below any framework."""
    headers = {**problem.headers, "Content-Length": str(len(problem.body))}
    if problem.status in (408, 413) or problem.kind == DrainingError.kind:
        headers["Connection"] = "close"  # what is left of the body may still come
    raw = [(name.lower().encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": problem.body})


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request's header; names are lower-case."""
    return next((value.decode("latin-1") for found, value in scope["headers"] if found == name), None)


def _check_not_packed(scope: Scope, body: bytearray) -> None:
    """Raises AnswerError, 415."""
    packed = (header(scope, b"content-encoding") or "identity").strip().lower()
    if body and packed not in ("identity", ""):
        raise refused(
            415,
            "content-encoding",
            f"the body is packed as {packed[:80]!a}, expected it as it is. Send it without Content-Encoding.",
            "Content-Encoding",
        )


def _content_length(scope: Scope) -> int | None:
    text = header(scope, b"content-length")
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None
