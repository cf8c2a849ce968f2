"""How computations at the same time share the processors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from magicface_rt import Session
from magicface_rt.process import cores
from magicface_rt.process.cores import threads_of_each
from magicface_rt.serve.ray import RayPlan


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cores", lambda: 8)


@pytest.mark.parametrize(
    ("threads", "at_once", "each"), [(0, 1, 0), (0, 2, 4), (0, 3, 2), (0, 9, 1), (3, 1, 3), (3, 4, 3)]
)
def test_those_at_once_share_the_cores_unless_told(threads: int, at_once: int, each: int) -> None:
    assert threads_of_each(threads, at_once) == each


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert cores.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("quota", "found"),
    [("max 100000", 4), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("5", 4), ("0 0", 4)],
)
def test_a_containers_quota_counts(quota: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7})
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert cores.cores(tmp_path / "cpu.max") == found
    assert cores.cores(tmp_path / "missing") == 4


@pytest.mark.parametrize(("workers", "threads", "each"), [(1, 0, 0), (4, 0, 2), (4, 1, 1)])
def test_workers_of_a_session(
    workers: int, threads: int, each: int, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    found: list[int] = []
    start = onnxruntime.InferenceSession

    def starts(model: Any, options: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(model, str):  # a graph's file, and not what holds the arena
            found.append(options.intra_op_num_threads)
        return start(model, options, *rest, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", starts)
    with Session(tiny_bundle, backend="onnxruntime-cpu", workers=workers, threads=threads) as session:
        session.generate("a man", steps=1)
    assert set(found) == {each}


@pytest.mark.parametrize(
    ("plan", "each"),
    [
        ({}, 0),
        ({"replicas": (2, 2)}, 4),
        ({"replicas": (1, 4), "workers": 2}, 1),
        ({"replicas": (8, 8), "cpus": 4.0}, 4),
        ({"replicas": (2, 2), "cpus": 2.0}, 2),
        ({"replicas": (2, 2), "session": {"threads": 1}}, 1),
    ],
)
def test_replicas_on_ray(plan: dict[str, Any], each: int) -> None:
    assert RayPlan("b", "c", **plan).threads == each
