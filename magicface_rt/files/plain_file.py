"""Open and read files that a user named, only if they are regular files and no larger than allowed."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

__all__ = ["open_plain", "read_plain"]


def open_plain(path: str | os.PathLike[str], most: int) -> BinaryIO:
    """Open a regular file of at most `most` bytes for reading; a pipe, which could block for ever, is refused.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it does not exist, is not a regular file, is larger, or no file can have this name.
    """
    try:
        # Opening a pipe would block, and a check by name could be of another file than the one opened afterwards.
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
    """Read a regular file of at most `most` bytes.

    Raises: as `open_plain`.
    """
    with open_plain(path, most) as stream:
        content = stream.read(most + 1)
    if len(content) > most:  # it has grown since it was opened
        raise ValueError(f"it is larger than {most:,} bytes")
    return content
