"""`magicface-rt serve` as a process: what it says, how it ends, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from loopback import PROMPT, Oracle, concept, until

from magicface_rt import Session
from magicface_rt.cli import main
from magicface_rt.errors import OptionError, UnreachableError
from magicface_rt.serve import Client, LocalService
from magicface_rt.serve.server import local_service

MAN = concept("man", 1)


class Process:
    """The command, started on a free port."""

    def __init__(self, bundle: Path, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "magicface_rt.cli", "serve", str(bundle), "--port", "0", "--threads", "1"),
                *("--backend", "onnxruntime-cpu"),
                *map(str, arguments),
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for("listening on ")
            self.wait_for("ready\n")
        except BaseException:  # on Ray it has processes of its own, which it ends when it is asked to
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(30)
            raise
        self.url = next(line for line in self.said if "listening on" in line).rpartition(" ")[2].strip()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def wait_for(self, text: str) -> None:
        until(
            lambda: any(text in line for line in self.said) or self.process.poll() is not None,
            f"it did not say {text!r}: {self.said}",
            180,  # Ray starts a dozen processes, beside other tests
        )
        assert any(text in line for line in self.said), self.said

    def client(self, **options: Any) -> Client:
        return Client(self.url, **{"retries": 0, "trust_env": False, **options})

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextlib.contextmanager
def started(bundle: Path, *arguments: object, **environment: str) -> Iterator[Process]:
    process = Process(bundle, *arguments, **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait(30)


def test_a_process_finishes_its_work_when_it_is_told_to_end(tiny_bundle: Path, oracle: Oracle, tmp_path: Path) -> None:
    folder = tmp_path / "concepts"
    with started(tiny_bundle, "--concepts", folder, "--default-steps", 20, "--tokens", _tokens(tmp_path)) as process:
        with process.client(token="t" * 20) as client, process.client(token="t" * 20) as other:
            kept = client.put_concept(MAN)
            made: list[Any] = []
            stepped = threading.Event()

            def generate() -> None:
                made.append(client.generate(PROMPT, [kept], seed=3, progress=lambda step: stepped.set()))

            working = threading.Thread(target=generate)
            working.start()
            assert stepped.wait(30)
            process.process.send_signal(signal.SIGTERM)
            process.wait_for("SIGTERM")
            # until all is done it says that it is ending, and takes nothing new
            with contextlib.suppress(UnreachableError):
                assert httpx.get(f"{process.url}/readyz", trust_env=False).status_code == 503
            with pytest.raises(Exception, match=r"ending|no answer"):
                other.generate(PROMPT, steps=1)
            working.join(60)
        assert process.process.wait(60) == 0
    assert list(made[0].pngs) == oracle.pngs([MAN], seed=3, steps=20)
    assert "ended" in process.said[-1]
    assert not any("Traceback" in line or "t" * 20 in line for line in process.said), process.said
    assert [path.name for path in folder.iterdir()] == [f"{kept.id}.concept"]

    options = ("--default-steps", 20, "--max-body", "300MiB")  # more than all bodies together have unless it is said
    with started(tiny_bundle, "--concepts", folder, *options) as process:
        with process.client() as client:
            assert not client.put_concept(MAN).new
            assert client.bundle()["limits"]["body_bytes"] == 300 << 20
        assert process.end(signal.SIGINT) == 0


def long_request(client: Client) -> tuple[threading.Thread, list[Exception]]:
    """A thread that makes pictures for longer than any test waits, and has begun; and what it failed with."""
    stepped = threading.Event()
    errors: list[Exception] = []

    def generate() -> None:
        try:
            client.generate(PROMPT, steps=150, images=4, progress=lambda step: stepped.set())
        except Exception as error:
            errors.append(error)

    working = threading.Thread(target=generate)
    working.start()
    assert stepped.wait(30)
    return working, errors


def test_what_takes_longer_than_the_drain_is_cut_off(tiny_bundle: Path) -> None:
    with started(tiny_bundle, "--drain", "0.2") as process, process.client() as client:
        working, errors = long_request(client)
        assert process.end() == 0
        working.join(30)
        assert [getattr(error, "kind", error) for error in errors] == ["draining"]
        assert "1 requests were cut off" in process.said[-1]


def test_a_second_signal_cuts_off_at_once(tiny_bundle: Path) -> None:
    with started(tiny_bundle, "--drain", "300") as process, process.client() as client:
        working, errors = long_request(client)
        process.process.send_signal(signal.SIGTERM)
        process.wait_for("SIGTERM: ending when the requests that are being done have their answers")
        assert working.is_alive(), "the first signal lets it go on"
        assert process.process.poll() is None
        assert process.end(signal.SIGINT) == 0
        working.join(30)
        assert [getattr(error, "kind", error) for error in errors] == ["draining"]
        assert any("SIGINT again: ending now" in line for line in process.said)
        assert "1 requests were cut off" in process.said[-1]


def test_what_cannot_be_served_is_said_before_anything_is_opened(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: dict[str, tuple[object, ...]] = {
            f"port {port} of 127.0.0.1 is in use": (tiny_bundle, "--port", port),
            "expected 0 to 65535": (tiny_bundle, "--port", 70000),
            "is no address of this machine": (tiny_bundle, "--host", "192.0.2.7"),
            "no such folder": (tmp_path / "nowhere", "--port", 0),
            "cannot be read": (tiny_bundle, "--port", 0, "--tokens", tmp_path / "missing"),
            "holds no token": (tiny_bundle, "--port", 0, "--tokens", tmp_path / "empty"),
            "cannot be made": (tiny_bundle, "--port", 0, "--concepts", tmp_path / "file"),
            "--max-body is": (tiny_bundle, "--port", 0, "--max-body", "much"),
            "deadline is": (tiny_bundle, "--port", 0, "--deadline", "0"),
            "storage is": (tiny_bundle, "--port", 0, "--storage", "4-bit"),
            "memory is": (tiny_bundle, "--port", 0, "--memory", "some"),
        }
        for reason, arguments in cases.items():
            assert main(["serve", *map(str, arguments)]) == 2, reason
            said = capsys.readouterr().err
            assert reason in said, said
            assert "Traceback" not in said


@pytest.mark.parametrize("verb", ["serve", "ui"])
def test_whoever_names_no_host_is_reached_from_this_machine_alone(
    verb: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def listen(host: str, port: int) -> socket.socket:
        asked.append(host)
        raise OptionError("that is all")

    monkeypatch.setattr("magicface_rt.serve.server.listen", listen)
    assert main([verb, str(tiny_bundle)]) == 2
    assert asked == ["127.0.0.1"]


def test_a_service_that_can_start_no_thread_says_so_in_a_line(
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as where a limit of addresses leaves none for its stack: none of the engine's, nor one to close it in."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("magicface-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    monkeypatch.setattr(
        "magicface_rt.process.host_memory._address_limit", lambda: [("limit of addresses (ulimit -v)", 1 << 20)]
    )
    monkeypatch.setattr("magicface_rt.cli.serve.SERVE_ADDRESSES", 0)  # it would not have come so far
    assert main(["serve", str(tiny_bundle), "--port", "0"]) == 3
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: there is too little memory on the host: the warm-up failed: ")
    assert "ready" not in said.splitlines()
    assert [record.getMessage() for record in caplog.records] == ["the warm-up failed: can't start new thread"]


def test_a_service_ends_where_no_thread_can_be_started_to_wait_in(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if not thread.name.startswith("magicface-engine"):
            raise RuntimeError("can't start new thread")
        start(thread)

    async def ended(service: LocalService) -> int:
        await service.start()
        cut_off = await service.drain(60)
        await service.close()
        return cut_off

    monkeypatch.setattr(threading.Thread, "start", refused)
    with Session(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False) as session:
        service = local_service([session], warm=False)
        assert asyncio.run(ended(service)) == 0
        assert not any(thread.is_alive() for thread in service.engine._threads)


def test_without_the_extra_it_says_what_to_install(tiny_bundle: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'httpx'): sys.modules[name] = None\n"
        "import magicface_rt.cli as cli\n"
        f"code = cli.main(['serve', {str(tiny_bundle)!r}])\n"
        "import magicface_rt.serve as serve\n"
        "try: serve.Client\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "pip install 'magicface_rt[serve]'" in done.stderr
    assert done.stdout.startswith("BackendMissingError")


def test_the_client_needs_httpx_and_no_server() -> None:
    code = (
        "import sys\n"
        "for name in ('fastapi', 'starlette', 'uvicorn', 'pydantic', 'prometheus_client', 'python_multipart'):\n"
        "    sys.modules[name] = None\n"
        "from magicface_rt.serve import AsyncClient, Client\n"
        "from magicface_rt.errors import UnreachableError\n"
        "try: Client('http://127.0.0.1:9', retries=0, trust_env=False).generate('a man')\n"
        "except UnreachableError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no answer from http://127.0.0.1:9" in done.stdout


def test_a_warm_up_that_fails_ends_the_process(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from magicface_rt import NonFiniteError, Session

    def fails(*_: object, **__: object) -> None:
        raise NonFiniteError("made to fail")

    monkeypatch.setattr(Session, "warm_up", fails)
    earlier = signal.signal(signal.SIGTERM, _noted)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["serve", str(tiny_bundle), "--port", "0"]) == 1
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [before, _noted]
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert "made to fail" in capsys.readouterr().err


def _noted(*_: object) -> None:
    """The handler of a program that calls `main`."""


def _tokens(folder: Path) -> Path:
    path = folder / "tokens"
    path.write_text("t" * 20)
    return path
