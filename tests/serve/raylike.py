"""A service on Ray on loopback, whose replicas can be held up and looked into from the test."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
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

    def __init__(self, running: Running, gate: Gate, concepts: Path, cluster: Cluster) -> None:
        self.running, self.gate, self.concepts, self.cluster = running, gate, concepts, cluster
        self.url = running.url
        self._ends = False

    def end(self) -> None:
        """As a signal has it end; once."""
        if not self._ends:
            self._ends = True
            self.running.end()

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

    def admitted(self) -> float:
        """Requests that wait or are made."""
        return self.metric("magicface_queue_length") + self.metric("magicface_running")

    def replicas(self) -> set[int]:
        """The processes of the replicas that live."""
        return self.cluster.replicas()

    def wait_for_replicas(self, count: int) -> None:
        until(lambda: self.metric("magicface_replicas") == count and len(self.replicas()) == count, "no replicas", 60)

    def mapped(self, id: str) -> set[int]:
        """The processes that have the file of a concept in their memory, as the system sees it."""
        file, found = str(self.concepts / f"{id}.concept"), set()
        for pid in processes():
            with contextlib.suppress(OSError):
                if file in Path(f"/proc/{pid}/maps").read_text():
                    found.add(pid)
        return found


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Cluster:
    """One Ray of this machine, known by the folder that its start names; another Ray's processes are none of it.

    driver  the process that started it, which is not counted
    """

    def __init__(self, folder: Path, driver: int) -> None:
        self.folder, self.driver = folder, driver

    @classmethod
    def of(cls, said: Iterable[str], driver: int) -> Cluster:
        """Of what was said when it started."""
        (line,) = [line.strip() for line in said if line.startswith("starting Ray in ")]
        return cls(Path(line.removeprefix("starting Ray in ")), driver)

    def processes(self) -> dict[int, str]:
        """Its processes that live, and their commands. Daemons have the folder in theirs, workers have their logs there
        open; both also when whoever started them is dead.
        """
        found = {pid: command_of(pid) for pid in processes() if pid != self.driver and self._owns(pid)}
        return {pid: command for pid, command in found.items() if command}  # without one it has just ended

    def replicas(self) -> set[int]:
        return {pid for pid, command in self.processes().items() if "ServeReplica:magicface:pictures" in command}

    def wait_for_end(self) -> None:
        """Until nothing of it is left."""
        until(lambda: not self.processes(), f"left over: {self.processes()}", 60)

    def kill(self) -> dict[int, str]:
        """End by their numbers what lives; returns what that was."""
        killed: dict[int, str] = {}
        while left := self.processes():
            killed |= left
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)
        return killed

    def _owns(self, pid: int) -> bool:
        if str(self.folder) in command_of(pid):
            return True
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{name}").startswith(f"{self.folder}/"):
                        return True
        return False


def stored_bytes() -> int:
    """All that this Ray ever put into its object store, which is shared memory and may become files."""
    import ray
    from ray._private import internal_api

    address = ray.get_runtime_context().gcs_address
    reply = internal_api.get_memory_info_reply(internal_api.get_state_from_address(address))
    return int(reply.store_stats.cumulative_created_bytes)


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
def ended(cluster: Cluster) -> Iterator[Cluster]:
    """Nothing of it is left after the block: what ought to end by itself has time to, and is killed where it does not,
    or where the block failed.
    """
    try:
        yield cluster
        cluster.wait_for_end()
    finally:
        cluster.kill()


@contextlib.contextmanager
def on_ray(
    bundle: Path, folder: Path, *, settings: ServeSettings, replicas: int = 2, page: bool = False
) -> Iterator[OnRay]:
    """A service on a Ray of its own; nothing of it is left after the block."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "MAGICFACE_RT_TOKENS")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, before["PYTHONPATH"])))  # for `HeldSession`
    os.environ["MAGICFACE_RT_TOKENS"] = TOKEN  # as who starts a service may have it
    (folder / "gate").mkdir()
    plan = RayPlan(
        str(bundle),
        str(folder / "concepts"),
        session={"backend": "onnxruntime-cpu", "threads": 1, "check_hashes": False},
        replicas=(replicas, replicas),
        cpus=0.5,
        page=page,
        settings=settings,
        tokens=Tokens([TOKEN]),
        opener=partial(HeldSession, gate=str(folder / "gate")),
    )
    with contextlib.closing(listen("127.0.0.1", 0)) as where:
        port = where.getsockname()[1]
    gate, said = Gate(folder / "gate"), list[str]()
    try:
        with contextlib.ExitStack() as stack:
            ray = started(plan, report=said.append)
            plan = ray.__enter__()
            cluster = stack.enter_context(ended(Cluster.of(said, os.getpid())))
            stack.push(ray)  # it ends before anybody looks at what is left
            running = Running(plan, "127.0.0.1", port)
            running.start()
            service = OnRay(running, gate, folder / "concepts", cluster)
            try:
                yield service
            finally:
                gate.free()
                service.end()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
