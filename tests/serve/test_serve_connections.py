"""What comes over a connection before a request is one: heads without an end, in size or time, and what is no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.responses import Response, StreamingResponse
from loopback import PROMPT, Gated, Running, running, until

from magicface_rt.serve import ServeSettings, connection
from magicface_rt.serve.auth import Tokens
from tests.locations import ROOT

TOKEN = "correct-horse-battery-staple"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
ORDER = {"prompt": PROMPT, "steps": 1}


@pytest.fixture(scope="module")
def server(session: Gated) -> Iterator[Running]:
    with running(session, settings=ServeSettings(default_steps=1), tokens=Tokens([TOKEN])) as started:
        yield started


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, headers=AUTHORIZED, timeout=60) as opened:
        yield opened


@contextlib.contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(server.socket.getsockname(), timeout=30) as opened:
        yield opened


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the service closes the connection."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            got += piece
    return got


HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (HEAD, b"X-A: " + b"a" * 1000 + b"\r\n"),
        (HEAD + b"X: ", b"a" * 1000),
        (b"GET /", b"a" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1", b"0" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: " + b"a" * 1000 + b"\r\n"),
    ],
    ids=["headers", "one header", "path", "chunk", "trailers"],
)
def test_a_head_without_an_end_is_refused_and_not_kept(server: Running, begun: bytes, more: bytes) -> None:
    pieces = iter([begun, *[more] * (32 * 2**20 // len(more))])
    with connected(server) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            client.sendall(piece)
    assert len(list(pieces)) > 16 * 2**20 // len(more)  # less than half of it went, what the system buffers included
    with connected(server) as client:
        client.sendall(begun + more * (2 * connection.HEAD_BYTES // len(more)))
        answer = answer_of(client)
    if answer:  # it may be lost where more came than was read
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["kind"] == "bad-request"


def test_a_head_as_long_as_it_may_be_is_taken(http: httpx.Client) -> None:
    assert http.get("/v1/bundle", headers={"X-A": "a" * 60_000}).status_code == 200


@pytest.mark.parametrize(
    ("begun", "drop"),
    [
        (b"", b""),
        (HEAD, b""),
        (HEAD + b"X: ", b"a"),
        (b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"a"),  # answered: it has no token
        (HEAD + b"\r\n" + HEAD, b""),
    ],
    ids=["nothing", "half", "drop by drop", "the rest of a body", "a second"],
)
def test_a_request_that_does_not_come_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch, begun: bytes, drop: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    ended = threading.Event()
    with connected(server) as client:

        def dripping() -> None:
            with contextlib.suppress(OSError):
                while drop and not ended.wait(0.05):
                    client.sendall(drop)

        client.sendall(begun)
        dripper = threading.Thread(target=dripping)
        dripper.start()
        try:
            answer = answer_of(client)  # and it ends
        finally:
            ended.set()
            dripper.join(30)
    assert answer.count(b"HTTP/1.1 ") == (b"\r\n\r\n" in begun)


def test_who_waits_for_an_answer_or_asks_again_is_not_cut_off(
    server: Running, session: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    session.free.clear()
    threading.Timer(1.5, session.free.set).start()
    limits = httpx.Limits(max_connections=1)
    with httpx.Client(base_url=server.url, trust_env=False, headers=AUTHORIZED, limits=limits, timeout=60) as http:
        connections = set()
        assert http.post("/v1/images", json=ORDER).status_code == 200
        for _ in range(10):
            answer = http.get("/healthz")
            assert answer.status_code == 200
            connections.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(0.1)
        assert len(connections) == 1


def test_of_too_many_connections_that_on_which_was_waited_for_longest_is_closed(
    server: Running, session: Gated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection.Connection, "_said", -math.inf)
    monkeypatch.setattr(connection, "most_connections", lambda: 4)
    connections, most, body = server.server.server_state.connections, 0, json.dumps(ORDER).encode()
    until(lambda: not connections, "those of other tests are kept")
    session.free.clear()
    try:
        with contextlib.ExitStack() as opened, caplog.at_level(logging.WARNING):
            busy, *clients = (opened.enter_context(connected(server)) for _ in range(3))
            head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
            busy.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: server.server.server_state.tasks, "it has not come")
            clients[0].sendall(HEAD + b"\r\n")  # the older one, which waits for less long after its answer
            assert clients[0].recv(65536).startswith(b"HTTP/1.1 200 ")
            for number in range(18):
                clients.append(opened.enter_context(connected(server)))
                if number % 2:
                    clients[-1].sendall(HEAD)  # half of one is no request
                until(lambda: other_end(server, clients[-1]), "it is not taken")
                most = max(most, len(connections))
                if number == 1:
                    assert answer_of(clients[1]) == b""
                    assert other_end(server, clients[0])
            assert answer_of(clients[0]) == b""
            until(lambda: len(connections) <= 4, "too many are kept")
            clients[-1].sendall(b"Connection: close\r\n\r\n")
            assert answer_of(clients[-1]).startswith(b"HTTP/1.1 200 ")
            session.free.set()
            assert answer_of(busy).startswith(b"HTTP/1.1 200 ")
    finally:
        session.free.set()
    assert most <= 5  # with the one that is being closed
    said = [record.getMessage() for record in caplog.records]
    assert said.count("more than 4 connections: one is closed for each new one") == 1


def test_clients_that_take_nothing_of_their_answers_lock_nobody_out(
    server: Running, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 3)
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            client = opened.enter_context(asking(server, large))
            until(
                lambda client=client: (end := other_end(server, client)) is None or end.flow.write_paused, "all written"
            )  # type: ignore[misc]
        for _ in range(2):
            with connected(server) as client:
                client.sendall(HEAD + b"Connection: close\r\n\r\n")
                assert answer_of(client).startswith(b"HTTP/1.1 200 ")


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed it, without waiting for anything."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except OSError:  # nothing came, or it is not connected yet
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such limit")
def test_a_burst_of_connections_takes_no_files_from_others() -> None:
    """asyncio accepts all that wait before it looks at any of them."""
    started = [sys.executable, "-m", "tests.serve.burst_server"]
    with subprocess.Popen(started, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        address = ("127.0.0.1", int(child.stdout.readline()))
        with contextlib.ExitStack() as opened:
            many = [opened.enter_context(socket.socket()) for _ in range(700)]
            for one in many:
                one.setblocking(False)
                one.connect_ex(address)
            end = time.monotonic() + 60
            while not any(map(is_closed, many)):  # the system has dropped some: as many more as it takes
                assert time.monotonic() < end, "there is room for all"
                many.append(opened.enter_context(socket.create_connection(address, timeout=30)))
                many[-1].setblocking(False)
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(HEAD + b"Connection: close\r\n\r\n")
                assert answer_of(client).startswith(b"HTTP/1.1 200 ")
            child.stdin.close()
            told = json.loads(child.stdout.readline())
        child.wait(30)
    assert told["refused"] == 0
    assert told["limit"] <= told["most"] < 2 * told["limit"]


def test_where_all_connections_have_requests_a_further_one_is_closed(
    server: Running, http: httpx.Client, session: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.free.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, "/v1/images", json=ORDER)
        try:
            until(lambda: server.server.server_state.tasks, "it has not come")
            monkeypatch.setattr(connection, "most_connections", lambda: 1)
            with connected(server) as client:
                assert answer_of(client) == b""
        finally:
            session.free.set()
        assert answer.result(60).status_code == 200
    with connected(server) as client:
        client.sendall(HEAD + b"Connection: close\r\n\r\n")
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such limit")
def test_half_of_the_files_that_may_be_open_are_left_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for files, most in ((256, 128), (1, 1), (10**6, 1000), (resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert connection.most_connections() == most


def test_a_trailer_is_no_header(server: Running) -> None:
    body = b"%x\r\n%b\r\n0\r\n" % (len(json.dumps(ORDER)), json.dumps(ORDER).encode())
    head = b"POST /v1/images HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    kind, right = b"Content-Type: application/json\r\n", f"Authorization: Bearer {TOKEN}\r\n".encode()
    for headers, trailers, status in (
        (kind, right, b"401"),
        (right, kind, b"415"),
        (kind + right, b"Content-Type: text/plain\r\nContent-Length: 3\r\n", b"200"),
    ):
        with connected(server) as client:
            client.sendall(head + headers + b"\r\n" + body + trailers + b"\r\n")
            assert answer_of(client).split(b" ")[1] == status


def test_an_accept_of_very_many_ranges_is_refused(http: httpx.Client) -> None:
    for accept in ("a," * 30_000, "image/png" + ";a" * 30_000):
        answer = http.post("/v1/images", json=ORDER, headers={"Accept": accept})
        assert (answer.status_code, answer.json()["field"]) == (406, "Accept")
    browser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/png,*/*;q=0.8"
    assert http.post("/v1/images", json=ORDER, headers={"Accept": browser}).headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("sent", ["half a head", "half a body", "no body"])
def test_who_has_not_sent_all_of_a_request_is_let_go_of_at_the_end(
    session: Gated, sent: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = HEAD if sent == "half a head" else b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    with caplog.at_level(logging.ERROR), running(session, settings=ServeSettings(body_seconds=600)) as server:
        with connected(server) as client:
            client.sendall(head + b"{" * (sent == "half a body"))
            until(lambda: sent == "half a head" or server.server.server_state.tasks, "it has not come")
            server.server.stop()
            answer = answer_of(client)
        if sent == "half a head":
            assert answer == b""
        else:
            told, _, body = answer.partition(b"\r\n\r\n")
            assert told.startswith(b"HTTP/1.1 503 ")
            assert b"connection: close" in told.lower()
            assert json.loads(body)["kind"] == "draining"
    assert [record.getMessage() for record in caplog.records] == []


def test_what_is_no_http_fails_nothing(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/images HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    right = f"Authorization: Bearer {TOKEN}\r\n".encode()
    with caplog.at_level(logging.ERROR):
        for sent in (
            b"\x16\x03\x01\x02\x00",
            b"GET\r\n\r\n",
            head + right + b"\r\nzz\r\n",  # as the body is read
            head + b"\r\n1\r\naXX",  # as it is answered already
            HEAD + b"\r\n\0\0\0\0\r\n\r\n",
        ):
            with connected(server) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                answer = answer_of(client)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), sent
        until(lambda: not server.server.server_state.tasks, "a request has not ended")
    assert [record.getMessage() for record in caplog.records] == []


ANSWER = bytes(range(256)) * 2**16
"""More than the buffers of the system take."""


@pytest.fixture(scope="module")
def large(server: Running) -> str:
    """The path of a large answer, which is written at once; and with `/pieces` behind it, one after the other."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(ANSWER), 2**16):
            yield ANSWER[start : start + 2**16]

    server.app.add_api_route("/large", lambda: Response(ANSWER))
    server.app.add_api_route("/large/pieces", lambda: StreamingResponse(pieces()))
    return "/large"


