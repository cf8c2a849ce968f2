"""Caches that a store holds beside its plans: compiled kernels and measurements. All of it can be made again.

DIR/runtime-cache/       what TensorRT-RTX compiled on a GPU, a file for each plan (backends/runtime_cache.py)
DIR/timing-caches/       what TensorRT measured while it built (engines/timing_cache.py)
DIR/onnxruntime-*/       engines that ONNX Runtime's TensorRT providers compiled
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from magicface_rt import atomic_files

RUNTIME = "runtime-cache"
OURS = (RUNTIME, "timing-caches")
FOLDERS = (*OURS, "onnxruntime-*")
DIGEST_CHARACTERS = 32
"""How many leading characters of a plan's digest begin the name of its runtime cache."""


def clear_unfinished(root: Path) -> None:
    """Remove unfinished files that killed processes left; those that a live process is writing stay."""
    for name in OURS:
        if not (root / name).is_symlink():
            atomic_files.remove_abandoned(root / name, lambda _: True)


def cache_files(root: Path) -> list[Path]:
    """Every finished cache file, least recently written first."""
    files = [
        path
        for pattern in FOLDERS
        for folder in root.glob(pattern)
        if not folder.is_symlink()
        for path in _below(folder)
        if not atomic_files.is_part(path.name)
    ]
    return sorted(files, key=_written)


def size(files: Collection[Path]) -> int:
    """Bytes of the files that are still there."""
    total = 0
    for path in files:
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def orphans(root: Path, digests: Collection[str]) -> list[Path]:
    """Runtime caches of plans that are not among these digests."""
    known = {digest[:DIGEST_CHARACTERS] for digest in digests}
    return [
        path
        for path in cache_files(root)
        if path.parent == root / RUNTIME and path.name[:DIGEST_CHARACTERS] not in known
    ]


def remove(path: Path) -> None:
    """Remove a file; one that is gone is no error.

    Raises:
        OSError: it could not be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _below(top: Path) -> Iterator[Path]:
    """Yield the files below a folder at any depth. Links are not followed; unreadable folders are skipped."""
    folders = [str(top)]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)


def _written(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
