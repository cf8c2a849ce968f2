"""A page on loopback, and what a browser would send to it."""

from __future__ import annotations

import base64
import io
import json
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw

from magicface_rt import Progress, Session
from magicface_rt.serve import ServeSettings
from magicface_rt.serve.app import build_app
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.metrics import Metrics
from magicface_rt.serve.server import Server, listen, local_service
from magicface_rt.ui.facts import Facts
from magicface_rt.ui.mounting import mount_page

SETTINGS = ServeSettings(default_steps=3, steps=60, batch_wait=0)


class Held(Session):
    """A Session whose requests stop after each step while `free` is not set."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.free = threading.Event()
        self.free.set()
        self.steps = 0

    def generate_batch(self, requests: Any, *, progress: Any = None) -> Any:
        def held(step: Progress) -> object:
            self.steps += 1
            self.free.wait(30)
            return progress is None or progress(step)

        return super().generate_batch(requests, progress=held)


def photograph(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def disc(size: tuple[int, int] = (96, 96)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((10, 10, size[0] - 10, size[1] - 10), fill=255)
    return mask


def dot(size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A mask of one place of the finest grid, which the coarser ones do not sample."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((3, 3, 5, 5), fill=255)
    return mask


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 900 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(100))
    chunks = ((struct.pack(">I", len(one) - 4), one, struct.pack(">I", zlib.crc32(one))) for one in (header, pixels))
    return b"\x89PNG\r\n\x1a\n" + b"".join(part for chunk in chunks for part in chunk)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def bridged(*photographs: tuple[int, bytes, bytes | None]) -> str:
    """What the page's script sends for (slot, photograph, mask)."""
    found = [(slot, encoded(image), None if mask is None else encoded(mask)) for slot, image, mask in photographs]
    return json.dumps(
        [{"slot": slot, "image": image, "mask": mask, "name": f"p {slot}.png"} for slot, image, mask in found]
    )


def until(true: Callable[[], object], otherwise: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)


class Served:
    """A server with the page, in a thread."""

    def __init__(self, session: Session, settings: ServeSettings, tokens: Tokens | None) -> None:
        metrics = Metrics()
        self.service = local_service([session], settings=settings, metrics=metrics, warm=False)
        app = build_app(self.service, settings=settings, tokens=tokens, metrics=metrics)
        facts = Facts.of(session.bundle, settings, backend=session.backend.name, protected=bool(tokens))
        self.page = mount_page(app, self.service, session.tokenizer, facts)
        self.socket = listen("127.0.0.1", 0)
        self.url = "http://{}:{}".format(*self.socket.getsockname())
        self.server = Server(app, self.service, drain=20)
        self.server.at_end = self.page.end
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        until(lambda: self.server.started, "the server did not start")

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, verify=False, timeout=60, **options)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.stop()
        self.thread.join(40)
        self.socket.close()
        assert not self.thread.is_alive(), "the server did not end"


@contextmanager
def served(session: Session, *, settings: ServeSettings = SETTINGS, tokens: Tokens | None = None) -> Iterator[Served]:
    server = Served(session, settings, tokens)
    try:
        yield server
    finally:
        if isinstance(session, Held):
            session.free.set()
        server.stop()


class Tab:
    """A browser's tab without a browser: sends the page's events and reads what comes back."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.hash = secrets.token_hex(6)
        self.config = http.get("/ui/config").raise_for_status().json()
        self.components = {one["id"]: one for one in self.config["components"]}

    def values(self, event: str, **by_label: Any) -> list[Any]:
        """What the event's fields hold, some of them filled in, by label. Where several have a label, the first has the
        value, or each in its turn one of a list.
        """
        left = {label: list(given) if isinstance(given, list) else [given] for label, given in by_label.items()}
        found = []
        for number in self.event(event)["inputs"]:
            props = self.components[number]["props"]
            given = left.get(props.get("label"))
            found.append(given.pop(0) if given else props.get("value"))
        assert not any(left.values()), f"the page has no place for {left}"
        return found

    def send(self, event: str, values: list[Any]) -> None:
        body = {
            "data": values,
            "fn_index": self.event(event)["id"],
            "session_hash": self.hash,
            "event_data": None,
            "trigger_id": None,
        }
        self.http.post("/ui/gradio_api/queue/join", json=body).raise_for_status()

    def news(self) -> Iterator[dict[str, Any]]:
        """Messages until the page's events are over."""
        with self.http.stream("GET", "/ui/gradio_api/queue/data", params={"session_hash": self.hash}) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    yield message
                    if message["msg"] == "close_stream":
                        return

    def outcome(self, event: str, values: list[Any]) -> list[Any]:
        """The event's outputs in the end."""
        self.send(event, values)
        done = [message for message in self.news() if message["msg"] == "process_completed"]
        assert done[-1]["success"], done[-1]
        data: list[Any] = done[-1]["output"]["data"]
        return data

    def generate(self, photographs: str, **by_label: Any) -> list[Any]:
        """Status, result, timings, Python, curl."""
        return self.outcome("generate", self.values("generate", bridge=photographs, **by_label))[:5]

    def event(self, name: str) -> dict[str, Any]:
        """How the page has described it."""
        found: dict[str, Any] = next(one for one in self.config["dependencies"] if one["api_name"] == name)
        return found
