"""What `make` runs, with an environment whose Python and tools only say what they were asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from locations import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

SAYS = """#!/bin/sh
echo "$(basename "$0") $*" >> "$(dirname "$0")/said"
case "$*" in *"$FAILS"*) exit 1;; esac
"""
FIRST, SECOND = "not gpu and not full", "full and not gpu"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment that make takes for whole and new."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        (programs / name).write_text(SAYS)
        (programs / name).chmod(0o755)
    stamp = programs.parent / ".installed"
    stamp.touch()
    os.utime(stamp, (time.time() + 3600,) * 2)
    return programs.parent


@pytest.mark.parametrize(
    ("fails", "passes"),
    [("nothing that is asked", True), (f"-m {FIRST}", False), (f"-m {SECOND}", False), ("pytest", False)],
)
def test_all_tests_are_run_and_any_that_fails_is_told(environment: Path, fails: str, passes: bool) -> None:
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={environment}", "test-all"],
        env={**os.environ, "FAILS": fails, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )
    said = (environment / "bin" / "said").read_text().splitlines()
    asked = [line.partition(" -m ")[2].partition(" -m ")[2] for line in said if line.startswith("python")]
    assert asked == [FIRST, SECOND], done.stdout + done.stderr
    assert (done.returncode == 0) is passes


@pytest.mark.parametrize("resume", [True, False])
def test_all_tests_go_on_where_they_were_ended_if_asked(environment: Path, resume: bool) -> None:
    subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={environment}", "test-all", *["RESUME=1"] * resume],
        env={**os.environ, "FAILS": "nothing that is asked", "MAKEFLAGS": ""},
        check=True,
        capture_output=True,
    )
    asked = [line for line in (environment / "bin" / "said").read_text().splitlines() if line.startswith("python")]
    assert ["--resume" in line for line in asked] == [resume, resume]


def test_nothing_is_tested_where_lint_fails(environment: Path) -> None:
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={environment}", "test-all"],
        env={**os.environ, "FAILS": "check .", "MAKEFLAGS": ""},
        capture_output=True,
    )
    assert done.returncode != 0
    assert "pytest" not in (environment / "bin" / "said").read_text()
