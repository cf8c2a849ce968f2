"""Which files a process opens to write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Writes:
    """Notes the files that this process opens to write in a block. A hook cannot be taken away again."""

    def __init__(self) -> None:
        self._on = False
        self._paths: list[Path] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def noted(self) -> Iterator[list[Path]]:
        """The files of the block, filled as they are opened."""
        self._paths, self._on = [], True
        try:
            yield self._paths
        finally:
            self._on = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._on and event == "open" and isinstance(arguments[0], (str, bytes)):
            mode, flags = arguments[1], arguments[2]
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
                self._paths.append(Path(os.fsdecode(arguments[0])))