@contextlib.contextmanager
def asking(server: Running, path: str, *headers: str) -> Iterator[socket.socket]:
    """A client that has asked for it, and for which the system keeps little that it does not read."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.settimeout(30)
        client.connect(server.socket.getsockname())
        lines = (f"GET {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {TOKEN}", *headers, "", "")
        client.sendall("\r\n".join(lines).encode())
        yield client


def other_end(server: Running, client: socket.socket) -> connection.Connection | None:
    ends = [*server.server.server_state.connections]
    found = [end for end in ends if isinstance(end, connection.Connection) and end.client == client.getsockname()]
    return found[0] if found else None


@pytest.mark.parametrize("path", ["/large", "/large/pieces"], ids=["at once", "in pieces"])
def test_an_answer_of_which_nothing_is_taken_is_not_kept(
    server: Running, large: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    tasks = server.server.server_state.tasks
    with asking(server, path) as client:
        until(lambda: (end := other_end(server, client)) is not None and end.flow.write_paused, "it was all written")
        until(lambda: other_end(server, client) is None, "the connection is kept")
        until(lambda: not tasks, "the answer is still being written")
        assert len(answer_of(client)) < len(ANSWER)


@pytest.mark.parametrize("headers", [(), ("Connection: close",)], ids=["kept alive", "closed"])
def test_a_connection_is_not_kept_for_the_rest_of_an_answer(
    server: Running, large: str, monkeypatch: pytest.MonkeyPatch, headers: tuple[str, ...]
) -> None:
    made = connection.Connection.connection_made

    def never_paused(end: connection.Connection, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(2 * len(ANSWER))  # so that all of it is a rest
        made(end, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", never_paused)
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(server.server.config, "timeout_keep_alive", 1)
    with asking(server, large, *headers) as client:
        until(lambda: (end := other_end(server, client)) is not None and end.transport.is_closing(), "it is not closed")
        until(lambda: other_end(server, client) is None, "the connection is kept")
        assert len(answer_of(client)) < len(ANSWER)


@pytest.mark.parametrize("path", ["/large", "/large/pieces"], ids=["at once", "in pieces"])
def test_who_takes_an_answer_slowly_gets_all_of_it(
    server: Running, large: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 2.0)
    got = bytearray()
    with asking(server, path, "Connection: close") as client:
        end = time.monotonic() + 6
        while time.monotonic() < end:
            got += client.recv(2**15)
            time.sleep(0.1)
        assert len(got) < len(ANSWER) / 4, "it was not slow"
        got += answer_of(client)
    assert len(got) > len(ANSWER)
    assert got.endswith(ANSWER) or path != "/large"
