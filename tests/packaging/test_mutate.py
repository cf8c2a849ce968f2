"""tools/mutate.py on a module of five mutants: a survivor is found and told, and what a test kills is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from locations import ROOT

from tools.mutate import module_name, mutants

MODULE = """\
LIMIT = 3


def over(number):
    return number > LIMIT
"""
ASKED = """
import sys
from tools import mutate
mutate.UNCHANGING = ("hypothesis", "pytest")
sys.path.insert(0, ".")
raise SystemExit(mutate.main(["small.py", "--tests", "test_small.py", *sys.argv[1:]]))
"""


def test_a_module_has_the_name_under_which_tests_import_it() -> None:
    for path, name in {
        "magicface_rt/schedule.py": "magicface_rt.schedule",
        "magicface_rt/kept/__init__.py": "magicface_rt.kept",
        "export/replay.py": "magicface_rt.export.replay",
        "engines/__init__.py": "magicface_rt.engines",
        "benchmarks/table.py": "benchmarks.table",
    }.items():
        assert module_name(Path(path)) == name


def mutated(folder: Path, test: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on the module above, whose one test is given."""
    (folder / "small.py").write_text(MODULE)
    (folder / "test_small.py").write_text(f"from small import over\n\n\ndef test_over():\n    {test}\n")
    return subprocess.run(
        [sys.executable, "-c", ASKED, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def test_what_no_test_notices_survives_and_is_told(tmp_path: Path) -> None:
    done = mutated(tmp_path, "assert over(5) and not over(3)")
    assert done.stdout.splitlines() == [
        "small.py:1: 3  ->  4",
        "small.py: 5 mutants, 4 killed, 1 survived",
    ], done.stderr
    assert done.returncode == 1


def test_what_tests_notice_is_killed(tmp_path: Path) -> None:
    done = mutated(tmp_path, "assert over(4) and not over(3)", "--lines", "1-1")
    assert done.stdout.splitlines() == ["small.py: 2 mutants, 2 killed, 0 survived"], done.stderr
    assert done.returncode == 0
    assert (tmp_path / "small.py").read_text() == MODULE


def test_tests_that_fail_without_any_change_are_said(tmp_path: Path) -> None:
    done = mutated(tmp_path, "assert over(3)")
    assert done.returncode == 1
    assert "small.py: its tests fail without any change: test_small.py" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("x = a < b", {"a < b  ->  a <= b", "a < b  ->  a >= b"}),
        ("x = a and True", {"a and True  ->  a or True", "True  ->  False"}),
        ("x = a[0]", {"0  ->  1", "0  ->  -1"}),
        ("x = min(a, b)", {"min  ->  max"}),
        ("for a in b:\n    break", {"break  ->  continue"}),
        ("def f():\n    'words'\n    raise ValueError('7')", {"raise ValueError('7')  ->  pass"}),
        ("from a import b\nx: Literal['c'] = b", set()),
    ],
)
def test_each_change_is_of_one_thing(source: str, changes: set[str]) -> None:
    found = [f"{mutant.before}  ->  {mutant.after}" for mutant in mutants(source, "x.py")]
    assert set(found) == changes
    assert len(found) == len(changes)
