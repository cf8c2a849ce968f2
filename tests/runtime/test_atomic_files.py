"""Files and folders appear whole or not at all: a signal at any call, and two that write the same."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from magicface_rt.files import atomic_files
from tests.killed import fill, kill, killed, temporary

fcntl = pytest.importorskip("fcntl")

CALLS = [(os, name) for name in ("mkdir", "open", "close", "scandir", "unlink", "rmdir", "rename", "replace", "link")]
CALLS += [(os, "fsync"), (fcntl, "flock")]


def write(place: Path, text: str) -> None:
    place.mkdir()
    for name in ("a.txt", "b.txt"):
        (place / name).write_text(text)


def read(place: Path) -> str | None:
    """The text of what stands there, if it is whole; None where there is nothing."""
    if not place.exists():
        return None
    texts = [file.read_text() for file in sorted(place.iterdir())] if place.is_dir() else [place.read_text()]
    assert len(texts) == (2 if place.is_dir() else 1)
    assert len(set(texts)) == 1
    return texts[0]


def put_folder(out: Path, look: Callable[[Path], object] = lambda earlier: None) -> None:
    with atomic_files.temporary_sibling(out, folder=True) as part:
        for name in ("a.txt", "b.txt"):
            (part / name).write_text("new")
        atomic_files.replace_into_place(part, out, look=look)


def put_file(out: Path, *, overwrite: bool = True) -> None:
    with atomic_files.temporary_sibling(out) as part:
        part.write_text("new")
        atomic_files.replace_into_place(part, out, overwrite=overwrite)


# What is done, with what is there before, and of what may stand there after a signal.
DEEDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object] | None, set[str | None]]] = {
    "a folder": (put_folder, None, {None, "new"}),
    "a file": (put_file, None, {None, "new"}),
    "a file where nothing may be": (lambda out: put_file(out, overwrite=False), None, {None, "new"}),
    "a folder that replaces": (put_folder, lambda out: write(out, "earlier"), {"earlier", "new"}),
    "a folder that replaces, by two renamings": (put_folder, lambda out: write(out, "earlier"), {"earlier", "new"}),
    "a file that replaces": (put_file, lambda out: out.write_text("earlier"), {"earlier", "new"}),
    "a folder that is removed": (atomic_files.remove, lambda out: write(out, "earlier"), {"earlier", None}),
    "a file that is removed": (atomic_files.remove, lambda out: out.write_text("earlier"), {"earlier", None}),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_nothing_temporary_is_left_by_a_signal(deed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as each call of the system returns; after `close`, for one, `shutil` has not noted yet that it closed."""
    do, prepare, allowed = DEEDS[deed]
    if "two renamings" in deed:
        monkeypatch.setattr(atomic_files, "_rename", lambda one, other, flag: False)
    descriptors, seen = len(os.listdir("/proc/self/fd")), set()
    at, ended = 0, False
    while not ended:
        at += 1
        place = tmp_path / str(at)
        place.mkdir()
        if prepare is not None:
            prepare(place / "out")
        count, struck = 0, ""

        def interrupting(name: str, real: Callable[..., Any], at: int = at) -> Callable[..., Any]:
            def called(*arguments: Any, **named: Any) -> Any:
                nonlocal count, struck
                found = real(*arguments, **named)
                count += 1
                if count == at:
                    struck = name
                    raise KeyboardInterrupt
                return found

            return called

        with monkeypatch.context() as patched:
            for module, name in CALLS:
                patched.setattr(module, name, interrupting(name, getattr(module, name)))
            try:
                do(place / "out")
                ended = True
            except KeyboardInterrupt:
                assert struck
        assert read(place / "out") in (allowed if not ended else allowed - {"earlier"}), (at, struck)
        assert {path.name for path in place.iterdir()} <= {"out"}, (at, struck)
        seen.add(struck)
        left, descriptors = len(os.listdir("/proc/self/fd")) - descriptors, len(os.listdir("/proc/self/fd"))
        assert left <= (struck in ("open", "scandir")), (at, struck)  # what these return is lost with the signal
    assert at > 2
    assert {"rename"} <= seen if "removed" in deed else {"open", "flock", "fsync", "close"} <= seen


