"""Writers on a disk that fails at any of their steps, on one that is slow, and on one that may lose its power.

Afterwards there is what was before, or the new one whole; what failed is said with the place and what to do; nothing
temporary is left, unless removing is what the disk refuses; and once it is well again the same command simply works,
and removes what was left.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import disks
import figures
import pytest
from disks import FAULTS, Dawdling, Failing, Layer, Settling
from killing import leftovers
from killing_checks import concept_at, result_at, write_job
from killing_targets import clear
from killing_writers import made_result

from magicface_rt import Bundle, KeptConcept, Session
from magicface_rt.cli import main
from magicface_rt.errors import OutputError
from magicface_rt.files import atomic_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="paths of descriptors are looked up in /proc")

NEW, OLD = 7, 3


@pytest.fixture(scope="module")
def kept(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> KeptConcept:
    folder = tmp_path_factory.mktemp("kept")
    arguments = ["prepare", tiny_bundle, "--job", write_job(folder), "--out", folder, "--backend", "onnxruntime-cpu"]
    assert main([os.fspath(a) for a in arguments]) == 0
    return KeptConcept.load(folder / "man.concept")


@dataclass
class Writer:
    """save: with a mark, over what is there if asked. found: that mark; fails where what is there is not whole."""

    place: Path
    save: Callable[[int, bool], object]
    found: Callable[[], int | None]

    def put(self, mark: int | None) -> None:
        """Only that, well written."""
        clear(self.place)
        if mark is None:
            return
        copy = self.place.parent.parent / f"{mark}-{self.place.name}"
        if not copy.exists():
            self.save(mark, False)
            self.place.rename(copy)
        (shutil.copytree if copy.is_dir() else shutil.copy)(copy, self.place)


@pytest.fixture
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Writer:
    below = tmp_path / "work"
    below.mkdir()
    if request.param == "result.save":
        place = below / "run"
        return Writer(place, lambda k, over: made_result(k).save(place, overwrite=over), lambda: result_at(place))
    concept, place = request.getfixturevalue("kept"), below / "man.concept"
    return Writer(
        place,
        lambda k, over: concept.renamed(weight=float(k)).save(place, overwrite=over),
        lambda: concept_at(place, concept),
    )


@pytest.fixture
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer stands for the disk: nothing need reach a real one."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


writers = pytest.mark.parametrize("writer", ["result.save", "KeptConcept.save"], indirect=True)
codes = pytest.mark.parametrize(
    "code",
    [
        pytest.param(code, id=errno.errorcode[code], marks=pytest.mark.slow if code == errno.EDQUOT else ())
        for code in FAULTS
    ],
)


# ------------------------------------------------------------------------------------------------------------- failing


def tidied(left: int) -> str:
    """Of so many steps after which something temporary was there, all of it gone when the same was done again."""
    return f"{left} left something temporary{', which the next run removed' if left else ''}"


@writers
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@codes
@pytest.mark.usefixtures("no_disk")
def test_a_disk_that_fails_at_any_step(writer: Writer, replaced: bool, code: int, request: Any) -> None:
    below, before = writer.place.parent, OLD if replaced else None
    said = borne = left = 0
    for at in range(200):
        writer.put(before)
        failing = Failing(at, code)
        error = ""
        with Layer(below, failing).installed():
            try:
                writer.save(NEW, replaced)
            except OutputError as raised:
                error = str(raised)
        if not failing.hit:
            break
        found = writer.found()
        if error:
            said += 1
            for part in (str(writer.place), "cannot be written", os.strerror(code), FAULTS[code]):
                assert part in error, error
            # A file that was replaced cannot come back, nor can anything on a disk that takes nothing any more.
            final = replaced and writer.place.is_file()
            assert found == before or (found == NEW and (final or failing.may_leave_something))
        else:  # something that it can do without, such as tidying up
            borne += 1
            assert found == NEW
        remains = leftovers(below)
        assert not remains or failing.may_leave_something
        left += bool(remains)
        if found == NEW and not replaced:
            writer.put(None)
        writer.save(NEW, replaced)
        assert writer.found() == NEW
        assert leftovers(below) == []
    assert at >= 6
    assert said >= 6
    assert left or code != errno.EROFS, "what can no longer be removed stays: else nobody saw the next run remove it"
    kind = request.node.callspec.params["writer"]
    told = f"{said} steps that failed were said, {borne} could be done without; 0 halves; {tidied(left)}"
    figures.tell("disks", f"{kind}{', replacing' if replaced else ''}, {errno.errorcode[code]}", told)


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.EROFS, errno.EIO))]
)
@pytest.mark.usefixtures("no_disk")
def test_prepare_on_a_disk_that_fails_at_any_step(
    code: int,
    kept: KeptConcept,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command, but for the computing. What can be seen before it is."""
    below, prepared = tmp_path / "work", 0
    below.mkdir()

    def prepare(*_: Any, **__: Any) -> KeptConcept:
        nonlocal prepared
        prepared += 1
        return kept

    monkeypatch.setattr(Session, "prepare", prepare)
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(Session, "bundle", Bundle.open(tiny_bundle), raising=False)
    monkeypatch.setattr(Session, "close", lambda _: None)
    place, job = below / "out" / "man.concept", write_job(tmp_path)
    command = ["prepare", str(tiny_bundle), "--job", str(job), "--out", str(place.parent)]
    early = late = left = 0
    for at in range(200):
        failing, before = Failing(at, code), prepared
        with Layer(below, failing).installed():
            ended = main(command)
        if not failing.hit:
            break
        said = capsys.readouterr().err
        there = concept_at(place, kept) is not None
        if ended:
            assert ended == 2
            assert said.startswith("error: ")
            for part in (str(place), os.strerror(code), FAULTS[code]):
                assert part in said, said
            early += prepared == before
            late += prepared > before
            assert not there or failing.may_leave_something
        remains = leftovers(below)
        assert not remains or failing.may_leave_something
        left += bool(remains)
        assert main([*command, "--overwrite"] if there else command) == 0
        assert leftovers(below) == []
        shutil.rmtree(place.parent)
    assert ended == 0
    assert early >= 1
    assert late >= 4
    told = f"{early} steps that failed were said before anything was computed, {late} after; {tidied(left)}"
    figures.tell("disks", f"prepare, {errno.errorcode[code]}", told)


