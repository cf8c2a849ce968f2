"""Work in processes that are killed, limited or made to fail, by the hundred: each is forked from one that has loaded
everything already.

python killing.py READY LIBRARY      for each line of JSON on stdin do that work and say what became of it

READY: a bundle. LIBRARY: what is loaded, `load_LIBRARY` of killing_writers. A request:

    work, arguments   a function of killing_writers, and what it gets
    below             the folder below which changes are steps
    log               file for what the child says, its process id first
    kill              null; or {"step": n}, before that step; or {"after": "start" or "write", "seconds": s}; with
                      "armed": FILE steps and writes count while that file is there
    fault             null; or [n, code]: step n fails, see `disks.Failing`
    dawdle            seconds that each step takes more
    permits           null; or a named pipe, of which each step that counts takes a byte, and waits for one
    settled           whether to see that it is on the disk before it gets its name, see `disks.Settling`
    file_limit        null; or bytes that a file may have
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import disks
import killing_writers
from forking import ForkingProcess

SECONDS = 600
"""What one child may take, to end what hangs."""

OUTSIDE = 199
"""The code of a child to which a signal came before its work."""


@dataclass(frozen=True)
class Ended:
    """What became of a child.

    code     exit code, or -9 where it was killed
    seconds  from its start, and `writing` from its first write below the folder; None where there was none
    steps    how many there were
    said     on stdout and stderr
    """

    code: int
    seconds: float
    writing: float | None
    steps: int
    said: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Forks:
    """A process that forks, and whom to ask for it."""

    def __init__(self, folder: Path, ready: Path, library: str) -> None:
        self._log = folder / "log"
        self._process = ForkingProcess(__file__, os.fspath(ready), library, before=unlimited)

    def run(self, work: str, arguments: list[Any], below: Path, **more: Any) -> Ended:
        """Have it done, and wait for it."""
        self.send(work, arguments, below, **more)
        return self.answer()

    def send(self, work: str, arguments: list[Any], below: Path, **more: Any) -> None:
        """Have it done. `more`: kill, fault, dawdle, permits, settled, file_limit."""
        self._log.unlink(missing_ok=True)
        request = {"work": work, "arguments": arguments, "below": os.fspath(below), "log": os.fspath(self._log), **more}
        self._process.tell(request)

    def answer(self) -> Ended:
        """Wait for what was sent."""
        ended = Ended(**self._process.answer(), said=self.said)
        assert ended.code != 70, ended.said  # what no verb returns: it raised something that is not ours
        return ended

    @property
    def said(self) -> str:
        """What the child has said so far."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return text.partition("\n")[2]

    def wait_for_start(self) -> None:
        """Until the child has its number in the log, after which its work begins."""
        while not self._log.exists() or not self._log.read_text().endswith("\n"):
            time.sleep(0.001)

    @property
    def pid(self) -> int:
        """The child's."""
        return int(self._log.read_text().partition("\n")[0])

    def end(self) -> None:
        """Kill the child, if it still runs."""
        with contextlib.suppress(OSError):
            pid = self.pid
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == self._process.number:
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self._process.stop()


@contextlib.contextmanager
def forking(folder: Path, ready: Path, library: str) -> Iterator[Forks]:
    """`folder`: of its own, for logs."""
    forks = Forks(folder, ready, library)
    try:
        yield forks
    finally:
        forks.stop()


