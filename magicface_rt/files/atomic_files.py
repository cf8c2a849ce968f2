"""Files and folders that appear whole or not at all: written beside their place, flushed to disk, then renamed.

    .NAME.<32 hex digits>.part    what becomes NAME, while it is written; or the earlier NAME, while it is removed
    .NAME.<32 hex digits>.old     the earlier NAME, where the system cannot let two folders change places

There, a NAME that is too long is represented by its beginning and a digest.

A process holds a lock (flock) on what it writes, which the system frees however the process ends. So what a killed
process left can be told from what another one is writing, and the next process to write the same NAME removes it. Where
there are no such locks (Windows, some network file systems) it stays until somebody removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..process.interrupts import reraise_if_interrupt

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FULL",
    "advice",
    "check_writable",
    "exchange",
    "explain_os_error",
    "fsync",
    "fsync_tree",
    "is_live",
    "make_folder",
    "remove",
    "remove_abandoned",
    "remove_abandoned_of",
    "remove_if_possible",
    "replace_into_place",
    "resolve_target",
    "temporary_folder",
    "temporary_sibling",
    "write",
]

_NAME = re.compile(r"\.(.+)\.[0-9a-f]{32}\.(part|old)", re.DOTALL)
_MOST_NAME = 255 - len(f"..{'0' * 32}.part")
"""The most bytes of a NAME that leave room for the rest, where file names may have 255."""

_DIGITS = 32
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
_CANNOT_RENAME_SO = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_CANNOT_LINK = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
FULL = {errno.ENOSPC, errno.EDQUOT}
"""The numbers of errors by which a disk says that it has no room."""

_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_NAME = {errno.EINVAL, errno.ENAMETOOLONG}
_MOVED = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}
"""A folder is missing where one was expected, or the other way round: another process is putting one there."""

_BUSY_SECONDS, _BUSY_LOOK_SECONDS = 10, 0.005
"""How long to wait, and how often to look, while another process is replacing the same folder, which takes as long as
removing one."""


def resolve_target(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path at which `path` is written; for a link, that is where it leads.

    Raises:
        OSError: links lead to each other, there is no working directory any more, or no file can have this name.
    """
    target = Path(path).absolute()
    try:
        named = b"\0" not in os.fsencode(target)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise OSError(errno.EINVAL, "No file can have this name", str(target))
    if not target.is_symlink():
        return target
    end = Path(os.path.realpath(target))
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    return end


def temporary_sibling(target: Path, *, folder: bool = False) -> TemporarySibling:
    """Return a context that makes a new empty file or folder beside `target`, to be filled for `replace_into_place`.

        with temporary_sibling(target) as new:
            new.write_bytes(content)
            replace_into_place(new, target)

    Users who may not read what is there now may not read the new one either. Whatever has its name when the context
    ends is removed. What killed processes left of the same `target` is removed first.

    Raises (when the context is entered):
        OSError: it cannot be made.
    """
    return TemporarySibling(target, folder=folder)


def temporary_folder(kind: str, within: Path | None = None) -> TemporarySibling:
    """Return a context that makes a new folder for temporary files, which only this user may enter.

    It is removed when the context ends. What killed processes of this user left of the same kind is removed first.

    kind    the name of what it is for, such as `magicface-rt-verify`
    within  the folder that it is made in; by default that of the system's temporary files

    Raises (also when the context is entered):
        OSError: it cannot be made.
    """
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    return TemporarySibling(
        Path(within or tempfile.gettempdir()).absolute() / f"{kind}-{user}", folder=True, private=True
    )


