"""What tells a file from another one, and whether a file that is in use was written to. Nothing is read for it."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["Stamp"]


class Stamp(NamedTuple):
    """Of a file its inode, its bytes, and when it was written, in nanoseconds."""

    inode: int
    size: int
    written: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)

    def rewritten(self, path: str) -> Stamp | None:
        """The stamp that this file has now, where it was written to in its place; None where it was not.

        What is open or mapped stays as it is where the file was removed, or another one was renamed over it.

        Raises:
            OSError: it cannot be looked at.
        """
        try:
            found = Stamp.of(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found if found.inode == self.inode and found != self else None

    def __str__(self) -> str:
        return f"inode {self.inode}, {self.size} bytes, written at {self.written} ns"
