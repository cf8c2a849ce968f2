"""What TensorRT-RTX compiled on this GPU, kept beside the store so that the next start need not compile it again.

A file holds the SHA-256 of the rest, and the rest as the library gave it. A cache that cannot be used is no error:
the kernels are compiled again, and the file is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

FOLDER = "runtime-cache"
_DIGEST_BYTES = 32

logger = logging.getLogger("magicface_rt.tensorrt")


def cache_path(store: Path, plan_digest: str, compute_capability: str, driver: str, version: str) -> Path:
    """One file for each plan, kind of GPU, driver and version of the library."""
    where = re.sub(r"[^0-9A-Za-z.-]", "_", f"sm{compute_capability}-driver{driver}-{version}")
    return store / FOLDER / f"{plan_digest[:32]}-{where}.cache"


class RuntimeCache:
    """The file of one plan, and the library's `IRuntimeCache` that it goes into."""

    def __init__(self, path: Path, cache: Any) -> None:
        self.path = path
        self.cache = cache
        self._saved = b""

    def load(self) -> bool:
        """Fill the library's cache from the file; False where there is none that can be used."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("runtime cache %s cannot be read (%s); kernels are compiled again.", self.path, error)
            return False
        digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        # Compared first: what is in the blob is run on the GPU.
        if hashlib.sha256(blob).digest() != digest:
            logger.warning("runtime cache %s is damaged; kernels are compiled again.", self.path)
            return False
        if not self.cache.deserialize(blob):
            logger.warning("runtime cache %s is of another environment; kernels are compiled again.", self.path)
            return False
        self._saved = digest
        return True

    def save(self) -> bool:
        """Write the library's cache where it differs from the file, all of it or nothing; False where not written."""
        try:
            blob = bytes(self.cache.serialize())
        except (TypeError, RuntimeError) as error:
            logger.warning("runtime cache %s cannot be serialized: %s", self.path, error)
            return False
        digest = hashlib.sha256(blob).digest()
        if digest == self._saved:
            return False
        try:
            self._write(digest + blob)
        except OSError as error:
            logger.warning("runtime cache %s cannot be written (%s); the next start compiles again.", self.path, error)
            return False
        self._saved = digest
        return True

    def _write(self, content: bytes) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{self.path.name}.", dir=self.path.parent
        )  # readable by its owner only
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
