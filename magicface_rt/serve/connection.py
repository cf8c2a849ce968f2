"""The server's end of a connection: uvicorn's over h11, with limits on what arrives before a token is looked at, and on
how long an answer waits to be taken; and a limit on how many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .problems import Problem

if sys.platform == "linux":
    import fcntl
    import termios

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["HEAD_BYTES", "Connection", "backlog"]

MOST_CONNECTIONS = 1000
"""Connections at once, each of which may hold the beginning of a head."""

MOST_BACKLOG = 100
"""Connections that may wait to be accepted; what is more is tried again by the client's system."""

HEAD_BYTES = 64 * 2**10
"""The most bytes that a request's line and headers may have together."""

HEAD_SECONDS = 60.0
"""Seconds within which a client must send them, counted from the start of the connection or the last answer."""

ANSWER_SECONDS = 60.0
"""Seconds within which a client must take something of an answer that waits for it."""

logger = logging.getLogger("magicface_rt.serve")

_NO_REQUEST = Problem(
    400,
    "bad-request",
    f"what came is no HTTP request, or its line and headers have more than {HEAD_BYTES:,} bytes together.",
)


def most_connections() -> int:
    """Return how many connections there may be at once: the other half of the files that this process may open at once
    are for concepts, pictures and plans.
    """
    if resource is None:
        return MOST_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, files // 2))


def backlog() -> int:
    """Return how many connections may wait to be accepted. asyncio accepts as many before it looks at the first."""
    return max(1, min(MOST_BACKLOG, most_connections() // 4))


class Connection(H11Protocol):
    """For `uvicorn.Config(http=Connection, h11_max_incomplete_event_size=HEAD_BYTES)`.

    uvicorn closes only connections on which nothing arrives after an answer. This class also closes those on which a
    request never properly begins, and those on which the rest of an already answered request does not end. It breaks
    off those on which an answer waits of which the client takes nothing, and with them what is left of the answer.
    Of more connections than there may be at once it breaks off the one whose client the server has waited for longest.
    """

    _said = -math.inf
    """When it was last logged that there were too many, by the clock of the event loop."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()
        if len(self.connections) > most_connections():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
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
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._look()

    def _make_room(self) -> None:
        """Break off the connection whose client the server has waited for longest, or this one if it waits for none."""
        others = (each for each in self.connections if isinstance(each, Connection) and each is not self)
        longest = min(others, key=Connection._waits_since, default=self)
        one = longest if longest._waits_since() < math.inf else self
        one.transport.abort()
        one._look()
        if (now := self.loop.time()) > Connection._said + HEAD_SECONDS:
            Connection._said = now
            logger.warning("more than %d connections: one is closed for each new one", most_connections())

    def _waits_since(self) -> float:
        """Return since when the server has waited for the client; infinity if it does not."""
        timers = ((self._late, HEAD_SECONDS), (self._stuck, ANSWER_SECONDS))
        return min((timer.when() - seconds for timer, seconds in timers if timer is not None), default=math.inf)

    def _look(self) -> None:
        """Start each timer while the server waits for the client, and stop it when it no longer does: for a request,
        while the client does not wait for an answer; for the client to take something, while nothing more is written.
        """
        waited = self.cycle is None or self.cycle.response_complete
        if waited and not self.transport.is_closing():
            if self._late is None:
                self._late = self.loop.call_later(HEAD_SECONDS, self._close)
        elif self._late is not None:
            self._late.cancel()
            self._late = None
        ended = self.flow.write_paused or self.transport.is_closing()
        if ended and self.transport.get_write_buffer_size() > 0:
            if self._stuck is None:
                self._stuck = self.loop.call_later(ANSWER_SECONDS, self._look_again, self._untaken())
        elif self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _look_again(self, untaken: int) -> None:
        """Break the connection off if as much of the answer waits as before; nothing was written meanwhile."""
        self._stuck = None
        if self._untaken() < untaken:
            self._look()
        else:
            self.transport.abort()

    def _untaken(self) -> int:
        """Return how many bytes have not reached the client. The system takes them in large pieces from the transport,
        so one that reads slowly shows only in what the system still has of them.
        """
        found = self.transport.get_write_buffer_size()
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                waiting = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
                found += int.from_bytes(waiting, sys.byteorder)
        return found
