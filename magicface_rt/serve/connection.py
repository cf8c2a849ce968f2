"""The server's end of a connection: uvicorn's over h11, with limits on what arrives before a token is looked at."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .problems import Problem

__all__ = ["HEAD_BYTES", "Connection"]

HEAD_BYTES = 64 * 2**10
"""The most bytes that a request's line and headers may have together."""

HEAD_SECONDS = 60.0
"""Seconds within which a client must send them, counted from the start of the connection or the last answer."""

_NO_REQUEST = Problem(
    400,
    "bad-request",
    f"what came is no HTTP request, or its line and headers have more than {HEAD_BYTES:,} bytes together.",
)


class Connection(H11Protocol):
    """For `uvicorn.Config(http=Connection, h11_max_incomplete_event_size=HEAD_BYTES)`.

    uvicorn closes only connections on which nothing arrives after an answer. This class also closes those on which a
    request never properly begins, and those on which the rest of an already answered request does not end.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._look()

    def handle_events(self) -> None:
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """Replaces uvicorn's, which fails once an answer has begun, and does not answer with a problem as the service
        does.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in _NO_REQUEST.headers.items()]
            length = str(len(_NO_REQUEST.body)).encode("ascii")
            headers += [(b"Content-Length", length), (b"Connection", b"close")]
            for event in (
                h11.Response(status_code=_NO_REQUEST.status, headers=headers, reason=b"Bad Request"),
                h11.Data(data=_NO_REQUEST.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # a request whose body is malformed
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _look(self) -> None:
        """Start the timer while the server waits for the client; stop it while the client waits for an answer."""
        waited = self.cycle is None or self.cycle.response_complete
        if waited and not self.transport.is_closing():
            if self._late is None:
                self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        elif self._late is not None:
            self._late.cancel()
            self._late = None
