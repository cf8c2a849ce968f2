"""Handles standard streams that were closed before the process started, as `2>&-` and some schedulers do, and streams
that can no longer be written to, such as a pipe whose reader has gone or a file on a full disk.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_closed_streams() -> None:
    """Put the null device in place of closed streams: reads find the end at once, and what is written is dropped.

    Otherwise Python would print to stdout what is meant for a missing stderr, and the next file that is opened would
    get the number to which libraries write their messages.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            _occupy(number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - to the process's end


class LossyStream:
    """A stream for messages. What it does not take is dropped, and the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        if isinstance(stream, io.TextIOWrapper):  # file names may have characters that a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream
        self._fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def fault(self) -> OSError | None:
        """Return why not everything was written. None if all was, or if the reader has gone: it has what it wanted."""
        self.flush()
        return None if isinstance(self._fault, BrokenPipeError) else self._fault

    def restore(self) -> TextIO:
        """Return the stream, or the null device if the stream has failed: that one keeps what it did not take, and
        would fail again.
        """
        return self._stream

    def _drop(self, error: OSError) -> None:
        self._fault = error
        self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the process's end


@contextlib.contextmanager
def lossy_streams() -> Iterator[tuple[LossyStream, LossyStream]]:
    """Replace stdout and stderr by such streams for the block, and yield them."""
    both = LossyStream(sys.stdout), LossyStream(sys.stderr)
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in both)
    try:
        yield both
    finally:
        sys.stdout, sys.stderr = (stream.restore() for stream in both)


def _occupy(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
        os.set_inheritable(number, True)
