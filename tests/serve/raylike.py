"""A service on Ray on loopback, whose replicas can be held up and looked into from the test."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from loopback import until

from magicface_rt import Session
from magicface_rt.serve import Client, ServeSettings
from magicface_rt.serve.auth import Tokens
from magicface_rt.serve.ray import RayPlan
from magicface_rt.serve.ray.cluster import Running, started
from magicface_rt.serve.server import listen

TOKEN = "a-token-that-nobody-may-find"
HERE = str(Path(__file__).parent)


class HeldSession(Session):
    """Its requests stop at every step while the gate's folder has a file `hold`, and it notes there what it does, a
    line each with the number of its process.
    """

    def __init__(self, *arguments: Any, gate: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._gate = Path(gate)
        self._note("opened")

    def generate_batch(self, requests: Any, *, progress: Any = None) -> Any:
        self._note("made " + " ".join(str(request.options.seed) for request in requests))

        def stopping(step: Any) -> object:
            self._note(f"step {step.step}")
            self._wait()
            return progress is None or progress(step)

        return super().generate_batch(requests, progress=stopping)

    def prepare(self, *arguments: Any, **settings: Any) -> Any:
        self._note("prepared")
        self._wait()
        return super().prepare(*arguments, **settings)

    def _note(self, what: str) -> None:
        with (self._gate / "notes").open("a") as file:
            file.write(f"{os.getpid()} {what}\n")

    def _wait(self) -> None:
        end = time.monotonic() + 40
        while (self._gate / "hold").exists() and time.monotonic() < end:
            time.sleep(0.005)


class Gate:
    """The test's side of a `HeldSession`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = 0

    def hold(self) -> None:
        (self.folder / "hold").touch()

    def free(self) -> None:
        (self.folder / "hold").unlink(missing_ok=True)

    def forget(self) -> None:
        """What was noted so far is of no interest any more."""
        self._read = len(self._lines())

    def notes(self, kind: str) -> list[tuple[int, str]]:
        """Process and the rest of each line of a kind since `forget`."""
        found = [line.split(" ", 2) for line in self._lines()[self._read :]]
        return [(int(words[0]), words[2] if len(words) > 2 else "") for words in found if words[1] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        until(lambda: len(self.notes(kind)) >= count, f"no {kind} was noted, or fewer than {count}: {self._lines()}")

    def _lines(self) -> list[str]:
        file = self.folder / "notes"
        return file.read_text().splitlines() if file.exists() else []


class OnRay:
    """The service, and what the test knows of it."""

    def __init__(self, running: Running, gate: Gate, concepts: Path, folder: Path) -> None:
        self.running, self.gate, self.concepts, self.folder = running, gate, concepts, folder
        self.url = running.url

    def client(self, **options: Any) -> Client:
        return Client(
            self.url, **{"token": TOKEN, "retries": 0, "timeout": 60.0, "trust_env": False, "verify": False, **options}
        )

    def http(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, verify=False, timeout=60)

    def metric(self, name: str) -> float:
        with self.http() as http:
            lines = http.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    def replicas(self) -> set[int]:
        """The processes of the replicas that live."""
        return {pid for pid in processes() if "ServeReplica:magicface:pictures" in command_of(pid)}

    def wait_for_replicas(self, count: int) -> None:
        until(lambda: self.metric("magicface_replicas") == count and len(self.replicas()) == count, "no replicas", 60)

    def mapped(self, id: str) -> set[int]:
        """The processes that have the file of a concept in their memory, as the system sees it."""
        found = set()
        for pid in processes():
            with contextlib.suppress(OSError):
                if id in Path(f"/proc/{pid}/maps").read_text():
                    found.add(pid)
        return found


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def ray_processes() -> list[str]:
    """Commands of all processes of Ray on this machine."""
    found = [command_of(pid) for pid in processes() if pid != os.getpid()]
    return [
        text for text in found if re.search(r"^ray::|/raylet/raylet |gcs_server |ray/_private/|ray/dashboard/", text)
    ]


def listening() -> dict[int, tuple[str, int]]:
    """TCP ports on which this user's processes listen for others than this machine: the address, and the process."""
    owners = {}
    for pid in processes():
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    owners[os.readlink(f"/proc/{pid}/fd/{name}")] = pid
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            text, port = words[1].split(":")
            packed = b"".join(bytes.fromhex(text[k : k + 8])[::-1] for k in range(0, len(text), 8))
            address = ipaddress.ip_address(packed)
            address = getattr(address, "ipv4_mapped", None) or address
            owner = owners.get(f"socket:[{words[9]}]")
            if words[3] == "0A" and owner is not None and not address.is_loopback:
                found[int(port, 16)] = ("127.0.0.1" if address.is_unspecified else str(address), owner)
    return found


def other_bundle(bundle: Path, out: Path) -> Path:
    """A bundle that makes other pictures: its schedule is another."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "bundle.json").read_text())
    manifest["scheduler"]["beta_end"] = 0.0125
    (out / "bundle.json").write_text(json.dumps(manifest, indent=1))
    return out


@contextlib.contextmanager
def on_ray(bundle: Path, folder: Path, *, settings: ServeSettings, replicas: int = 2) -> Iterator[OnRay]:
    """A service on a Ray of its own; nothing of it is left after the block."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, before)))  # for `HeldSession`
    (folder / "gate").mkdir()
    there = set(Path("/tmp").glob("magicface-ray-*"))
    plan = RayPlan(
        str(bundle),
        str(folder / "concepts"),
        session={"backend": "onnxruntime-cpu", "threads": 1, "check_hashes": False},
        replicas=(replicas, replicas),
        cpus=0.5,
        settings=settings,
        tokens=Tokens([TOKEN]),
        opener=partial(HeldSession, gate=str(folder / "gate")),
    )
    with contextlib.closing(listen("127.0.0.1", 0)) as where:
        port = where.getsockname()[1]
    gate = Gate(folder / "gate")
    try:
        with started(plan) as plan:
            (ray_folder,) = set(Path("/tmp").glob("magicface-ray-*")) - there
            running = Running(plan, "127.0.0.1", port)
            running.start()
            try:
                yield OnRay(running, gate, folder / "concepts", ray_folder)
            finally:
                gate.free()
                running.end()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
