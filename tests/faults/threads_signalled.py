"""Verbs that a signal interrupts, each in a process of its own that is forked from one which has loaded everything.

python threads_signalled.py LIBRARY    cli; export, which loads PyTorch as well; or all, what any verb needs

For each line of JSON on stdin: {"arguments": [...], "folder": ..., "number": signal or null, "seconds": s or null,
"event": n or null, "calls": true or false}. The signal is sent so many seconds after the verb began, or by the child to
itself as it is about to do its n-th change of a file or folder; or, with `calls`, its n-th call of a function of the
package. Answered is {"code", "seconds", "events", "said"}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from forking import ForkingProcess

LIBRARIES = {
    "cli": ("onnxruntime", "magicface_rt.cli._verbs", "magicface_rt.session"),
    "export": ("magicface_rt.cli._verbs", "magicface_rt.export.exporter", "magicface_rt.export.checkpoint"),
}
LIBRARIES["all"] = (
    *(*LIBRARIES["cli"], *LIBRARIES["export"], "magicface_rt.export.parity", "magicface_rt.export.random_weights"),
    *("magicface_rt.engines.builder", *(["tensorrt_rtx"] if importlib.util.find_spec("tensorrt_rtx") else [])),
)
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.move"}
OUTSIDE = 199
"""The code of a child in which the signal came when no verb ran any more."""


@dataclass(frozen=True)
class Ended:
    """How a child ended. `events`: changes of files and folders that it was about to make, or the calls that it did."""

    code: int
    seconds: float
    events: int
    said: str


class Forks:
    """A process that has loaded everything, and forks."""

    def __init__(self, library: str) -> None:
        self._process = ForkingProcess(__file__, library)

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        number: int | None = None,
        *,
        seconds: float | None = None,
        event: int | None = None,
        calls: bool = False,
    ) -> Ended:
        """`folder`: where it works, which is there already. `calls`: an event is a call of one of our functions."""
        request = {"arguments": list(arguments), "folder": os.fspath(folder), "number": number}
        self._process.tell({**request, "seconds": seconds, "event": event, "calls": calls})
        return Ended(**self._process.answer())

    def stop(self) -> None:
        self._process.stop()


# ------------------------------------------------------------------------------------------------------ what is started


def serve(library: str) -> None:
    for name in LIBRARIES[library]:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        heard, told = os.pipe()
        marks, marking = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            os.close(marks)
            _work(request, told, marking)
        os.close(told)
        os.close(marking)
        os.read(marks, 1)  # it begins
        started = time.monotonic()
        counted: list[bytes] = []
        counting = threading.Thread(target=lambda: counted.append(_read(marks)))  # noqa: B023 - it ends below
        counting.start()
        if request["seconds"] is not None:
            time.sleep(request["seconds"])
            os.kill(child, request["number"])  # nobody has waited for it, so the number is still its own
        said = _read(heard).decode(errors="replace")
        _, status = os.waitpid(child, 0)
        counting.join()
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - started
        print(json.dumps({"code": code, "seconds": seconds, "events": len(counted[0]), "said": said}), flush=True)


def _read(pipe: int) -> bytes:
    with os.fdopen(pipe, "rb") as stream:
        return stream.read()


def _work(request: dict[str, Any], told: int, marking: int) -> NoReturn:
    from magicface_rt.cli import main

    code = OUTSIDE
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for at, of in ((0, nothing), (1, nothing), (2, told)):
            os.dup2(of, at)
        os.close(told)
        # What Python knows of the streams, such as that they are pipes, is not true of these.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(request["folder"])
        _count(request, marking)
        code = main(request["arguments"])
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _count(request: dict[str, Any], marking: int) -> None:
    """Marks the beginning and every event; the signal comes as the one that was asked for begins."""
    left = -1 if request["event"] is None else int(request["event"])

    def came() -> None:
        nonlocal left
        os.write(marking, b".")
        if left == 0:
            left = -1
            os.kill(os.getpid(), request["number"])
        left -= left > 0

    def changed(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or writes:
            came()

    def called(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("magicface_rt"):
            came()

    if request["calls"]:
        sys.setprofile(called)
    else:
        sys.addaudithook(changed)
    os.write(marking, b".")


if __name__ == "__main__":
    serve(sys.argv[1])
