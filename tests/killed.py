"""What is killed in the middle of its work, as by a system that is out of memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path


def killed(work: Callable[[], object]) -> None:
    """Do the work in a forked process, which has to call `kill` on its way.

    It must not compute with PyTorch, whose threads do not exist there.
    """
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)  # ends it, should it wait for ever
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL, "it did not come to that"


def kill(*_: object, **__: object) -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill(folder: Path) -> None:
    """Write a file into a folder, and end this process."""
    (folder / "weights.bin").write_bytes(b"large")
    kill()


def temporary(place: Path, kind: str) -> list[Path]:
    """The temporary folders of a kind in a place."""
    return sorted(place.glob(f".{kind}-*.part"))