@pytest.mark.parametrize("writer", ["result.save"], indirect=True)
@pytest.mark.usefixtures("no_disk")
def test_where_folders_cannot_change_places_a_failing_disk_brings_the_earlier_one_back(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_files, "exchange", lambda *_: False)
    for at in range(200):
        writer.put(OLD)
        failing = Failing(at, errno.EIO)
        with Layer(writer.place.parent, failing).installed():
            try:
                writer.save(NEW, True)
            except OutputError:
                # after the last step, which says whether the name is on the disk, the earlier one is gone
                assert writer.found() in (OLD, NEW)
            else:
                assert writer.found() == NEW
        if not failing.hit:
            break
        for _ in range(2):
            writer.save(NEW, True)
        assert leftovers(writer.place.parent) == []


# ------------------------------------------------------------------------------------------------------ slow, and power


@writers
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
def test_on_a_slow_disk_it_is_never_seen_half_written(writer: Writer, replaced: bool) -> None:
    """Somebody looks all the time."""
    writer.put(OLD if replaced else None)
    over = threading.Event()
    seen: list[int | None] = []
    failed: list[BaseException] = []

    def look() -> None:
        while not over.is_set():
            try:
                with standing_still(writer.place):
                    seen.append(writer.found())
            except MovedError:
                pass
            except BaseException as error:
                failed.append(error)
                return

    looking = threading.Thread(target=look)
    slow = Dawdling(0.02)
    looking.start()
    try:
        with Layer(writer.place.parent, slow).installed():
            writer.save(NEW, replaced)
    finally:
        over.set()
        looking.join(30)
    if failed:
        raise failed[0]
    assert writer.found() == NEW
    assert set(seen) <= {OLD if replaced else None, NEW}
    assert len(seen) >= 3
    figures.tell(
        "disks",
        f"slow: {'a result' if writer.place.name == 'run' else 'a concept'}{', replaced' if replaced else ''}",
        f"looked at {len(seen)} times in {slow.seen} steps of 20 ms more, never half there",
    )


class MovedError(Exception):
    """What was looked at was replaced meanwhile, so that what was seen says nothing."""


@contextmanager
def standing_still(place: Path) -> Iterator[None]:
    def which() -> int:
        return os.stat(place).st_ino if os.path.lexists(place) else 0

    before = which()
    try:
        yield
    except Exception:
        if which() != before:
            raise MovedError from None
        raise
    if which() != before:
        raise MovedError


@writers
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
def test_what_gets_its_name_is_on_the_disk(writer: Writer, replaced: bool) -> None:
    """Else a box that loses power could have the name and not what it names."""
    writer.put(OLD if replaced else None)
    settling = Settling()
    with Layer(writer.place.parent, settling).installed():
        writer.save(NEW, replaced)
    settling.check()


@writers
def test_the_folders_on_the_way_are_on_the_disk(writer: Writer) -> None:
    """Else it could be lost with them."""
    folder = writer.place.parent
    folder.rmdir()
    settling = Settling()
    with Layer(folder.parent, settling).installed():
        writer.save(NEW, False)
    assert {os.fspath(folder.parent), os.fspath(folder)} <= settling.named
    settling.check()


def test_every_folder_on_the_way_is_on_the_disk(tmp_path: Path) -> None:
    settling = Settling()
    with Layer(tmp_path, settling).installed():
        atomic_files.make_folder(tmp_path / "a" / "b" / "c")
    assert settling.named == {os.fspath(tmp_path / path) for path in ("", "a", "a/b")}
    settling.check()


def test_the_layer_sees_every_kind_of_step(tmp_path: Path) -> None:
    """What fails above must be what happens."""
    seen: list[tuple[str, str]] = []
    below = tmp_path / "work"
    below.mkdir()
    real = (open, os.open, os.replace, os.unlink)
    with disks.Layer(below, lambda *step: seen.append((step[0], os.path.basename(step[1])))).installed():
        (below / "a").write_text("x")
        (below / "a").rename(below / "b")
        os.close(os.open(below / "c", os.O_WRONLY | os.O_CREAT))
        (below / "d").mkdir()
        atomic_files.fsync_tree(below / "d")
        shutil.rmtree(below / "d")
        os.remove(below / "b")
        with open(below / "e", "wb", buffering=0) as stream:
            stream.write(b"1")
            stream.write(b"2")
        (tmp_path / "outside").write_text("x")
        assert (below / "e").read_bytes() == b"12"
    assert seen == [
        ("open", "a"),
        ("write", "a"),
        ("rename", "a"),
        ("open", "c"),
        ("mkdir", "d"),
        ("fsync", "d"),
        ("rmdir", "d"),
        ("unlink", "b"),
        ("open", "e"),
        ("write", "e"),
        ("write", "e"),
    ]
    assert real == (open, os.open, os.replace, os.unlink)
