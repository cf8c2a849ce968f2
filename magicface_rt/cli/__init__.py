"""The command line, `magicface-rt`: one module for each verb, and nothing here that needs torch.

exit codes: 0 fine, 1 a check or a result is wrong, 2 what was given cannot be used, 3 it cannot be computed here,
130 interrupted; see `MagicFaceError`

This module loads the verbs with the first command line, and until then next to nothing: where there is too little
memory for what they need, it says so, as it does where there is too little to read the line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ._streams import open_closed_streams, told

__all__ = ["main"]

INTERRUPTED = 130
INTERRUPTED_TEXT = "interrupted; nothing half written"
"""Said by `main`, as typer ends with the same code, in silence, what is interrupted outside of a verb."""

ADDRESSES = 112 << 20
"""Bytes of addresses with fewer of which the verbs could not be loaded. numpy's OpenBLAS, where it finds too few, ends
the process, or has it interrupted."""

ADDRESSES_OF_A_THREAD = 40 << 20
"""What it takes for each of its threads but the first: a buffer, and a stack."""

RESERVE = 2 << 20
"""Bytes of memory that are set aside, so that it can be said that there is too little."""

LOST = "What was asked for is done, and what it writes is saved; only what was to be printed of it is lost."

TOO_LITTLE = "there is too little memory on the host. Allow this process more (ulimit -v, the container's limit)."
"""Said where there is too little to look at what was said."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process, unless given) and return its exit code.

    A reader of stdout or stderr that goes changes neither what is done nor the exit code; where stdout takes nothing
    for another reason, as on a full disk, that is said and 0 becomes 2. Nobody is told what stderr does not take.
    """
    open_closed_streams()
    with told() as (stdout, _):
        code = _ended(argv)
        fault = None if code == INTERRUPTED else stdout.fault()  # which may wait for a reader
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
    except Exception as error:  # outside of a verb, which says itself what it met
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
    """The module that holds all of them.

    Raises:
        HostMemoryError: a limit of addresses leaves too few for it.
        whatever too little memory raises elsewhere.
    """
    if "numpy" not in sys.modules:
        from magicface_rt.shortage import check_addresses, share_heap

        share_heap()
        check_addresses(ADDRESSES + (_threads() - 1) * ADDRESSES_OF_A_THREAD, "the command line")
    from . import _verbs

    return _verbs


def _threads() -> int:
    """Those of OpenBLAS."""
    from magicface_rt.cores import processors

    asked = (os.environ.get(f"{of}_NUM_THREADS", "") for of in ("OPENBLAS", "GOTO", "OMP"))
    return min(processors(), next((int(number) for number in asked if number.isdecimal() and int(number)), 1 << 30))


def _was_interrupted(error: Exception) -> bool:
    try:
        from magicface_rt.interrupts import was_interrupted

        return was_interrupted(error)
    except Exception:  # for which there is too little memory, as there was for the command
        return False


def _too_little(error: Exception) -> str:
    """What to say where too little memory was its cause, else ""."""
    try:
        from magicface_rt.shortage import shortage
        from magicface_rt.shown import one_line

        found = shortage(error)
        return "" if found is None else one_line(str(found))
    except Exception:
        return TOO_LITTLE
