"""File locks that end with their process, so a killed holder never blocks anybody.

They are flock(2) locks: the kernel drops them when the holder's last descriptor closes, however the process ended. They
work between processes and between threads. A child forked by the holder without exec shares its lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType

from magicface_rt.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POLL_SECONDS = 0.05
OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
"""Flags for os.open, where the system has them: refuse symbolic links, and do not translate bytes."""
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}  # nothing that anybody could have a lease on
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class FileLock:
    """A held exclusive lock on a file of its own; releasing it removes the file."""

    def __init__(self, path: Path, stream: FileIO) -> None:
        self._path = path
        self._stream = stream

    @classmethod
    def acquire(
        cls, path: Path, *, timeout: float | None = None, on_wait: Callable[[], object] | None = None
    ) -> FileLock | None:
        """Take the lock, waiting at most `timeout` seconds (None: as long as it takes); return None after that time.

        `on_wait` is called once, before the first wait.

        Raises:
            OSError: the file cannot be made.
            StoreError: this system or file system has no such locks.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waited = False
        while True:
            stream = _open(path, os.O_RDWR | os.O_CREAT)
            try:
                free = _flock(stream, exclusive=True, wait=False)
                if free and _stands_at(stream, path):
                    return cls(path, stream)
            except BaseException:
                stream.close()
                raise
            stream.close()
            if free:
                continue  # the previous holder removed this file on release; the lock that counts is that of the path
            if deadline is not None and time.monotonic() >= deadline:
                return None
            if not waited and on_wait is not None:
                on_wait()
            waited = True
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Remove the file, then unlock it: a waiter that locks the removed file sees that it has no path any more."""
        if self._stream.closed:
            return
        if _stands_at(self._stream, self._path):
            with contextlib.suppress(OSError):
                self._path.unlink()
        _let_go(self._stream)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


class Lease:
    """A shared lock on a file in use, held until `close`; meanwhile `unused` yields False."""

    def __init__(self, stream: FileIO) -> None:
        self._stream = stream

    @classmethod
    def take(cls, path: Path) -> Lease | None:
        """Take a lease on a file; return None if the file is gone, or disappears meanwhile.

        Needs no write access. On a system without locks it holds nothing, but nothing can be pruned there either.

        Raises:
            OSError: the file cannot be opened.
        """
        try:
            stream = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with contextlib.suppress(StoreError):
            _flock(stream, exclusive=False, wait=True)
        if not _stands_at(stream, path):
            _let_go(stream)
            return None
        return cls(stream)

    def close(self) -> None:
        """End the lease. May be called twice."""
        if not self._stream.closed:
            _let_go(self._stream)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Yield whether nobody has a lease on a file; if so, none can be taken inside the context.

    Raises:
        OSError: the file cannot be opened.
        StoreError: this system or file system has no such locks.
    """
    try:
        stream = _open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        yield True
        return
    try:
        yield _flock(stream, exclusive=True, wait=False)
    finally:
        _let_go(stream)


def _open(path: Path, flags: int) -> FileIO:
    descriptor = os.open(path, flags | OPEN_FLAGS, 0o600)
    try:
        return FileIO(descriptor, "r+" if flags & os.O_RDWR else "r")
    except BaseException:  # it is a folder
        os.close(descriptor)
        raise


def _flock(stream: FileIO, *, exclusive: bool, wait: bool) -> bool:
    if fcntl is None:
        raise StoreError(
            "engine store: this system has no flock, which keeps two builds of one plan apart. "
            "Build on Linux; a finished store can be read here."
        )
    mode = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(stream, mode)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise StoreError(
                f"engine store: the file system has no locks ({error.strerror}). Put the store on a local disk: "
                "--store DIR."
            ) from error
        raise
    return True


def _let_go(stream: FileIO) -> None:
    # Unlocking explicitly frees the lock even if a forked child still has the descriptor.
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_UN)
    stream.close()


def _stands_at(stream: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False
