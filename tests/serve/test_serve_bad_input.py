"""Everything that a client can get wrong: the right status, the field at fault, and the service goes on."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import shutil
import socket
import struct
import threading
import zlib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from loopback import PROMPT, Gated, Running, concept, disc, picture, png, running, until
from PIL import Image, ImageFile

from magicface_rt.errors import AnswerError, NonFiniteError, OptionError
from magicface_rt.serve import FolderConcepts, ServeSettings, local
from magicface_rt.serve.access import LOOPBACK_NAMES
from magicface_rt.serve.app import build_app
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.bodies import BodyLimitMiddleware
from magicface_rt.serve.concepts import StoredConcept
from magicface_rt.serve.reading import read_order
from magicface_rt.serve.schemas import PictureOrder
from magicface_rt.serve.server import Server, serve

ID = "0" * 64
TOKEN = "correct-horse-battery-staple"
SETTINGS = ServeSettings(
    default_steps=1, pixels=10_000, body_bytes=400_000, bodies_bytes=800_000, body_seconds=0.5, steps=20
)


@pytest.fixture(scope="module")
def server(session: Gated) -> Iterator[Running]:
    with running(session, settings=SETTINGS) as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, verify=False, timeout=30) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _the_service_goes_on(server: Running, session: Gated) -> Iterator[None]:
    yield
    session.free.set()
    with server.client() as client:
        assert client.generate(PROMPT, steps=1).batch == 1
    assert not server.service._uses
    assert server.service._held_pixels == 0


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels whose bytes are few, and which claims to be well-formed as far as its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


IMAGE, MASK = png(picture(1)), png(disc((10, 20, 80, 90)))
FLOATS = io.BytesIO()
Image.fromarray(np.zeros((8, 8), np.float32)).save(FLOATS, "TIFF")


def inline(**changes: Any) -> dict[str, Any]:
    return {"word": "man", "references": [{"image": text(IMAGE), "mask": text(MASK), **changes}]}


ORDERS: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no prompt": ({"prompt": None}, 422, "prompt", "body"),
    "prompt a number": ({"prompt": 3}, 422, "prompt", "body"),
    "prompt too long to read": ({"prompt": "a " * 1500}, 422, "prompt", "body"),
    "prompt of too many tokens": ({"prompt": "zebra " * 100}, 422, "prompt", "prompt"),
    "negative prompt of too many tokens": ({"negative_prompt": "a " * 100}, 422, "negative_prompt", "prompt"),
    "unknown key": ({"stepz": 3}, 422, "stepz", "body"),
    "10,000 steps": ({"steps": 10_000}, 422, "steps", "body"),
    "more steps than the service takes": ({"steps": 21}, 422, "steps", "option"),
    "no steps": ({"steps": 0}, 422, "steps", "body"),
    "steps as text": ({"steps": "3"}, 422, "steps", "body"),
    "steps true": ({"steps": True}, 422, "steps", "body"),
    "too many images": ({"images": 5}, 422, "images", "option"),
    "two images as PNG": ({"images": 2, "response": "png"}, 422, "images", "option"),
    "guidance of 0": ({"guidance": 0}, 422, "guidance", "body"),
    "alpha above 1": ({"alpha": 1.5}, 422, "alpha", "body"),
    "seed below 0": ({"seed": -1}, 422, "seed", "body"),
    "seed of 2^64": ({"seed": 2**64}, 422, "seed", "body"),
    "no such weight mode": ({"weight_mode": "much"}, 422, "weight_mode", "body"),
    "a deadline of 0": ({"deadline": 0}, 422, "deadline", "body"),
    "concepts no list": ({"concepts": {"id": ID}}, 422, "concepts", "body"),
    "an id that is not there": ({"concepts": [{"id": ID}]}, 404, "concepts[0].id", "concept-not-found"),
    "an id that is a path": ({"concepts": [{"id": "../../etc"}]}, 404, "concepts[0].id", "concept-not-found"),
    "neither id nor references": ({"concepts": [{"word": "man"}]}, 422, "concepts[0]", "concept"),
    "both": ({"concepts": [{**inline(), "id": ID}]}, 422, "concepts[0]", "concept"),
    "no references": ({"concepts": [{"references": [], "word": "man"}]}, 422, "concepts[0].references", "body"),
    "no word": ({"concepts": [{**inline(), "word": None}]}, 422, "concepts[0].word", "concept"),
    "a blank word": ({"concepts": [{**inline(), "word": "  "}]}, 422, "concepts[0].word", "concept"),
    "a word that is not there": ({"concepts": [{**inline(), "word": "dog"}]}, 422, "concepts[0].word", "prompt"),
    "one word twice": ({"concepts": [inline(), inline()]}, 422, "concepts", "concept"),
    "too many concepts": ({"concepts": [inline()] * 7}, 422, "concepts", "concept"),
    "a weight of 101": ({"concepts": [{**inline(), "weight": 101}]}, 422, "concepts[0].weight", "concept"),
    "a weight as text": ({"concepts": [{**inline(), "weight": "2"}]}, 422, "concepts[0].weight", "body"),
    "a weight too large to scale": (
        {"concepts": [{**inline(), "weight": 50}], "weight_mode": "scale"},
        422,
        "concepts[0].weight",
        "concept",
    ),
    "a token that is not there": (
        {"concepts": [{**inline(), "token_index": 70}]},
        422,
        "concepts[0].token_index",
        "concept",
    ),
    "a token that is the start": (
        {"concepts": [{**inline(), "token_index": [0]}]},
        422,
        "concepts[0].token_index",
        "concept",
    ),
    "a token that is text": (
        {"concepts": [{**inline(), "token_index": "first"}]},
        422,
        "concepts[0].token_index",
        "body",
    ),
    "no base64": ({"concepts": [inline(image="%%%")]}, 422, "concepts[0].references[0].image", "image"),
    "a data URL of text": (
        {"concepts": [inline(image="data:image/png,abc")]},
        422,
        "concepts[0].references[0].image",
        "image",
    ),
    "an empty image": ({"concepts": [inline(image="")]}, 422, "concepts[0].references[0].image", "image"),
    "no image": ({"concepts": [inline(image=text(b"hello"))]}, 422, "concepts[0].references[0].image", "image"),
    "half an image": (
        {"concepts": [inline(image=text(IMAGE[: len(IMAGE) // 2]))]},
        422,
        "concepts[0].references[0].image",
        "image",
    ),
    "a format that is not read": (
        {"concepts": [inline(image=text(FLOATS.getvalue()))]},
        422,
        "concepts[0].references[0].image",
        "image",
    ),
    "a bomb": ({"concepts": [inline(image=text(bomb(60_000)))]}, 422, "concepts[0].references[0].image", "image"),
    "a small bomb": ({"concepts": [inline(image=text(bomb(101)))]}, 422, "concepts[0].references[0].image", "image"),
    "a bomb of a mask": (
        {"concepts": [inline(mask=text(bomb(60_000)))]},
        422,
        "concepts[0].references[0].mask",
        "mask",
    ),
    "no mask and no alpha": ({"concepts": [inline(mask=None)]}, 422, "concepts[0].references[0].mask", "mask"),
    "an empty mask": (
        {"concepts": [inline(mask=text(png(Image.new("L", (96, 96)))))]},
        422,
        "concepts[0].references[0].mask",
        "mask",
    ),
    "a mask of another shape": (
        {"concepts": [inline(mask=text(png(Image.new("L", (90, 30), 255))))]},
        422,
        "concepts[0].references[0].mask",
        "mask",
    ),
    "a reference's prompt of too many tokens": (
        {"concepts": [inline(prompt="a " * 100)]},
        422,
        "concepts[0].references[0].prompt",
        "prompt",
    ),
    "a threshold of 0": (
        {"concepts": [inline(mask_threshold=0)]},
        422,
        "concepts[0].references[0].mask_threshold",
        "body",
    ),
}


@pytest.mark.parametrize(("changes", "status", "field", "kind"), ORDERS.values(), ids=ORDERS.keys())
def test_an_order_that_cannot_be_used_is_refused_by_name(
    http: httpx.Client, session: Gated, changes: dict[str, Any], status: int, field: str | None, kind: str
) -> None:
    answer = http.post("/v1/images", json={"prompt": PROMPT, **changes})
    assert (answer.status_code, answer.json()["field"], answer.json()["kind"]) == (status, field, kind), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert not session.calls


def test_a_bomb_is_seen_before_it_is_decoded(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(str(self.size)) or real(self))
    for image in (bomb(101), bomb(60_000), png(picture(1, size=101))):
        order = {"prompt": PROMPT, "concepts": [inline(image=text(image))]}
        for answer in (http.post("/v1/images", json=order), http.put("/v1/concepts", files=[("image", ("i", image))])):
            assert answer.status_code == 422
            assert "10,000" in answer.json()["detail"]
    assert not decoded


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 422),
        (b"{", {}, 400),
        (b"[]", {}, 422),
        (b"null", {}, 422),
        (b'"text"', {}, 422),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"prompt": "a \\ud800 b"}', {}, 422),
        (b'{"prompt": "a", "\\ud800": 1}', {}, 422),
        (b'{"prompt": "a", "guidance": NaN}', {}, 422),
        (b'{"prompt": "a", "guidance": 1e999}', {}, 422),
        (json.dumps({"prompt": PROMPT, "concepts": [{**inline(), "weight": float("nan")}]}).encode(), {}, 422),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 415),
        (b'{"prompt": "a"}', {"Accept": "text/html"}, 406),
        (b'{"prompt": "a"}', {"Accept": "image/png;q=0, application/json;q=x"}, 406),
    ],
)
def test_a_body_that_is_no_order_is_refused(
    http: httpx.Client, body: bytes, headers: dict[str, str], status: int
) -> None:
    answer = http.post("/v1/images", content=body, headers={"Content-Type": "application/json", **headers})
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == status
    assert "NaN" not in answer.text


def test_what_was_sent_is_not_repeated_in_the_answer(http: httpx.Client) -> None:
    secret = text(b"a photograph")
    for order in ({"prompt": {"x": secret}}, {"prompt": "a", "concepts": [{"image": secret, "weight": secret}]}):
        answer = http.post("/v1/images", json=order)
        assert answer.status_code == 422
        assert secret not in answer.text
        assert len(answer.json()["errors"]) >= 1


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"prompt": "a", "seed": 1, "seed": 2}', "seed"),
        (b'{"prompt": "a", "prompt": "a"}', "prompt"),
        (b'{"prompt": "a", "concepts": [{"id": "x", "weight": 1.0, "weight": 2.0}]}', "weight"),
        (b'{"prompt": "a", "concepts": [{"references": [{"mask": null, "image": "", "mask": ""}]}]}', "mask"),
        (b'{"prompt": "a", "s\\u0065ed": 1, "seed": 2}', "seed"),
        (b'{"prompt": "a", "\\ud800": 1, "\\ud800": 2}', "\\ud800"),
    ],
)
def test_a_key_of_a_body_that_stands_twice(http: httpx.Client, session: Gated, body: bytes, key: str) -> None:
    """As in a job; one reader takes the first, another the last."""
    answer = http.post("/v1/images", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["kind"]) == (422, "body"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"] == f"the key '{key}' stands twice in one object. Leave one out."
    assert not session.calls


BASE64 = {"Content-Transfer-Encoding": "Base64"}
FORM: dict[str, tuple[Any, int, str | None]] = {
    "no image": ([("word", (None, "man"))], 422, "image"),
    "an unknown part": ([("image", ("i", IMAGE)), ("colour", (None, "red"))], 422, "colour"),
    "a word twice": ([("image", ("i", IMAGE)), ("word", (None, "a")), ("word", (None, "b"))], 422, "word"),
    "steps as text": ([("image", ("i", IMAGE)), ("steps", (None, "many"))], 422, "steps"),
    "steps beyond counting": ([("image", ("i", IMAGE)), ("steps", (None, "9" * 20))], 422, "steps"),
    "more steps than are taken": ([("image", ("i", IMAGE)), ("steps", (None, "21"))], 422, "steps"),
    "no steps": ([("image", ("i", IMAGE)), ("steps", (None, "0"))], 422, "steps"),
    "a seed that is none": ([("image", ("i", IMAGE)), ("reference_seed", (None, "-1"))], 422, "reference_seed"),
    "a storage that is none": ([("image", ("i", IMAGE)), ("storage", (None, "4-bit"))], 422, "storage"),
    "a resample that is none": ([("image", ("i", IMAGE)), ("resample", (None, "best"))], 422, "resample"),
    "a threshold that is none": ([("image", ("i", IMAGE)), ("mask_threshold", (None, "300"))], 422, "mask_threshold"),
    "no mask and no alpha": ([("image", ("i", IMAGE))], 422, "mask"),
    "one mask for two images": ([("image", ("i", IMAGE))] * 2 + [("mask", ("m", MASK))], 422, "mask"),
    "three prompts for two images": (
        [("image", ("i", IMAGE)), ("mask", ("m", MASK))] * 2 + [("prompt", (None, "a"))] * 3,
        422,
        "prompt",
    ),
    "a mask of another shape": (
        [("image", ("i", IMAGE)), ("mask", ("m", png(Image.new("L", (90, 30), 255))))],
        422,
        "mask",
    ),
    "a bomb": ([("image", ("i", bomb(60_000))), ("mask", ("m", MASK))], 422, "image"),
    "a second image that is none": (
        [("image", ("i", IMAGE)), ("image", ("j", b"x")), ("mask", ("m", MASK)), ("mask", ("m", MASK))],
        422,
        "image[1]",
    ),
    "too many images": ([("image", ("i", IMAGE)), ("mask", ("m", MASK))] * 7, 422, "image"),
    "a prompt that is too long": (
        [("image", ("i", IMAGE)), ("mask", ("m", MASK)), ("prompt", (None, "a " * 100))],
        422,
        "prompt",
    ),
    "a blank word": ([("image", ("i", IMAGE)), ("mask", ("m", MASK)), ("word", (None, " "))], 422, "word"),
    "a word in base64": ([("image", ("i", IMAGE)), ("word", (None, "bWFu", "text/plain", BASE64))], 422, "word"),
    "an image in base64": ([("image", ("i", b64encode(IMAGE), "image/png", BASE64))], 422, "image"),
    "a word of latin-1": (
        [("image", ("i", IMAGE)), ("word", (None, b"m\xe4n", "text/plain; charset=Latin1"))],
        422,
        "word",
    ),
    "a word that is no text": ([("image", ("i", IMAGE)), ("word", (None, b"\xff"))], 422, "word"),
}


def test_a_form_may_have_something_around_its_parts_and_say_how_they_are_encoded(http: httpx.Client) -> None:
    plain = [("image", ("i", IMAGE)), ("mask", ("m", MASK)), ("word", (None, "m\u00e4n"))]
    said = [
        *plain[:2],
        ("word", (None, "m\u00e4n", "text/plain; charset=UTF-8", {"Content-Transfer-Encoding": "8bit"})),
    ]
    put = http.put("/v1/concepts", files=plain).json()
    for parts, before, after in ((said, b"", b""), (plain, b"--x\r\nA preamble\r\n", b"an epilogue\r\n--x")):
        request = http.build_request("PUT", "/v1/concepts", files=parts)
        kind = {"Content-Type": request.headers["Content-Type"]}
        again = http.put("/v1/concepts", content=before + request.read() + after, headers=kind)
        assert (again.status_code, again.json()["id"], again.json()["word"]) == (200, put["id"], "m\u00e4n"), again.text
    http.delete(f"/v1/concepts/{put['id']}")


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (
            b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            {},
            400,
            "an integer of the body has more than 4,300 digits",
        ),
        (b"[" * 50_000, {}, 400, "nested too deeply"),
        (b"{", {}, 400, "the body is not JSON"),
        (gzip.compress(b'{"prompt": "a"}'), {"Content-Encoding": "gzip"}, 415, "the body is packed as 'gzip'"),
    ],
    ids=["a long integer", "deep", "half", "packed"],
)
def test_why_a_body_cannot_be_read_is_said(
    http: httpx.Client, body: bytes, headers: Any, status: int, says: str
) -> None:
    answer = http.post("/v1/images", content=body, headers={"Content-Type": "application/json", **headers})
    assert answer.status_code == status
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(("parts", "status", "field"), FORM.values(), ids=FORM.keys())
def test_an_upload_that_cannot_be_used_is_refused_by_name(
    http: httpx.Client, session: Gated, parts: Any, status: int, field: str | None
) -> None:
    answer = http.put("/v1/concepts", files=parts)
    assert (answer.status_code, answer.json().get("field")) == (status, field), answer.text
    assert not session.prepared


def test_half_a_multipart_body_is_refused(http: httpx.Client, server: Running) -> None:
    request = http.build_request("PUT", "/v1/concepts", files=[("image", ("i", IMAGE)), ("mask", ("m", MASK))])
    whole, kind = request.read(), request.headers["Content-Type"]
    for body in (whole[: len(whole) // 2], whole[:-4], b"", b"--", whole.replace(b'name="image"', b"")):
        answer = http.put("/v1/concepts", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400, answer.text
    for wrong in ("multipart/form-data", "application/json", "multipart/mixed; boundary=x", ""):
        answer = http.put("/v1/concepts", content=whole, headers={"Content-Type": wrong})
        assert answer.status_code == 415, (wrong, answer.text)
    # and one whose sender goes away in the middle
    with socket.create_connection(server.socket.getsockname()) as connection:
        head = f"PUT /v1/concepts HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(whole)}\r\n\r\n"
        connection.sendall(head.encode() + whole[:100])


def test_a_body_that_is_too_large_or_too_slow_is_refused(http: httpx.Client, server: Running) -> None:
    declared = http.post("/v1/images", content=bytes(600_000), headers={"Content-Type": "application/json"})
    chunked = http.post(
        "/v1/images", content=(bytes(10_000) for _ in range(60)), headers={"Content-Type": "application/json"}
    )
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["kind"] == "body-too-large"
    with socket.create_connection(server.socket.getsockname()) as connection:
        connection.sendall(b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_stranger_takes_nothing_of_the_room_for_bodies(session: Gated) -> None:
    """Some paths need no token. What is sent to them, and stops before its end, is not kept."""
    settings = ServeSettings(default_steps=1, body_bytes=100_000, bodies_bytes=200_000, body_seconds=60)
    with running(session, settings=settings, tokens=Tokens(["s" * 32])) as server, ExitStack() as resources:
        room = next(one for one in walk(server.app) if isinstance(one, BodyLimitMiddleware))
        strangers = []
        for n in range(8):
            path, method = ("/healthz", "/readyz")[n % 2], ("POST", "GET")[n // 2 % 2]
            length = "Transfer-Encoding: chunked" if n // 4 else "Content-Length: 99000"
            strangers.append(resources.enter_context(socket.create_connection(server.socket.getsockname())))
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n"
            strangers[-1].sendall(head.encode() + b"9000\r\n" * (n // 4) + bytes(0x9000))
        most = 0
        for one in strangers:
            assert one.recv(100).startswith(b"HTTP/1.1 413 ")
            most = max(most, room.held_bytes)
        assert most == 0
        with httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
            assert http.get("/healthz").status_code == 200
            owner = {"Authorization": f"Bearer {'s' * 32}", "Content-Type": "application/json"}
            assert http.post("/v1/images", content=bytes(90_000), headers=owner).status_code == 400


def test_a_large_body_does_not_hold_up_others(session: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes that are taken by default: many values, and few that are long."""
    reading, free = threading.Event(), threading.Event()

    def held(kind: str | None, body: bytes) -> PictureOrder:
        reading.set()
        free.wait(60)
        return read_order(kind, body)

    monkeypatch.setattr("magicface_rt.serve.app.read_order", held)
    many = b'{"prompt": "a", "concepts": [' + b"1," * (15 * 2**20) + b"1]}"
    long = json.dumps(
        {"prompt": "a", "concepts": [{"word": "a", "references": [{"image": "A" * (31 * 2**20)}]}]}
    ).encode()
    with running(session, settings=ServeSettings(default_steps=1)) as server, ThreadPoolExecutor(1) as pool:

        def post(body: bytes) -> httpx.Response:
            headers = {"Content-Type": "application/json"}
            return httpx.post(f"{server.url}/v1/images", content=body, headers=headers, timeout=60, trust_env=False)

        for body, said in ((many, "more than 100,000 values"), (long, "concepts[0].references[0].image: ")):
            reading.clear()
            free.clear()
            sent = pool.submit(post, body)
            try:
                assert reading.wait(60)
                assert httpx.get(f"{server.url}/healthz", timeout=10, trust_env=False).status_code == 200
                assert not sent.done()
            finally:
                free.set()
            answer = sent.result(60)
            assert answer.status_code == 422
            assert said in answer.json()["detail"] or answer.json()["field"] == said.removesuffix(": ")


