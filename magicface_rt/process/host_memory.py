"""Too little memory on the host: recognising it whichever library reports it, and finding how much is left."""

from __future__ import annotations

import ctypes
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import BackendError, BuildError, DeviceError, HostMemoryError, MagicFaceError
from .interrupts import reraise_if_interrupt

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SAID = (
    "bad_alloc",  # C++
    "bad allocation",
    "can't allocate memory",  # PyTorch
    "cannot allocate memory",  # the system, also when a library is loaded
    "failed to map segment",
)
"""Phrases by which libraries report it in errors of other types, in lower case."""

_SAID_UNDER_A_LIMIT = (
    "can't start new thread",  # its stack takes address space; without a limit of that, another limit was hit
    "error return without exception set",  # Python, if there was no memory for the exception
)
"""Phrases that mean the same, but only under an address-space limit (`ulimit -v`)."""

_COMPILING = re.compile(r"field '\w+' is required for [A-Z]\w+")
"""What Python's compiler says, as a ValueError, if it had no memory for a part of a program; under a limit as well."""

_M_ARENA_MAX = -8
"""The parameter of glibc's `mallopt` for the largest number of heaps."""

_CURE = (
    "Free some, or allow this process more (ulimit -v, the container's limit); or ask for less: fewer pictures at "
    "once, prepared concepts from files, a smaller budget or workspace."
)


def shortage(error: BaseException) -> HostMemoryError | None:
    """Return a `HostMemoryError` for an error that was caused by too little memory on the host; None for others."""
    if isinstance(error, HostMemoryError):
        return error
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, DeviceError):
            return None
        if _is_memory_message(cause):
            said = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
            return HostMemoryError(_with_limits(f"there is too little memory on the host: {said[:300]}."))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def as_host_memory_error() -> Iterator[None]:
    """Turn any error in the block that was caused by too little memory on the host into a `HostMemoryError`."""
    try:
        yield
    except Exception as error:
        reraise_if_interrupt(error)
        found = shortage(error)
        if found is None or found is error:
            raise
        raise found from error


def _is_memory_message(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, MagicFaceError) and not isinstance(error, (BackendError, BuildError)):
        return False  # these two repeat what a library said; others may repeat what a user wrote
    said = str(error).lower()
    if any(words in said for words in _SAID):
        return True
    compiling = isinstance(error, ValueError) and _COMPILING.fullmatch(str(error)) is not None
    return (compiling or any(words in said for words in _SAID_UNDER_A_LIMIT)) and bool(_address_limit())


def available_bytes(*, to_another: bool = False) -> int | None:
    """Return the bytes that this process may still take before a hard limit stops or ends it; None if none is set.

    to_another  those that a process may take which this one starts: it has the same limits, and no addresses yet

    The limits are that of its address space (RLIMIT_AS), and the memory limits of its control groups and of those above
    them. The cache of files counts as free, since the system drops it first.
    """
    addresses = _address_limit(used=0) if to_another else _address_limit()
    return min((left for _, left in (*addresses, *_group_limits())), default=None)


def host_memory_error(need: str) -> HostMemoryError:
    """Make the error for what is known beforehand to find too little memory. `need`: a clause that says so."""
    return HostMemoryError(_with_limits(f"{need}."))


def check_addresses(need: int, what: str) -> None:
    """Check that the address-space limit leaves enough for what would otherwise end the process, or hang.

    Raises:
        HostMemoryError: there is such a limit, and it leaves less than `need` bytes.
    """
    if any(left < need for _, left in _address_limit()):
        raise host_memory_error(f"{what} needs {need / 1e6:,.0f} MB of addresses")


def share_heap() -> None:
    """If there is an address-space limit, let all threads allocate from one heap. Call this before they start.

    glibc reserves 64 MiB of address space for the heap of each thread, until nothing is left for later requests; and a
    thread that finds no room for its own variables ends the process. Without a limit, or without glibc, this does
    nothing.
    """
    if _address_limit():
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 1)


def stack_bytes() -> int:
    """Return the bytes of address space that a thread's stack takes, unless the thread sets another size."""
    most = 8 << 20
    if resource is None:
        return most
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return most if soft == resource.RLIM_INFINITY else soft


def address_hint() -> str:
    """Return a sentence saying that an address-space limit may be to blame, which a library may not; "" without one."""
    found = _address_limit()
    return f"It may be for its limit of addresses (ulimit -v), by which {_may_take(found[0][1])}." if found else ""


def _with_limits(message: str) -> str:
    """Return the message with a sentence on the limit that leaves least, if one is set, and on what to do."""
    limit = ""
    with suppress(MemoryError):  # reading the limits takes some as well
        found = sorted((left, name) for name, left in _limits())
        limit = f" By its {found[0][1]} {_may_take(found[0][0])}." if found else ""
    return f"{message}{limit} {_CURE}"


def _may_take(left: int) -> str:
    return f"this process may take {left / 1e6:,.0f} MB more"


def _limits() -> list[tuple[str, int]]:
    return [*_address_limit(), *_group_limits()]


def _address_limit(used: int | None = None) -> list[tuple[str, int]]:
    if resource is None:
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return []
    if used is None:
        try:
            used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        except (OSError, ValueError, LookupError):  # a system that does not tell
            used = 0
    return [("limit of addresses (ulimit -v)", max(0, soft - used))]


def _group_limits(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> list[tuple[str, int]]:
    """Return the memory limits of version 2 of control groups, and of version 1 if that controls memory."""
    found = []
    try:
        lines = [line.split(":", 2) for line in of.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    for line in lines:
        if len(line) != 3 or not (line[1] == "" or "memory" in line[1].split(",")):
            continue
        base, names = (
            (root, ("memory.max", "memory.current", ""))
            if line[1] == ""
            else (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"))
        )
        group = base / line[2].lstrip("/")
        for folder in (group, *group.parents):
            if folder != base and base not in folder.parents:
                break
            if (left := _left_in(folder, *names)) is not None:
                found.append(("control group's memory limit", left))
    return found


def _left_in(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        if most == "max" or int(most) >= 1 << 60:  # version 1 says "none" by a number that no machine has
            return None
        taken = int((folder / used).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError, LookupError):
        return None
    return max(0, int(most) - taken + files)
