"""Bodies of requests, through the whole HTTP application but the network: forms, orders, and pieces that come slowly.

Behind the application stands a service that reads a request as the real one does, with a bundle and a tokenizer, and
then says that it is full. So an input is accepted where the answer is 507, and nothing is computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from corruptions import ODD_BYTES, edits_of, png_of, texts_of, with_key_twice
from hypothesis import strategies as st
from outcomes import inputs, judged, loop
from PIL import Image
from single_files import encoded

pytest.importorskip("fastapi")

from door import BOUNDARY, END, FINE, FORM, FULL, IMAGE, JSON, MASK, ORDER, SETTINGS, SOUND, Door, answered, part, text

from magicface_rt import Bundle
from magicface_rt.serve import ServeSettings
from magicface_rt.serve.access import LOOPBACK_NAMES
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.bodies import BodyLimitMiddleware
from magicface_rt.serve.multipart import MOST_HEADER_BYTES, MOST_PARTS, read_form
from magicface_rt.serve.reading import FORM_PARTS


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture(scope="module")
def door(bundle: Bundle) -> Iterator[Door]:
    opened = Door(bundle)
    yield opened
    opened.loop.close()


# -------------------------------------------------------------------------------------------------------------- forms


def put(door: Door, body: bytes, kind: str = FORM) -> int:
    return answered("form", lambda: door.ask("PUT", "/v1/concepts", kind, [body]))


def test_a_sound_form(door: Door) -> None:
    assert put(door, SOUND) == FULL


@inputs
def test_any_edit_of_a_form(inputs: int, door: Door) -> None:
    loop(inputs, edits_of(SOUND), lambda body: put(door, body))


@inputs
def test_any_parts(inputs: int, door: Door) -> None:
    names = st.sampled_from([*FORM_PARTS, "colour", "", "a" * 5000, 'a"; name="image'])
    values = st.sampled_from([IMAGE, MASK, IMAGE[:50], png_of(9000, 9000), b"", b"3", b"8-bit", *ODD_BYTES])
    heads = st.sampled_from(
        [b"", b"Content-Type: image/png\r\n", b"X: y\r\n" * 3, b"Content-Disposition: form-data\r\n"]
    )
    parts = st.lists(st.tuples(names, values | st.binary(max_size=20), heads), max_size=6)
    kinds = st.sampled_from(
        [FORM, FORM, FORM, f"{FORM}; charset=x", "multipart/form-data", "multipart/form-data; boundary="]
    )

    bodies = parts.map(lambda found: b"".join(part(*each) for each in found))
    ends = st.sampled_from([END, END, b"", END[:-4], END + SOUND])
    whole = st.tuples(bodies, ends).map(lambda two: two[0] + two[1])
    loop(inputs, st.tuples(whole, kinds), lambda one: put(door, *one))


@inputs
def test_any_content_type(inputs: int, door: Door) -> None:
    kinds = st.text("multipart/form-data; boundary=\"'frontier*%\\,", max_size=60) | st.text(max_size=20)
    as_sent = kinds.map(lambda kind: kind.encode("latin-1", "replace").decode("latin-1"))
    loop(inputs, as_sent, lambda kind: put(door, SOUND, kind))


LONG_FORMS = {
    "lines": b"\r\n" * 10_000_000,
    "hyphens": b"-" * 20_000_000,
    "headers": part("image", b"", b"A: b\r\n" * 3_000_000) + END,
    "one header": part("image", b"", b"A: " + b"b" * 20_000_000 + b"\r\n") + END,
    "a name": part("a" * 20_000_000, b"") + END,
    "parts": part("image", b"") * 300_000 + END,
    "returns in a part": part("image", b"\r" * 20_000_000) + END,
    "boundaries that are none": part("image", f"\r\n--{BOUNDARY}x".encode() * 1_500_000) + END,
    "what comes after the end": SOUND + b"\r\n" * 10_000_000,
    "options of a header": part("image", b"", b"Content-Disposition: form-data" + b';a="' * 1000 + b"\r\n") + END,
}


@pytest.mark.parametrize("case", LONG_FORMS)
def test_a_form_that_is_as_long_as_it_may_be(case: str) -> None:
    """Read in a thread, but by Python, a byte at a time where it is written so."""
    body = LONG_FORMS[case]
    judged(
        "form, long",
        lambda: read_form(FORM, body, FORM_PARTS),
        names=("the multipart body", "the part '"),
        memory=300 << 20,
    )


def test_the_headers_of_a_part_are_counted_together(door: Door) -> None:
    """Each was short, and there was no end of them, whichever release of the parser is installed."""
    more = b"".join(b"A%d: b\r\n" % k for k in range(MOST_HEADER_BYTES // 3))
    assert put(door, part("image", IMAGE, more) + END) == 400
    assert put(door, part("image", b"") * (MOST_PARTS + 1) + END) == 422


# ------------------------------------------------------------------------------------------------------------- orders


def post(door: Door, body: bytes, *, memory: int = 256 << 20) -> int:
    return answered("order", lambda: door.ask("POST", "/v1/images", JSON, [body]), memory)


def test_a_sound_order(door: Door) -> None:
    assert post(door, json.dumps(ORDER).encode()) == FULL


@inputs
def test_any_edit_of_an_order(inputs: int, door: Door) -> None:
    loop(inputs, edits_of(json.dumps(ORDER).encode()), lambda body: post(door, body))


@inputs
def test_any_other_value_of_an_order(inputs: int, door: Door) -> None:
    loop(inputs, texts_of(ORDER), lambda body: post(door, body))


@pytest.mark.parametrize(
    ("key", "value"), [("steps", "2"), ("steps", "1000000"), ("seed", "3"), ("weight", "2.5"), ("image", '""')]
)
def test_a_key_that_stands_twice_is_refused(door: Door, key: str, value: str) -> None:
    """Whichever of the two is sound: one reader takes the first, another the last."""
    assert post(door, with_key_twice(json.dumps(ORDER), key, value).encode()) == 422
    assert post(door, json.dumps(ORDER).replace('"steps": 2', f'"steps": 2, "steps": {value}').encode()) == 422


def test_references_are_counted_before_an_image_of_them_is_decoded(bundle: Bundle) -> None:
    """Of files of 50 kB each one request held 64 for each concept, 16 million pixels every one: tens of gigabytes."""
    settings = ServeSettings(body_bytes=64 << 20, bodies_bytes=64 << 20)
    white = Image.new("L", (4000, 4000), 255)
    one = {"image": text(encoded("PNG", white, optimize=True)), "mask": text(encoded("PNG", white, optimize=True))}
    order = {"prompt": "a man with a hat", "concepts": [{"word": "man", "references": [one] * 40}]}
    body = json.dumps(order).encode()
    assert len(body) < 5 << 20
    door = Door(bundle, settings)
    try:
        assert post(door, body, memory=200 << 20) == 422
        few = {**order, "concepts": [{"word": "man", "references": [one]}]}
        assert post(door, json.dumps(few).encode(), memory=600 << 20) == FULL
    finally:
        door.loop.close()


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 390_000,
        b'{"prompt":' * 39_000,
        b'{"prompt": "' + b"a" * 390_000 + b'"}',
        b'{"prompt": "a", "seed": ' + b"9" * 390_000 + b"}",
        b'{"prompt": "a", "concepts": [' + b"{}," * 100_000 + b"{}]}",
        b'{"prompt": "a", ' + b",".join(b'"k%d": 1' % k for k in range(30_000)) + b"}",
        b'{"prompt": "a", "concepts": [{"word": "man", "token_index": [' + b"1," * 150_000 + b"1]}]}",
    ],
    ids=["lists", "objects", "text", "digits", "concepts", "keys", "tokens"],
)
def test_an_order_as_long_as_it_may_be(body: bytes, door: Door) -> None:
    assert post(door, body) in (400, 422)


# ------------------------------------------------------------------------------------------------------------ headers

HEADERS = [
    "authorization",
    "host",
    "content-length",
    "content-type",
    "content-encoding",
    "transfer-encoding",
    "accept",
    "expect",
    "cookie",
    "origin",
    "referer",
    "range",
    "x-forwarded-for",
    "x-forwarded-proto",
    "forwarded",
    "via",
]
VALUES = [
    "",
    "0",
    "-1",
    "9" * 400,
    "Bearer",
    "Bearer " + "x" * 40,
    "bearer \xff",
    "Basic YTpi",
    "chunked",
    "gzip",
    "*/*",
    "localhost",
    "[::1]:80",
    "[",
    "a:b:c",
    "x" * 60_000,
    "multipart/form-data",
    f"{FORM}; boundary=",
    "text/\xff",
    "application/json; charset=utf-16",
    "application/json; charset=no-such",
    "http://x",
    "null",
    "bytes=0-",
]


@inputs
def test_any_headers(inputs: int, bundle: Bundle) -> None:
    """Of a service that asks for a token, and of one that does not, which looks at the name that it is called by."""
    token = "0123456789abcdef" * 2
    right = {"authorization": f"Bearer {token}", "host": "localhost:8000"}
    doors = {"authorization": Door(bundle, tokens=Tokens([token])), "host": Door(bundle, hosts=LOOPBACK_NAMES)}
    values = st.sampled_from(VALUES) | st.text(max_size=10)
    pairs = st.tuples(st.sampled_from(HEADERS), values.map(lambda value: value.encode("latin-1", "replace")))
    bodies = {JSON: json.dumps(ORDER).encode(), FORM: SOUND, "": b"x"}
    asked = st.sampled_from([("POST", "/v1/images"), ("PUT", "/v1/concepts"), ("POST", "/v1/concepts"), ("GET", "/x")])

    def check(one: tuple[str, bool, tuple[str, str], str, list[tuple[str, bytes]]]) -> None:
        needed, given, (method, path), kind, headers = one
        raw = [(name.encode(), value) for name, value in headers if name != needed]
        if given:
            raw.append((needed.encode(), right[needed].encode()))
        elif needed == "host":
            raw.append((b"host", b"evil.example"))
        status = answered(
            "headers",
            lambda: doors[needed].ask(method, path, kind, [bodies[kind]], raw, host=None),
            fine=FINE | {401, 403, 405, 421},
        )
        assert (status in (401, 403)) == (not given)

    kinds = st.sampled_from([JSON, FORM, ""])
    loop(
        inputs,
        st.tuples(st.sampled_from(sorted(doors)), st.booleans(), asked, kinds, st.lists(pairs, max_size=5)),
        check,
    )
    for door in doors.values():
        door.loop.close()


# ------------------------------------------------------------------------------------------------------------- pieces


def bodies_of(door: Door) -> BodyLimitMiddleware:
    """What holds the bodies, of the application's middleware."""
    found: Any = door.app.middleware_stack
    while not isinstance(found, BodyLimitMiddleware):
        found = getattr(found, "_app", None) or found.app
    return found


