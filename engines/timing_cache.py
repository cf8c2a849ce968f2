"""Keep the kernel timings that `tensorrt` measured, so building a similar graph next takes a fraction of the time.

A store has one file for each version of the library and each compute capability. It is a hint and not part of a plan,
so a fault in it costs time and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from magicface_rt.files import atomic_files
from magicface_rt.files.plain_file import read_plain
from magicface_rt.store_folders import TIMING_CACHES

from .flavour import Flavour
from .gpu import capability_here
from .log import LOGGER

MOST_BYTES = 1 << 30


def cache_file(root: Path, flavour: Flavour, device: int) -> Path:
    """The file for this library and this GPU's compute capability."""
    return root / TIMING_CACHES / f"{flavour.name}-{flavour.version}-{capability_here(device) or 'none'}.bin"


def load(root: Path, flavour: Flavour, device: int, config: Any) -> None:
    """Give a builder's configuration the saved cache, or an empty one."""
    path = cache_file(root, flavour, device)
    kept = b""
    try:
        kept = read_plain(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        if os.path.lexists(path):
            LOGGER.warning("timing cache %s cannot be read (%s); building without it", path, error)
    cache = config.create_timing_cache(kept)
    if not (cache is not None and config.set_timing_cache(cache, False)):
        LOGGER.warning("timing cache %s is not usable with %s %s; starting anew", path, flavour.name, flavour.version)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save(root: Path, flavour: Flavour, device: int, cache: Any) -> None:
    """Save a cache. If two builds end together, the measurements of only one are kept."""
    if cache is None:
        return
    path = cache_file(root, flavour, device)
    content = cache.serialize()
    if content is None:
        LOGGER.warning("timing cache %s is not kept: %s returned none", path, flavour.name)
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_files.write(path, memoryview(content))
    except OSError as error:
        LOGGER.warning("timing cache %s cannot be written (%s)", path, error)
