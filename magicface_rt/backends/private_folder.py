"""Folders of native code that is run unchecked: whoever can write there can run code as this user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["why_not_private"]


def why_not_private(place: Path, *, folder: bool = True) -> str:
    """Return why another user may have put something into a folder, or written a file; "" if none can have."""
    if os.name != "posix":
        return ""
    found = os.lstat(place)
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(found.st_mode):
        return "is a symbolic link, expected a folder" if folder else "is no plain file"
    if found.st_uid != os.getuid():
        return f"belongs to user {found.st_uid}, expected this one ({os.getuid()})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        expected = "700" if folder else "600"
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):o}, expected {expected})"
    return ""