@pytest.mark.parametrize(
    ("deed", "stays"),
    [
        ("a folder", None),
        ("a file", None),
        ("a file where nothing may be", None),
        ("a folder that replaces", "earlier"),
        ("a folder that replaces, by two renamings", "new"),
        ("a file that replaces", "new"),
    ],
)
def test_what_stays_where_only_the_new_name_cannot_be_made_durable(
    deed: str, stays: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is told all the same. What can come back does, and nothing temporary is left."""
    do, prepare, _ = DEEDS[deed]
    if "two renamings" in deed:
        monkeypatch.setattr(atomic_files, "_rename", lambda one, other, flag: False)
    if prepare is not None:
        prepare(tmp_path / "out")
    real = atomic_files.fsync

    def failing(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        real(path)

    monkeypatch.setattr(atomic_files, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        do(tmp_path / "out")
    assert read(tmp_path / "out") == stays
    assert os.listdir(tmp_path) == ([] if stays is None else ["out"])


FORKER = """
import os
import signal
import sys
from pathlib import Path
from magicface_rt.files import atomic_files

with atomic_files.temporary_sibling(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    print(child, flush=True)
    signal.pause()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_writer_left_stays_as_long_as_what_it_forked_meanwhile(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", FORKER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    child = int(writer.stdout.readline())
    try:
        writer.kill()
        writer.wait(timeout=60)
        (part,) = os.listdir(tmp_path)
        assert atomic_files.remove_abandoned(tmp_path, "out".__eq__) == []
        assert atomic_files.is_live(tmp_path / part)
    finally:
        os.kill(child, signal.SIGKILL)
        writer.stdout.read()  # ends when the child has
        writer.stdout.close()
    assert [path.name for path in atomic_files.remove_abandoned(tmp_path, "out".__eq__)] == [part]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755, 0o777])
def test_what_is_replaced_keeps_its_permissions(kind: str, mode: int, tmp_path: Path) -> None:
    """A portrait that only its owner may read is not shown to others by saving it again, nor while it is written."""
    target, folder = tmp_path / "x", kind == "folder"
    target.mkdir() if folder else target.touch()
    os.chmod(target, mode)
    umask = os.umask(0o022)
    try:
        with atomic_files.temporary_sibling(target, folder=folder) as part:
            shown = part.stat().st_mode & 0o077
            assert shown & ~mode == 0
            (part / "a" if folder else part).write_text("new")
            atomic_files.replace_into_place(part, target)
        assert target.stat().st_mode & 0o777 == mode
        new = tmp_path / "new"
        with atomic_files.temporary_sibling(new, folder=folder) as part:
            (part / "a" if folder else part).write_text("new")
            atomic_files.replace_into_place(part, new)
        assert new.stat().st_mode & 0o777 == (0o755 if folder else 0o644)
    finally:
        os.umask(umask)


@pytest.mark.parametrize("top", [0o755, 0o700])
@pytest.mark.parametrize("private", [True, False])
def test_each_file_of_a_folder_keeps_its_permissions(private: bool, top: int, tmp_path: Path) -> None:
    """Portraits that only their owner may read lie in a folder that others may enter."""
    target, wide, mode = tmp_path / "x", 0o644, 0o600 if private else 0o640
    (target / "inner").mkdir(parents=True)
    for name, has in {"image": mode, "run": wide, "inner/image": mode}.items():
        (target / name).touch()
        os.chmod(target / name, has)
    os.chmod(target / "inner", 0o750)
    os.chmod(target, top)
    outside = tmp_path / "outside"
    outside.touch()
    os.chmod(outside, 0o666)
    umask = os.umask(0o022)
    try:
        with atomic_files.temporary_sibling(target, folder=True) as part:
            assert part.stat().st_mode & 0o077 == 0
            for folder in ("inner", "folder"):
                (part / folder).mkdir()
            (part / "link").symlink_to(outside)
            for name in ("image", "run", "another", "inner/image", "inner/another"):
                (part / name).write_text("new")
            atomic_files.replace_into_place(part, target)
    finally:
        os.umask(umask)
    found = {path.relative_to(target).as_posix(): path.stat().st_mode & 0o777 for path in target.rglob("*")}
    assert found == {
        "image": mode,
        "run": wide,
        "another": mode,  # as private as the most private one
        "inner": 0o750,
        "folder": 0o700 if private else 0o750,  # whoever may read the files may enter it
        "link": outside.stat().st_mode & 0o777,
        "inner/image": mode,
        "inner/another": mode,
    }
    assert target.stat().st_mode & 0o777 == top
    assert outside.stat().st_mode & 0o777 == 0o666, "what a link leads to is not ours"
    assert (target / "image").read_text() == "new"


def test_an_empty_folder_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    os.chmod(target, 0o775)
    with atomic_files.temporary_sibling(target, folder=True) as part:
        (part / "a").touch()
        atomic_files.replace_into_place(part, target, overwrite=False)
    assert target.stat().st_mode & 0o777 == 0o775
    assert (target / "a").exists()


def test_what_belonged_to_another_group_is_not_shown_to_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    target.touch()
    os.chmod(target, 0o640)
    real = os.lstat

    def of_another_group(path: Any) -> Any:
        found = real(path)
        return os.stat_result([*found[:5], found.st_gid + 1, *found[6:]]) if Path(path) == target else found

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with atomic_files.temporary_sibling(target) as part:
        monkeypatch.setattr(os, "lstat", of_another_group)
        monkeypatch.setattr(os, "chown", refused)
        atomic_files.replace_into_place(part, target)
        monkeypatch.undo()
    assert target.stat().st_mode & 0o777 == 0o600


def test_files_that_belonged_to_other_groups_are_not_shown_to_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    target.mkdir()
    for name in ("a", "b"):
        (target / name).touch()
        os.chmod(target / name, 0o640)
    real = os.lstat

    def of_another_group(path: Any) -> Any:
        found = real(path)
        return os.stat_result([*found[:5], found.st_gid + 1, *found[6:]]) if Path(path) == target / "a" else found

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with atomic_files.temporary_sibling(target, folder=True) as part:
        for name in ("a", "b", "c"):
            (part / name).touch()
        monkeypatch.setattr(os, "lstat", of_another_group)
        monkeypatch.setattr(os, "chown", refused)
        atomic_files.replace_into_place(part, target)
        monkeypatch.undo()
    assert {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()} == {"a": 0o600, "b": 0o640, "c": 0o600}


def test_what_is_replaced_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    """By another that clears the place as it has the name of a part, and may still have to come back."""
    out, looks = tmp_path / "out", []
    write(out, "earlier")

    def look(earlier: Path) -> None:
        assert atomic_files.remove_abandoned(tmp_path, "out".__eq__) == []
        looks.append(read(earlier))
        if len(looks) == 2:
            raise OSError("not what it was")

    with pytest.raises(OSError, match="not what it was"):
        put_folder(out, look)
    assert looks == ["earlier", "earlier"]
    assert read(out) == "earlier"
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_refused_is_kept_where_another_has_taken_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two folders cannot change places the earlier one is aside as it is looked at."""
    monkeypatch.setattr(atomic_files, "_rename", lambda one, other, flag: False)
    out, looks = tmp_path / "out", []
    write(out, "earlier")

    def look(earlier: Path) -> None:
        looks.append(earlier)
        if len(looks) == 2:
            write(out, "another's")
            raise ValueError("not what it was")

    with pytest.raises(ValueError, match="not what it was"):
        put_folder(out, look)
    assert read(out) == "another's"
    assert read(looks[1]) == "earlier"
    assert sorted(tmp_path.iterdir()) == sorted([out, looks[1]])


SAVER = """
import sys
import time
from pathlib import Path
from magicface_rt.files import atomic_files

out, text, times, how = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
if how == "by two renamings":
    atomic_files._rename = lambda one, other, flag: False


def look(earlier):
    time.sleep(0.001)
    texts = [file.read_text() for file in earlier.iterdir()]
    assert len(texts) == 2 and len(set(texts)) == 1, texts


for _ in range(times):
    with atomic_files.temporary_sibling(out, folder=True) as part:
        for name in ("a.txt", "b.txt"):
            (part / name).write_text(text)
        atomic_files.replace_into_place(part, out, look=look)
"""


@pytest.mark.parametrize("how", ["in one step", "by two renamings"])
@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_two_processes_that_replace_the_same_folder_lose_nothing(times: int, how: str, tmp_path: Path) -> None:
    """Nor do they where neither finds one there."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SAVER]
    savers = [
        subprocess.Popen([*command, str(out), text, str(times), how], stderr=subprocess.PIPE, text=True)
        for text in ("one", "other")
    ]
    for saver in savers:
        _, said = saver.communicate(timeout=600)
        assert saver.returncode == 0, said[-2000:]
    assert read(out) in ("one", "other")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")
def test_what_a_killed_process_left_of_a_temporary_folder_goes_with_the_next_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of live processes, of other kinds and of other users stay."""

    def work(kind: str) -> None:
        with atomic_files.temporary_folder(kind, tmp_path) as made:
            fill(made)

    killed(lambda: work("one"))
    killed(lambda: work("other"))
    (left,), (another,) = temporary(tmp_path, "one"), temporary(tmp_path, "other")
    assert os.listdir(left) == ["weights.bin"]
    with atomic_files.temporary_folder("one", tmp_path) as live:
        assert live.stat().st_mode & 0o777 == 0o700
        assert temporary(tmp_path, "one") == [live]
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with atomic_files.temporary_folder("one") as beside:
            assert temporary(tmp_path, "one") == sorted([live, beside])
    assert list(tmp_path.iterdir()) == [another]
    real = os.lstat

    def of_somebody_else(path: Any) -> Any:
        found = real(path)
        return os.stat_result([*found[:4], found.st_uid + 1, *found[5:]])

    monkeypatch.setattr(os, "lstat", of_somebody_else)
    assert atomic_files.remove_abandoned(tmp_path, lambda _: True, own=True) == []
    monkeypatch.undo()
    assert atomic_files.remove_abandoned(tmp_path, lambda _: True, own=True) == [another]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_takes_nothing_temporary_from_its_parent(tmp_path: Path) -> None:
    """Neither as it leaves the context by an error of its own, nor as it ends."""

    def leave() -> None:
        made.close()
        kill()

    made = atomic_files.temporary_sibling(tmp_path / "x")
    with made as path:
        killed(leave)
        assert path.exists()
        assert atomic_files.is_live(path)
    assert list(tmp_path.iterdir()) == []
