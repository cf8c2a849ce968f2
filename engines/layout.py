"""Paths in an engine store, and the operations on them that do not depend on what a plan is.

    DIR/<flavour>/<first two digits>/<digest of the key>/    a plan and its manifest (engines/manifest.py)
                                     .<digest>.<id>.part/    a plan being written, or being removed
                                     .<digest>.lock          held while a plan is built or removed, absent otherwise

A `.part` folder belongs to the holder of its plan's lock; the next holder removes any that it finds. A plan's time of
last use is the modification time of its folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from magicface_rt.errors import StoreError
from magicface_rt.files import atomic_files
from magicface_rt.store_folders import FLAVOURS

from . import caches

_SHARD = re.compile(r"[0-9a-f]{2}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDERS = (*FLAVOURS, *caches.FOLDERS)
_SHOWN = 3
_OF_A_DISK = ("lost+found",)
_LEFTOVER = re.compile(r"\.([0-9a-f]{64})\.([0-9a-f]{32}\.part|lock)")


def plan_folder(root: Path, flavour: str, digest: str) -> Path:
    """The folder of a plan."""
    return root / flavour / digest[:2] / digest


def lock_path(folder: Path) -> Path:
    """The lock file of a plan's folder."""
    return folder.parent / f".{folder.name}.lock"


def new_part(folder: Path) -> Path:
    """A new temporary path beside a plan's folder; nothing is created."""
    return folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"


def make_parents(root: Path, folder: Path) -> None:
    """Make the folders above a plan's, for their owner only; those that exist keep their permissions.

    Raises:
        OSError: a folder could not be made.
        StoreError: something other than a folder of the store's own is in the way.
    """
    atomic_files.make_folder(root.parent)
    for above in (root, folder.parent.parent, folder.parent):
        with contextlib.suppress(FileExistsError):
            atomic_files.make_folder(above, mode=0o700)
        if not above.is_dir() or (above != root and above.is_symlink()):
            raise StoreError(f"engine store {root}: {above} is not a folder of the store's own. Remove it.")


def check_root(root: Path) -> None:
    """Check that a folder can be a store's: it holds a folder of a flavour or of a cache, or nothing, or is not there.

    What a disk has of its own and hidden files say nothing, so an empty disk can be a store.

    Raises:
        StoreError: it holds only other things, which are named, or cannot be read.
    """
    found = [path for path in _listed(root, links=True) if path.name not in _OF_A_DISK and path.name[:1] != "."]
    if found and not any(path.name in _FOLDERS and _is_folder(path) for path in found):
        first = ", ".join(repr(path.name) for path in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise StoreError(
            f"engine store {root}: this folder is not one. It holds {first}{more}, expected some of "
            f"{', '.join(_FOLDERS)}, or nothing. Name the folder that `magicface-rt build BUNDLE --store DIR` filled."
        )


def linked_parent(folder: Path) -> Path | None:
    """The closest folder above a plan's, below the root, that is a symbolic link; None if there is none."""
    return next((above for above in (folder.parent, folder.parent.parent) if os.path.islink(above)), None)


def plan_folders(root: Path) -> list[Path]:
    """Everything that stands in a plan's place, whatever it is.

    Only folders of known flavours are looked into: others keep files in `*/<two digits>/<digest>` as well.
    """
    return [path for shard in _shards(root) for path in _listed(shard, links=True) if _DIGEST.fullmatch(path.name)]


def leftovers(root: Path) -> list[Path]:
    """Plan folders with temporary folders or a lock file beside them, whether a live process owns those or not."""
    return sorted(
        {
            shard / match[1]
            for shard in _shards(root)
            for match in map(_LEFTOVER.fullmatch, (path.name for path in _listed(shard)))
            if match
        }
    )


def remove_parts(folder: Path) -> None:
    """Remove the temporary folders of a plan; the caller holds its lock."""
    for path in folder.parent.glob(f".{folder.name}.*.part"):
        if _LEFTOVER.fullmatch(path.name):
            atomic_files.remove_if_possible(path)


def keep_only(folder: Path, name: str) -> None:
    """Remove everything in a folder but one file.

    Raises:
        OSError: another file could not be removed.
    """
    for path in folder.iterdir():
        if path.name == name:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def bytes_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if it is not a folder."""
    if os.path.islink(folder):
        return 0
    return sum(size for path in _listed(folder, links=True) if (size := _size(path)))


def mark_used(folder: Path) -> None:
    """Set the time of last use to now, without rewriting the plan. A read-only store stays as it is."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(folder, ns=(now, now))


def last_used(folder: Path) -> float:
    """Seconds since the epoch; 0 when the folder is gone."""
    try:
        return os.lstat(folder).st_mtime_ns / 1e9
    except OSError:
        return 0.0


def _shards(root: Path) -> Iterator[Path]:
    for name in FLAVOURS:
        flavour = root / name
        for shard in [] if os.path.islink(flavour) else _listed(flavour):
            if _SHARD.fullmatch(shard.name):
                yield shard


def _listed(folder: Path, *, links: bool = False) -> list[Path]:
    """A folder's entries, sorted by name; symbolic links are left out unless asked for, so no walk leaves the store."""
    try:
        found = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return [path for path in found if links or not os.path.islink(path)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"engine store: {path} cannot be read ({error.strerror}). Only the user who made a store can read it; "
        "name another one with --store DIR."
    )


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
