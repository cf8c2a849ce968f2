"""Server side: reads each request's body whole, within limits of bytes and time, before a route sees it."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from ..errors import Cancelled, DrainingError, ServiceError
from .problems import Problem, refusal
from .settings import ServeSettings

__all__ = ["BodyLimitMiddleware", "Share", "replayed", "send_problem", "take_body"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARD_SECONDS = 5.0
DISCARD_TIMES = 4
"""A client that sends too much is still read from, for DISCARD_SECONDS and DISCARD_TIMES the limit at most, so that it
gets to read the answer; if it were cut off at once, it would see a broken connection instead.
"""


class Share:
    """One body's share of the bytes that all bodies may use together. It is given back once, in the application's event
    loop.
    """

    def __init__(self, bodies: BodyLimitMiddleware) -> None:
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()
        self._nbytes = 0

    def take(self, nbytes: int) -> None:
        """Add bytes to the share. Raises AnswerError, 503, if all bodies together would have too many."""
        self._bodies.take(nbytes)
        self._nbytes += nbytes

    def give_back(self) -> None:
        """Release the share: nothing holds the body any more. Further calls do nothing."""
        self._bodies.held_bytes -= self._nbytes
        self._nbytes = 0

    def lasts_as_long_as(self, holder: object) -> None:
        """Release the share when an object made from the body is freed, which may be long before the answer is sent."""
        weakref.finalize(holder, self._give_back_soon).atexit = False

    def handed_on(self) -> Share:
        """Move this share to a new one, which is not given back when the request has been answered."""
        other = Share(self._bodies)
        other._nbytes, self._nbytes = self._nbytes, 0
        return other

    def _give_back_soon(self) -> None:  # runs in whichever thread freed the object
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.give_back)


class BodyLimitMiddleware:
    """ASGI middleware that hands each body on in one piece, and its `Share` as `share` in the request's state.

    held_bytes  bytes that all bodies hold now
    on_problem  called with the kind of each problem that the middleware answers itself
    ending      when set, bodies that are still arriving are no longer waited for, since they would be of no use
    bodiless    paths that take no body. Those that need no token are among them: a stranger could otherwise fill what
                all bodies may use together
    """

    def __init__(
        self,
        app: App,
        settings: ServeSettings,
        on_problem: Callable[[str], object] = lambda kind: None,
        ending: asyncio.Event | None = None,
        bodiless: Collection[str] = (),
    ) -> None:
        self._app = app
        self._settings = settings
        self._on_problem = on_problem
        self._ending = ending or asyncio.Event()
        self._bodiless = bodiless
        self.held_bytes = 0

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
                self._on_problem(error.kind)
                await send_problem(Problem.of(error), send)
                return
            whole = replayed(bytes(body), receive)
            body.clear()  # so that the body is not held twice
            await self._app(scope, whole, send)
        finally:
            share.give_back()

    def take(self, nbytes: int) -> None:
        """See `Share.take`."""
        if self.held_bytes + nbytes > self._settings.bodies_bytes:
            busy = refusal(503, "busy", "too many uploads are being read. Try again later.")
            busy.retry_after = 1.0
            raise busy
        self.held_bytes += nbytes

    async def _read(self, scope: Scope, receive: Receive, body: bytearray, share: Share) -> bool:
        """Fill `body`; return False if the client disconnects first."""
        end = time.monotonic() + self._settings.body_seconds
        limit = 0 if scope["path"] in self._bodiless else self._settings.body_bytes
        declared = _content_length(scope)
        if declared is not None and declared > limit:
            await self._discard(receive)
            raise _too_large(f"{declared:,}", limit)
        while True:
            message = await self._next(receive, end)
            if message["type"] == "http.disconnect":
                return False
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > limit:
                if message.get("more_body", False):
                    await self._discard(receive)
                raise _too_large("more", limit)
            share.take(len(chunk))
            body += chunk
            if not message.get("more_body", False):
                return True

    async def _next(self, receive: Receive, end: float) -> Message:
        """Return the next message. Raises AnswerError, 408, when time is up, or DrainingError when the service is
        ending.
        """
        coming, ending = asyncio.ensure_future(receive()), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait(
                {coming, ending}, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                return coming.result()
            if ending.done():
                raise DrainingError("the service is ending, and the body has not come.", retry_after=1.0)
            raise refusal(408, "body-timeout", f"the body did not come within {self._settings.body_seconds:g} s.")
        finally:
            coming.cancel()
            ending.cancel()

    async def _discard(self, receive: Receive) -> None:
        """Read the rest of the body, within limits, and keep none of it."""
        end, left = time.monotonic() + DISCARD_SECONDS, DISCARD_TIMES * self._settings.body_bytes
        while left > 0:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return


def _too_large(found: str, limit: int) -> ServiceError:
    return refusal(413, "body-too-large", f"the body has {found} bytes; at most {limit:,} are taken.")


async def take_body(receive: Receive) -> bytes:
    """Return the body from the `receive` of an application behind `BodyLimitMiddleware`, and keep no copy of it there.

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
    return b"".join(pieces)  # a single piece is returned itself, not copied


def replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives an already read body in one piece, and then whatever else arrives."""
    whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replay() -> Message:
        nonlocal whole
        if whole is not None:
            message, whole = whole, None
            return message
        return await receive()

    return replay


async def send_problem(problem: Problem, send: Send) -> None:
    """Answer with a problem at the ASGI level, below any framework."""
    headers = {**problem.headers, "Content-Length": str(len(problem.body))}
    if problem.status in (408, 413) or problem.kind == DrainingError.kind:
        headers["Connection"] = "close"  # what is left of the body may still come
    raw = [(name.lower().encode("ascii"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": problem.body})


def header(scope: Scope, name: bytes) -> str | None:
    """Return the value of a request's header, or None; `name` is in lower case."""
    return next((value.decode("latin-1") for found, value in scope["headers"] if found == name), None)


def _check_not_packed(scope: Scope, body: bytearray) -> None:
    """Raise AnswerError, 415, if the body is packed."""
    packed = (header(scope, b"content-encoding") or "identity").strip().lower()
    if body and packed not in ("identity", ""):
        raise refusal(
            415,
            "content-encoding",
            f"the body is packed as {packed[:80]!a}, expected it as it is. Send it without Content-Encoding.",
            "Content-Encoding",
        )


def _content_length(scope: Scope) -> int | None:
    text = header(scope, b"content-length")
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else None
