"""What tests count is told at the end by however many processes, and is not lost where a run does not come to one: the
next one goes on where it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent.parent

COUNTING = """
import os
import figures
import pytest
import tallies

@pytest.mark.parametrize("number", range(4))
def test_counts(number):
    figures.tell("kills", f"case {number}", f"{number} kills")
    tallies.TALLY["parser"]["tried"] += 10
    tallies.TALLY["parser"]["ImageError"] += number
"""
ENDING = """
def test_ends_its_process():
    os._exit(1)
"""
WATCHED = """
import faulthandler
import pytest

seconds = []
faulthandler.dump_traceback_later = lambda after, exit: seconds.append(after)

def test_quick():
    assert seconds[-1] == 1800

@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_slow(number):
    assert seconds[-1] == 4 * 3600
"""

WAITING = """
import time
import pytest

@pytest.fixture
def waited():
    time.sleep(0.3)
    yield
    time.sleep(0.2)

def test_it(waited):
    time.sleep(0.1)
"""


ONCE = """
from pathlib import Path
import figures
import pytest
import tallies

RAN = Path(__file__).parent / "ran.log"

@pytest.mark.parametrize("number", range(6))
def test_once(number):
    with RAN.open("a") as ran:
        ran.write(f"{number}\\n")
    figures.tell("kills", f"case {number}", f"{number} kills in run {len(RAN.read_text())}")
    tallies.TALLY["parser"]["tried"] += 10
    if number == 4 and not RAN.with_name("mended.log").exists():
        raise AssertionError("not yet")
    if number == 5 and not RAN.with_name("mended.log").exists():
        pytest.skip("not here")
"""


ONLY_THE_RECORD = 'pytest_plugins = ["record"]\n'
"""All that most of these runs need of our `conftest.py`, which imports the package as well."""


def lay_out(folder: Path, test: str, conftest: str | None = None) -> None:
    told = ONLY_THE_RECORD if conftest is None else (TESTS / conftest).read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(told, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (folder / "test_it.py").write_text(test)


def run(folder: Path, test: str, *options: str, conftest: str | None = None) -> subprocess.CompletedProcess[str]:
    """A run of its own with the record, or with one of our `conftest.py`; of other plugins only with pytest-xdist."""
    lay_out(folder, test, conftest)
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if "-n" in options:
        options = ("-p", "xdist", *options)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rootdir",
        str(folder),
        "-c",
        str(folder / "pytest.ini"),
        *options,
    ]
    return subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, env={**environment, "PYTHONPATH": paths}, timeout=300
    )


def put_down(folder: Path) -> tuple[dict[str, str], int]:
    """The figures, and the sum of what was tried in each process, as the file of the only run says it."""
    (file,) = (folder / ".pytest_cache" / "d" / "records").iterdir()
    told: dict[str, str] = {}
    tried: dict[int, int] = {}
    for line in file.read_text().splitlines()[1:]:
        found: dict[str, Any] = json.loads(line)
        told |= found["figures"].get("kills", {})
        tried[found["process"]] = found["tally"]["parser"]["tried"]
    return told, sum(tried.values())


FIGURES = {f"case {number}": f"{number} kills" for number in range(4)}


@pytest.mark.parametrize(
    "options",
    [pytest.param((), id="one process"), pytest.param(("-n", "2"), id="two processes", marks=pytest.mark.slow)],
)
def test_all_that_was_counted_is_told_and_put_down(tmp_path: Path, options: tuple[str, ...]) -> None:
    if options:
        pytest.importorskip("xdist")
    ended = run(tmp_path, COUNTING, *options, conftest="conftest.py")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for number in range(4):
        assert f"{number} kills" in ended.stdout
    told = " ".join(ended.stdout.split())
    assert "parser 40 tried 0 accepted 6 refused (ImageError 6)" in told
    assert put_down(tmp_path) == (FIGURES, 40)


def test_why_a_test_failed_stands_there_before_the_run_has_ended(tmp_path: Path) -> None:
    run(tmp_path, "def test_it():\n    assert 6 * 9 == 42\n" + ENDING)
    (file,) = (tmp_path / ".pytest_cache" / "d" / "records").iterdir()
    said = json.loads(file.read_text().splitlines()[1])
    assert not said["passed"]
    assert "assert (6 * 9) == 42" in said["why"]


def test_the_seconds_of_a_test_and_of_its_fixtures_stand_there(tmp_path: Path) -> None:
    assert run(tmp_path, WAITING).returncode == 0
    (file,) = (tmp_path / ".pytest_cache" / "d" / "records").iterdir()
    took = json.loads(file.read_text().splitlines()[1])["seconds"]
    assert took.keys() == {"setup", "call", "teardown"}
    assert took["setup"] >= 0.3
    assert took["call"] >= 0.1
    assert took["teardown"] >= 0.2


def test_a_run_that_is_ended_leaves_what_was_counted_before(tmp_path: Path) -> None:
    ended = run(tmp_path, COUNTING + ENDING)
    assert ended.returncode == 1
    assert "kills" not in ended.stdout
    assert put_down(tmp_path) == (FIGURES, 40)


def test_a_slow_test_has_hours_before_its_process_is_ended(tmp_path: Path) -> None:
    ended = run(tmp_path, WATCHED, conftest="faults/conftest.py")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture
def commit(tmp_path: Path) -> Path:
    """A clone of git with one commit of what `run` needs."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    (tmp_path / ".gitignore").write_text("*.log\n.pytest_cache\n__pycache__\n")
    lay_out(tmp_path, ONCE)
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "all"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    return tmp_path


def counts(ended: subprocess.CompletedProcess[str]) -> tuple[int, ...]:
    """Tests that passed, failed, were skipped and left out, of the last line."""
    last = ended.stdout.strip().splitlines()[-1]
    found = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    return tuple(found.get(word, 0) for word in ("passed", "failed", "skipped", "deselected"))


@pytest.mark.parametrize(
    "options",
    [pytest.param((), id="one process"), pytest.param(("-n", "2"), id="two processes", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_where_it_was(commit: Path, options: tuple[str, ...]) -> None:
    if options:
        pytest.importorskip("xdist")
    first = run(commit, ONCE, *options)
    assert (first.returncode, counts(first)[:3]) == (1, (4, 1, 1)), first.stdout + first.stderr
    (commit / "mended.log").touch()
    second = run(commit, ONCE, "--resume", *options)
    assert (second.returncode, counts(second)[:3]) == (0, (2, 0, 0)), second.stdout + second.stderr
    assert sorted((commit / "ran.log").read_text().split()) == ["0", "1", "2", "3", "4", "4", "5", "5"]
    assert "4 tests passed in earlier runs of commit" in second.stdout
    assert [line.split()[3] for line in second.stdout.splitlines() if line.startswith("kills")] == list("012345")
    third = run(commit, ONCE, "--resume", *options)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "6 tests passed in earlier runs" in third.stdout
    assert len((commit / "ran.log").read_text().split()) == 8
    assert re.search("parser +80 tried", third.stdout)  # 60 of the first run, 20 of the second


def test_only_what_passed_at_this_very_commit_is_left_out(commit: Path) -> None:
    (commit / "mended.log").touch()
    assert run(commit, ONCE).returncode == 0
    changed = run(commit, ONCE + "\n", "--resume")
    assert changed.returncode == 4
    assert "changes that are not committed" in changed.stderr
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(commit), *who, "commit", "-aqm", "another"], check=True)
    assert counts(run(commit, ONCE + "\n", "--resume")) == (6, 0, 0, 0)
    none = run(commit, ONCE + "\n", "--resume", "-k", "of_no_such_name")
    assert none.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