class TemporarySibling:
    """The context that `temporary_sibling` and `temporary_folder` return.

    If entering is interrupted, it leaves nothing behind. Other code that enters it, such as an `ExitStack`, may be
    interrupted before it has noted that: who lets other code do so calls `close` as well. If leaving is interrupted
    before its first line, as Python allows, what was made is removed when this object is freed or the process ends.
    """

    def __init__(self, target: Path, *, folder: bool = False, private: bool = False) -> None:
        self._target, self._folder, self._private = target, folder, private
        self._made: tuple[Path, list[int], int] | None = None
        self._net: weakref.finalize[..., TemporarySibling] | None = None

    def __enter__(self) -> Path:
        remove_abandoned_of(self._target, own=self._private)
        process, earlier = os.getpid(), 0 if self._private else _mode(self._target, folder=self._folder)
        try:
            while True:
                path, locks = _beside(self._target, "part"), list[int]()
                self._made = path, locks, process  # before anything is made: a signal's handler may raise in any call
                _make(path, earlier, folder=self._folder)
                if _lock_into(locks, path):
                    break
            # No `__del__`, which would run each time, and in which Python cannot raise what a signal's handler raises.
            self._net = weakref.finalize(self, _discard, path, locks, process)
        except BaseException:
            self.close()
            raise
        return path

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what has the name that was made, if it was. May be called any number of times."""
        if self._made is not None:
            _discard(*self._made)
            self._made = None
        if self._net is not None:
            self._net.detach()


def replace_into_place(
    new: Path, target: Path, *, overwrite: bool = True, look: Callable[[Path], object] = lambda earlier: None
) -> None:
    """Let `new`, a part of `target`, take its place, durably on disk.

    With `overwrite` an earlier file or folder is replaced: at every moment either it or the new one is there. Without
    it, a file is put only where there is nothing, and a folder only where there is nothing or an empty one.

    What replaces something takes over its permissions and, where that is allowed, its group. So does each file of a
    folder those of its namesake; one without a namesake is readable by nobody who might not read all earlier files.

    If several processes replace the same folder at the same time, one waits for the other.

    look: called with an earlier folder just before it is replaced, and again with its new place before it is removed;
    whatever it raises keeps that folder, or brings it back

    Raises:
        FileExistsError: `new` is a file, there is no `overwrite`, and something is there.
        OSError: it failed. What was there before is there again, unless the only failure was in flushing the new name
            to disk: then a file stays replaced, and so does a folder if two cannot change places.
    """
    fsync_tree(new)
    if overwrite or new.is_dir():  # without it, of an empty folder
        _take_permissions(new, target)
    last = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            _try_to_replace(new, target, overwrite, look)
        except OSError as error:
            elsewhere = overwrite and error.errno in _MOVED and new.is_dir()
            if not elsewhere or time.monotonic() > last:
                raise
            time.sleep(_BUSY_LOOK_SECONDS)
        else:
            return


def write(target: Path, content: bytes | memoryview) -> None:
    """Write a file with this content, in place of an earlier one.

    Raises:
        OSError: as `temporary_sibling` and `replace_into_place`.
    """
    with temporary_sibling(target) as new:
        new.write_bytes(content)
        replace_into_place(new, target)


def check_writable(target: Path, *, folder: bool = False) -> None:
    """Check, before hours of work, that `target` can be made, by making a part of it and removing that.

    Folders that do not exist yet are not made: they are tried inside the part, in the nearest folder that exists.

    Raises:
        OSError: it cannot be made.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(target)  # refuses a name that is too long, which that of a part need not be
    place = next(place for place in target.parents if os.path.lexists(place))
    names = target.relative_to(place).parts
    deep = len(names) > 1
    with temporary_sibling(place / target.name, folder=folder or deep) as tried:
        for name in names if deep else ():
            (tried / name).mkdir()
            (tried / name).rmdir()
        if folder or deep:
            tried.rmdir()
        else:
            tried.unlink()


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder, and those above it that are missing, with their names durably on disk.

    Raises:
        OSError: one could not be made or flushed.
    """
    missing = []
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        missing.append(place)
    folder.mkdir(mode, parents=True, exist_ok=True)
    for made in reversed(missing):
        fsync(made.parent)


def remove(target: Path) -> None:
    """Remove a file or folder, which is gone at once: what a killed process leaves of it is a part of `target`.

    Raises:
        OSError: it cannot be moved away, and is unchanged. (What is moved away and cannot be deleted stays as a part.)
    """
    aside = _beside(target, "part")
    try:
        os.rename(target, aside)
    finally:  # a signal may arrive during the renaming
        remove_if_possible(aside)


def remove_if_possible(path: Path) -> None:
    """Remove as much of a file or folder as can be removed, even if a signal arrives meanwhile; the rest stays."""
    try:
        _take_away(path)
    except BaseException:
        _take_away(path)
        raise


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk.

    Raises:
        OSError: it could not be flushed.
    """
    folder = path.is_dir()
    if os.name == "nt" and folder:  # which Windows cannot flush
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno == errno.EINVAL):  # some file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to disk.

    Raises:
        OSError: it could not be flushed.
    """
    if path.is_dir():
        for inner in sorted(path.iterdir()):
            fsync_tree(inner)
    fsync(path)


def remove_abandoned(folder: Path, of: Callable[[str], bool], *, own: bool = False) -> list[Path]:
    """Remove what killed processes left unfinished in a folder, of names that `of` accepts; return what went.

    What a live process is writing stays. So does an earlier folder that is the only one of its name, because its
    process was killed in the middle of replacing it. With `own`, so does what belongs to another user, for folders such
    as /tmp in which anybody may write. Nothing is raised: what cannot be removed now may be another time.
    """
    removed: list[Path] = []
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir(folder)
    for name in names:
        found = _NAME.fullmatch(name)
        if found is None or not of(found[1]) or (found[2] == "old" and not _stands(folder, found[1], names)):
            continue
        with contextlib.suppress(OSError):
            if own and hasattr(os, "geteuid") and os.lstat(folder / name).st_uid != os.geteuid():
                continue
            lock = _lock(folder / name)
            if lock is not None:
                try:
                    remove_if_possible(folder / name)
                finally:
                    _unlock(lock)
                removed.append(folder / name)
    return removed


def remove_abandoned_of(target: Path, *, own: bool = False) -> list[Path]:
    """Remove what killed processes left unfinished of `target`, as `remove_abandoned` does; return what went."""
    return remove_abandoned(target.parent, _stem(target.name).__eq__, own=own)


def is_live(part: Path) -> bool:
    """Whether a live process holds what has the name of a part. False also if that cannot be known."""
    try:
        lock = _lock(part)
    except BlockingIOError:
        return True
    except OSError:
        return False
    _unlock(lock)
    return False


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places in one step; return False if this system or file system cannot.

    Raises:
        OSError: it can, but failed.
    """
    return _rename(one, other, _RENAME_EXCHANGE)


