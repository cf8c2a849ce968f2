"""A file that somebody named, read whole: only where it is a file, and only where it is no larger than it may be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["read_plain"]


def read_plain(path: str | os.PathLike[str], most: int) -> bytes:
    """Its bytes, at most so many. A pipe, which would have its reader wait for ever, is not opened.

    Raises:
        OSError: it cannot be read.
        ValueError: there is none, it is no file, it is larger, or no file can have this name.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError("it does not exist or is not a file") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it does not exist or is not a file")
    if found.st_size <= most:
        with path.open("rb") as stream:
            content = stream.read(most + 1)  # it may have grown
        if len(content) <= most:
            return content
    raise ValueError(f"it is larger than {most:,} bytes")
