"""Several processes at one store, and processes that are killed: at random moments, and before each of their steps."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import figures
import pytest
import store_worker
from store_worker import CONTENT, sample_key, writer

from magicface_rt.engines.store import Damaged, EngineStore

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")

QUICK_KILLS, ALL_KILLS = 25, 200
Ask = Callable[..., dict[str, Any]]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, store_worker.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def say(process: subprocess.Popen[str], line: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


@pytest.fixture
def builders(store: EngineStore, tmp_path: Path) -> Iterator[Callable[[int], list[subprocess.Popen[str]]]]:
    """Starts processes that build the same plan in about half a second each, all at the same moment."""
    started: list[subprocess.Popen[str]] = []

    def start_all(count: int) -> list[subprocess.Popen[str]]:
        started.extend(start("build", store.root, tmp_path / "calls", "0.6") for _ in range(count))
        assert [hear(process) for process in started] == ["ready"] * count
        for process in started:
            say(process)
        return started

    yield start_all
    for process in started:
        process.kill()
        process.communicate()


def calls(tmp_path: Path) -> list[int]:
    path = tmp_path / "calls"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def names(store: EngineStore) -> list[str]:
    """What stands beside the plans, and they: digests, temporary folders, locks."""
    return sorted(path.name for path in store.root.glob("*/*/*"))


def test_two_processes_that_build_the_same_plan_make_it_once(
    store: EngineStore, builders: Callable[[int], list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    processes = builders(2)
    outcomes = [json.loads(hear(process)) for process in processes]
    assert [process.wait(timeout=30) for process in processes] == [0, 0]
    assert len(calls(tmp_path)) == 1
    plan = store.get(sample_key())
    assert [(o["sha256"], o["read"]) for o in outcomes] == [(plan.sha256, len(CONTENT))] * 2
    assert sorted(o["waits"] for o in outcomes) == [0, 1]
    assert names(store) == [plan.folder.name]


def test_of_four_processes_the_one_that_holds_the_lock_is_killed_and_the_others_finish(
    store: EngineStore, builders: Callable[[int], list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    processes = builders(4)
    while not calls(tmp_path):
        assert all(process.poll() is None for process in processes)
    (holder,) = [process for process in processes if process.pid == calls(tmp_path)[0]]
    holder.kill()
    others = [process for process in processes if process is not holder]
    outcomes = [json.loads(hear(process)) for process in others]
    assert [process.wait(timeout=30) for process in others] == [0, 0, 0]
    assert holder.wait() == -signal.SIGKILL
    assert len(calls(tmp_path)) == 2
    plan = store.get(sample_key())
    assert [(o["sha256"], o["read"]) for o in outcomes] == [(plan.sha256, len(CONTENT))] * 3
    assert names(store) == [plan.folder.name]


def test_a_plan_that_another_process_uses_is_not_pruned_until_that_ends(store: EngineStore) -> None:
    plan = store.build(sample_key(), writer())
    reader = start("lease", store.root)
    try:
        assert hear(reader) == "leased"
        assert store.prune(limit=0).entries == []
        assert store.read(plan) == CONTENT
    finally:
        reader.kill()
        reader.communicate()
    assert store.prune(limit=0).entries == [plan]


# Kills


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Sends a request to a process that forks a child for it, kills the child, and says how it ended."""
    server = start("serve")

    def send(store: EngineStore, work: str, **request: Any) -> dict[str, Any]:
        say(server, json.dumps({"store": str(store.root), "work": work, **request}))
        outcome = json.loads(hear(server))
        assert outcome["code"] in (0, -signal.SIGKILL)
        return dict(outcome)

    yield send
    server.kill()
    server.communicate()


def check_after_a_kill(store: EngineStore, old: bytes | None) -> bool:
    """Nothing half written is found, nothing is locked, and a build cleans up; says whether there was something to.

    `old`: content of the plan that stood there damaged, which may stand there still.
    """
    for entry, fault in store.verify():
        still_old = old is not None and entry.path.read_bytes() == old
        assert fault is None or still_old, fault
    found = store.find(sample_key())
    if found is not None and found.path.read_bytes() != old:
        assert store.read(found) == CONTENT
    left = [name for name in names(store) if name != sample_key().digest]
    plan = store.build(sample_key(), writer(), timeout=0)
    assert store.read(plan) == CONTENT
    store.prune()
    assert names(store) == [plan.folder.name]
    return any(name.endswith(".part") for name in left)


def kill_builders(store: EngineStore, ask: Ask, count: int, seed: int) -> None:
    """So many kills that were not too late, an eighth of them or more while something was being written."""
    draw = random.Random(seed)
    whole = ask(store, "build", seconds=0.02)
    assert whole["code"] == 0
    killed = late = half = 0
    longest = 1.1 * whole["seconds"]
    while killed < count or half < count // 8:
        assert killed + late < 10 * count, (killed, late, half)
        old = None
        plan = store.get(sample_key())
        if (killed + late) % 2:
            old = CONTENT[:-1] + b"!"
            plan.path.write_bytes(old)  # a damaged plan, to be replaced
        else:
            assert store.remove(plan)
        delay = draw.uniform(0, longest)
        outcome = ask(store, "build", seconds=0.02, delay=delay)
        if outcome["code"] == 0:  # it does not take as long every time
            longest, late = delay, late + 1
        else:
            killed += 1
        half += check_after_a_kill(store, old)
    told = f"{killed} kills ({late} came too late): 0 half plans; {half} left temporary files, which the next removed"
    figures.tell("kills", "store of plans", told)


def test_builders_killed_at_random_moments_leave_nothing_half_written(store: EngineStore, ask: Ask) -> None:
    kill_builders(store, ask, QUICK_KILLS, seed=1)


@pytest.mark.slow
def test_many_builders_killed_at_random_moments_leave_nothing_half_written(store: EngineStore, ask: Ask) -> None:
    kill_builders(store, ask, ALL_KILLS, seed=2)


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "replaced"])
def test_a_builder_killed_before_each_of_its_steps_leaves_nothing_half_written(
    store: EngineStore, ask: Ask, damaged: bool
) -> None:
    half = 0
    for step in range(500):
        old = None
        if damaged:
            old = CONTENT[:-1] + b"!"
            store.build(sample_key(), writer()).path.write_bytes(old)
        outcome = ask(store, "build", step=step)
        half += check_after_a_kill(store, old)
        if outcome["code"] == 0:
            break
        store.prune(limit=0)
    assert outcome["code"] == 0
    assert half >= 10
    assert step >= 25


def test_a_process_killed_before_each_step_of_pruning_leaves_nothing_half_removed(store: EngineStore, ask: Ask) -> None:
    other = sample_key(precision="bf16")
    half = 0
    for step in range(500):
        for key in (sample_key(), other):
            store.build(key, writer())
        outcome = ask(store, "prune", step=step)
        assert all(fault is None for _, fault in store.verify())
        assert not any(isinstance(entry, Damaged) for entry in store.entries())
        half += any(name.endswith(".part") for name in names(store))
        store.prune()
        assert all(not name.startswith(".") for name in names(store))
        if outcome["code"] == 0:
            break
    assert outcome["code"] == 0
    assert store.entries() == []
    assert half >= 5
