"""A file that somebody named: only where it is a file, and only where it is no larger than it may be."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

__all__ = ["open_plain", "read_plain"]


def open_plain(path: str | os.PathLike[str], most: int) -> BinaryIO:
    """It, opened to be read. Of a pipe, which would have its reader wait for ever, nothing is.

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
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(handle)
        larger = stat.S_ISREG(found.st_mode)
        raise ValueError(f"it is larger than {most:,} bytes" if larger else "it does not exist or is not a file")
    return os.fdopen(handle, "rb")


def read_plain(path: str | os.PathLike[str], most: int) -> bytes:
    """Its bytes, at most so many.

    Raises: as `open_plain`.
    """
    with open_plain(path, most) as stream:
        content = stream.read(most + 1)
    if len(content) > most:  # it has grown
        raise ValueError(f"it is larger than {most:,} bytes")
    return content
