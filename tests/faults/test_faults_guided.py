"""Attacks guided by coverage on the parsers that are written in Python; see `guided`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import figures
import pytest
from byte_targets import TARGETS
from outcomes import MANY, QUICK, SEED

pytest.importorskip("torch")
pytest.importorskip("atheris", reason="there is none for this system or this Python")

HERE = Path(__file__).parent
PATHS = os.pathsep.join(str(path) for path in (HERE, HERE.parent, HERE.parents[1]))
ELSEWHERE = ("picture", "weights")
"""What Pillow and safetensors parse, in which no branch is seen; of these pictures our own part is."""
OURS = ("picture png", "picture jpg", "picture tif", "picture avif")
GUIDED = [*(name for name in TARGETS if not name.startswith(ELSEWHERE)), *OURS]
SOON = ("kept concept", "job json", "target")
"""Those that the quick tests try."""
OF_A_BUNDLE = ("bundle manifest", "order", "form", "authorization")
"""Those that need parts of one."""


def guided(name: str, inputs: int, out: Path, bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / "guided.py"), name, "--inputs", str(inputs), "--out", str(out)]
    command += ["--bundle", str(bundle)]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    return subprocess.run(
        [*command, "--seed", str(SEED)], capture_output=True, text=True, env=environment, timeout=3000
    )


@pytest.mark.parametrize(
    ("name", "inputs"),
    [(name, QUICK) for name in SOON] + [pytest.param(name, MANY, marks=pytest.mark.slow) for name in GUIDED],
)
def test_inputs_that_reach_new_branches(name: str, inputs: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue("tiny_bundle") if name in OF_A_BUNDLE else tmp_path
    done = guided(name, inputs, tmp_path, bundle)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{inputs} different inputs, of " in done.stdout
    seen = [int(found) for found in re.findall(r" cov: (\d+) ", done.stderr)]
    assert seen[-1] > 10, "nothing is instrumented"
    distinct, _, told = done.stdout.partition(" that were drawn\n")
    outcome = " ".join(told.splitlines()[0].partition(" " * 4)[2].split())
    figures.tell("guided", name, f"{distinct}; {outcome}; {seen[0]} branches at first, {seen[-1]} at last")


def test_an_input_that_fails_is_shown_and_kept(tmp_path: Path) -> None:
    """The attack would not be worth much if it said nothing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import magicface_rt.values.shown, magicface_rt.files.strict_json as strict\n"
        "def distinct(pairs, was=strict._distinct):\n"
        "    if any(len(key) != 2 and key.startswith('pro') and key != 'prompt' for key, _ in pairs):\n"
        "        raise ZeroDivisionError('found')\n"
        "    return was(pairs)\n"
        "strict._distinct = distinct\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(HERE / "guided.py"), "job json", "--inputs", str(MANY), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), PATHS))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode != 0
    assert "ZeroDivisionError: found" in done.stderr + done.stdout
    (kept,) = out.glob("failed-*")
    assert b"pro" in kept.read_bytes()
