"""What TensorRT-RTX compiled on this GPU, kept beside the store so that the next start need not compile it again.

A file holds the SHA-256 of the rest, and the rest as the library gave it. A cache that cannot be used is no error: the
kernels are compiled again, and the file is replaced. One in a folder that others may write into is ignored: its digest
shows that nothing was damaged, but not who wrote it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from ..files import atomic_files
from ..files.plain_file import read_plain
from ..files.write_access import why_not_private
from ..store_folders import DIGEST_CHARACTERS, RUNTIME_CACHE

SAVED_AT_MOST_EVERY = 60.0
"""Seconds, while requests are served: each set of shapes may add kernels, and the file is written as a whole."""

MOST_BYTES = 4 << 30
_DIGEST_BYTES = 32

logger = logging.getLogger("magicface_rt.tensorrt")


def cache_path(store: Path, plan_digest: str, compute_capability: str, driver: str, version: str) -> Path:
    """Return the cache's path: one file for each plan, kind of GPU, driver and version of the library."""
    where = re.sub(r"[^0-9A-Za-z.-]", "_", f"sm{compute_capability}-driver{driver}-{version}")
    return store / RUNTIME_CACHE / f"{plan_digest[:DIGEST_CHARACTERS]}-{where}.cache"


class RuntimeCache:
    """The file of one plan, and the library's `IRuntimeCache` that it is loaded into. Thread-safe.

    `make`: makes another, empty cache of the library's, in which what another process wrote meanwhile is merged with
    what is here.
    """

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self.path = path
        self.cache = make()
        self._make = make
        self._lock = threading.Lock()
        self._saved = b""
        self._in_file = b""
        self._saved_at: float | None = None

    def load(self) -> bool:
        """Fill the library's cache from the file; return False if there is none that can be used."""
        digest, blob = self._read()
        if not blob:
            return False
        if not self.cache.deserialize(blob):
            logger.warning("runtime cache %s is of another environment; kernels are compiled again.", self.path)
            return False
        self._saved = self._in_file = digest
        return True

    def save_now_and_then(self) -> bool:
        """Call `save`, unless that was done `SAVED_AT_MOST_EVERY` seconds ago or less."""
        if self._saved_at is not None and monotonic() - self._saved_at <= SAVED_AT_MOST_EVERY:
            return False
        return self.save()

    def save(self) -> bool:
        """Write the library's cache, whole or not at all, if it has more than the file; return whether it was written.

        What another process wrote since is kept. If two write at the same moment, what one of them compiled may be
        lost.
        """
        with self._lock:
            self._saved_at = monotonic()
            if not self._is_private(logging.DEBUG):
                return False
            try:
                blob = bytes(self.cache.serialize())
                digest = hashlib.sha256(blob).digest()
                if digest == self._saved:
                    return False
                merged = self._with_that_of_others(blob)
            except (TypeError, RuntimeError) as error:
                logger.warning("runtime cache %s cannot be serialized: %s", self.path, error)
                return False
            written = b""
            if merged:
                written = hashlib.sha256(merged).digest()
                try:
                    self._write(written + merged)
                except OSError as error:
                    logger.warning(
                        "runtime cache %s cannot be written (%s); the next start compiles again.", self.path, error
                    )
                    return False
                self._in_file = written
            self._saved = digest
            return bool(merged)

    def _with_that_of_others(self, blob: bytes) -> bytes:
        """Return what the file should hold: `blob`, and what another process wrote. Empty if it should be left."""
        digest, theirs = self._read(quiet=True)
        if not theirs or digest == self._in_file:
            return blob
        together = self._make()
        if not together.deserialize(theirs) or not together.deserialize(blob):
            return blob  # theirs is of another environment, and nobody could use it here
        merged = bytes(together.serialize())
        # A cache only grows. Should the library have replaced theirs instead, the larger of the two stays.
        return merged if len(merged) >= len(theirs) else b""

    def _read(self, *, quiet: bool = False) -> tuple[bytes, bytes]:
        """Return the digest and the content of the file; both empty if there is none, or a damaged one."""
        level = logging.DEBUG if quiet else logging.WARNING
        if not self._is_private(level) or not self._is_private(level, folder=False):
            return b"", b""
        try:
            content = read_plain(self.path, MOST_BYTES)
        except (OSError, ValueError) as error:
            if os.path.lexists(self.path):
                logger.log(level, "runtime cache %s cannot be read (%s); kernels are compiled again.", self.path, error)
            return b"", b""
        digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        # Compared first: what is in the blob is run on the GPU.
        if hashlib.sha256(blob).digest() != digest:
            logger.log(level, "runtime cache %s is damaged; kernels are compiled again.", self.path)
            return b"", b""
        return digest, blob

    def _is_private(self, level: int, *, folder: bool = True) -> bool:
        """Return whether nobody else can have written the file, by its folder or by its own permissions."""
        place = self.path.parent if folder else self.path
        try:
            reason = why_not_private(place, folder=folder)
        except FileNotFoundError:
            return True  # it is made private
        except OSError as error:
            reason = f"cannot be looked at ({error.strerror})"
        if reason:
            logger.log(level, "runtime cache: %s %s; it is not used.", place, reason)
        return not reason

    def _write(self, content: bytes) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_files.temporary_sibling(self.path) as part:
            part.chmod(0o600)  # readable by its owner only
            part.write_bytes(content)
            if not self._is_private(logging.DEBUG, folder=False):
                self.path.unlink()  # else `replace_into_place` would keep its permissions
            atomic_files.replace_into_place(part, self.path)
