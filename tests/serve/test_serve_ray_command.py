"""`magicface-rt serve --engine ray` as a process: how it starts, is updated and ends, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from loopback import PROMPT, Oracle, concept, until
from raylike import TOKEN, other_bundle, ray_processes
from test_serve_command import started

from magicface_rt.cli import main
from magicface_rt.errors import ServiceError
from magicface_rt.serve import Client

MAN = concept("man", 1)


@pytest.mark.ray
def test_a_process_is_updated_by_sighup_and_finishes_its_work_by_sigterm(
    tiny_bundle: Path, oracle: Oracle, tmp_path: Path
) -> None:
    here, there = set(ray_processes()), set(Path("/tmp").glob("magicface-ray-*"))
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (tmp_path / "tokens").write_text(TOKEN)
    options = ("--engine", "ray", "--replicas", 1, "--tokens", tmp_path / "tokens", "--default-steps", 30)
    with started(bundle, *options, "--concepts", tmp_path / "concepts") as process:
        client = Client(process.url, token=TOKEN, retries=0, trust_env=False)
        with client:
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
            process.process.send_signal(signal.SIGHUP)
            process.wait_for("updating to bundle")
            assert client.generate(PROMPT, seed=3, steps=2).pngs  # it waits for the one replica that there is
            until(lambda: any(line.startswith("updated") for line in process.said), "it was not updated", 60)
            assert client.bundle()["hash"] != before
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
    assert len(made[0].pngs) == 1
    assert "ended" in process.said[-1]
    assert not any("Traceback" in line or TOKEN in line for line in process.said), process.said
    until(lambda: not set(ray_processes()) - here, f"left over: {set(ray_processes()) - here}")
    assert set(Path("/tmp").glob("magicface-ray-*")) == there
    assert [path.name for path in (tmp_path / "concepts").iterdir()] == [f"{kept.id}.concept"]


def test_what_cannot_be_served_is_said_before_ray_is_started(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def not_here(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", not_here)
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
            "--ui goes with --engine local": (tiny_bundle, *on_ray, "--ui"),
            "storage is '4-bit'": (tiny_bundle, *on_ray, "--port", 0, "--storage", "4-bit"),
        }
        for reason, arguments in cases.items():
            assert main(["serve", *map(str, arguments)]) == 2, reason
            said = capsys.readouterr().err
            assert reason in said, said
            assert "Traceback" not in said
    assert not list(Path("/dev/shm").glob("magicface-concepts-*"))


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


def test_nothing_of_ray_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, magicface_rt.cli, magicface_rt.serve.ray, magicface_rt.serve.server\n"
        "magicface_rt.serve.ray.RayPlan('b', 'c')\n"
        "raise SystemExit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
