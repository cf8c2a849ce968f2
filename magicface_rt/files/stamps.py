"""Stamps that tell one file from another, and whether a file in use was written to, without reading it."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["Stamp"]


class Stamp(NamedTuple):
    """A file's inode, its size in bytes, and the time when it was last written to, in nanoseconds."""

    inode: int
    size: int
    written: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)

    def was_modified(self, path: str) -> Stamp | None:
        """Return the stamp that the file has now if it was written to in place; None if it was not.

        Removing the file, or renaming another one over it, does not count: what is open or mapped stays as it is.

        Raises:
            OSError: the file cannot be examined.
        """
        try:
            found = Stamp.of(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found if found.inode == self.inode and found != self else None

    def __str__(self) -> str:
        return f"inode {self.inode}, {self.size} bytes, written at {self.written} ns"
