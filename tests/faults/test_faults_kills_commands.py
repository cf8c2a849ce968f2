"""The commands themselves, killed as processes of their own; and a server, killed while it stores a concept."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer

import figures
import killing_targets
import pytest
from killing import Ended, Tally, leftovers, unlimited
from killing_checks import plan_at
from killing_server import check, put, serving, stored
from killing_targets import GetForks

from magicface_rt import Concept, KeptConcept, Reference
from magicface_rt.bundle import Bundle

pytest_plugins = ("killing_fixtures",)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")

FEW, ALL = 5, 200
STEPS = 16
"""Of storing a concept there are a few more."""


# ---------------------------------------------------------------------------------------------- processes of their own


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "magicface_rt.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=unlimited,
    )


def writes(below: Path) -> bool:
    """Whether there is a temporary file with something in it, or a temporary folder."""
    for folder, folders, files in os.walk(below):  # passes over what goes meanwhile, which `rglob` raises before 3.13
        if any(name.endswith(".part") for name in folders):
            return True
        for name in files:
            with suppress(FileNotFoundError):
                if name.endswith(".part") and os.stat(os.path.join(folder, name)).st_size:
                    return True
    return False


def kill_while_it_writes(process: subprocess.Popen[str], below: Path, seconds: float) -> bool:
    """Kill it so many seconds after it began to write; says whether it was not over by then."""
    while process.poll() is None and not writes(below):
        time.sleep(0.0005)
    time.sleep(seconds)
    process.kill()
    said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


@pytest.mark.parametrize(
    ("verb", "kills", "seconds"),
    [
        ("prepare", 1, 0.0),
        ("build", 1, 0.5),
        pytest.param("prepare", ALL, 0.5, marks=pytest.mark.slow),
        pytest.param("build", ALL, 1.5, marks=pytest.mark.slow),
        pytest.param("export", 20, 50.0, marks=pytest.mark.slow),
    ],
)
def test_a_command_that_is_killed_works_when_it_is_given_again(
    verb: str,
    kills: int,
    seconds: float,
    tiny_bundle: Path,
    pair_job: Path,
    below: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Each next try is the same command again, until so many were killed; the last one is left alone."""
    place = below / {"prepare": "kept", "build": "store", "export": "bundle"}[verb]
    whole: Callable[[], object] = {
        "prepare": lambda: [KeptConcept.load(p).word for p in sorted(place.glob("*.concept"))] == ["hat", "man"],
        "build": lambda: plan_at(place),
        "export": lambda: Bundle.open(place, check_hashes=True),
    }[verb]
    if verb == "prepare":
        arguments = killing_targets.prepare_arguments(tiny_bundle, pair_job, place)
    elif verb == "build":
        pytest.importorskip("tensorrt_rtx")
        arguments = killing_targets.build_arguments(tiny_bundle, place)
    else:
        checkpoint = request.getfixturevalue("tiny_checkpoint")
        arguments = killing_targets.export_arguments(checkpoint, place, tiny_bundle)
    draw, tally = random.Random(kills), Tally()
    hit = tries = of_two = 0
    while hit < kills:
        tries += 1
        assert tries <= 4 * kills + 4, f"{hit} of {tries} kills came before the command had ended"
        killed = kill_while_it_writes(start(arguments), below, draw.uniform(0, seconds))
        there = place.exists() and bool(whole())
        ended = Ended(-signal.SIGKILL if killed else 0, 0.0, None, 0, "")
        tally.count(ended, whole=there, unfinished=bool(leftovers(below)))
        hit += killed
        of_two += verb == "prepare" and killed and len(list(place.glob("*.concept"))) == 1
        if there:  # else the next one has nothing to do
            killing_targets.clear(place)
    again = start(arguments)
    said = again.communicate(timeout=600)[1]
    assert again.returncode == 0, said
    assert "waiting" not in said
    assert whole()
    assert leftovers(below) == []
    assert tally.whole or kills < ALL, f"no moment was late enough for the whole: {tally}"
    told = f"{tally}; {of_two} left one concept of two" if verb == "prepare" else str(tally)
    figures.tell("kills", f"{verb}, as a process", told)


# ----------------------------------------------------------------------------------------------------------- a server


@pytest.mark.parametrize("kills", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_server_that_is_killed_while_it_stores_a_concept(
    kills: int, forks: GetForks, tiny_bundle: Path, man_job: Path, tmp_path: Path
) -> None:
    """The next server serves what is whole, and the same upload works."""
    pytest.importorskip("uvicorn")
    folder, of_it = tmp_path / "concepts", forks("serve")
    man = Concept("man", Reference(man_job.parent / "man.png", prompt="a man"))
    with serving(of_it, tiny_bundle, folder) as client:
        assert put(client, man, 0) is not None
        begun = time.monotonic()
        assert put(client, man, 1) is not None
        seconds = time.monotonic() - begun
    draw, tally, armed = random.Random(kills), Tally(), tmp_path / "armed"
    broken_off: int | None = None
    # Those that come too late do not count, and enough of them must hit the writing.
    while tally.kills < kills or tally.unfinished < max(1, kills // 8):
        assert tally.tries < 10 * kills, tally
        seed = 2 + tally.tries
        kill = [
            {"step": draw.randrange(STEPS), "armed": os.fspath(armed)},
            {"after": "write", "seconds": draw.uniform(0, 0.004), "armed": os.fspath(armed)},
            None,  # at any moment of the request
        ][tally.tries % 3]
        with serving(of_it, tiny_bundle, folder, kill=kill) as client:
            check(client, folder)
            if broken_off is not None:
                assert put(client, man, broken_off) is not None
                assert leftovers(folder) == []
                check(client, folder)
            before = len(stored(folder))
            timer = Timer(draw.uniform(0, 1.1 * seconds), of_it.end)
            armed.touch()
            if kill is None:
                timer.start()
            found = put(client, man, seed)
            timer.cancel()
            armed.unlink()
        there = len(stored(folder)) - before
        ended = Ended(0 if found else -signal.SIGKILL, 0.0, None, 0, "")
        tally.count(ended, whole=bool(there), unfinished=bool(leftovers(folder)))
        assert there or found is None, "it said that the concept is kept"
        broken_off = None if found else seed
    with serving(of_it, tiny_bundle, folder) as client:
        if broken_off is not None:
            assert put(client, man, broken_off) is not None
        assert leftovers(folder) == []
        check(client, folder)
    figures.tell("kills", "PUT /v1/concepts", str(tally))
