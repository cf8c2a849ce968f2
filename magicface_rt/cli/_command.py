"""What every verb shares: messages, warnings, `--json`, errors and their exit codes."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console, RenderableType

from magicface_rt.errors import BackendError, BackendMissingError, EngineError, MagicFaceError, OutputError
from magicface_rt.files import atomic_files
from magicface_rt.process.host_memory import address_hint, check_addresses, shortage
from magicface_rt.process.interrupts import reraise_if_interrupt, was_interrupted
from magicface_rt.results import check_replaceable
from magicface_rt.soft_warnings import MagicFaceWarning
from magicface_rt.values.shown import one_line

from . import INTERRUPTED, INTERRUPTED_TEXT
from ._signals import came, raise_lost

RESERVE = 4 << 20
"""Bytes of memory that a verb sets aside, so that it can still report a lack of memory."""

TORCH_ADDRESSES = 600 << 20
"""Bytes of address space below which no module of the export extra could be imported. PyTorch, if it finds too little
while it is loaded, may end the process.
"""

TRACEBACK_HINT = "Run `magicface-rt --traceback ...` (or set MAGICFACE_RT_TRACEBACK=1) to see where."

_OPEN_FILE = re.compile(r"/proc/\d+(/task/\d+)?/fd/\d+")
_MOST_LINKS = 40  # Linux follows as many

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Also write the outcome, or the error, as JSON; - for stdout."),
]

_tracebacks = False


def show_traceback(wanted: bool) -> None:
    """Set whether errors are shown with their traceback, and whether other packages' warnings are shown at all."""
    global _tracebacks
    _tracebacks = wanted


