"""`magicface-rt serve --engine ray` as a process: how it starts, is updated and ends, and what it refuses."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("ray")

from loopback import PROMPT, Oracle, concept, until
from raylike import TOKEN, Cluster, ended, other_bundle
from test_serve_command import Process, started

from magicface_rt.cli import main
from magicface_rt.errors import OptionError, ServiceError
from magicface_rt.serve import Client
from tests.killed import fill, killed, temporary

MAN = concept("man", 1)
PAGE = ["--ui"] if importlib.util.find_spec("gradio") is not None else []


@contextlib.contextmanager
def process_on_ray(bundle: Path, *arguments: object, **environment: str) -> Iterator[tuple[Process, Cluster]]:
    """`magicface-rt serve --engine ray` as a process, and its Ray. Nothing of either is left after the block."""
    with (
        started(bundle, "--engine", "ray", *arguments, **environment) as process,
        ended(Cluster.of(process.said, process.process.pid)) as cluster,
    ):
        try:
            yield process, cluster
        finally:
            if process.process.poll() is None:  # it ends its Ray when it is asked to
                process.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.process.wait(60)


def open_tab(url: str, until_then: contextlib.ExitStack) -> Iterator[str]:
    """The connection that a browser holds for as long as a tab is open: its lines."""
    http = until_then.enter_context(httpx.Client(auth=("anybody", TOKEN), trust_env=False, timeout=60))
    lines = until_then.enter_context(http.stream("GET", f"{url}/ui/gradio_api/heartbeat/abc")).iter_lines()
    assert "ALIVE" in next(lines)
    return lines


def shown_bundle(url: str) -> str:
    """The bundle that the page names, by the beginning of its hash."""
    page = httpx.get(f"{url}/ui/config", auth=("anybody", TOKEN), trust_env=False).raise_for_status().text
    found = re.search(r"Bundle ([0-9a-f]{16})\.", page)
    assert found is not None
    return found.group(1)


@pytest.mark.ray
def test_a_process_is_updated_by_sighup_and_finishes_its_work_by_sigterm(
    tiny_bundle: Path, oracle: Oracle, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (tmp_path / "tokens").write_text(TOKEN)
    options = ("--replicas", 1, "--tokens", tmp_path / "tokens", "--default-steps", 30, *PAGE)
    with process_on_ray(bundle, *options, "--concepts", tmp_path / "concepts") as (process, cluster):
        assert cluster.folder.is_dir()
        client = Client(process.url, token=TOKEN, retries=0, trust_env=False)
        with client, contextlib.ExitStack() as tabs:
            assert list(client.generate(PROMPT, seed=3, steps=2).pngs) == oracle.pngs(seed=3, steps=2)
            kept = client.put_concept(MAN, steps=2)

            # what has vanished is said, and the service goes on
            bundle.rename(tmp_path / "aside")
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("not updated")
            assert client.generate(PROMPT, seed=3, steps=2).pngs

            other = other_bundle(tiny_bundle, tmp_path / "new")
            other.rename(bundle)
            before = client.bundle()["hash"]
            if PAGE:
                assert f"the page is at {process.url}/ui/\n" in process.said
                assert shown_bundle(process.url) == before[:16]
                tab = open_tab(process.url, tabs)
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("updating to bundle")
            assert client.generate(PROMPT, seed=3, steps=2).pngs  # it waits for the one replica that there is
            until(lambda: any(line.startswith("updated") for line in process.said), "it was not updated", 60)
            assert client.bundle()["hash"] != before
            if PAGE:  # the front that had the tab did not wait until it is closed
                assert shown_bundle(process.url) == client.bundle()["hash"][:16]
                assert all("ALIVE" in line for line in tab if line)
            with Oracle(bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as updated:
                assert list(client.generate(PROMPT, seed=3, steps=2).pngs) == updated.pngs(seed=3, steps=2)
            with pytest.raises(Exception, match=r"bundle"):
                client.generate(PROMPT, [kept])

            made: list[Any] = []
            stepped = threading.Event()

            def generate() -> None:
                made.append(client.generate(PROMPT, seed=3, progress=lambda step: stepped.set()))

            working = threading.Thread(target=generate)
            working.start()
            assert stepped.wait(30)
            process.process.send_signal(signal.SIGTERM)
            process.wait_for("SIGTERM")
            late = Client(process.url, token=TOKEN, retries=0, trust_env=False)

            def refused() -> bool:
                try:
                    late.generate(PROMPT, steps=1)
                except ServiceError as error:
                    return "ending" in str(error) or "no answer" in str(error)
                return False  # the front has not heard of it yet

            with late:
                until(refused, "requests are still taken", 30)
            working.join(60)
        assert process.process.wait(60) == 0
        cluster.wait_for_end()
        assert not cluster.folder.exists()
    assert len(made[0].pngs) == 1
    assert "ended" in process.said[-1]
    assert not any("Traceback" in line or TOKEN in line for line in process.said), process.said
    assert [path.name for path in (tmp_path / "concepts").iterdir()] == [f"{kept.id}.concept"]


@pytest.mark.ray
@pytest.mark.slow  # three times a Ray
def test_each_service_has_a_ray_of_its_own_and_one_that_was_killed_is_in_nobodys_way(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    with process_on_ray(tiny_bundle, "--replicas", 1, "--concepts", tmp_path) as (first, of_first):
        (raylet,) = [command for command in of_first.processes().values() if "/raylet/raylet " in command]
        address = re.search(r"--gcs-address=(\S+)", raylet)
        assert address is not None
        with process_on_ray(tiny_bundle, "--replicas", 2, RAY_ADDRESS=address.group(1)) as (second, of_second):
            assert any(f"RAY_ADDRESS is {address.group(1)} and is not used" in line for line in second.said)
            assert of_first.folder != of_second.folder
            assert not of_first.processes().keys() & of_second.processes().keys()
            assert (len(of_first.replicas()), len(of_second.replicas())) == (1, 2)
            for process, replicas in ((first, 1), (second, 2)):
                text = httpx.get(f"{process.url}/metrics", trust_env=False).text
                assert f"\nmagicface_replicas {replicas}.0\n" in text
            assert second.end() == 0
            of_second.wait_for_end()
            assert len(of_first.replicas()) == 1
            with first.client() as client:
                assert client.generate(PROMPT, steps=1).pngs

        # what the first leaves when it cannot end it is not the third's
        first.process.kill()
        first.process.wait(30)
        until(lambda: not of_first.replicas(), "its replicas go on", 60)
        with process_on_ray(tiny_bundle, "--replicas", 1, RAY_ADDRESS=address.group(1)) as (third, of_third):
            assert len(of_third.replicas()) == 1
            with third.client() as client:
                assert client.generate(PROMPT, steps=1).pngs
            assert third.end() == 0
        of_first.kill()


def test_concepts_that_a_killed_service_left_in_shared_memory_go_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are personal data. Those of a service that runs stay."""
    from magicface_rt.cli.serve import _shared_folder
    from magicface_rt.serve.ray import cluster

    def serve() -> None:
        with _shared_folder(None) as folder:
            fill(folder)

    monkeypatch.setattr(cluster, "SHARED_MEMORY", tmp_path)
    killed(serve)
    (left,) = temporary(tmp_path, "magicface-concepts")
    assert (left / "weights.bin").exists()
    with _shared_folder(None) as folder, _shared_folder(None) as another:
        assert temporary(tmp_path, "magicface-concepts") == sorted([folder, another])
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
    with _shared_folder(Path("given")) as folder:
        assert folder == Path("given").absolute()


