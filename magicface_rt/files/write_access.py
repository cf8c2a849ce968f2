"""Who may write where native code lies that is run unchecked: whoever can write there can run code as this user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["anyone_may_write", "why_not_private"]


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


def anyone_may_write(path: Path, within: Path) -> tuple[Path, str] | None:
    """Return what every user of this machine may replace or add to, and its mode: `path`, or a folder from `within`
    down to it.

    None if there is nothing of that kind as far down as anything is there, or a folder that others may not enter comes
    first. What is above `within` is not looked at.
    """
    if os.name != "posix":
        return None
    for place in (*reversed([above for above in path.parents if above.is_relative_to(within)]), path):
        try:
            mode = os.stat(place).st_mode
        except OSError:
            return None
        if mode & stat.S_IWOTH:
            return place, f"{stat.S_IMODE(mode):o}"
        if stat.S_ISDIR(mode) and not mode & stat.S_IXOTH:
            return None
    return None
