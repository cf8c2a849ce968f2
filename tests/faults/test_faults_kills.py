"""Writers that are killed, at random moments and before each of their steps.

Afterwards there is what was before, or the new one whole; no lock is held; the same command simply works, and removes
what the killed one left.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import figures
import pytest
from killing import Moments, Tally, leftovers
from killing_checks import concept_at, concepts_at, result_at
from killing_targets import PAIR, GetForks, Target
from killing_writers import made_result

from magicface_rt import KeptConcept
from magicface_rt.files import atomic_files

pytest_plugins = ("killing_fixtures",)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")

FEW, ALL = 4, 200
CHEAP = 30
"""Kills of what takes milliseconds."""

OTHER = 3
"""The mark of what stood there before."""


# ------------------------------------------------------------------------------------------------------ random moments


@pytest.mark.parametrize(
    ("target", "of", "kills"),
    [
        *((name, name, CHEAP) for name in ("result.save", "KeptConcept.save")),
        ("prepare of two", "prepare", FEW),
        *((name, name, FEW) for name in ("build", "export")),
        pytest.param("prepare of two", "prepare", ALL, marks=pytest.mark.slow),
        *(
            pytest.param(name, name, ALL, marks=pytest.mark.slow)
            for name in ("result.save", "KeptConcept.save", "build", "export")
        ),
    ],
    indirect=["target"],
)
def test_killed_at_random_moments(target: Target, of: str, kills: int, forks: GetForks) -> None:
    of_it = forks(target.library)
    whole = target.run(of_it)
    assert target.standing()
    target.clear()
    moments, tally = Moments(whole, seed=kills), Tally()
    # Those that come too late do not count, and enough of them must hit what they are for.
    while tally.kills < kills or tally.unfinished < max(1, kills // 8):
        assert tally.tries < 10 * kills, tally
        ended = target.run(of_it, kill=moments.next())
        assert ended.killed or ended.code == 0, ended.said
        if not ended.killed:
            moments.was_late()
        tally.count(ended, whole=target.standing(), unfinished=bool(leftovers(target.below)))
        target.again(of_it)
    figures.tell("kills", of, str(tally))


# ----------------------------------------------------------------------------------------------------------- each step


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("of", ["result.save", "KeptConcept.save"])
def test_killed_before_each_of_its_steps(
    of: str, replaced: bool, kept_man: Path, forks: GetForks, tmp_path: Path
) -> None:
    """Where something stands already it stands at every moment, or the new one does."""
    below, other = tmp_path / "work", tmp_path / "other"
    below.mkdir()
    if of == "result.save":
        place = below / "run"
        make, found = ["result", [os.fspath(place), 7, replaced]], lambda: result_at(place)
        before = ["result", [os.fspath(other), OTHER, False]]
    else:
        place, kept = below / "man.concept", KeptConcept.load(kept_man)
        make, found = ["concept", [os.fspath(kept_man), os.fspath(place), 7, replaced]], lambda: concept_at(place, kept)
        before = ["concept", [os.fspath(kept_man), os.fspath(other), OTHER, False]]
    run = forks("cli").run
    assert run(*before, tmp_path).code == 0
    tally = Tally()
    for step in range(200):
        if replaced:
            (shutil.copytree if other.is_dir() else shutil.copy)(other, place)
        ended = run(*make, below, kill={"step": step})
        standing = found()
        assert standing in (OTHER if replaced else None, 7)
        tally.count(ended, whole=standing == 7, unfinished=bool(leftovers(below)))
        if not ended.killed:
            break
        again = run(*make, below)
        assert again.code == (2 if standing == 7 and not replaced else 0), again.said
        assert found() == 7
        if again.code == 0:
            assert leftovers(below) == []
        shutil.rmtree(below)
        below.mkdir()
    assert ended.code == 0, ended.said
    assert tally.kills >= 5
    assert tally.unfinished >= 3
    figures.tell("kills", f"{of}, before each step{', replacing' if replaced else ''}", str(tally))


@pytest.mark.parametrize("target", ["prepare of two"], indirect=True)
@pytest.mark.parametrize("tries", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_prepare_of_two_killed_before_its_steps_goes_on_with_what_is_missing(
    target: Target, tries: int, kept_pair: Path, forks: GetForks
) -> None:
    """Where the first file stands already, the same command keeps it, untouched, and writes the second."""
    of_it = forks(target.library)
    whole = target.run(of_it)
    assert whole.code == 0, whole.said
    target.clear()
    tally, halves = Tally(), 0
    tries = min(tries, whole.steps)
    for turn in range(tries):
        ended = target.run(of_it, kill={"step": turn * whole.steps // tries})
        assert ended.killed, ended.said
        found = concepts_at(target.place, kept_pair)
        tally.count(ended, whole=found == PAIR, unfinished=bool(leftovers(target.below)))
        earlier = {name: (target.place / name).stat() for name in found}
        halves += found == ["man.concept"]
        again = target.run(of_it)
        assert again.code == 0, again.said
        assert again.said.count("was there already") == len(found)
        assert target.standing()
        assert leftovers(target.below) == []
        for name, stamp in earlier.items():
            now = (target.place / name).stat()
            assert (now.st_ino, now.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns), f"{name} was written anew"
        target.clear()
    assert halves >= 1, "no kill came between the two"
    figures.tell("kills", "prepare, before some of its steps", f"{tally}; {halves} left one concept of two")


def test_a_result_killed_where_folders_cannot_change_places_is_not_lost(forks: GetForks, tmp_path: Path) -> None:
    """Then there is a moment at which the earlier one has another name, and that keeps it until the next is there."""
    below = tmp_path / "work"
    below.mkdir()
    place, run, aside = below / "run", forks("cli").run, 0
    again = ["result", [os.fspath(place), 7, True, False], below]
    for step in range(200):
        made_result(OTHER).save(place)
        ended = run(*again, kill={"step": step})
        if result_at(place) is None:
            (old,) = below.glob(".run.*.old")
            assert result_at(old) == OTHER
            aside += 1
            for left in ([old.name], []):  # the run after next knows that there is another
                assert run(*again).code == 0
                assert leftovers(below) == left
            assert result_at(place) == 7
        shutil.rmtree(below)
        below.mkdir()
        if not ended.killed:
            break
    assert aside == 1


@pytest.mark.parametrize("target", ["export"], indirect=True)
@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_an_export_killed_before_each_of_its_steps(target: Target, every: int, forks: GetForks) -> None:
    of_it = forks(target.library)
    steps = target.run(of_it).steps
    target.clear()
    tally = Tally()
    for step in range(0, steps, every):
        ended = target.run(of_it, kill={"step": step})
        assert ended.killed, (step, ended.said)
        tally.count(ended, whole=target.standing(), unfinished=bool(leftovers(target.below)))
        if tally.kills % 5 == 0 or target.standing():
            target.again(of_it)
        for left in leftovers(target.below):  # whose removal would be the next one's first steps
            shutil.rmtree(target.below / left, ignore_errors=True)
    target.again(of_it)
    assert tally.whole or every > 1, "none came after it had its name"
    assert tally.unfinished >= tally.kills // 2
    figures.tell("kills", "export, before its steps", str(tally))


# ------------------------------------------------------------------------------------- what is left, and what is not


def test_what_a_live_process_writes_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_files.temporary_sibling(target, folder=True) as one:
        (one / "run.json").write_text("1")
        with atomic_files.temporary_sibling(target, folder=True) as two:
            assert atomic_files.remove_abandoned(tmp_path, lambda name: True) == []
            (two / "run.json").write_text("2")
            atomic_files.replace_into_place(two, target)
        atomic_files.replace_into_place(one, target)
        assert (target / "run.json").read_text() == "1"
    assert os.listdir(tmp_path) == ["run"]


def test_only_what_was_left_of_the_same_name_is_removed(tmp_path: Path) -> None:
    digits = "0123456789abcdef" * 2
    mine = [f".run.{digits}.part", f".run.{digits[::-1]}.part"]
    others = [
        *(f".run.{digits[:-1]}.part", f".run.{digits}", f"run.{digits}.part", f".run.{digits.upper()}.part"),
        *(f".other.{digits}.part", f".run.more.{digits}.part", f".run.{digits}.old"),
    ]
    for name in (*mine, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "image-0.png").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / f".run.{'f' * 32}.part"
    link.symlink_to("elsewhere")
    assert sorted(path.name for path in atomic_files.remove_abandoned(tmp_path, "run".__eq__)) == sorted(mine)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "elsewhere", link.name])
    (tmp_path / "run").mkdir()  # there is another one now
    assert [path.name for path in atomic_files.remove_abandoned(tmp_path, "run".__eq__)] == [f".run.{digits}.old"]


@pytest.mark.parametrize("length", [1, 216, 217, 255])
def test_what_was_left_of_a_long_name_goes_with_the_next_of_it(length: int, tmp_path: Path) -> None:
    target, other = (tmp_path / f"{'n' * (length - 1)}{end}" for end in "ab")

    def left(of: Path) -> str:
        with atomic_files.temporary_sibling(of) as part:
            os.link(part, tmp_path / "kept")
        os.rename(tmp_path / "kept", part)
        return part.name

    mine, others = left(target), left(other)
    assert (mine.startswith(f".{target.name}.")) == (length <= 216)
    assert len(os.fsencode(mine)) <= 255
    old = mine.replace(".part", ".old")
    (tmp_path / old).mkdir()
    with atomic_files.temporary_sibling(target) as part:
        assert sorted(os.listdir(tmp_path)) == sorted([others, old, part.name]), "the only one that there is stays"
        atomic_files.replace_into_place(part, target)
    with atomic_files.temporary_sibling(target):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([others, target.name])


@pytest.mark.parametrize("target", ["build"], indirect=True)
def test_what_was_left_beside_a_whole_plan_goes_with_the_next_build(target: Target, forks: GetForks) -> None:
    """Of a process that was killed when all was done but tidying up."""
    of_it = forks(target.library)
    assert target.run(of_it).code == 0
    (plan,) = target.place.glob("*/*/[!.]*")
    (plan.parent / f".{plan.name}.lock").touch()
    (plan.parent / f".{plan.name}.{'0' * 32}.part").mkdir()
    assert target.run(of_it).code == 0
    assert target.standing()
    assert leftovers(target.below) == []


def test_what_was_put_may_be_locked_by_nobody(tmp_path: Path) -> None:
    """The lock ends with the writing, not with the process."""
    for name in ("a", "b"):
        with atomic_files.temporary_sibling(tmp_path / name) as part:
            part.write_text(name)
            atomic_files.replace_into_place(part, tmp_path / name)
    os.rename(tmp_path / "a", tmp_path / f".b.{'0' * 32}.part")
    assert len(atomic_files.remove_abandoned(tmp_path, "b".__eq__)) == 1
    assert os.listdir(tmp_path) == ["b"]
