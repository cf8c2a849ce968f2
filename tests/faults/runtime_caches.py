"""TensorRT-RTX's runtime cache, with a stand-in for the library: what it is given is what is looked at."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from outcomes import little_memory, no_hang
from tallies import TALLY

from magicface_rt.backends.runtime_cache import RuntimeCache

BLOB = random.Random(0).randbytes(1500)
SOUND = hashlib.sha256(BLOB).digest() + BLOB


class Compiled:
    """The library's runtime cache: holds what it was given."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True

    def serialize(self) -> bytes:
        return self.content


def given(path: Path) -> bytes:
    """What the library gets of a file; and what another process then finds there is sound again."""
    TALLY["runtime cache"]["tried"] += 1
    with no_hang(), little_memory(256 << 20):
        cache = RuntimeCache(path, Compiled)
        loaded = cache.load()
        found: bytes = cache.cache.content
        assert loaded == bool(found)
        if not loaded:
            cache.cache.content = BLOB
            if cache.save():
                again = RuntimeCache(path, Compiled)
                assert again.load()
                assert again.cache.content == BLOB
    TALLY["runtime cache"]["accepted" if loaded else "left out"] += 1
    return found
