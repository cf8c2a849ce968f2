"""The command line, `magicface-rt`: one module for each verb, and nothing here that needs torch.

exit codes: 0 fine, 1 a check or a result is wrong, 2 what was given cannot be used, 3 it cannot be computed here,
130 interrupted; see `MagicFaceError`

This module imports the verbs only when a command line is first run, and next to nothing before that, so it can report
when there is too little memory to load them or to read the command line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ._signals import handlers_restored
from ._streams import lossy_streams, open_closed_streams

__all__ = ["main"]

INTERRUPTED = 130
INTERRUPTED_TEXT = "interrupted; nothing half written"
"""Printed by `main`, because typer, when it is interrupted outside of a verb, ends with the same code and prints
nothing.
"""

ADDRESSES = 112 << 20
"""Bytes of address space below which the verbs could not be loaded. numpy's OpenBLAS, if it finds too little, ends the
process or has it interrupted.
"""

ADDRESSES_OF_A_THREAD = 40 << 20
"""Bytes that OpenBLAS takes for each of its threads but the first: a buffer and a stack."""

RESERVE = 2 << 20
"""Bytes of memory that are set aside, so that a lack of memory can still be reported."""

LOST = "What was asked for is done, and what it writes is saved; only what was to be printed of it is lost."

TOO_LITTLE = "there is too little memory on the host. Allow this process more (ulimit -v, the container's limit)."
"""Printed when there is too little memory even to examine the error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own, unless given) and return its exit code.

    If the reader of stdout or stderr goes away, neither the work nor the exit code changes. If stdout cannot be written
    to for another reason, such as a full disk, that is reported, and 0 becomes 2. What stderr does not take is lost
    silently.
    """
    open_closed_streams()
    with handlers_restored(), lossy_streams() as (stdout, _):
        code = _ended(argv)
        fault = None if code == INTERRUPTED else stdout.fault()  # flushes, which may wait for a reader
        if fault:
            print(f"error: stdout cannot be written: {fault}. {LOST if code == 0 else ''}".rstrip(), file=sys.stderr)
            code = code or 2
    return code


def _ended(argv: Sequence[str] | None) -> int:
    reserve = b""
    try:
        reserve = bytes(RESERVE)
        code = int(_loaded().read(argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(INTERRUPTED_TEXT, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # raised outside of a verb; a verb reports its own errors
        del reserve
        if _was_interrupted(error):
            print(INTERRUPTED_TEXT, file=sys.stderr)
            return INTERRUPTED
        said = _too_little(error)
        if not said:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 3


def _loaded() -> ModuleType:
    """Import and return the module that holds all verbs.

    Raises:
        HostMemoryError: a limit on address space leaves too little for it.
        whatever too little memory raises elsewhere.
    """
    if "numpy" not in sys.modules:
        from magicface_rt.process.host_memory import check_addresses, share_heap

        share_heap()
        check_addresses(ADDRESSES + (_threads() - 1) * ADDRESSES_OF_A_THREAD, "the command line")
    from . import _verbs

    return _verbs


def _threads() -> int:
    """Return how many threads OpenBLAS will use."""
    from magicface_rt.process.cores import processors

    asked = (os.environ.get(f"{of}_NUM_THREADS", "") for of in ("OPENBLAS", "GOTO", "OMP"))
    return min(processors(), next((int(number) for number in asked if number.isdecimal() and int(number)), 1 << 30))


def _was_interrupted(error: Exception) -> bool:
    try:
        from magicface_rt.process.interrupts import was_interrupted

        return was_interrupted(error)
    except Exception:  # too little memory for this as well
        return False


def _too_little(error: Exception) -> str:
    """Return what to print if too little memory caused the error, else ""."""
    try:
        from magicface_rt.process.host_memory import shortage
        from magicface_rt.values.shown import one_line

        found = shortage(error)
        return "" if found is None else one_line(str(found))
    except Exception:
        return TOO_LITTLE
