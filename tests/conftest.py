"""Fixtures that several test folders share: a tiny checkpoint and its bundle, made once for a test run. And what tests
counted: told at the end, and put down after each test in a file of pytest's cache, should the run not come to its end.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import figures
import pytest
import tallies
from filelock import FileLock

import magicface_rt.cli._verbs  # noqa: F401 - else a verb that is loaded while a test has something replaced keeps it

ROOT = Path(__file__).resolve().parent.parent


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the test run, made by the first of its processes that wants it."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    out = base / name
    with FileLock(base / f"{name}.lock"):
        if not out.exists():
            make(out)
    return out


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint of Stable Diffusion's layout, 256 px."""
    pytest.importorskip("torch")
    from magicface_rt.export.random_weights import write_checkpoint

    return made_once(tmp_path_factory, "tiny-checkpoint", lambda out: write_checkpoint("tiny", out, seed=0))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `tiny_checkpoint`, with all five graphs."""
    from magicface_rt.export.checkpoint import Checkpoint
    from magicface_rt.export.exporter import export_bundle

    def export(out: Path) -> None:
        export_bundle(Checkpoint.open(tiny_checkpoint), out)

    return made_once(tmp_path_factory, "tiny-bundle", export)


TOLD = "MAGICFACE_RT_TESTS_TOLD"
"""The file of this run, which all of its processes add to: a line of JSON for each test that told something new."""

_put_down: dict[str, Any] = {"figures": {}, "tally": {}}


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a process of pytest-xdist, which has the name from the one that reports
        return
    os.environ.pop(TOLD, None)
    if (cache := getattr(config, "cache", None)) is not None:
        began = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        os.environ[TOLD] = os.fspath(cache.mkdir("told") / f"{began}-{os.getpid()}.jsonl")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with slow tests come first, or at the end one process would wait for another."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _counted() -> dict[str, Any]:
    return {"figures": copy.deepcopy(figures.FIGURES), "tally": tallies.plain()}


def pytest_runtest_logfinish(nodeid: str) -> None:
    now, path = _counted(), os.environ.get(TOLD)
    new = {
        what: {subject: told for subject, told in now[what].items() if told != _put_down[what].get(subject)}
        for what in now
    }
    _put_down.update(now)
    if path is not None and any(new.values()):
        line = json.dumps({"process": os.getpid(), "after": nodeid, **new}) + "\n"
        with open(path, "a", encoding="utf-8") as file:  # one write, so that processes do not mix their lines
            file.write(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: all goes to the one that reports
        session.config.workeroutput.update(_counted())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    for subject, told in output.get("figures", {}).items():
        figures.FIGURES.setdefault(subject, {}).update(told)
    tallies.add(output.get("tally", {}))
    _put_down.update(_counted())  # that process did it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tallies.TALLY:
        terminalreporter.section("attacks: inputs by parser and outcome")
        for line in tallies.lines():
            terminalreporter.write_line(line)
    if figures.FIGURES:
        terminalreporter.section("figures")
        for line in figures.lines():
            terminalreporter.write_line(line)
