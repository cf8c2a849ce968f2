"""A file that somebody named, read whole: only where it is a file, and only where it is no larger than it may be."""

from __future__ import annotations

import os
import stat

__all__ = ["read_plain"]


def read_plain(path: str | os.PathLike[str], most: int) -> bytes:
    """Its bytes, at most so many. Of a pipe, which would have its reader wait for ever, nothing is read.

    Raises:
        OSError: it cannot be read.
        ValueError: there is none, it is no file, it is larger, or no file can have this name.
    """
    try:
        # Opening a pipe would wait, and what is looked at by its name may be another thing when it is opened.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ValueError("it does not exist or is not a file") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise ValueError("it does not exist or is not a file")
    with os.fdopen(handle, "rb") as stream:
        content = stream.read(most + 1) if found.st_size <= most else b""
    if found.st_size > most or len(content) > most:  # it may have grown
        raise ValueError(f"it is larger than {most:,} bytes")
    return content
