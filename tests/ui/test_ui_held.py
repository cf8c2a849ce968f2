"""What the process holds of a photograph: while its request waits, while it runs, and when it has been answered."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from paging import Held, Served, Tab, bridged, disc, photograph, png, served, until
from PIL import ExifTags, Image, ImageOps

from magicface_rt import ImageError
from magicface_rt.images import LoadedReference
from magicface_rt.serve import ServeSettings, local
from magicface_rt.serve.job import EngineJob
from magicface_rt.serve.uploads import open_image

PADDING = 6_000_000
"""Bytes behind a photograph, which its format does not look at."""

MAN, MASK = png(photograph(1)), png(disc())
PADDED = MAN + bytes(PADDING)
WORD = "Word of the prompt that it stands for"
SETTINGS = ServeSettings(default_steps=3, batch_wait=0, body_bytes=9_000_000, bodies_bytes=12_000_000)


@pytest.fixture(scope="module")
def server(session: Held) -> Iterator[Served]:
    with served(session, settings=SETTINGS) as started:
        yield started


def order(image: bytes, steps: int = 2) -> bytes:
    """The body of POST /v1/images."""
    files = {"image": base64.b64encode(image).decode(), "mask": base64.b64encode(MASK).decode()}
    concept = {"references": [files], "word": "man"}
    return json.dumps({"prompt": "a man with a hat", "concepts": [concept], "steps": steps}).encode()


def sent_by_page(server: Served, image: bytes, **fields: Any) -> Callable[[], object]:
    """A request of the page; and what waits for its end."""
    http = server.http()
    tab = Tab(http)
    given = {"Prompt": "a man with a hat", WORD: "man", "Steps": 2, "Seed": 3, **fields}
    tab.send("generate", tab.values("generate", bridge=bridged((1, image, MASK)), **given))

    def end() -> object:
        with contextlib.closing(http):
            return [message for message in tab.news() if message["msg"] == "process_completed"]

    return end


def sent_over_http(server: Served, image: bytes) -> Callable[[], object]:
    """The same over HTTP."""
    answers: list[httpx.Response] = []
    body = order(image)

    def send() -> None:
        with server.http() as http:
            answers.append(http.post("/v1/images", content=body, headers={"Content-Type": "application/json"}))

    thread = threading.Thread(target=send)
    thread.start()

    def end() -> object:
        thread.join(60)
        return [answer.raise_for_status() for answer in answers]

    return end


SENDERS = [
    pytest.param(sent_by_page, id="page"),
    pytest.param(sent_over_http, id="http"),
]
Sender = Callable[[Served, bytes], Callable[[], object]]


class Decoding:
    """Requests stop before their images are decoded, until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.reached = 0
        real = local.parse_order

        def held(*given: Any) -> Any:
            self.reached += 1
            self.go.wait(30)
            return real(*given)

        monkeypatch.setattr(local, "parse_order", held)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoding]:
    held = Decoding(monkeypatch)
    yield held
    held.go.set()


def test_what_waits_to_be_decoded_counts_among_all_bodies_and_no_longer(
    server: Served, session: Held, decoding: Decoding
) -> None:
    session.free.clear()
    before = session.steps
    first = sent_by_page(server, PADDED)
    until(lambda: decoding.reached == 1, "it was not read")
    with pytest.raises(httpx.HTTPStatusError, match="503") as refused:
        sent_by_page(server, PADDED)
    assert refused.value.response.json()["kind"] == "busy"
    decoding.go.set()
    until(lambda: session.steps > before, "no step was reached")
    second = sent_by_page(server, PADDED)  # while the first one runs
    session.free.set()
    assert first()
    assert second()


