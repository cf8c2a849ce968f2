"""The service under load: `magicface-rt serve` in processes of its own on loopback, and what memory they hold."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from magicface_rt.errors import BackendError

START_SECONDS = 240.0
END_SECONDS = 90.0


@dataclass(frozen=True)
class Form:
    """How a bundle is served.

    batch: pictures made together, 1 for no batching; replicas: of Ray, 0 for one process; workers: batches that the
    process, or each replica, makes at the same time.
    """

    batch: int
    replicas: int = 0
    workers: int = 1

    @property
    def name(self) -> str:
        where = f"Ray, {self.replicas} replicas" if self.replicas else "one process"
        workers = f", {self.workers} workers" if self.workers > 1 else ""
        return f"{where}{workers}, {'no batching' if self.batch == 1 else f'batches of {self.batch}'}"

    def arguments(self) -> list[str]:
        engine = ["--engine", "ray", "--replicas", str(self.replicas)] if self.replicas else []
        return ["--batch", str(self.batch), "--workers", str(self.workers), *engine]


class Service:
    """A running service."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        return next(line for line in self._said if "listening on" in line).rpartition(" ")[2].strip()

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until the service is ready. Raises BackendError if it ends, or does not get ready in time."""
        end = monotonic() + seconds
        while not any(line.strip() == "ready" for line in self._said):
            if self._process.poll() is not None or monotonic() > end:
                self._reader.join(1)
                raise BackendError("the service did not get ready; it said: " + "".join(self._said[-8:]).strip())
            sleep(0.05)

    def memory_bytes(self) -> int:
        """Memory of the process and its descendants. Pages that several of them share count once in total."""
        return sum(_proportional_bytes(pid) for pid in _descendants(self._process.pid))

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def kill(self) -> None:
        if self._process.poll() is None:
            for pid in reversed(_descendants(self._process.pid)):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait(30)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)


@contextlib.contextmanager
def served(bundle: Path, form: Form, options: Sequence[str] = ()) -> Iterator[Service]:
    """Run a service on a free port of loopback, warm, with an empty folder of concepts; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="magicface-load-") as concepts:
        command = [sys.executable, "-m", "magicface_rt.cli", "serve", str(bundle), "--port", "0"]
        command += ["--concepts", concepts, "--most-concepts", "100000", *form.arguments(), *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        service = Service(process)
        try:
            service.wait_until_ready()
            yield service
            service.end()
        finally:
            service.kill()


def _descendants(pid: int) -> list[int]:
    """A process and all its descendants, parents before children; Linux only."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # the name in brackets may hold spaces; what follows is: state, parent
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def _proportional_bytes(pid: int) -> int:
    """A process's PSS: its private pages, and its part of each shared page. 0 if the process has gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