def explain_os_error(error: OSError) -> str:
    """Say what happened and what to do, as the end of a message: `file 'a' cannot be written: ...`."""
    return f"{error}. {advice(error)}"


def advice(error: OSError, *, place: str = "place", room: str = "", other: str = "") -> str:
    """Say what to do about an error of writing, as a sentence.

    place  what cannot be written to, in a word
    room   how room is made there; unless given, "Free some space there"
    other  what else may be done; unless given, to choose another place
    """
    if error.errno in FULL:
        return f"{room or 'Free some space there'}, or {other or 'choose another place'}."
    if error.errno == errno.EFBIG:
        return f"Raise the limit on the size of files (`ulimit -f`), or {other or 'choose another place'}."
    if error.errno in _REFUSED:
        return f"Make the {place} writable for this user, or {other or 'choose another one'}."
    if error.errno == errno.ENXIO:
        return f"Nobody reads from it. Start what does first, or {other or 'choose another place'}."
    if error.errno in _NO_NAME:
        return "Choose another name."
    return f"Look at the {place} and its disk, or {other or 'choose another one'}."


# -------------------------------------------------------------------------------------------------------------- inside


def _beside(target: Path, kind: str) -> Path:
    """Return a new name beside `target`, for a part of it or for its earlier state."""
    return target.parent / f".{_stem(target.name)}.{uuid.uuid4().hex}.{kind}"


def _stem(name: str) -> str:
    """Return NAME as it stands in the names of its parts."""
    encoded = os.fsencode(name)
    if len(encoded) <= _MOST_NAME:
        return name
    most = _MOST_NAME - 1 - _DIGITS
    begin = name[:most]
    while len(os.fsencode(begin)) > most:  # whole characters
        begin = begin[:-1]
    return f"{begin}~{hashlib.sha256(encoded).hexdigest()[:_DIGITS]}"