def test_what_is_refused_or_has_no_photograph_counts_no_longer(server: Served) -> None:
    for image, fields in ((PADDED, {"Seed": -1}), (PADDED, {WORD: None}), (bytes(PADDING), {})):
        for _ in range(2):
            assert "alert" in str(sent_by_page(server, image, **fields)())


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Bytes that Python's own objects have taken since then."""
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: (gc.collect(), tracemalloc.get_traced_memory()[0])[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("send", SENDERS)
def test_the_bytes_of_a_photograph_are_let_go_of_when_it_is_decoded(
    server: Served, session: Held, decoding: Decoding, send: Sender
) -> None:
    decoding.go.set()
    send(server, MAN)()  # whatever is loaded late is loaded now
    decoding.go.clear()
    session.free.clear()
    before, reached = session.steps, decoding.reached
    with traced() as taken:
        end = send(server, PADDED)
        of_sender = len(order(PADDED)) if send is sent_over_http else 0
        until(lambda: decoding.reached > reached, "it was not read")
        assert taken() - of_sender > PADDING, "this would not find them"
        decoding.go.set()
        until(lambda: session.steps > before, "no step was reached")
        assert taken() - of_sender < PADDING / 3
        session.free.set()
        assert end()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_without_its_file_is_seen_as_with_it(kind: str) -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    photograph(1, (96, 64)).save(file, format=kind, exif=turned)
    bare = open_image(file.getvalue(), pixels=10_000, name="the image", error=ImageError)
    with Image.open(io.BytesIO(file.getvalue())) as whole:
        expected = ImageOps.exif_transpose(whole)
    assert expected.size == (64, 96)
    assert type(bare) is Image.Image
    assert ImageOps.exif_transpose(bare).tobytes() == expected.tobytes()
    palette = photograph(1).quantize(4)
    file = io.BytesIO()
    palette.save(file, format="PNG", transparency=1)
    bare = open_image(file.getvalue(), pixels=10_000, name="the image", error=ImageError)
    with Image.open(io.BytesIO(file.getvalue())) as whole:
        assert bare.convert("RGBA").tobytes() == whole.convert("RGBA").tobytes()


class Seen:
    """Everything with a photograph in it that is made while it is there, and which of it lives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._made: list[tuple[str, weakref.ref[Any]]] = []
        for kind in (Image.Image, EngineJob, LoadedReference):
            self._watch(monkeypatch, kind)
        pixels = LoadedReference.pixels

        def noted(loaded: LoadedReference, height: int, width: int) -> np.ndarray[Any, Any]:
            array = pixels(loaded, height, width)
            self._made.append(("pixels", weakref.ref(array)))
            return array

        monkeypatch.setattr(LoadedReference, "pixels", noted)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        real = kind.__init__

        def noted(made: Any, *given: Any, **named: Any) -> None:
            real(made, *given, **named)
            self._made.append((kind.__name__, weakref.ref(made)))
            if isinstance(made, LoadedReference):
                self._made.append(("mask", weakref.ref(made.mask_grid)))

        monkeypatch.setattr(kind, "__init__", noted)

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._made}

    @property
    def living(self) -> set[str]:
        gc.collect()
        return {kind for kind, made in self._made if made() is not None}


@pytest.mark.parametrize("send", SENDERS)
def test_nothing_of_a_photograph_lives_when_its_request_has_been_answered(
    server: Served, session: Held, send: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.free.clear()
    before = session.steps
    seen = Seen(monkeypatch)
    end = send(server, MAN)
    until(lambda: session.steps > before, "no step was reached")
    assert {"Image", "EngineJob"} <= seen.living, "this would not find it"
    session.free.set()
    assert end()
    assert seen.kinds >= {"Image", "EngineJob", "LoadedReference", "mask", "pixels"}
    until(lambda: not seen.living, f"there is still {seen.living}", 10)


def test_the_photographs_are_let_go_of_when_the_picture_is_made(server: Served) -> None:
    with server.http() as http:
        tab = Tab(http)
        fields = {"Prompt": "a man with a hat", WORD: "man", "Steps": 2}
        status, *_ = tab.generate(bridged((1, MAN, MASK)), **fields)
        assert "Done in" in status

        def held() -> str:
            page = server.page.page
            queue = page._queue
            events = [event.data.data for event in queue.event_ids_to_events.values() if event.data is not None]
            state = list(page.state_holder.session_data[tab.hash].config_values.values())
            return json.dumps([events, state], default=str)

        assert "a man with a hat" in held(), "this would not find it"
        assert base64.b64encode(MAN).decode() not in held()
        state = server.page.page.state_holder.session_data[tab.hash]
        bridge = next(number for number, one in tab.components.items() if one["props"].get("label") == "bridge")
        state._update_value_in_config(bridge, bridged((1, MAN, MASK)))
        assert base64.b64encode(MAN).decode() in held(), "this would not find it"