class Command:
    """A verb at work: what it prints, and what it leaves as JSON.

    `print` is for results (stdout, or stderr if `--json -` has stdout), `note` for what is being done (stderr); `note`
    also ends the verb if something has swallowed a signal. `outcome` becomes the JSON; `fail` sets the exit code, 1
    unless given.
    """

    def __init__(self, json_to: str | None) -> None:
        self.json_to = json_to
        self.outcome: dict[str, Any] = {}
        self.exit_code = 0
        self._shown: set[str] = set()

    @property
    def console(self) -> Console:
        return Console(stderr=self.json_to == "-", highlight=False, markup=False, soft_wrap=True)

    def print(self, what: RenderableType = "") -> None:
        self.console.print(what)

    def note(self, line: object) -> None:
        raise_lost()
        print(one_line(str(line)), file=sys.stderr, flush=True)

    def fail(self, exit_code: int = 1) -> None:
        self.exit_code = exit_code

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Replaces `warnings.showwarning`: notes each warning once."""
        text = str(message) if issubclass(category, MagicFaceWarning) else f"{filename}:{lineno}: {message}"
        if text not in self._shown:
            self._shown.add(text)
            self.note(f"warning: {text}")


@contextmanager
def command(json_to: str | None) -> Iterator[Command]:
    """Run the body of a verb. What it raises is printed as one line, written as JSON, and turned into an exit code."""
    verb, reserve = Command(json_to), b""
    try:
        reserve = bytes(RESERVE)
        _check_json_target(json_to)
        with warnings.catch_warnings():
            if not _tracebacks:
                warnings.simplefilter("ignore")
            warnings.simplefilter("always", MagicFaceWarning)
            warnings.showwarning = verb.warn
            yield verb
        write_json(json_to, verb.outcome)
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise _interrupted(json_to) from None
    except Exception as error:
        del reserve
        if was_interrupted(error) or came():
            raise _interrupted(json_to) from None
        raise typer.Exit(_tell(error, json_to)) from error
    if verb.exit_code == BackendError.exit_code and (hint := address_hint()):
        verb.note(hint)
    if verb.exit_code:
        raise typer.Exit(verb.exit_code)


def _interrupted(json_to: str | None) -> typer.Exit:
    _write_error(json_to, "Interrupted", INTERRUPTED_TEXT, wait=False)
    return typer.Exit(INTERRUPTED)


def print_usage_error(error: Any, arguments: Sequence[str]) -> int:
    """Report a command line that typer cannot parse, and return the exit code. `--json` is looked for by hand, since
    nothing was parsed.
    """
    text = one_line(error.format_message())
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "magicface-rt"
    if not text:  # no arguments were given: typer has shown the help
        return int(error.exit_code)
    print(f"error: {text.rstrip('.')}. See `{path} --help`.", file=sys.stderr)
    json_to = next((b for a, b in pairwise(arguments) if a == "--json"), None)
    json_to = next((a.removeprefix("--json=") for a in arguments if a.startswith("--json=")), json_to)
    _write_error(json_to, "UsageError", text)
    return 2


def write_json(to: str | None, content: Mapping[str, Any], *, wait: bool = True) -> None:
    """Write JSON to stdout for "-", or to a file, which appears complete or not at all.

    Links are followed. A pipe, a device, or what a process has open (/dev/stdout, /proc/*/fd) is appended to in place;
    without `wait`, only if that can be done at once.

    Raises:
        OutputError: the file cannot be written.
    """
    if to is None:
        return
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
    if to == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    encoded = text.encode(errors="backslashreplace")
    try:
        if _is_stream(to):
            sys.stdout.flush()
            with open(to, "ab", opener=None if wait else _open_at_once) as stream:
                stream.write(encoded)
            return
        atomic_files.write(atomic_files.resolve_target(to), encoded)
    except OSError as error:
        raise OutputError(f"JSON file {to!r} cannot be written: {atomic_files.explain_os_error(error)}") from error


def check_output_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Check, before hours of work, that a new folder can be created there, as `atomic_files.check_writable` does.

    Raises:
        OutputError: the folder exists (with `overwrite`: and is not an earlier result), or cannot be created.
    """
    try:
        target = atomic_files.resolve_target(folder)
        check_replaceable(target, overwrite)
        atomic_files.check_writable(target, folder=True)
    except OSError as error:
        tried = OSError(error.errno, error.strerror)  # without the name of what was only tried
        raise OutputError(
            f"output folder {str(folder)!r} cannot be made: {atomic_files.explain_os_error(tried)}"
        ) from error


def check_new_path(path: Path, what: str) -> None:
    """Check a path as `check_output_folder` does, but for something that is never replaced.

    Raises:
        OutputError: something is there already, or it cannot be created.
    """
    if os.path.lexists(path):
        raise OutputError(f"{what} {str(path)!r} exists already. Give a new path, or remove it first.")
    check_output_folder(path)


def export_module(name: str) -> Any:
    """Import a module of `magicface_rt.export`, which needs torch and the rest of its extra.

    Raises:
        BackendMissingError: the extra is not installed.
        HostMemoryError: a limit on address space leaves too little for it.
    """
    if "torch" not in sys.modules:
        check_addresses(TORCH_ADDRESSES, "PyTorch")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return importlib.import_module(f"magicface_rt.export.{name}")
    except ImportError as error:
        reraise_if_interrupt(error)
        raise BackendMissingError(
            f"this needs the export extra, which is not installed or not whole ({error}). "
            "Install it: pip install 'magicface_rt[export]'"
        ) from error


def _check_json_target(to: str | None) -> None:
    """Check, before hours of work, that JSON can be written there.

    Raises:
        OutputError: it cannot.
    """
    if to in (None, "-"):
        return
    try:
        if _is_stream(str(to)):
            return
        target = atomic_files.resolve_target(str(to))
        if target.is_dir() or not target.parent.is_dir():
            why = "it is a folder" if target.is_dir() else f"there is no folder {str(target.parent)!r}"
            raise OutputError(f"JSON file {to!r} cannot be written: {why}.")
        atomic_files.check_writable(target)
    except OSError as error:
        raise OutputError(f"JSON file {to!r} cannot be written: {atomic_files.explain_os_error(error)}") from error


def _is_stream(path: str) -> bool:
    """Return whether a path leads to what is neither a file nor a folder, or to what a process has open."""
    at = Path(path).absolute()
    for _ in range(_MOST_LINKS):
        at = Path(os.path.realpath(at.parent), at.name)
        if _OPEN_FILE.fullmatch(os.fspath(at)):
            return True
        if not at.is_symlink():
            break
        at = at.parent / os.readlink(at)
    return at.exists() and not at.is_file() and not at.is_dir()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _tell(error: Exception, json_to: str | None) -> int:
    """Print what a verb raised, and return its exit code."""
    short = shortage(error)  # first: a library that finds no memory to load may look like one that is not installed
    if short is not None:
        if short is not error:
            short.__cause__ = error
        return _print_error(short, str(short), short.exit_code, json_to)
    if isinstance(error, MagicFaceError):
        hint = address_hint() if isinstance(error, (BackendError, EngineError)) else ""
        return _print_error(error, f"{error} {hint}".rstrip(), error.exit_code, json_to)
    if isinstance(error, OSError):
        return _print_error(error, str(error), 2, json_to)
    text = f"unexpected {type(error).__name__}: {error}. {'' if _tracebacks else TRACEBACK_HINT}"
    return _print_error(error, text, 1, json_to)


def _print_error(error: BaseException, text: str, exit_code: int, json_to: str | None) -> int:
    if _tracebacks:
        traceback.print_exception(error)
    line = one_line(text)
    print(f"error: {line}", file=sys.stderr)
    _write_error(json_to, type(error).__name__, line)
    return exit_code


def _write_error(json_to: str | None, kind: str, message: str, *, wait: bool = True) -> None:
    try:
        _check_json_target(json_to)
        write_json(json_to, {"error": {"kind": kind, "message": message}}, wait=wait)
    except (OSError, OutputError) as error:
        if not message.startswith("JSON file"):
            print(f"error: {one_line(str(error))}", file=sys.stderr)


def _finite(value: Any) -> Any:
    """Turn NaN and infinities, which JSON does not have, into text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