def _stands(folder: Path, stem: str, names: list[str]) -> bool:
    """Whether the folder has something whose parts are named by this stem."""
    return any(_stem(name) == stem and os.path.lexists(folder / name) for name in names)


def _make(path: Path, earlier: int | None, *, folder: bool) -> None:
    """Make an empty part of something whose permissions were `earlier`; None: of something new.

    Its group may be another one, so that only `replace_into_place` gives it those permissions. Until then nobody else
    may look into a folder.
    """
    if folder:
        os.mkdir(path, 0o777 if earlier is None else 0o700)
    else:
        path.touch(0o666 if earlier is None else 0o600 | earlier & 0o006, exist_ok=False)


def _lock_into(locks: list[int], path: Path) -> bool:
    """Lock a part that was just made, and add the descriptor that holds the lock to `locks`, where there are locks.

    Return whether the part is still there: in the moment before it was locked, another process may have taken it for
    left behind.
    """
    try:
        lock = _lock(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    if lock is not None:
        locks.append(lock)
    return True


def _discard(path: Path, locks: list[int], process: int) -> None:
    """Remove a part and release its lock, which is taken out of `locks`, so that no descriptor is closed twice.

    Nothing is done in a process that was forked from the one that made it.
    """
    if os.getpid() != process:
        return
    try:
        try:
            remove_if_possible(path)
        except BaseException:  # a signal arrived before the removal began
            remove_if_possible(path)
            raise
    finally:
        while locks:
            _unlock(locks.pop())


def _mode(path: Path, *, folder: bool) -> int | None:
    """Return the permissions of a file or folder; None if there is none, or something else."""
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return None
    return stat.S_IMODE(found) if (stat.S_ISDIR if folder else stat.S_ISREG)(found) else None


def _take_permissions(new: Path, target: Path) -> None:
    """Give `new` the group and the permissions of what it will replace, if that is of the same kind; of a folder, also
    give each file those of its namesake.

    Raises:
        OSError: it would be readable by more users, and that cannot be changed.
    """
    try:
        earlier, mine = os.lstat(target), os.lstat(new)
    except OSError:
        return
    if stat.S_IFMT(earlier.st_mode) != stat.S_IFMT(mine.st_mode):
        return
    if stat.S_ISDIR(mine.st_mode):  # first what is in it: until its own permissions are set nobody else may look
        _take_permissions_within(new, target)
    _permit(new, mine, stat.S_IMODE(earlier.st_mode), earlier.st_gid)


def _take_permissions_within(new: Path, target: Path) -> None:
    """As `_take_permissions`, for everything in a folder. What has no namesake is readable by nobody who might not read
    one of the files that were there: a second portrait is as private as the first.
    """
    kinds, files = {}, []
    try:
        for name in os.listdir(target):
            found = os.lstat(target / name)
            kinds[name] = stat.S_IFMT(found.st_mode)
            if stat.S_ISREG(found.st_mode):
                files.append(found)
    except OSError:  # it was replaced or removed meanwhile
        return
    shared, groups = 0o077, {found.st_gid for found in files}
    for found in files:
        shared &= found.st_mode
    if len(groups) > 1:
        shared &= ~0o070
    for inner in sorted(new.iterdir()):
        mine = os.lstat(inner)
        if kinds.get(inner.name) == stat.S_IFMT(mine.st_mode):
            _take_permissions(inner, target / inner.name)
        elif files:
            entered = (shared & 0o044) >> 2 if stat.S_ISDIR(mine.st_mode) else 0  # who may read it may enter it
            mode = stat.S_IMODE(mine.st_mode)
            _permit(
                inner, mine, mode & (~0o077 | shared | entered), mine.st_gid if len(groups) > 1 else files[0].st_gid
            )


def _permit(new: Path, mine: os.stat_result, mode: int, group: int) -> None:
    """Give `new`, whose status is `mine`, permissions and a group; where the group may not be, it gets no permissions.

    Raises:
        OSError: it would be readable by more users, and that cannot be changed.
    """
    if stat.S_ISLNK(mine.st_mode):  # what it leads to is not ours
        return
    has = stat.S_IMODE(mine.st_mode)
    if group != mine.st_gid:
        try:
            os.chown(new, -1, group)
        except OSError:
            mode &= ~0o070  # they were another group's
    if mode != has:
        try:
            os.chmod(new, mode)
        except OSError:  # some file systems know no permissions
            if has & ~mode & 0o077:
                raise


def _lock(path: Path) -> int | None:
    """Lock a file or folder; return the descriptor that holds the lock until closed, or None if there are no locks.

    Raises:
        BlockingIOError: a live process holds it.
        OSError: it is gone or cannot be opened.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The former holder may have renamed it meanwhile: then nobody may remove it.
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
        raise BlockingIOError(errno.EWOULDBLOCK, "it is another one now", str(path))
    except BaseException as error:
        os.close(descriptor)
        if not isinstance(error, OSError) or isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise
        return None


def _try_to_replace(new: Path, target: Path, overwrite: bool, look: Callable[[Path], object]) -> None:
    """Try once to put in its place what has been flushed to disk."""
    earlier = os.path.lexists(target)
    replaced = overwrite and earlier and new.is_dir() and target.is_dir()
    # The earlier folder is locked until its fate is certain, or others might take it, as a part, for left behind.
    held = _lock_soon(target) if replaced else None
    try:
        if replaced:
            _replace_folder(new, target, look)
        elif not overwrite and not new.is_dir():
            _move_where_nothing_is(new, target)
        else:
            os.replace(new, target)
        try:
            fsync(target.parent)
        except OSError:
            # A caller that is told of a failure must not find it there.
            with contextlib.suppress(OSError):
                if replaced:
                    exchange(new, target)
                elif not earlier:
                    os.rename(target, new)
            raise
    finally:
        _unlock(held)


def _lock_soon(target: Path) -> int | None:
    """Like `_lock`, for a folder that another process may be replacing: wait for that; None if it does not end.

    Raises:
        OSError: the folder is gone or cannot be opened.
    """
    last = time.monotonic() + _BUSY_SECONDS
    while time.monotonic() < last:
        try:
            return _lock(target)
        except BlockingIOError:
            time.sleep(_BUSY_LOOK_SECONDS)
    return None


def _unlock(descriptor: int | None) -> None:
    """Release the lock, even if a process that was forked meanwhile has the descriptor as well."""
    if descriptor is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def _move_where_nothing_is(new: Path, target: Path) -> None:
    """Rename a file to a place where nothing is; of two that do so at the same time one succeeds.

    Raises:
        FileExistsError: something is there.
    """
    try:
        os.link(new, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
    else:
        # The file has both names now. If this one cannot be removed, no harm is done: the next process removes it.
        with contextlib.suppress(OSError):
            new.unlink()
        return
    if _rename(new, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(new, target)


def _replace_folder(new: Path, target: Path, look: Callable[[Path], object]) -> None:
    """Replace a folder; afterwards the earlier one is at `new`."""
    look(target)
    if exchange(new, target):
        try:
            look(new)
        except BaseException:
            exchange(new, target)
            raise
        return
    aside, looked = _beside(target, "old"), False
    try:
        target.rename(aside)
        look(aside)
        looked = True
        new.rename(target)
        aside.rename(new)
    except BaseException:
        if os.path.lexists(target) and looked:  # interrupted as it was put there, or another process has put its own
            remove_if_possible(aside)
        else:  # where another process has, this keeps its name
            with contextlib.suppress(OSError):
                aside.rename(target)
        raise


def _take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)  # nothing can be removed from a folder that its owner may not write to
        try:
            shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            # Interrupted after closing a folder, before noting that, it closes it again and fails.
            reraise_if_interrupt(error)
            raise
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _rename(one: Path, other: Path, flag: int) -> bool:
    """Call `renameat2`; return False if this system or file system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_RENAME_SO:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@functools.cache
def _renameat2() -> Any:
    """Return the C library's `renameat2`; None if it has none."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function
