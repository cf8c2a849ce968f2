"""Streams that whoever started the process has closed, as `2>&-` does and some schedulers do."""

from __future__ import annotations

import os
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def open_closed_streams() -> None:
    """Have nothing in their places: reads find an end, and what is written is dropped.

    Python would print to stdout what is meant for a stderr that is none, and the next file that is opened would get the
    number to which libraries write their messages.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            _occupy(number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - to the process's end


def _occupy(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
        os.set_inheritable(number, True)
