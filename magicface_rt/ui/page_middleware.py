"""Stands between the service and the page's framework: which paths exist, and what a browser may do with the page.

Gradio's application has routes that the page has no use for: an upload cache, whose files are served back, and proxies.
They are closed to callers. So is anything in an event that the page would not send (event.py).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable
from importlib.resources import files

from starlette.datastructures import QueryParams

from ..errors import Cancelled, ServiceError
from ..serve.bodies import App, Message, Receive, Scope, Send, header, replayed, send_problem, take_body
from ..serve.problems import Problem, refusal
from .event import PageEvents, Parcel, read_event, tab_of
from .tabs import Tabs

__all__ = ["PageMiddleware"]

_CALLS = ("app_id", "info", "login_check", "queue/join", "queue/data", "startup-events")
_PATHS = {"", "/", "/config", "/config/", "/theme.css", *(f"/gradio_api/{call}" for call in _CALLS)}
_EVENTS = "/gradio_api/queue/join"
_MESSAGES = "/gradio_api/queue/data"
_HEARTBEAT = "/gradio_api/heartbeat/"
_FOLDERS = ("/assets/", "/static/", "/svelte/", _HEARTBEAT)

POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""Lets the browser load nothing from elsewhere, whatever the framework's scripts would like to load. They make
functions out of text, which requires unsafe-eval.
"""

_HEADERS = (
    (b"content-security-policy", POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

_NAMING = (b"host", b"x-forwarded-host")
"""Headers from which the framework makes the page's address."""
_OVERRIDE = b"x-gradio-server"
"""Another such header; nobody needs to send it."""
_MACHINE = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
_DOTTED = re.compile(r"[0-9.]+")

_OWN = {"/page.js": b"text/javascript; charset=utf-8", "/page.css": b"text/css; charset=utf-8"}

_FOREIGN = re.compile(r'\s*<(?:meta\s[^>]*(?:property|name)="(?:og|twitter):[^>]*|link rel="manifest"[^>]*)>')
_HEAD = (
    '<link rel="icon" href="data:,"><link rel="stylesheet" href="./page.css"><script src="./page.js"></script></head>'
)


class PageMiddleware:
    """ASGI middleware around the framework's application, mounted under a path.

    events  those that the page has
    tabs    told which tabs send events and listen for messages
    left    called with each tab whose connection has ended, for whatever reason. The framework itself only notices when
            the connection's task ends normally, and not when the server cancels it

    An event's photographs are put into `scope["state"]["parcel"]`; the framework does not get them.
    """

    def __init__(self, app: App, events: PageEvents, tabs: Tabs, left: Callable[[str], object]) -> None:
        self._app = app
        self._events = events
        self._tabs = tabs
        self._left = left
        self._assets = {path: (files(__package__) / "assets" / path[1:]).read_bytes() for path in _OWN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # the page has no web sockets
            return
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != _OVERRIDE]
        misnamed = next((name for name in _NAMING if not _names_a_machine(header(scope, name))), None)
        if misnamed is not None:
            name = misnamed.decode("ascii").title()
            what = f"the header {name} names no machine. Ask for the page by its address."
            await send_problem(Problem(400, "host", what, name), send)
        elif path in self._assets:
            await _send(send, self._assets[path], _OWN[path])
        elif path not in _PATHS and not path.startswith(_FOLDERS):
            await send_problem(Problem(404, "no-such-path", "the page has nothing there."), send)
        elif scope["method"] not in ("GET", "HEAD") and not _same_origin(scope):
            await send_problem(Problem(403, "other-origin", "this was sent by another site's page."), send)
        elif path == _EVENTS:
            await self._event(scope, receive, send)
        elif scope["method"] not in ("GET", "HEAD"):
            await send_problem(Problem(405, "method-not-allowed", "the page sends nothing there."), send)
        elif path in ("", "/"):
            await self._page(scope, receive, send)
        elif path == _MESSAGES:
            await self._messages(scope, receive, send)
        elif path.startswith(_HEARTBEAT):
            try:
                await self._app(scope, receive, _guarded(send))
            finally:
                self._left(path.removeprefix(_HEARTBEAT))
        else:
            await self._app(scope, receive, _guarded(send))

    async def _event(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check what a field or button sends, and pass it on. The limits on bodies apply before the page is reached."""
        try:
            if (header(scope, b"content-type") or "").partition(";")[0].strip().lower() != "application/json":
                raise refusal(415, "content-type", "expected Content-Type: application/json.", "Content-Type")
            body = await take_body(receive)
            event, photographs = await asyncio.to_thread(read_event, body, self._events)
            tab = tab_of(event)
            self._tabs.check(tab)
        except Cancelled:
            return
        except ServiceError as error:
            await send_problem(Problem.of(error), send)
            return
        del body
        state = scope["state"]
        state["parcel"] = Parcel(photographs, state["share"].handed_on())
        del photographs
        with self._tabs.sending(tab):
            await self._app(scope, replayed(event, receive), _guarded(send))

    async def _messages(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a tab its messages. What it has not read when its connection is lost, it will not read."""
        tab = QueryParams(scope["query_string"]).get("session_hash", "")
        ended = lost = False

        async def noted(message: Message) -> None:
            nonlocal ended
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))
            await send(message)

        async def heard() -> Message:
            nonlocal lost
            message = await receive()
            lost = lost or (message["type"] == "http.disconnect" and not ended)
            return message

        try:
            with self._tabs.listening(tab):
                await self._app(scope, heard, _guarded(noted))
        finally:
            if lost:
                self._tabs.lost(tab)

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the page's HTML, with this package's assets added and references to other sites removed."""
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = bytearray()

        async def hold(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                body.extend(message.get("body", b""))

        await self._app({**scope, "headers": plain}, receive, hold)
        text = _FOREIGN.sub("", body.decode("utf-8")).replace("</head>", _HEAD, 1)
        await _send(send, text.encode("utf-8"), b"text/html; charset=utf-8", int(start["status"]))


def _names_a_machine(value: str | None) -> bool:
    """Return whether a header's value is missing or names a machine; of several values the first counts."""
    if value is None:
        return True
    match = _MACHINE.fullmatch(value.partition(",")[0].strip())
    if match is None:
        return False
    found = match.group(1) or match.group(2)
    if match.group(1) is None and _DOTTED.fullmatch(found) is None:
        return True
    try:
        ipaddress.ip_address(found)
    except ValueError:
        return False
    return True


def _same_origin(scope: Scope) -> bool:
    """Return whether a request that changes something comes from this page, or from no page at all.

    Browsers say so themselves over TLS and on this machine; elsewhere the origin is compared with the page's address.
    """
    site = header(scope, b"sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = header(scope, b"origin")
    return origin is None or origin.partition("://")[2] == header(scope, b"host")


def _guarded(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return guarded


async def _send(send: Send, body: bytes, content_type: bytes, status: int = 200) -> None:
    headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"cache-control", b"no-store"),
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
