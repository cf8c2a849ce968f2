"""What every request to the server passes first: its Host and its token are checked, and its time is measured."""

from __future__ import annotations

import base64
import ipaddress
import re
import time
from collections.abc import Collection

from ..errors import ServiceError
from .auth import Tokens
from .bodies import App, Message, Receive, Scope, Send, header, send_problem
from .metrics import Metrics
from .problems import Problem, refusal

__all__ = ["LOOPBACK_NAMES", "OPEN", "AccessMiddleware", "names_of"]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""What a client on this machine calls it in the Host header."""


def names_of(address: str) -> tuple[str, ...] | None:
    """Return the names by which clients may call a service that listens on this address and has no tokens; None for
    any.

    Any web page can make a name of its own resolve to this machine. A request under another name was not meant for this
    service.
    """
    found = ipaddress.ip_address(address)
    if not found.is_loopback:
        return None
    return (*LOOPBACK_NAMES, f"[{address}]" if found.version == 6 else address)


_PORT = re.compile(r":\d{1,5}$")

OPEN = ("/healthz", "/readyz")
"""Paths that need no token."""

PAGE = "/ui"
"""Where the page is, if there is one. A browser cannot be told to send a bearer token, but it can ask its user for a
name and a password (RFC 7617): the password is the token, and the name may be anything.
"""

_WRONG_HOST = Problem.of(
    refusal(
        403,
        "host",
        f"without tokens, and listening for this machine only, the service answers to {', '.join(LOOPBACK_NAMES)} and "
        "to no other name. Use one of these; or start it with --tokens, or with another --host.",
        "Host",
    )
)

_ASK = 'Basic realm="magicface_rt: any name, and a token as the password", charset="UTF-8"'


class AccessMiddleware:
    """ASGI middleware that answers requests without a valid token itself, before a body is read.

    hosts  names that clients may call this machine by, with any port; None for any. A browser lets a page send what it
           likes to the page's own name, wherever that name leads (DNS rebinding)

    Sets `scope["state"]["owner"]` to whose request it is.
    """

    def __init__(self, app: App, tokens: Tokens, metrics: Metrics, hosts: Collection[str] | None = None) -> None:
        self._app = app
        self._hosts = hosts
        self._tokens = tokens
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            state = scope.setdefault("state", {})
            state["owner"] = ""
            if not self._is_called_right(scope):
                self._metrics.problem("host")
                await send_problem(_WRONG_HOST, watched)
                return
            if scope["path"] not in OPEN:
                client = scope.get("client") or ("",)
                on_page = scope["path"] == PAGE or scope["path"].startswith(f"{PAGE}/")
                authorization = header(scope, b"authorization")
                try:
                    given = _bearer(authorization) if on_page else authorization
                    state["owner"] = self._tokens.owner(given, str(client[0]))
                except ServiceError as error:
                    self._metrics.problem(error.kind)
                    await send_problem(Problem.of(error), _asking(watched) if on_page else watched)
                    return
            await self._app(scope, receive, watched)
        except Exception:
            status = 500  # answered by an outer layer
            raise
        finally:
            route = getattr(scope.get("route", None), "path", "other")
            status = status or 499  # nothing was sent: the client has gone
            method = scope["method"] if scope["method"] in ("GET", "PUT", "POST", "DELETE") else "other"
            self._metrics.answered(route, method, status, time.perf_counter() - start)

    def _is_called_right(self, scope: Scope) -> bool:
        if self._hosts is None:
            return True
        names = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        return len(names) == 1 and _PORT.sub("", names[0]).lower() in self._hosts


def _bearer(authorization: str | None) -> str | None:
    """Convert a Basic header, in which a browser sends a name and a token, to the Bearer header that a client sends."""
    scheme, _, encoded = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")[2]
    except ValueError:  # not base64, not ASCII or not UTF-8
        return None
    return f"Bearer {password}"


def _asking(send: Send) -> Send:
    """Wrap `send` so that a refusal makes the browser ask its user for a token."""

    async def asking(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [(name, value) for name, value in message["headers"] if name != b"www-authenticate"]
            message = {**message, "headers": [*others, (b"www-authenticate", _ASK.encode("ascii"))]}
        await send(message)

    return asking
