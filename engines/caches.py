"""Caches that a store holds beside its plans: compiled kernels and measurements. All of it can be made again.

Their folders are named in magicface_rt/store_folders.py. Somebody may keep other things in a folder of such a name, or
name a folder as a store that is none. So a file counts as a cache, and may be removed, only if its whole path below the
store has the form that the SDK or ONNX Runtime gives it, without a link on the way.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from magicface_rt.files import atomic_files
from magicface_rt.store_folders import (
    COMPILING_PROVIDERS,
    DIGEST_CHARACTERS,
    FLAVOURS,
    RUNTIME_CACHE,
    TIMING_CACHES,
    onnxruntime_cache,
)

_WRITTEN_HERE = {
    RUNTIME_CACHE: re.compile(rf"[0-9a-f]{{{DIGEST_CHARACTERS}}}-[^/]+\.cache"),
    TIMING_CACHES: re.compile(rf"({'|'.join(FLAVOURS)})-[^/]+\.bin"),
}
"""The form of the file names in each folder that the SDK writes itself."""

_FORMS = _WRITTEN_HERE | {
    # <bundle's hash>/<fused node's name>: ONNX Runtime begins that name with the provider's, and TensorRT's provider
    # adds .engine, .profile or .timing.
    onnxruntime_cache(provider): re.compile(rf"[0-9a-f]{{64}}/{name}_[^/]+")
    for provider, name in COMPILING_PROVIDERS.items()
}
"""The form of a cache file's path below each cache folder."""

FOLDERS = tuple(_FORMS)


def clear_unfinished(root: Path) -> None:
    """Remove unfinished cache files that killed processes left; those that a live process is writing stay."""
    for name, form in _WRITTEN_HERE.items():
        if not (root / name).is_symlink():
            atomic_files.remove_abandoned(root / name, functools.partial(_has_form, form))


def cache_files(root: Path) -> list[Path]:
    """Every finished cache file, least recently written first."""
    files = [
        path
        for name, form in _FORMS.items()
        for folder in [root / name]
        if not folder.is_symlink()
        for path in _below(folder)
        if form.fullmatch(path.relative_to(folder).as_posix())
    ]
    return sorted(files, key=_written)


def size(files: Collection[Path]) -> int:
    """Bytes of the files that are still there."""
    total = 0
    for path in files:
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def orphans(root: Path, files: Collection[Path], digests: Collection[str]) -> list[Path]:
    """Those of a store's cache files that are runtime caches of plans that are not among these digests."""
    known = {digest[:DIGEST_CHARACTERS] for digest in digests}
    return [
        path for path in files if path.parent == root / RUNTIME_CACHE and path.name[:DIGEST_CHARACTERS] not in known
    ]


def remove(path: Path) -> None:
    """Remove a file; one that is gone is no error.

    Raises:
        OSError: it could not be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _has_form(form: re.Pattern[str], name: str) -> bool:
    return form.fullmatch(name) is not None


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
