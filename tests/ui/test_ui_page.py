"""The page over HTTP, without a browser: what it answers, what it refuses, and what it leaves behind."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio import processing_utils
from paging import Held, Served, Tab, bomb, bridged, disc, dot, photograph, png, served, until
from PIL import Image
from writes import Writes

from magicface_rt import Concept, Reference
from magicface_rt.serve import ServeSettings
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.schemas import MOST_TEXT
from magicface_rt.serve.server import CLOSE_SECONDS
from magicface_rt.tokenizer import Tokenizer
from magicface_rt.ui.file_names import file_names
from magicface_rt.ui.mounting import TABS

PROMPT = "a man with a hat"
MAN, MASK, BLACK = png(photograph(1)), png(disc()), png(Image.new("L", (96, 96)))
SECRET = "a man who is nowhere else"
TOKEN = "0123456789abcdef"
WORD = "Word of the prompt that it stands for"


@pytest.fixture(scope="module")
def server(session: Held) -> Iterator[Served]:
    with served(session) as started:
        yield started


@pytest.fixture
def tab(server: Served) -> Iterator[Tab]:
    with server.http() as http:
        yield Tab(http)


def picture_of(html: str) -> bytes:
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found is not None, html[:300]
    return base64.b64decode(found.group(1))


def generated(tab: Tab, photographs: str, **fields: object) -> list[str]:
    given = {"Prompt": PROMPT, WORD: "man", "Steps": 2, "Seed": 3, **fields}
    return tab.generate(photographs, **given)


def test_the_picture_is_the_sessions_and_every_step_has_its_regions(tab: Tab, session: Held) -> None:
    status, result, timings, *_ = tab.generate(
        bridged((1, MAN, MASK), (2, png(photograph(2)), MASK)),
        **{"Prompt": PROMPT, WORD: ["man", "hat"], "Weight": [2.5, 2.0], "Steps": 4, "Seed": 3},
    )
    man = Concept("man", Reference(photograph(1), mask=disc()), weight=2.5)
    hat = Concept("hat", Reference(photograph(2), mask=disc()), weight=2.0)
    expected = session.generate(PROMPT, [man, hat], steps=4, seed=3, record_regions=True)
    assert "Done in" in status
    assert picture_of(result) == png(expected.images[0])
    shown = json.loads(re.search(r'data-regions="([^"]+)"', result).group(1).replace("&quot;", '"'))  # type: ignore[union-attr]
    labels = np.frombuffer(base64.b64decode(shown["labels"]), np.uint8)
    assert expected.regions_per_step is not None
    np.testing.assert_array_equal(labels, expected.regions_per_step[:, 0].ravel())
    assert len({step.tobytes() for step in expected.regions_per_step}) > 1, "nothing is shown where all are the same"
    assert shown["stages"] == ["RSA", "RSA", "RBA", "RBA"]
    assert shown["names"] == ["man", "hat"]
    assert "U-Net over the picture" in timings


def test_what_was_done_and_may_not_have_been_meant_stands_beside_the_picture(tab: Tab) -> None:
    status, *_ = generated(tab, bridged((1, MAN, png(dot()))))
    assert "Done in" in status
    assert "may not have been meant" in status
    assert "the mask vanishes on the" in status
    for mask in (MASK, png(disc((48, 48)))):  # of a large photograph the page sends a smaller mask
        status, *_ = generated(tab, bridged((1, MAN, mask)))
        assert "Done in" in status
        assert "meant" not in status


def test_every_field_counts_and_belongs_to_the_concept_in_whose_block_it_stands(tab: Tab, session: Held) -> None:
    prompt = "a man with a hat beside a man"
    half = Image.new("L", (96, 96))
    half.paste(255, (0, 0, 48, 96))
    _, result, *_ = tab.generate(
        bridged((2, png(photograph(2)), MASK), (3, MAN, png(half))),
        **{
            "Prompt": prompt,
            WORD: [None, "hat", "man (2)"],
            "Weight": [3.0, 2.2, 1.5],
            "What the photograph shows": ["", "a hat", "a man"],
            "Alpha": 0.2,
            "Steps": 4,
            "Seed": 11,
            "Guidance": 4.5,
            "Negative prompt": "rain",
        },
    )
    hat = Concept("hat", Reference(photograph(2), mask=disc(), prompt="a hat"), weight=2.2)
    man = Concept("man", Reference(photograph(1), mask=half, prompt="a man"), weight=1.5, token_index=8)
    settings = {"alpha": 0.2, "steps": 4, "seed": 11, "guidance": 4.5, "negative_prompt": "rain"}
    assert picture_of(result) == png(session.generate(prompt, [hat, man], **settings).images[0])


def test_it_says_after_every_step_where_the_picture_stands(tab: Tab) -> None:
    tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=4, Alpha=0.4))
    found = [re.search(r"Step (\d) of 4, (\w+) stage", json.dumps(message)) for message in tab.news()]
    assert [one.groups() for one in found if one] == [("1", "first"), ("2", "first"), ("3", "second"), ("4", "second")]


def test_words_are_looked_for_beside_the_event_loop(tab: Tab, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[object] = []
    real = Tokenizer._raw_encode

    def noted(self: Tokenizer, text: str, what: str) -> object:
        threads.append(threading.current_thread())
        return real(self, text, what)

    monkeypatch.setattr(Tokenizer, "_raw_encode", noted)
    offered = tab.outcome("words", [PROMPT])
    assert [choice[0] for choice in offered[0]["choices"]] == ["a", "man", "with", "a (2)", "hat"]
    status, *_ = generated(tab, bridged((1, MAN, MASK)))
    assert "Done in" in status
    assert threads
    assert server.thread not in threads


def test_a_prompt_that_no_request_takes_is_not_looked_through(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    real = Tokenizer._raw_encode
    monkeypatch.setattr(
        Tokenizer, "_raw_encode", lambda self, text, what: encoded.append(len(text)) or real(self, text, what)
    )
    long = " " * 2_000_000 + " ".join(f"w{k}" for k in range(25))
    assert not any(one["choices"] for one in tab.outcome("words", [long]))
    status, *_ = generated(tab, bridged(), Prompt=long)
    assert f"at most {MOST_TEXT} characters" in status
    assert max(encoded, default=0) <= MOST_TEXT


def test_no_concept_makes_the_picture_of_the_prompt_alone(tab: Tab, session: Held) -> None:
    _, result, *_ = tab.generate(bridged(), Prompt="a house", Steps=2)
    assert picture_of(result) == png(session.generate("a house", steps=2).images[0])
    assert "data-regions" not in result


@pytest.mark.parametrize(
    ("photographs", "fields", "said"),
    [
        pytest.param(bridged((1, MAN, png(disc((64, 96))))), {}, r"mask.* is 64 x 96, its image 96 x 96", id="size"),
        pytest.param(
            bridged((1, MAN, MASK)),
            {WORD: "cat"},
            r"Concept 1, word:</strong> concept &#x27;cat&#x27;: the word &#x27;cat&#x27; is not in the prompt",
            id="word",
        ),
        pytest.param(
            bridged((1, MAN, BLACK)),
            {},
            r"Concept 1, mask:.*the mask is empty",
            id="empty",
        ),
        pytest.param(bridged((1, b"", None)), {}, r"Concept 1, photograph:.*the image is empty", id="none"),
        pytest.param(bridged((1, b"hello", None)), {}, r"photograph:.*cannot be read", id="damaged"),
        pytest.param(bridged((1, MAN, MASK)), {WORD: None}, "word is missing", id="no-word"),
        pytest.param(bridged(), {"Prompt": "man " * 100}, "Prompt:.*at most 75 fit", id="prompt"),
        pytest.param(bridged(), {"Seed": -1}, "seed: ", id="seed"),
        pytest.param('{"problem": "<b>too large</b>"}', {}, "&lt;b&gt;too large", id="script"),
    ],
)
def test_what_cannot_be_used_stands_on_the_page_which_goes_on(
    tab: Tab, photographs: str, fields: dict[str, object], said: str
) -> None:
    status, *_ = generated(tab, photographs, **fields)
    assert 'role="alert"' in status
    assert re.search(said, status), status
    status, *_ = generated(tab, bridged((1, MAN, MASK)))
    assert "Done in" in status


def test_a_bomb_is_refused_by_its_header(tab: Tab) -> None:
    status, *_ = generated(tab, bridged((1, bomb(), None)))
    assert "the image has more than the 16,000,000 pixels that are taken" in status


def test_tabs_do_not_see_each_others_pictures(server: Served, tab: Tab, session: Held) -> None:
    with server.http() as http:
        other = Tab(http)
        session.free.clear()
        tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=2, Seed=1))
        other.send("generate", other.values("generate", bridge=bridged(), Prompt="a tree", Steps=2, Seed=2))
        session.free.set()
        results = [
            next(m for m in one.news() if m["msg"] == "process_completed")["output"]["data"][1] for one in (tab, other)
        ]
    expected = [session.generate(p, steps=2, seed=s).images[0] for p, s in (("a house", 1), ("a tree", 2))]
    assert [picture_of(result) for result in results] == [png(image) for image in expected]


def test_cancel_stops_at_the_next_step(server: Served, tab: Tab, session: Held) -> None:
    session.free.clear()
    before = session.steps
    tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=50))
    until(lambda: session.steps > before, "no step was reached")
    tab.send("cancel", [])
    messages = []
    for message in tab.news():
        messages.append(message)
        if message["msg"] == "process_completed" and "Cancelled" in str(message):
            session.free.set()
    assert any("Cancelled" in str(message) for message in messages)
    until(lambda: server.service.engine.running == 0, "it goes on")
    assert session.steps == before + 1
    status, *_ = generated(tab, bridged())
    assert "Done in" in status


def test_a_closed_tab_stops_its_request_and_is_forgotten(server: Served, tab: Tab, session: Held) -> None:
    session.free.clear()
    before = session.steps
    with server.http() as http, http.stream("GET", f"/ui/gradio_api/heartbeat/{tab.hash}") as heartbeat:
        lines = heartbeat.iter_lines()  # let go of, it closes the connection
        assert "ALIVE" in next(lines)
        tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=50))
        until(lambda: session.steps > before, "no step was reached")
        assert tab.hash in server.page.page.state_holder.session_data
    until(lambda: tab.hash not in server.page.page.state_holder.session_data, "it is remembered")
    session.free.set()
    until(lambda: server.service.engine.running == 0, "it goes on")
    assert session.steps <= before + 2


def test_tabs_that_never_open_a_connection_are_forgotten_and_go_on(server: Served, tab: Tab) -> None:
    remembered = server.page.page.state_holder.session_data
    first = tab.hash
    for number in range(TABS + 3):
        tab.hash = first if number == 0 else f"{first}-{number}"
        tab.outcome("words", [PROMPT])
        assert tab.hash in remembered
    assert len(remembered) <= TABS
    assert set(server.page.page.state_holder.time_last_used) <= set(remembered)
    assert first not in remembered
    tab.hash = first
    status, *_ = generated(tab, bridged((1, MAN, MASK)))
    assert "Done in" in status


def test_requests_of_the_page_stand_in_the_services_queue(session: Held) -> None:
    with served(session, settings=ServeSettings(default_steps=2, queue=1, batch=1)) as small, small.http() as http:
        tabs = [Tab(http) for _ in range(3)]
        engine = small.service.engine
        session.free.clear()
        for number, tab in enumerate(tabs[:2]):
            tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house"))
            until(lambda n=number: engine.running + engine.waiting == n + 1, "it was not queued")  # type: ignore[misc]
        status, *_ = tabs[2].generate(bridged(), Prompt="a house")
        assert "1 requests wait, which is the limit" in status
        session.free.set()


def test_the_page_loads_nothing_from_elsewhere(server: Served) -> None:
    with server.http() as http:
        html = http.get("/ui/").raise_for_status()
        assets = [http.get(f"/ui/{name}").raise_for_status().text for name in ("page.js", "page.css", "theme.css")]
    found = {url for text in (html.text, *assets) for url in re.findall(r"https?://[^\s\"'\\<)]+", text)}
    names = ("http://www.w3.org/",)  # of XML; nothing is loaded from there
    assert {url for url in found if not url.startswith((server.url, *names))} == set()
    assert 'rel="manifest"' not in html.text
    policy = html.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http:" not in policy
    assert "https:" not in policy


def test_gradios_history_analytics_and_links_are_off(tab: Tab) -> None:
    assert tab.config["run_history"] is False
    assert tab.config["analytics_enabled"] is False
    assert tab.config["footer_links"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "gradio_api/upload"),
        ("GET", "gradio_api/file=/etc/passwd"),
        ("GET", "gradio_api/proxy=https://example.org"),
        ("POST", "gradio_api/run/generate"),
        ("POST", "gradio_api/call/generate"),
        ("POST", "gradio_api/component_server"),
        ("GET", "gradio_api/runs"),
        ("POST", "login"),
        ("GET", "monitoring"),
        ("GET", "assets/../../routes.py"),
        ("GET", "gradio_api/deep_link"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(server: Served, method: str, path: str) -> None:
    with server.http() as http:
        answer = http.request(method, f"/ui/{path}")
    assert answer.status_code in (403, 404), (path, answer.status_code)


def test_another_sites_page_cannot_send_events(server: Served) -> None:
    with server.http() as http:
        for headers, status in (
            ({"Origin": "https://elsewhere.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": server.url}, 422),
            ({"Origin": server.url, "Sec-Fetch-Site": "cross-site"}, 403),
            ({"Origin": "https://the-proxys.example", "Sec-Fetch-Site": "same-origin"}, 422),
        ):
            answer = http.post("/ui/gradio_api/queue/join", json={"data": [], "fn_index": 0}, headers=headers)
            assert answer.status_code == status, (headers, answer.text)


def a_file(path: str) -> dict[str, object]:
    return {"path": path, "url": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "nested", [lambda one: one, lambda one: [[one]], lambda one: {"value": one}], ids=["bare", "listed", "within"]
)
@pytest.mark.parametrize("path", ["http://192.0.2.1/x.png", "/etc/hostname"])
def test_nothing_is_fetched_for_a_field(
    tab: Tab, monkeypatch: pytest.MonkeyPatch, nested: Callable[[object], object], path: str
) -> None:
    fetched: list[object] = []
    for name in ("ssrf_protected_download", "async_ssrf_protected_download", "unsafe_download", "save_file_to_cache"):
        monkeypatch.setattr(processing_utils, name, lambda *given, **_: fetched.append(given))
    for event in ("generate", "words", "add"):
        values = tab.values(event)
        for place in range(len(values)):
            with pytest.raises(httpx.HTTPStatusError, match="422") as refused:
                tab.send(event, [nested(a_file(path)) if k == place else value for k, value in enumerate(values)])
            answer = refused.value.response
            assert (answer.json()["kind"], answer.json()["field"]) == ("body", "data")
            assert answer.headers["content-type"] == "application/problem+json"
    status, *_ = generated(tab, bridged())
    assert "Done in" in status
    assert not fetched


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 50_000, 400),
        (b"[" + b"1," * 200_000 + b"1]", 422),
        (b"\xff", 400),
        (b'{"data": [{"path": "/etc/hostname"}], "fn_index": 0, "data": []}', 422),
        (b'{"data": [], "session_hash": "a", "session_hash": "b"}', 422),
    ],
)
def test_what_is_no_event_is_refused(server: Served, body: bytes, status: int) -> None:
    with server.http() as http:
        headers = {"Content-Type": "application/json"}
        answer = http.post("/ui/gradio_api/queue/join", content=body, headers=headers)
        assert answer.status_code == status
        assert answer.json()["status"] == status
        assert http.post("/ui/gradio_api/startup-events", json={}).status_code == 405


@pytest.fixture
def event(tab: Tab) -> dict[str, object]:
    """One that would make a picture, with a photograph and a prompt that are not to be found elsewhere."""
    values = tab.values("generate", bridge=bridged((1, MAN, MASK)), Prompt=SECRET, **{WORD: "man"})
    return {"data": values, "fn_index": tab.event("generate")["id"], "session_hash": tab.hash}


def told_of_nothing(answer: httpx.Response, logged: str) -> None:
    assert answer.headers["content-type"] == "application/problem+json"
    for text in (answer.text, logged):
        assert SECRET not in text
        assert base64.b64encode(MAN).decode()[40:80] not in text
    assert "Traceback" not in logged


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("data", lambda data: data[:-3]),
        ("data", lambda data: [*data, ""]),
        ("data", lambda data: []),
        ("data", lambda data: data[0]),
        ("data", lambda data: None),
        ("data", lambda data: dict(enumerate(data))),
        ("data", lambda data: [data[1:], *data[1:]]),
        ("data", lambda data: data[1:] + data[:1]),
        ("data", lambda data: [True if isinstance(one, (int, float)) else one for one in data]),
        ("data", lambda data: [float("nan") if isinstance(one, (int, float)) else one for one in data]),
        ("data", lambda data: [10**400 if isinstance(one, (int, float)) else one for one in data]),
        ("fn_index", lambda number: 9999),
        ("fn_index", lambda number: -1),
        ("fn_index", lambda number: float("inf")),
        ("fn_index", lambda number: float(number)),
        ("fn_index", lambda number: str(number)),
        ("fn_index", lambda number: True),
        ("fn_index", lambda number: None),
        ("fn_index", lambda number: [number]),
        ("session_hash", lambda tab: None),
        ("session_hash", lambda tab: ""),
        ("session_hash", lambda tab: SECRET),
        ("session_hash", lambda tab: "a" * 65),
        ("session_hash", lambda tab: 7),
    ],
)
def test_an_event_that_the_page_does_not_send_is_refused_and_stands_in_no_log(
    tab: Tab,
    event: dict[str, object],
    field: str,
    change: Callable[[Any], object],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    event[field] = change(event[field])
    headers = {"Content-Type": "application/json"}
    answer = tab.http.post("/ui/gradio_api/queue/join", content=json.dumps(event), headers=headers)
    assert (answer.status_code, answer.json()["kind"], answer.json()["field"]) == (422, "body", field)
    told_of_nothing(answer, caplog.text + "".join(capfd.readouterr()))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_an_event_is_json_by_its_content_type(
    tab: Tab, event: dict[str, object], kind: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = tab.http.post("/ui/gradio_api/queue/join", content=json.dumps(event), headers=headers)
    assert (answer.status_code, answer.json()["kind"]) == (415, "content-type")
    told_of_nothing(answer, "".join(capfd.readouterr()))


def test_the_framework_gets_what_it_knows_and_no_photograph(
    tab: Tab, server: Served, event: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    queue = server.page.page._queue
    real = queue.push

    async def noted(body: Any, request: object, username: object) -> object:
        given.append(body)
        return await real(body=body, request=request, username=username)

    monkeypatch.setattr(queue, "push", noted)
    more = {"trigger_id": 1, "event_data": {"path": "/etc/hostname"}, "oauth_token": "a", "simple_format": True}
    tab.http.post("/ui/gradio_api/queue/join", json={**event, **more}).raise_for_status()
    assert [message for message in tab.news() if message["msg"] == "process_completed"]
    (body,) = given
    assert (body.trigger_id, body.event_data, body.oauth_token, body.simple_format) == (None, None, None, False)
    assert SECRET in body.data
    assert base64.b64encode(MAN).decode()[40:80] not in str(body.data)


def raw(server: Served, *headers: str) -> str:
    """The first line of the answer to GET /ui/ with these headers."""
    with socket.create_connection(server.socket.getsockname(), 10) as connection:
        lines = ("GET /ui/ HTTP/1.1", "Connection: close", *headers, "", "")
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return connection.recv(4096).split(b"\r\n")[0].decode("ascii")


def test_a_web_socket_is_refused_and_nothing_is_logged(
    server: Served, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==")
    with socket.create_connection(server.socket.getsockname(), 10) as connection:
        lines = ("GET /ui/ HTTP/1.1", "Host: localhost", "Connection: Upgrade", *asked, "", "")
        connection.sendall("\r\n".join(lines).encode("ascii"))
        assert b" 403 " in connection.recv(4096).split(b"\r\n")[0]
    logged = caplog.text + "".join(capfd.readouterr())
    assert "ERROR" not in logged
    assert "Traceback" not in logged


HOSTS = ("localhost", "localhost:8000", "[::1]:80", "127.0.0.1", "a_b.example", "xn--exmple-cua")
NO_HOSTS = ("[v1.x]", "[::1", "[", "a:b", "1.2.3.999", "a b", "a/b", "a@b", "a?b", "\xe9", "[::1]x", "")


@pytest.mark.parametrize("name", ["Host", "X-Forwarded-Host"])
def test_a_name_that_names_no_machine_is_refused(
    server: Served, name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    others = () if name == "Host" else ("Host: localhost",)
    for host in HOSTS:
        assert " 200 " in raw(server, *others, f"{name}: {host}"), host
    for host in NO_HOSTS:
        assert " 400 " in raw(server, *others, f"{name}: {host}"), host
    for more in ("Origin: http://[v1.x]", "X-Gradio-Server: http://[v1.x]"):
        assert " 200 " in raw(server, "Host: localhost", more), more
    logged = caplog.text + "".join(capfd.readouterr())
    assert "Traceback" not in logged


def test_bodies_have_the_services_limit(session: Held) -> None:
    with served(session, settings=ServeSettings(body_bytes=50_000)) as small, small.http() as http:
        tab = Tab(http)
        values = tab.values("generate", bridge="x" * 60_000)
        with pytest.raises(httpx.HTTPStatusError, match="413"):
            tab.send("generate", values)
        assert 'data-most-bytes=\\"50000\\"' in json.dumps(tab.config)


def test_with_tokens_the_page_asks_for_one(session: Held) -> None:
    with served(session, tokens=Tokens([TOKEN])) as guarded, guarded.http() as http:
        for path in ("/ui", "/ui/", "/ui/config", "/ui/page.js", "/ui/assets/x", "/ui/gradio_api/queue/data"):
            refused = http.get(path)
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"].startswith("Basic ")
        assert http.get("/ui/", auth=("me", "wrong-token-012345")).status_code == 401
        assert http.get("/ui/", headers={"Authorization": "Basic nonsense"}).status_code == 401
        assert http.get("/v1/bundle", auth=("me", TOKEN)).status_code == 401, "the password is for the page only"
        assert http.get("/v1/bundle").headers["www-authenticate"] == "Bearer"
        http.auth = httpx.BasicAuth("me", TOKEN)
        owners: list[str] = []
        real = guarded.service.generate

        async def noted(order: object, *, owner: str, listener: object = None) -> object:
            owners.append(owner)
            return await real(order, owner=owner, listener=listener)  # type: ignore[arg-type]

        guarded.service.generate = noted  # type: ignore[assignment, method-assign]
        status, _, _, _, curl = generated(Tab(http), bridged())
        assert "Done in" in status
        assert "Authorization: Bearer $TOKEN" in curl
        assert TOKEN not in curl
    assert owners == [Tokens([TOKEN]).owner(f"Bearer {TOKEN}", "")]


@pytest.mark.parametrize(
    "name",
    ["p 1.PNG", "\"a\"; (b), it's Jürgen's $HOME `id`,filename=x;type=text.jpeg", "фото"],
    ids=["usual", "odd", "bare"],
)
def test_the_calls_that_are_shown_make_the_same_picture(
    name: str, server: Served, tab: Tab, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = 'a man with `a` $hat\'s \\ "thing"'
    (photograph,) = json.loads(bridged((1, MAN, MASK)))
    photographs = json.dumps([{**photograph, "name": name}])
    _, result, _, python, curl = generated(tab, photographs, Prompt=prompt, Weight=2.25, Alpha=0.5)
    expected = picture_of(result)
    ((image, mask),) = file_names([(1, name)])
    assert image == name
    (tmp_path / image).write_bytes(MAN)
    (tmp_path / mask).write_bytes(MASK)
    (tmp_path / tiny_bundle.name).symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "the page's Python", "exec"), {})
    assert (tmp_path / "out.png").read_bytes() == expected
    (tmp_path / "out.png").unlink()
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    ran = subprocess.run(
        ["sh", "-eu"],
        input=curl,
        text=True,
        capture_output=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "no_proxy": "*"},
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out.png").read_bytes() == expected


def test_no_file_is_written(server: Served, tab: Tab) -> None:
    generated(tab, bridged((1, MAN, MASK)))  # whatever is loaded late is loaded now
    with Writes().noted() as written:
        status, *_ = generated(tab, bridged((1, MAN, MASK)))
    assert "Done in" in status
    assert written == []


def test_an_open_tab_does_not_keep_the_server(session: Held) -> None:
    path = "/ui/gradio_api/heartbeat/abc"
    with served(session) as ending, ending.http() as http, http.stream("GET", path) as heartbeat:
        lines = heartbeat.iter_lines()  # let go of, it closes the connection
        assert "ALIVE" in next(lines)
        ending.server.stop()
        ending.thread.join(CLOSE_SECONDS / 2)
        assert not ending.thread.is_alive(), "it waits for the tab"
