"""The server's last resort: answers errors that were not foreseen, and keeps the connection open."""

from __future__ import annotations

from collections.abc import Callable

from .bodies import App, Message, Receive, Scope, Send, send_problem
from .problems import Problem

__all__ = ["ErrorMiddleware"]


class ErrorMiddleware:
    """ASGI middleware. Starlette's own last resort raises the error again after it has answered, upon which uvicorn
    writes another traceback and cuts the connection.

    problem_of  returns the problem to answer an error with
    """

    def __init__(self, app: App, problem_of: Callable[[BaseException], Problem]) -> None:
        self._app = app
        self._problem_of = problem_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun:
                raise
            await send_problem(self._problem_of(error), send)