def test_orders_are_read_in_another_thread(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = PictureOrder.model_validate

    def noted(content: Any) -> PictureOrder:
        threads.append(threading.current_thread().name)
        return real(content)

    monkeypatch.setattr(PictureOrder, "model_validate", noted)
    with httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
        assert http.post("/v1/images", json={"prompt": 3}).status_code == 422
    assert threads
    assert server.thread.name not in threads


def test_a_body_counts_until_its_images_are_decoded_and_not_until_the_answer(server: Running, session: Gated) -> None:
    order = {"prompt": PROMPT, "concepts": [inline()], "steps": 3}
    room = next(one for one in walk(server.app) if isinstance(one, BodyLimitMiddleware))
    for extra in ({}, {"stream": True}):
        session.reset()
        session.free.clear()
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(
                httpx.post, f"{server.url}/v1/images", json={**order, **extra}, trust_env=False, timeout=60
            )
            session.wait_for_step()
            until(lambda: room.held_bytes == 0, "the body is held while the picture is made", 20)
            session.free.set()
            assert made.result(30).status_code == 200
    assert room.held_bytes == 0


def walk(app: Any) -> Iterator[Any]:
    """The applications around a FastAPI application's routes."""
    one = app.middleware_stack
    while one is not None:
        yield one
        one = getattr(one, "app", getattr(one, "_app", None))


def decoding_held(server: Running, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Decoding waits for the event that this returns."""
    free = threading.Event()
    real = local.parse_order

    def held(*given: Any) -> Any:
        free.wait(30)
        return real(*given)

    monkeypatch.setattr(local, "parse_order", held)
    return free


def test_what_is_being_decoded_counts_as_waiting_and_has_its_deadline(
    session: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServeSettings(default_steps=1, queue=3, decoders=1, batch_wait=0)
    with running(session, settings=settings) as server, ThreadPoolExecutor(4) as pool:
        free = decoding_held(server, monkeypatch)

        def post(**more: Any) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/images", json={"prompt": PROMPT, **more}, trust_env=False, timeout=30)

        try:
            waiting = [pool.submit(post) for _ in range(2)]
            until(lambda: server.service._arriving == 2, "the requests did not come")
            late = post(deadline=0.2)
            assert (late.status_code, late.json()["kind"]) == (504, "deadline-passed")
            waiting.append(pool.submit(post))
            until(lambda: server.service._arriving == 3, "the third did not come")
            refused = post()
            assert (refused.status_code, refused.json()["kind"]) == (429, "queue-full")
            upload = httpx.put(f"{server.url}/v1/concepts", files=[("image", ("i", IMAGE))], trust_env=False)
            assert upload.status_code == 429
        finally:
            free.set()
        assert [one.result(30).status_code for one in waiting] == [200] * 3
        assert server.service._arriving == 0


def test_a_deadline_holds_while_a_kept_concept_is_read(session: Gated, tmp_path: Path) -> None:
    reading, read = threading.Event(), threading.Event()

    class Slow(FolderConcepts):
        def get(self, id: str) -> StoredConcept:
            reading.set()
            assert read.wait(30)
            return super().get(id)

    store = Slow(tmp_path)
    with running(session, store=store, settings=ServeSettings(default_steps=1)) as server:
        read.set()
        with server.client() as client:
            id = client.put_concept(concept("man", 1)).id
        read.clear()
        order = {"prompt": PROMPT, "concepts": [{"id": id}], "deadline": 0.2}
        try:
            late = httpx.post(f"{server.url}/v1/images", json=order, trust_env=False, timeout=20)
            assert reading.is_set()
            assert (late.status_code, late.json()["kind"]) == (504, "deadline-passed")
        finally:
            read.set()


def test_a_finished_picture_does_not_wait_behind_uploads(session: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServeSettings(default_steps=1, decoders=1, batch_wait=0)
    with running(session, settings=settings) as server, ThreadPoolExecutor(2) as pool:
        session.free.clear()
        url, order = f"{server.url}/v1/images", {"prompt": PROMPT}
        first = pool.submit(httpx.post, url, json=order, trust_env=False, timeout=30)
        session.wait_for_step()
        free = decoding_held(server, monkeypatch)
        try:
            second = pool.submit(httpx.post, url, json=order, trust_env=False, timeout=30)
            until(lambda: server.service._arriving == 1, "the second did not come")
            session.free.set()
            assert first.result(15).status_code == 200
        finally:
            free.set()
        assert second.result(30).status_code == 200


def test_images_of_all_requests_together_are_limited(session: Gated, http: httpx.Client) -> None:
    settings = ServeSettings(default_steps=1, held_pixels=30_000)
    with running(session, settings=settings) as server, ThreadPoolExecutor(1) as pool:
        session.free.clear()
        order = {"prompt": PROMPT, "concepts": [inline()]}
        first = pool.submit(httpx.post, f"{server.url}/v1/images", json=order, trust_env=False, timeout=30)
        session.wait_for_step()
        with httpx.Client(base_url=server.url, trust_env=False, verify=False) as more:
            refused = more.post("/v1/images", json=order)
            assert (refused.status_code, refused.json()["kind"]) == (429, "queue-full")
            session.free.set()
            assert first.result(30).status_code == 200
            assert more.post("/v1/images", json=order).status_code == 200


def test_paths_and_methods_that_there_are_not(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/images", 405),
        ("POST", "/v1/concepts", 405),
        ("PATCH", "/v1/bundle", 405),
        ("GET", f"/v1/concepts/{ID}", 404),
        ("DELETE", "/v1/concepts/..%2f..%2fetc", 404),
        ("DELETE", "/v1/concepts/%00", 404),
        ("DELETE", "/v1/concepts/" + "x" * 3000, 404),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status, (method, path)
        assert answer.json()["status"] == status


HOSTS = {
    "localhost": 200,
    "LOCALHOST:8000": 200,
    "127.0.0.1": 200,
    "127.0.0.1:1": 200,
    "[::1]:8000": 200,
    "evil.example": 403,
    "evil.example:8000": 403,
    "127.0.0.1.evil.example": 403,
    "localhost.": 403,
    "localhost:8000@evil.example": 403,
    "0.0.0.0:8000": 403,
    "": 403,
}


def test_a_service_of_this_machine_answers_to_no_name_that_a_page_made_up(server: Running) -> None:
    async def ask() -> None:
        app = build_app(server.service, settings=SETTINGS, hosts=LOOPBACK_NAMES)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            for path in ("/v1/bundle", "/healthz", "/metrics", "/nothing"):
                for host, status in HOSTS.items():
                    answer = await http.get(path, headers={"Host": host})
                    if status == 403:
                        assert (answer.status_code, answer.json()["kind"]) == (403, "host"), (path, host)
                        assert "--tokens" in answer.json()["detail"]
                        assert answer.headers["content-type"] == "application/problem+json"
                    else:
                        assert answer.status_code != 403, (path, host)
            two = [("Host", "localhost"), ("Host", "evil.example")]
            assert (await http.get("/healthz", headers=two)).status_code == 403

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("host", "tokens", "name", "status"),
    [
        ("127.0.0.1", None, "evil.example", 403),
        ("127.0.0.1", None, "localhost", 200),
        ("127.0.0.2", None, "127.0.0.2", 200),
        ("127.0.0.2", None, "evil.example", 403),
        ("127.0.0.1", Tokens([TOKEN]), "evil.example", 200),
        ("0.0.0.0", None, "evil.example", 200),
    ],
)
def test_names_are_looked_at_where_nothing_else_keeps_strangers_out(
    session: Gated, monkeypatch: pytest.MonkeyPatch, host: str, tokens: Tokens | None, name: str, status: int
) -> None:
    answered: list[int] = []

    class Asked(Server):
        def run(self, sockets: Any = None) -> None:
            url = f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{sockets[0].getsockname()[1]}/healthz"

            def ask() -> None:
                until(lambda: self.started, "the server did not start")
                answered.append(httpx.get(url, headers={"Host": name}, trust_env=False).status_code)
                self.stop()

            asking = threading.Thread(target=ask)
            asking.start()
            super().run(sockets)
            asking.join(30)

    monkeypatch.setattr("magicface_rt.serve.server.Server", Asked)
    serve([session], settings=SETTINGS, host=host, port=0, tokens=tokens)
    assert answered == [status]


def test_nobody_chooses_whose_turn_it_is_by_a_header(server: Running, http: httpx.Client) -> None:
    owners: list[str] = []
    real = server.service.generate

    async def noted(order: Any, *, owner: str, listener: Any = None) -> Any:
        owners.append(owner)
        return await real(order, owner=owner, listener=listener)

    server.service.generate = noted  # type: ignore[method-assign]
    try:
        for address in ("192.0.2.1", "192.0.2.2"):
            headers = {"X-Forwarded-For": address, "Forwarded": f"for={address}"}
            http.post("/v1/images", json={"prompt": PROMPT}, headers=headers).raise_for_status()
    finally:
        server.service.generate = real  # type: ignore[method-assign]
    assert owners == ["127.0.0.1"] * 2


def test_a_kept_concept_does_not_fit_every_request(http: httpx.Client, server: Running) -> None:
    with server.client() as client:
        kept = client.put_concept(concept("man", 1), steps=2)
        for settings in ({"steps": 3}, {"reference_seed": 5}):
            with pytest.raises(AnswerError) as refused:
                client.generate(PROMPT, [kept], **settings)
            assert (refused.value.status, refused.value.field) == (422, "concepts[0].id")
        with pytest.raises(AnswerError, match="'man' is not in the prompt") as refused:
            client.generate("a house", [kept])
        assert refused.value.field == "concepts[0].word"
        client.erase(kept)
        parts = [("image", ("i", IMAGE)), ("mask", ("m", MASK))]
        nameless = http.put("/v1/concepts", files=parts).json()
        assert nameless["word"] is None
        with pytest.raises(AnswerError, match="put without a word") as refused:
            client.generate(PROMPT, [nameless["id"]])
        assert refused.value.field == "concepts[0].word"
        client.generate(PROMPT, [{"id": nameless["id"], "word": "hat"}])
        made = client.generate(PROMPT, [{"id": nameless["id"], "token_index": 2}])
        assert [made.settings["concepts"][0][key] for key in ("word", "name")] == ["man", "concept"]
        with pytest.raises(AnswerError, match="token_index 70 is outside"):
            client.generate(PROMPT, [{"id": nameless["id"], "token_index": [70]}])
        client.erase(nameless["id"])


def test_a_concept_of_another_bundle_is_refused(session: Gated, tmp_path: Path) -> None:
    from dataclasses import replace

    from magicface_rt import KeptConcept

    kept = session.prepare(concept("man", 1), steps=1)
    foreign = KeptConcept("man", kept.references, replace(kept.origin, bundle_hash="f" * 64))
    store = FolderConcepts(tmp_path)
    store.put(ID, foreign)
    with running(session, store=store, settings=SETTINGS) as server, server.client() as client:
        with pytest.raises(AnswerError, match="is of the bundle ffffffffffffffff") as refused:
            client.generate(PROMPT, [ID])
        assert (refused.value.status, refused.value.field) == (422, "concepts[0].id")
        assert client.concept(ID).info["bundle"] == "f" * 64


def test_only_who_has_a_token_is_served(session: Gated, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# mine\n\n{TOKEN}\n{'x' * 40}\n")
    tokens = Tokens.read(file)
    assert TOKEN not in repr(tokens) + str(vars(tokens))
    with running(session, settings=SETTINGS, tokens=tokens) as server:
        with httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
            for header in (
                None,
                "Bearer wrong-wrong-wrong",
                f"Basic {TOKEN}",
                "Bearer",
                f"Bearer {TOKEN}x",
                "Bearer ü",
            ):
                headers = {} if header is None else {"Authorization": header.encode("latin-1")}
                for path in ("/v1/bundle", "/v1/concepts", "/metrics", "/openapi.json", "/nothing"):
                    answer = http.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert answer.json()["kind"] == "unauthorized"
            assert http.post("/v1/images", content=bytes(600_000)).status_code == 401
            assert http.get("/healthz").status_code == http.get("/readyz").status_code == 200
        with server.client(token=TOKEN) as client, server.client(token="x" * 40) as other:
            assert client.bundle() == other.bundle()
            client.generate(PROMPT, steps=1)


def test_tokens_that_cannot_be_used_are_refused_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    for content, reason in (("", "holds no token"), ("short-one", "9 characters"), ("ü" * 20, "printable ASCII")):
        file.write_text(content)
        with pytest.raises(OptionError, match=reason) as refused:
            Tokens.read(file)
        assert not content or content not in str(refused.value)
    with pytest.raises(OptionError, match="cannot be read"):
        Tokens.read(tmp_path / "missing")
    assert not Tokens.read(None, {})
    assert Tokens.read(None, {"MAGICFACE_RT_TOKENS": TOKEN}).owner(f"bearer {TOKEN}", "x") != "x"
    with pytest.raises(OptionError, match="MAGICFACE_RT_TOKENS holds no token"):
        Tokens.read(None, {"MAGICFACE_RT_TOKENS": " \n"})


def test_a_bundle_that_vanishes_fails_requests_and_not_the_service(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    with (
        Gated(copy, backend="onnxruntime-cpu", threads=1) as session,
        running(session, settings=SETTINGS) as server,
        server.client() as client,
    ):
        aside = copy.rename(tmp_path / "aside")
        with pytest.raises(AnswerError) as refused:
            client.generate(PROMPT)
        assert refused.value.status == 503
        assert str(tmp_path) not in str(refused.value)
        assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200
        aside.rename(copy)
        client.generate(PROMPT)
        copy.rename(tmp_path / "aside")  # what is loaded stays
        client.generate(PROMPT)


def test_an_error_of_ours_is_a_problem_without_details(server: Running, session: Gated, monkeypatch: Any) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("/a/secret/path")

    monkeypatch.setattr(Gated, "generate_batch", fails)
    with pytest.raises(AnswerError) as refused, server.client() as client:
        client.generate(PROMPT)
    assert (refused.value.status, refused.value.kind) == (500, "internal")
    assert "secret" not in str(refused.value)
    until(lambda: server.service.engine.running == 0, "the job did not end")
    monkeypatch.undo()


def test_what_was_not_foreseen_is_logged_once_and_its_connection_goes_on(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise ZeroDivisionError("/a/secret/path")

    def asked() -> tuple[httpx.Response, object]:
        answer = http.get("/v1/concepts")
        return answer, answer.extensions["network_stream"].get_extra_info("client_addr")

    _, before = asked()
    monkeypatch.setattr(server.service, "concepts", fails)
    answer, then = asked()
    monkeypatch.undo()
    assert (answer.status_code, answer.json()["kind"]) == (500, "internal")
    assert "secret" not in answer.text
    _, after = asked()
    assert before == then == after
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["a request failed"]
    assert 'magicface_errors_total{kind="internal"}' in http.get("/metrics").text


def test_the_log_says_what_failed_and_not_for_whom(
    server: Running, session: Gated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of a preparation begins with the concept's name, which is a client's."""

    def spoiled(*_: Any, **__: Any) -> Any:
        try:
            raise NonFiniteError("graph reference_kv: k_ref_10 is not finite")
        except NonFiniteError as error:
            raise NonFiniteError(f"concept 'pelican': {error}") from error

    monkeypatch.setattr(session, "generate_batch", spoiled)
    with server.client() as client, pytest.raises(AnswerError) as failed:
        client.generate("a pelican with a hat", [concept("hat", 2, name="pelican")], steps=1)
    assert (failed.value.status, failed.value.kind) == (500, "not-finite")
    assert "pelican" not in caplog.text
    assert "graph reference_kv: k_ref_10 is not finite" in caplog.text


def test_the_log_has_nothing_of_a_request(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with server.client() as client:
        client.generate("a pelican with a hat", [concept("hat", 2)], steps=1)
        with pytest.raises(AnswerError):
            client.generate("a pelican", [concept("hat", 2)], steps=1)
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "PIL"))
    ]
    assert "pelican" not in " ".join(ours)