@inputs
def test_any_pieces(inputs: int, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a body comes, no more of it is held than may be, and nothing of it afterwards."""
    most: list[int] = []
    take = BodyLimitMiddleware.take

    def taken(self: BodyLimitMiddleware, nbytes: int) -> None:
        take(self, nbytes)
        most.append(self.held_bytes)

    monkeypatch.setattr(BodyLimitMiddleware, "take", taken)
    assert answered("pieces", lambda: door.ask("POST", "/v1/images", JSON, [b"{}"])) == 422  # builds the application
    assert most
    pieces = st.lists(st.integers(0, 150_000), min_size=1, max_size=8)
    lengths = (
        st.none() | st.integers(0, 10**6).map(str) | st.sampled_from(["-1", "x", "9" * 25, "\u0663", "1e9", "+5", ""])
    )

    held = bodies_of(door)

    def check(one: tuple[list[int], str | None]) -> None:
        sizes, length = one
        most.clear()
        headers = [] if length is None else [(b"content-length", length.encode("latin-1", "replace"))]
        status = answered(
            "pieces", lambda: door.ask("POST", "/v1/images", JSON, [b" " * size for size in sizes], headers)
        )
        if sum(sizes) > SETTINGS.body_bytes:
            assert status == 413
        assert max(most, default=0) <= SETTINGS.body_bytes
        assert held.held_bytes == 0

    loop(inputs, st.tuples(pieces, lengths), check)
    body = json.dumps(ORDER).encode()
    assert answered("pieces", lambda: door.ask("POST", "/v1/images", JSON, [body[:9], b"", body[9:]])) == FULL