def unlimited() -> None:
    """Without the limit on addresses that the tests here have."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


class Moments:
    """When to kill: in turn before one of its steps, at a moment of the writing or just after it, at one of the whole.

    How long it takes is not the same twice: after a kill that came too late the next come before its moment.
    """

    def __init__(self, whole: Ended, seed: int) -> None:
        assert whole.code == 0, whole.said
        assert whole.writing is not None, "nothing was written"
        self._steps = whole.steps
        self._lengths = {"start": whole.seconds, "write": 1.05 * whole.writing}
        self._draw = random.Random(seed)
        self._last: dict[str, Any] = {}
        self._turn = 0

    def next(self) -> dict[str, Any]:
        """What is to be killed next, as `Forks.run` takes it."""
        after = ("step", "write", "start")[self._turn % 3]
        self._turn += 1
        if after == "step":
            self._last = {"step": self._draw.randrange(self._steps)}
        else:
            self._last = {"after": after, "seconds": self._draw.uniform(0, self._lengths[after])}
        return self._last

    def was_late(self) -> None:
        """The last kill came too late."""
        if "after" in self._last:
            self._lengths[self._last["after"]] = self._last["seconds"]


@dataclass
class Tally:
    """What kills came to."""

    kills: int = 0
    late: int = 0
    whole: int = 0
    unfinished: int = 0

    def count(self, ended: Ended, *, whole: bool, unfinished: bool) -> None:
        """`unfinished`: whether temporary files were left."""
        self.kills += ended.killed
        self.late += not ended.killed
        self.whole += whole and ended.killed
        self.unfinished += unfinished and ended.killed

    @property
    def tries(self) -> int:
        return self.kills + self.late

    def __str__(self) -> str:
        nothing = self.kills - self.whole
        return (
            f"{self.kills} kills ({self.late} came too late): {nothing} left what was before, {self.whole} the new one "
            f"whole, 0 half of it; {self.unfinished} left temporary files, which the next run removed"
        )


def leftovers(folder: Path) -> list[str]:
    """What is temporary by its name, at any depth."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.suffix in (".part", ".old", ".lock")
    )


# ------------------------------------------------------------------------------------------------------ what is started


def serve(ready: str, library: str) -> None:
    getattr(killing_writers, f"load_{library}")(ready)
    gc.freeze()  # a child need not look at what is loaded, nor copy it by looking
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        heard, told = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(heard)
            _work(request, told)
        os.close(told)
        print(json.dumps(_watched(child, heard, started, request.get("kill") or {})), flush=True)


def _watched(child: int, heard: int, started: float, kill: dict[str, Any]) -> dict[str, Any]:
    """Kill the child when it is time, and wait for its end, at which the pipe closes."""
    steps, wrote = 0, None
    when = started + kill["seconds"] if kill.get("after") == "start" else started + SECONDS
    while True:
        ready, _, _ = select.select([heard], [], [], max(0.0, when - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            when += SECONDS
            continue
        marks = os.read(heard, 1 << 16)
        if not marks:
            break
        steps += len(marks)
        if wrote is None and b"w" in marks:
            wrote = time.monotonic()
            if kill.get("after") == "write":
                when = wrote + kill["seconds"]
    os.close(heard)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended = time.monotonic()
    writing = None if wrote is None else ended - wrote
    return {"code": code, "seconds": ended - started, "writing": writing, "steps": steps}


def _work(request: dict[str, Any], told: int) -> NoReturn:
    """In the child."""
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for at, of in ((0, nothing), (1, log), (2, log)):
            os.dup2(of, at)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        print(os.getpid(), flush=True)
        if request.get("file_limit") is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
        settling = disks.Settling() if request.get("settled") else None
        with disks.Layer(Path(request["below"]), _acting(request, told, settling)).installed():
            code = getattr(killing_writers, request["work"])(*request["arguments"])
        if settling is not None:
            settling.check()
    except KeyboardInterrupt:
        code = OUTSIDE
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _acting(request: dict[str, Any], told: int, settling: disks.Settling | None) -> disks.Act:
    """Tells each step, and fails or dies before the one that was asked for."""
    kill = request.get("kill") or {}
    die_at, armed = kill.get("step"), kill.get("armed")
    fault = disks.Failing(*request["fault"]) if request.get("fault") else None
    dawdle = request.get("dawdle") or 0.0
    permits = os.open(request["permits"], os.O_RDWR) if request.get("permits") else None
    step = 0

    def act(operation: str, path: str) -> None:
        nonlocal step
        counts = armed is None or os.path.exists(armed)
        if counts and step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        step += counts
        os.write(told, b"w" if counts and operation == "write" else b".")
        if settling is not None:
            settling(operation, path)
        if fault is not None:
            fault(operation, path)
        if permits is not None and counts:
            os.read(permits, 1)
        time.sleep(dawdle)

    return act


if __name__ == "__main__":
    serve(*sys.argv[1:])
