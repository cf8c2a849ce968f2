"""Runs the application in uvicorn, with a socket of our own, a warm-up, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from ..concept import Concept, Reference
from ..errors import OptionError
from ..options import Options
from ..request import Request
from ..session import Session
from ..ui import module as ui_module
from .access import PAGE, names_of
from .app import build_app
from .auth import Tokens
from .concepts import ConceptStore, MemoryConcepts
from .connection import HEAD_BYTES, Connection, backlog
from .engine import Engine
from .local import LocalService
from .metrics import Metrics
from .service import Service
from .settings import ServeSettings

__all__ = ["Server", "listen", "local_service", "serve", "warm_up"]

logger = logging.getLogger("magicface_rt.serve")

CLOSE_SECONDS = 10
"""How long connections may stay open once all requests are done, before they are cut."""

WATCH_SECONDS = 1.0
"""How often a service that is ready is checked for whether it can still compute."""


def serve(
    sessions: Sequence[Session],
    *,
    store: ConceptStore | None = None,
    settings: ServeSettings | None = None,
    tokens: Tokens | None = None,
    workers: int = 1,
    host: str = "127.0.0.1",
    port: int = 8000,
    page: bool = False,
    report: Callable[[str], object] = logger.info,
) -> int:
    """Serve until SIGTERM, SIGINT or Ctrl-C, and then until the running requests have their answers or `settings.drain`
    seconds have passed. Returns how many requests were cut off.

    workers  execution contexts of each Session, which must have been opened with as many
    port     0 for any free port
    page     whether to serve the page of `magicface_rt.ui` at /ui
    report   called with what is going on, line by line

    Raises:
        OptionError: the port is in use, or the address does not belong to this machine.
        BackendMissingError: the page needs an extra that is not installed.
        BundleError: a file of the bundle was written to, so no request can be done any more.
        MagicFaceError: the warm-up failed, or a thread that computes has ended.
    """
    sessions, settings = tuple(sessions), settings or ServeSettings()
    mounting = ui_module("mounting") if page else None
    with contextlib.closing(listen(host, port)) as where:
        metrics = Metrics()
        service = local_service(sessions, store=store, settings=settings, workers=workers, metrics=metrics)
        found = where.getsockname()
        hosts = None if tokens else names_of(str(found[0]))
        app = build_app(service, settings=settings, tokens=tokens, metrics=metrics, hosts=hosts)
        server = Server(app, service, drain=settings.drain, report=report)
        if mounting is not None:
            facts = ui_module("facts").Facts.of(
                sessions[0].bundle, settings, backend=sessions[0].backend.name, protected=bool(tokens)
            )
            server.at_end = mounting.mount_page(app, service, sessions[0].tokenizer, facts).end
        url = f"http://{f'[{found[0]}]' if ':' in found[0] else found[0]}:{found[1]}"
        report(f"listening on {url}")
        if page:
            report(f"the page is at {url}{PAGE}/")
        server.run(sockets=[where])
    failure = service.failure()
    if failure is not None:
        raise failure
    return server.cut_off


def local_service(
    sessions: Sequence[Session],
    *,
    store: ConceptStore | None = None,
    settings: ServeSettings | None = None,
    workers: int = 1,
    metrics: Metrics | None = None,
    warm: bool = True,
) -> LocalService:
    """Build a service in this process, with everything that it needs."""
    settings = settings or ServeSettings()
    store = store or MemoryConcepts(most=settings.concepts, most_bytes=settings.concept_bytes)
    engine = Engine(
        sessions,
        settings,
        workers=workers,
        warm=(lambda session: warm_up(session, settings)) if warm else None,
        observer=metrics,
    )
    if metrics is not None:
        metrics.watch(engine, store)
    return LocalService(engine, store, observer=metrics)


def warm_up(session: Session, settings: ServeSettings) -> None:
    """Load every graph and run a few steps, so the first request does not have to wait for that.

    On a GPU, also run a full batch, since some things are compiled and captured for its shapes.

    Raises what `Session.generate` raises.
    """
    bundle = session.bundle
    image = np.zeros((bundle.height, bundle.width, 3), np.uint8)
    mask = np.ones((bundle.height, bundle.width), np.bool_)
    concept = Concept("man", Reference(image, mask=mask, prompt="a man"))
    session.warm_up("a man", [concept])
    most = min(settings.batch, bundle.limits.images)
    if session.backend.free_device_memory() is not None and most > 1:
        session.generate_batch([Request("a man", options=Options(steps=4, images=most))])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OptionError: the port is in use, needs privileges, or is no port number; the host is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"--port is {port}, expected 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"--host {host!r} is no address of this machine: {error}. Give one, such as 0.0.0.0."
        ) from error
    where = socket.socket(family, kind, protocol)
    try:
        where.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        where.bind(address)
        where.listen(backlog())
    except OSError as error:
        where.close()
        raise OptionError(_why_not_bound(host, port, error)) from error
    return where


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} of {host} is in use by another process. Stop that, or give another --port (0 for a free one)."
        )
    if error.errno == errno.EACCES:
        return f"port {port} of {host} may not be used without privileges. Give a --port from 1024 up."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine. Give one that is, or 0.0.0.0 for all."
    return f"{host}:{port} cannot be listened on: {error}."


class Server(uvicorn.Server):
    """A uvicorn server in which a first signal drains the service, while /readyz and /healthz still answer, and a
    second one cuts the requests off. It runs in any thread; signals reach it in the main thread only.

    config   options of uvicorn.Config. Without `proxy_headers=True` a client's address is that of its connection: with
             a header, anyone could pose as any client in the fair order

    at_end   called in the event loop when the requests are done, to release connections that would otherwise stay open
    cut_off  how many requests had no time left, once the server has ended
    """

    def __init__(
        self,
        app: FastAPI,
        service: Service,
        *,
        drain: float = 60.0,
        report: Callable[[str], object] = logger.info,
        **config: Any,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                **{
                    "proxy_headers": False,
                    "http": Connection,  # else uvicorn uses another parser, without limits, if one is installed
                    "h11_max_incomplete_event_size": HEAD_BYTES,
                    "backlog": backlog(),
                    **config,
                },
            )
        )
        self.cut_off = 0
        self.at_end: Callable[[], object] = lambda: None
        self._app = app
        self._service = service
        self._drain = drain
        self._report = report
        self._draining: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Act as on a signal; may be called from any thread. Does nothing once the server has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                self._loop.call_soon_threadsafe(self._stop, number)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.ensure_future(self._watch())
        try:
            await super().serve(sockets)
        finally:
            self._watching.cancel()
            if self._draining is not None:
                self._draining.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's, which would raise the signals again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.stop(number)

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        if self._draining is None:
            self._report(
                f"{signal.Signals(number).name}: ending when the requests that are being done have their answers"
            )
            self._draining = asyncio.ensure_future(self._end(self._drain))
        else:
            self._report(f"{signal.Signals(number).name} again: ending now")
            self._draining.cancel()
            self._draining = asyncio.ensure_future(self._end(0))

    async def _end(self, seconds: float) -> None:
        self.cut_off += await self._service.drain(seconds)
        self._app.state.ending.set()
        self.at_end()
        self.should_exit = True

    async def _watch(self) -> None:
        """Report when the service is warm; exit if it cannot become so, or can no longer compute."""
        while not self.started:
            await asyncio.sleep(0.05)
        ready = False
        while self._draining is None:
            if self._service.failure() is not None:
                self.should_exit = True
                return
            if not ready and self._service.not_ready() is None:
                ready = True
                self._report("ready")
            await asyncio.sleep(WATCH_SECONDS if ready else 0.05)
