"""Servers on loopback: uvicorn in a thread, over a Session that can be held up."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from magicface_rt import Concept, Progress, Reference, Session
from magicface_rt.serve import Client, ServeSettings
from magicface_rt.serve.app import build_app
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.concepts import ConceptStore
from magicface_rt.serve.local import LocalService
from magicface_rt.serve.metrics import Metrics
from magicface_rt.serve.server import Server, listen, local_service

PROMPT = "a man with a hat"


def picture(seed: int, size: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def disc(box: tuple[int, int, int, int], size: int = 96) -> Image.Image:
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return mask


def concept(word: str, seed: int, **settings: Any) -> Concept:
    return Concept(word, Reference(picture(seed), mask=disc((10, 20, 80, 90)), prompt=f"a {word}"), **settings)


class Gated(Session):
    """A Session whose requests stop at their first step while `free` is not set, so that tests can act meanwhile.

    `calls`: the seeds of each batch that was begun; `prepared`: how often a concept was prepared.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.free = threading.Event()
        self.free.set()
        self.steps: list[Progress] = []
        self.calls: list[list[Any]] = []
        self.prepared = 0
        self._changed = threading.Condition()

    def generate_batch(self, requests: Any, *, progress: Any = None) -> Any:
        with self._changed:
            self.calls.append([request.options.seed for request in requests])

        def stopping(step: Progress) -> object:
            with self._changed:
                self.steps.append(step)
                self._changed.notify_all()
            self.free.wait(30)
            return progress is None or progress(step)

        return super().generate_batch(requests, progress=stopping)

    def prepare(self, *arguments: Any, **settings: Any) -> Any:
        self.prepared += 1
        self.free.wait(30)
        return super().prepare(*arguments, **settings)

    def wait_for_step(self, count: int = 1) -> None:
        """Until so many steps were reported since `reset`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.steps) >= count, 30), "no step was reached"

    def reset(self) -> None:
        self.free.set()
        self.steps.clear()
        self.calls.clear()
        self.prepared = 0


class Oracle(Session):
    """What the service is compared with."""

    def pngs(self, concepts: Sequence[Any] = (), prompt: str = PROMPT, **settings: Any) -> list[bytes]:
        return [png(image) for image in self.generate(prompt, concepts, **settings).images]


class Running:
    """A server in a thread."""

    def __init__(self, service: LocalService, tokens: Tokens | None, metrics: Metrics) -> None:
        self.service = service
        self.socket = listen("127.0.0.1", 0)
        self.url = "http://{}:{}".format(*self.socket.getsockname())
        app = build_app(service, settings=service.settings, tokens=tokens, metrics=metrics)
        self.app = app
        self.server = Server(app, service, drain=20)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started, "the server did not start")
        until(lambda: service.not_ready() is None, "it did not warm up")

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Requests wait so long for others to be made together with."""
        engine = self.service.engine
        before, engine.settings = engine.settings, replace(engine.settings, batch_wait=seconds)
        try:
            yield
        finally:
            engine.settings = before

    @contextmanager
    def hasty(self, seconds: float) -> Iterator[None]:
        """What begins meanwhile has no longer."""
        before, self.service.settings = self.service.settings, replace(self.service.settings, deadline=seconds)
        try:
            yield
        finally:
            self.service.settings = before

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"retries": 0, "timeout": 60.0, "trust_env": False, "verify": False, **options})

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(40)
        self.socket.close()
        assert not self.thread.is_alive(), "the server did not end"


def until(true: Callable[[], object], otherwise: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.005)


@contextmanager
def running(
    session: Session,
    *,
    settings: ServeSettings | None = None,
    store: ConceptStore | None = None,
    tokens: Tokens | None = None,
    workers: int = 1,
    warm: bool = False,
) -> Iterator[Running]:
    metrics = Metrics()
    service = local_service([session], store=store, settings=settings, workers=workers, metrics=metrics, warm=warm)
    server = Running(service, tokens, metrics)
    try:
        yield server
    finally:
        if isinstance(session, Gated):
            session.free.set()
        server.stop()
