"""Bad disks: a layer between Python and the system that fails, dawdles or watches, and small disks that are real.

`Layer` stands before whatever changes something below a folder, and calls `act(operation, path)` first:

    open        a file to write to            mkdir, unlink, rmdir
    write       bytes into it                 rename     also os.replace and os.link; the path is the one that goes
    fsync       a file or folder              exchange   two folders that change places
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from magicface_rt.files import atomic_files

Act = Callable[[str, str], object]

REMOVING = frozenset({"unlink", "rmdir"})
NEEDS_ROOM = frozenset({"open", "write", "mkdir", "fsync"})
FAULTS = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EROFS: "writable",
    errno.EIO: "disk",
}
"""What may be the matter with a disk, and a word of what our messages advise."""


class Layer:
    """Acts on what happens below a folder while it is `installed`, in this process."""

    def __init__(self, below: Path, act: Act) -> None:
        self.below = os.path.realpath(below)
        self.act = act

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Changes functions of `os` and `io`, and puts them back."""
        changed: dict[str, Callable[..., Any]] = {
            name: self._acting(operation, getattr(os, name))
            for operation, name in (
                ("unlink", "unlink"),
                ("unlink", "remove"),
                ("rmdir", "rmdir"),
                ("mkdir", "mkdir"),
                ("fsync", "fsync"),
                ("rename", "rename"),
                ("rename", "replace"),
                ("rename", "link"),
            )
        }
        opened = self._opening(io.open)
        # pathlib of Python 3.10 holds these functions in a class of its own
        accessor = getattr(pathlib, "_NormalAccessor", None)
        with contextlib.ExitStack() as stack:

            def swap(holder: Any, name: str, new: Any) -> None:
                stack.callback(setattr, holder, name, vars(holder)[name])
                setattr(holder, name, new)

            swap(os, "open", self._opening_descriptors(os.open))
            swap(io, "open", opened)
            swap(builtins, "open", opened)
            swap(atomic_files, "exchange", self._acting("exchange", atomic_files.exchange))
            for name, function in changed.items():
                swap(os, name, function)
            for name, function in {**changed, "open": opened}.items():
                if accessor is not None and name in vars(accessor):
                    swap(accessor, name, staticmethod(function))
            yield

    def _inside(self, place: Any, folder: int | None = None) -> str | None:
        if isinstance(place, int):
            path = os.readlink(f"/proc/self/fd/{place}")
        else:
            path = os.fsdecode(place)
            if folder is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            path = os.path.abspath(path)
        return path if path.startswith(f"{self.below}/") or path == self.below else None

    def _acting(self, operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def acting(place: Any, *rest: Any, **named: Any) -> Any:
            path = self._inside(place, named.get("dir_fd"))
            if path is not None:
                self.act(operation, path)
            return real(place, *rest, **named)

        return acting

    def _opening_descriptors(self, real: Callable[..., int]) -> Callable[..., int]:
        def opening(place: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                path = self._inside(place, named.get("dir_fd"))
                if path is not None:
                    self.act("open", path)
            return real(place, flags, *rest, **named)

        return opening

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opening(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            path = self._inside(file) if set(mode) & set("wax+") else None
            if path is None:
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if not isinstance(file, int):
                self.act("open", path)
            raw = _Raw(self.act, path, file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)  # type: ignore[arg-type]
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return opening


class _Raw(io.FileIO):
    def __init__(self, act: Act, path: str, *arguments: Any) -> None:
        self._act, self._path = act, path
        super().__init__(*arguments)

    def write(self, data: Any, /) -> int:
        self._act("write", self._path)
        return super().write(data) or 0


# ---------------------------------------------------------------------------------------------------------------- acts


@dataclass
class Failing:
    """From operation `at` on the disk is full: what needs room fails, and the rest does not. Or read-only: everything
    fails. Or it has another fault, which happens once.
    """

    at: int
    code: int
    seen: int = field(default=0, init=False)
    hit: list[str] = field(default_factory=list, init=False)

    def __call__(self, operation: str, path: str) -> None:
        self.seen += 1
        full, once = self.code in (errno.ENOSPC, errno.EDQUOT), self.code == errno.EIO
        if self.seen <= self.at or (full and operation not in NEEDS_ROOM) or (once and self.hit):
            return
        self.hit.append(operation)
        raise OSError(self.code, os.strerror(self.code), path)

    @property
    def may_leave_something(self) -> bool:
        """Whether removing was what failed: then what is left goes with the next run."""
        return self.code == errno.EROFS or bool(REMOVING & set(self.hit))


@dataclass
class Dawdling:
    """Every operation takes so many seconds more."""

    seconds: float
    seen: int = field(default=0, init=False)

    def __call__(self, operation: str, path: str) -> None:
        self.seen += 1
        time.sleep(self.seconds)


@dataclass
class Settling:
    """Sees that a part that gets its name is on the disk by then, and the name as well in the end."""

    dirty: set[str] = field(default_factory=set, init=False)
    named: set[str] = field(default_factory=set, init=False)

    def __call__(self, operation: str, path: str) -> None:
        folder = os.path.dirname(path)
        if operation == "fsync":
            self.dirty.discard(path)
        elif operation == "write":
            self.dirty.add(path)
        elif operation in ("open", "mkdir"):
            if not os.path.lexists(path):
                self.dirty |= {path, folder}
                if operation == "mkdir" and ".part" not in path:  # made on the way, and has its name at once
                    self.named.add(folder)
        elif operation in ("rename", "exchange") and path.endswith(".part"):
            late = sorted(one for one in self.dirty if one == path or one.startswith(f"{path}/"))
            assert not late, f"{late} got a name before they were on the disk"
            self.named.add(folder)
            self.dirty.add(folder)

    def check(self) -> None:
        """After the work."""
        assert self.named, "nothing got its name"
        assert not self.named & self.dirty, "a name may be lost when power is"


# --------------------------------------------------------------------------------------------------------------- disks


class Disk:
    """A file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, left: int) -> None:
        """Leave so many bytes, in whole pages."""
        self._filler.unlink(missing_ok=True)
        found = os.statvfs(self.path)
        with self._filler.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, found.f_bavail * found.f_frsize - left)

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def writable(self, yes: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'rw' if yes else 'ro'}", os.fspath(self.path)], check=True)


def _skip(reason: str) -> NoReturn:
    test = os.environ.get("PYTEST_CURRENT_TEST", "a small disk").rpartition("::")[2].partition(" (")[0]
    import figures  # not where the processes that are killed find it

    figures.tell("disks", test, f"not run: no file system can be mounted here ({reason})")
    pytest.skip(f"no file system can be mounted here: {reason}")


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[Disk]:
    """A disk of so many bytes, mounted here for the block. Skips the test where nothing can be mounted, and tells so
    among the figures: what it holds is then held by nothing.
    """
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", os.fspath(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        _skip(str(error))
    if done.returncode:
        _skip(done.stderr.strip())
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", os.fspath(path)], check=True)
