"""The commands, and what they call, on disks that are full, read-only or limited, and a server whose disk becomes so.

The disks are real: small ones in memory, mounted for a test. Where that is not allowed these tests are skipped; the
layer that fails in their place does so everywhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import figures
import pytest
from disks import FAULTS, Disk, small_disk
from killing import Ended, leftovers
from killing_server import check, put, serve_arguments, serving, stored
from killing_targets import GetForks, Target

from magicface_rt import Concept, Reference
from magicface_rt.errors import AnswerError

pytest_plugins = ("killing_fixtures",)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and mount")

MIB = 1 << 20
NAMES = ("result.save", "KeptConcept.save", "prepare", "build", "export")
every = pytest.mark.parametrize(("target", "of"), [(name, name) for name in NAMES], indirect=["target"])
DAWDLE = 0.05
"""Seconds that a slow disk takes more for each step."""
ROOMS = (0, 3, 6, 9, 11)
"""Of a disk on which something is to be written: twelfths of its size."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", 64 * MIB) as mounted:
        yield mounted


@pytest.fixture
def below(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """On the small disk, where there is one."""
    if "disk" in request.fixturenames:
        disk: Disk = request.getfixturevalue("disk")
        return disk.path
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def refused(ended: Ended, target: Target, *parts: str) -> str:
    """It ended in order: our message, one line, with the place and these parts; nothing half there."""
    assert ended.code == 2, ended.said
    (line,) = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    for part in (str(target.place), *parts):
        assert part in line, ended.said
    assert "Traceback" not in ended.said
    assert not target.standing()
    return line


def bytes_of(place: Path) -> int:
    files = [place, *place.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())


# -------------------------------------------------------------------------------------------------------- full, limited


@every
@pytest.mark.parametrize("rooms", [(6,), pytest.param(ROOMS, marks=pytest.mark.slow)])
def test_on_a_full_disk(target: Target, of: str, rooms: tuple[int, ...], forks: GetForks, disk: Disk) -> None:
    of_it = forks(target.library)
    assert target.run(of_it).code == 0
    size = bytes_of(target.place)
    target.clear()
    for room in rooms:
        disk.fill(size * room // 12)
        refused(target.run(of_it), target, os.strerror(errno.ENOSPC), FAULTS[errno.ENOSPC])
        assert leftovers(disk.path) == []
        assert sum(path.is_file() for path in disk.path.rglob("*")) == 1  # what fills it
        disk.free()
        target.again(of_it)
    figures.tell("disks", f"{of}, full", f"{len(rooms)} times, then freed: 0 halves, 0 temporary files, worked again")


@every
def test_under_a_limit_on_the_size_of_files(target: Target, of: str, forks: GetForks) -> None:
    of_it = forks(target.library)
    refused(target.run(of_it, file_limit=8192), target, os.strerror(errno.EFBIG), "ulimit -f")
    assert leftovers(target.below) == []
    target.again(of_it)
    figures.tell("disks", f"{of}, limited files", "said; 0 temporary files, worked again")


# ------------------------------------------------------------------------------------------------------------ read-only


@every
def test_on_a_read_only_disk(target: Target, of: str, forks: GetForks, disk: Disk) -> None:
    of_it = forks(target.library)
    disk.writable(False)
    line = refused(target.run(of_it), target)
    assert os.strerror(errno.EROFS) in line or "may not be written to" in line
    assert os.listdir(disk.path) == []
    disk.writable(True)
    target.again(of_it)
    figures.tell("disks", f"{of}, read-only", "said, worked again")


def test_a_read_only_folder_of_concepts_is_refused_at_the_start(forks: GetForks, disk: Disk, tiny_bundle: Path) -> None:
    pytest.importorskip("uvicorn")
    (disk.path / "there").mkdir()
    disk.writable(False)
    for name, said in (("there", "may not be read and written"), ("new", "cannot be made")):
        ended = forks("serve").run("cli", [serve_arguments(tiny_bundle, disk.path / name)], disk.path)
        assert ended.code == 2, ended.said
        assert str(disk.path / name) in ended.said
        assert said in ended.said


# --------------------------------------------------------------------------------------------------------------- served


def test_a_server_whose_disk_is_full_or_read_only_goes_on(
    forks: GetForks, disk: Disk, tiny_bundle: Path, man_job: Path
) -> None:
    """What it cannot keep it says; what it has it serves; and when there is room again it keeps that too."""
    pytest.importorskip("uvicorn")
    folder, of_it = disk.path / "concepts", forks("serve")
    man = Concept("man", Reference(man_job.parent / "man.png", prompt="a man"))
    with serving(of_it, tiny_bundle, folder) as client:
        first = put(client, man, 0)
        assert first is not None
        picture = client.generate("a man", [first], seed=1).pngs
        for seed, bad in ((1, "full"), (2, "half full"), (3, "read-only")):
            if bad == "read-only":
                disk.writable(False)
            else:
                disk.fill(0 if bad == "full" else bytes_of(folder) // 2)
            with pytest.raises(AnswerError) as refused:
                put(client, man, seed)
            assert (refused.value.status, refused.value.kind) == (507, "not-written")
            assert str(disk.path) not in str(refused.value)  # a path is nobody else's business
            assert client.generate("a man", [first], seed=1).pngs == picture
            check(client, folder)
            if bad == "read-only":
                disk.writable(True)
            else:
                disk.free()
            assert leftovers(folder) == []
            assert put(client, man, seed) is not None
            assert len(stored(folder)) == seed + 1
            check(client, folder)
        for code in (errno.ENOSPC, errno.EROFS):
            assert os.strerror(code) in of_it.said, "the log does not say it"
        assert str(folder) in of_it.said
    figures.tell("disks", "PUT /v1/concepts, full, read-only", "507, the service went on, worked again")


# ----------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.parametrize(("target", "of"), [(n, n) for n in ("prepare", "build", "export")], indirect=["target"])
def test_a_command_on_a_slow_disk_is_never_seen_half_written(target: Target, of: str, forks: GetForks) -> None:
    """Somebody looks all the time: there is nothing, and then the whole."""
    of_it, seen = forks(target.library), [target.standing()]
    of_it.send(target.work, target.arguments, target.below, dawdle=DAWDLE)
    with ThreadPoolExecutor(1) as waiting:
        ended = waiting.submit(of_it.answer)
        while not ended.done():
            seen.append(target.standing())
    assert ended.result().code == 0, ended.result().said
    assert target.standing()
    assert seen == sorted(seen)
    assert seen.count(False) >= 3
    told = (
        f"looked at {len(seen)} times in {ended.result().steps} steps of {1000 * DAWDLE:.0f} ms more, never half there"
    )
    figures.tell("disks", f"{of}, slow", told)


# ---------------------------------------------------------------------------------------------------- power, and steps


@every
def test_what_a_command_names_is_on_the_disk(target: Target, of: str, forks: GetForks) -> None:
    """Else a box that loses power could have the name and not what it names."""
    ended = target.run(forks(target.library), settled=True)
    assert ended.code == 0, ended.said
    assert target.standing()


@pytest.mark.parametrize(
    ("target", "of", "tries"),
    [
        *((name, name, 2) for name in ("build", "export")),
        *(pytest.param(name, name, 40, marks=pytest.mark.slow) for name in ("build", "export")),
    ],
    indirect=["target"],
)
def test_a_command_on_a_disk_that_fails_at_a_step(target: Target, of: str, tries: int, forks: GetForks) -> None:
    """`tries`: how many of its steps, all over it; full and broken in turn."""
    of_it = forks(target.library)
    steps = target.run(of_it).steps
    target.clear()
    tries = min(tries, steps)
    said = borne = left = 0
    for turn in range(tries):
        code = (errno.ENOSPC, errno.EIO)[turn % 2]
        ended = target.run(of_it, fault=[turn * steps // tries, code])
        if ended.code:
            said += 1
            refused(ended, target, os.strerror(code), FAULTS[code])
        else:
            borne += 1
            assert target.standing()
        remains = leftovers(target.below)
        assert not remains or code == errno.EIO  # which may have been met by a removal
        left += bool(remains)
        target.again(of_it)
    assert said >= tries // 2
    told = f"{said} steps that failed were said, {borne} could be done without; 0 halves, worked again"
    figures.tell("disks", f"{of}, at a step", f"{told}; {left} left something temporary until then")


def test_where_nothing_can_be_mounted_the_figures_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", {})
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no `mount`
    mounted = small_disk(tmp_path / "disk", MIB)
    with pytest.raises(pytest.skip.Exception, match="no file system can be mounted here"), mounted:
        raise AssertionError("it was mounted")
    (told,) = figures.FIGURES["disks"].items()
    assert told[0] == "test_where_nothing_can_be_mounted_the_figures_say_so"
    assert told[1].startswith("not run: no file system can be mounted here")
