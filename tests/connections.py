"""A block in which Python code may open no connection, look up no name and listen nowhere."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Connections:
    """Fails what uses the network in a block. A hook cannot be taken away again. What compiled libraries do without
    Python is not seen.
    """

    def __init__(self) -> None:
        self._forbidden = False
        sys.addaudithook(self._hook)

    @contextmanager
    def forbidden(self) -> Iterator[None]:
        self._forbidden = True
        try:
            yield
        finally:
            self._forbidden = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._forbidden and event.startswith("socket.") and event != "socket.gethostname":
            if event == "socket.__new__" and arguments[1] == socket.AF_UNIX:
                return
            raise AssertionError(f"{event} {arguments[1:]}")
