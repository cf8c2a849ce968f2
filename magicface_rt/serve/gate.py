"""What every request passes first: its token, and the clock."""

from __future__ import annotations

import time

from ..errors import ServiceError
from .auth import Tokens
from .bodies import App, Message, Receive, Scope, Send, header, send_problem
from .metrics import Metrics
from .problems import Problem

__all__ = ["Gate"]

OPEN = ("/healthz", "/readyz")
"""What needs no token."""


class Gate:
    """An ASGI application around another. Without a right token it answers itself, before a body is read.

    Sets `scope["state"]["owner"]`: whose request it is.
    """

    def __init__(self, app: App, tokens: Tokens, metrics: Metrics) -> None:
        self._app = app
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
            if scope["path"] not in OPEN:
                client = scope.get("client") or ("",)
                try:
                    state["owner"] = self._tokens.owner(header(scope, b"authorization"), str(client[0]))
                except ServiceError as error:
                    self._metrics.problem(error.kind)
                    await send_problem(Problem.of(error), watched)
                    return
            await self._app(scope, receive, watched)
        except Exception:
            status = 500  # answered further out
            raise
        finally:
            route = getattr(scope.get("route", None), "path", "other")
            status = status or 499  # there was nobody to answer
            method = scope["method"] if scope["method"] in ("GET", "PUT", "POST", "DELETE") else "other"
            self._metrics.answered(route, method, status, time.perf_counter() - start)
