"""The signals of a service on Ray, and how it ends, without Ray's processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from magicface_rt.serve.ray.cluster import Running
from magicface_rt.serve.ray.plan import RayPlan
from magicface_rt.serve.ray.signals import Signals


def test_a_handler_only_counts_and_whoever_waits_tells() -> None:
    """What it would call may be what it has interrupted, and print into itself."""
    told: list[str] = []
    signals = Signals(told.append)
    with signals.caught():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert (signals.stops, signals.updates, told) == (2, 1, [])
        signals.wait(0)
    assert told == [
        "SIGTERM: ending when the requests that are being done have their answers",
        "SIGINT again: ending now",
    ]


def test_a_signal_wakes_whoever_waits() -> None:
    signals = Signals()
    with signals.caught():
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        begin = time.monotonic()
        while not signals.stops:
            signals.wait(60)
        assert time.monotonic() - begin < 30


def test_a_front_that_does_not_answer_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(timeout_s: float) -> int:
        raise TimeoutError

    deleted: list[str] = []
    monkeypatch.setattr("ray.serve.delete", deleted.append)
    told: list[str] = []
    signals = Signals(told.append)
    signals._noted(signal.SIGTERM, None)
    signals._noted(signal.SIGTERM, None)
    running = Running(RayPlan("bundle", "concepts"), "127.0.0.1", 1, signals=signals)
    handle: Any = SimpleNamespace(drain=SimpleNamespace(remote=lambda _: SimpleNamespace(result=never)))
    running._handle = handle
    assert running.end() == 0
    assert len(deleted) == 1
    assert told[-1] == "SIGTERM again: ending now"
