"""What tests count is told at the end by however many processes, and is not lost where a run does not come to one."""

from __future__ import annotations

import json
import os
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


def run(folder: Path, test: str, *options: str, conftest: str = "conftest.py") -> subprocess.CompletedProcess[str]:
    """A run of its own with one of our `conftest.py`."""
    shutil.copy(TESTS / conftest, folder / "conftest.py")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (folder / "test_it.py").write_text(test)
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
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
    (file,) = (folder / ".pytest_cache" / "d" / "told").iterdir()
    told: dict[str, str] = {}
    tried: dict[int, int] = {}
    for line in file.read_text().splitlines():
        found: dict[str, Any] = json.loads(line)
        told |= found["figures"].get("kills", {})
        tried[found["process"]] = found["tally"]["parser"]["tried"]
    return told, sum(tried.values())


FIGURES = {f"case {number}": f"{number} kills" for number in range(4)}


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two processes"])
def test_all_that_was_counted_is_told_and_put_down(tmp_path: Path, options: tuple[str, ...]) -> None:
    if options:
        pytest.importorskip("xdist")
    ended = run(tmp_path, COUNTING, *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for number in range(4):
        assert f"{number} kills" in ended.stdout
    told = " ".join(ended.stdout.split())
    assert "parser 40 tried 0 accepted 6 refused (ImageError 6)" in told
    assert put_down(tmp_path) == (FIGURES, 40)


def test_a_run_that_is_ended_leaves_what_was_counted_before(tmp_path: Path) -> None:
    ended = run(tmp_path, COUNTING + ENDING)
    assert ended.returncode == 1
    assert "kills" not in ended.stdout
    assert put_down(tmp_path) == (FIGURES, 40)


def test_a_slow_test_has_hours_before_its_process_is_ended(tmp_path: Path) -> None:
    ended = run(tmp_path, WATCHED, conftest="faults/conftest.py")
    assert ended.returncode == 0, ended.stdout + ended.stderr