def test_what_cannot_be_served_is_said_before_ray_is_started(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def not_here(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", not_here)
    there = set(Path("/dev/shm").glob(".magicface-concepts-*"))
    on_ray = ("--engine", "ray")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: dict[str, tuple[object, ...]] = {
            f"port {port} of 127.0.0.1 is in use": (tiny_bundle, *on_ray, "--port", port),
            "no such folder": (tmp_path / "nowhere", *on_ray, "--port", 0),
            "--engine is 'cloud', expected local or ray": (tiny_bundle, "--engine", "cloud"),
            "--replicas goes with --engine ray": (tiny_bundle, "--replicas", 2),
            "replicas is 'many'": (tiny_bundle, *on_ray, "--port", 0, "--replicas", "many"),
            "each replica has a GPU of its own": (tiny_bundle, *on_ray, "--device", 1),
            "storage is '4-bit'": (tiny_bundle, *on_ray, "--port", 0, "--storage", "4-bit"),
        }
        for reason, arguments in cases.items():
            assert main(["serve", *map(str, arguments)]) == 2, reason
            said = capsys.readouterr().err
            assert reason in said, said
            assert "Traceback" not in said
    assert set(Path("/dev/shm").glob(".magicface-concepts-*")) == there


def test_a_process_that_has_a_ray_already_is_told_so_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from magicface_rt.serve.ray import RayPlan
    from magicface_rt.serve.ray.cluster import started as ray_started

    def not_here(*_: object, **__: object) -> None:
        raise AssertionError("it was started or ended")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "init", not_here)
    monkeypatch.setattr(ray, "shutdown", not_here)
    with pytest.raises(OptionError, match="connected to a Ray already"), ray_started(RayPlan("b", "c")):
        pass


def test_without_ray_it_says_what_to_install(tiny_bundle: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['ray'] = None\n"
        "import magicface_rt.cli as cli\n"
        f"code = cli.main(['serve', {str(tiny_bundle)!r}, '--engine', 'ray'])\n"
        "import magicface_rt.serve.ray as on_ray\n"
        "try: on_ray.application({'bundle': 'b', 'concepts': 'c'})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 3, done.stderr
    assert "pip install 'magicface_rt[serve,ray]'" in done.stderr
    assert "needs the extra ray" in done.stderr
    assert done.stdout.startswith("BackendMissingError")


def test_rays_processes_find_a_token_of_their_own_and_none_of_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    from magicface_rt.serve.ray.cluster import _environment

    monkeypatch.setenv("MAGICFACE_RT_TOKENS", TOKEN)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    rays = []
    for _ in range(2):
        with _environment():
            assert "MAGICFACE_RT_TOKENS" not in os.environ
            rays.append(os.environ["RAY_AUTH_TOKEN"])
        assert os.environ["MAGICFACE_RT_TOKENS"] == TOKEN
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert rays[0] != rays[1]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with _environment():
        assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"


@pytest.mark.ray
@pytest.mark.slow  # three times a Ray
def test_a_process_starts_one_ray_after_another(tmp_path: Path) -> None:
    """Each has a token of its own, where Ray would keep the first one. The process's own Ray starts afterwards, too."""
    code = (
        "import ray\n"
        "from magicface_rt.serve.ray import RayPlan\n"
        "from magicface_rt.serve.ray.cluster import started\n"
        "for _ in range(2):\n"
        "    with started(RayPlan('bundle', 'concepts', replicas=(1, 1)), report=print):\n"
        "        print('answered', ray.get(ray.remote(lambda: 3).remote()))\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False)\n"
        "print('answered', ray.get(ray.remote(lambda: 4).remote()))\n"
        "ray.shutdown()\n"
    )
    names = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=600
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("answered")]
    assert said == ["answered 3", "answered 3", "answered 4"], done.stdout[-2000:] + done.stderr[-4000:]
    assert done.returncode == 0, done.stderr[-4000:]


class Failing:
    """A service on Ray of which everything that it is asked for fails so."""

    plan: Any = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def update(self, _: Any) -> None:
        raise self.error

    @property
    def drain(self) -> Failing:
        return self

    def remote(self, *_: Any) -> Failing:
        return self

    def result(self, **_: Any) -> int:
        raise self.error


def test_an_update_that_ray_fails_at_is_none_and_the_service_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import RayServeException

    from magicface_rt.serve.ray import cluster

    monkeypatch.setattr(cluster, "_checked", lambda _: SimpleNamespace(hash="0" * 64))
    for error in (RayActorError(), RayServeException("gone\n" * 1000), OptionError("no")):
        told: list[str] = []
        cluster._update(Failing(error), told.append)  # type: ignore[arg-type]
        assert told[-1].startswith("not updated, the service goes on with what it has: ")
        assert len(told[-1]) < 600
        assert "\n" not in told[-1]
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not told as an outcome
        cluster._update(Failing(ZeroDivisionError()), told.append)  # type: ignore[arg-type]


def test_a_service_whose_front_is_gone_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray import serve
    from ray.exceptions import RayActorError

    from magicface_rt.serve.ray import RayPlan
    from magicface_rt.serve.ray.cluster import Running

    deleted: list[str] = []
    monkeypatch.setattr(serve, "delete", deleted.append)
    running = Running(RayPlan("b", "c"), "127.0.0.1", 1)
    running._handle = Failing(RayActorError())
    assert running.end() == 0
    assert len(deleted) == 1


def test_nothing_of_ray_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, magicface_rt.cli._verbs, magicface_rt.serve.ray, magicface_rt.serve.server\n"
        "magicface_rt.serve.ray.RayPlan('b', 'c')\n"
        "raise SystemExit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
