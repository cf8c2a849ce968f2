"""The record of a run: a file of the cache of pytest says after each test whether it passed, or why not, how many
seconds its fixtures and it took, and what was counted by then. All that was counted is told at the end. A run that was
ended before its end goes on with `--resume`, which leaves out what passed before at this very commit, and tells those
figures too.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections import defaultdict
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import figures
import pytest
import tallies

FILE = "MAGICFACE_RT_TESTS_RECORD"
"""The file of this run, which all of its processes add to: a line of JSON for each test, after one for the run."""


@dataclass
class Before:
    """What earlier runs of one commit came to."""

    commit: str = ""
    passed: set[str] = field(default_factory=set)
    figures: dict[str, dict[str, str]] = field(default_factory=dict)
    tally: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, file: Path) -> None:
        """Adds a run's record, where it is of this commit. Its last line may have been cut off. What a test that failed
        had tried counts, and counts again when it is run again.
        """
        tried: dict[tuple[int, str], dict[str, int]] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            try:
                said: dict[str, Any] = json.loads(line)
            except json.JSONDecodeError:
                continue
            if number == 0 and said.get("commit") != self.commit:
                return
            if said.get("passed"):
                self.passed.add(said["after"])
            for subject, told in said.get("figures", {}).items():
                self.figures.setdefault(subject, {}).update(told)
            for parser, counts in said.get("tally", {}).items():
                tried[said["process"], parser] = counts  # what this process came to in all by then
        for (_, parser), counts in tried.items():
            mine = self.tally.setdefault(parser, defaultdict(int))
            for outcome, count in counts.items():
                mine[outcome] += count


_before = Before()
_left_out = 0
_put_down: dict[str, Any] = {"figures": {}, "tally": {}}
_fell = pytest.StashKey[str]()
"""Why a test did not pass: what pytest tells of it at the end, which may be hours away, or never comes."""
_took = pytest.StashKey[dict[str, float]]()
"""Seconds of a test by phase: "setup" (its fixtures, also those that later tests share), "call", "teardown"."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", action="store_true", help="leave out what passed before at this very commit")


def pytest_configure(config: pytest.Config) -> None:
    if (given := getattr(config, "workerinput", None)) is not None:  # a process of pytest-xdist
        _before.passed = set(given["passed"])
        return
    os.environ.pop(FILE, None)
    if (cache := getattr(config, "cache", None)) is None:
        return
    records, commit = cache.mkdir("records"), _commit(config.rootpath)
    if config.getoption("resume"):
        if commit is None:
            raise pytest.UsageError(
                "--resume leaves out what passed at this very commit, but there are changes that are not committed, "
                "or this is no clone of git: commit them, or run all tests without --resume"
            )
        _before.commit = commit
        for file in sorted(records.glob("*.jsonl")):
            _before.add(file)
    began = datetime.now(timezone.utc)
    os.environ[FILE] = os.fspath(records / f"{began:%Y%m%d-%H%M%S}-{os.getpid()}.jsonl")
    _write({"began": began.isoformat(timespec="seconds"), "commit": commit})


def _commit(root: Path) -> str | None:
    """The commit whose files stand here unchanged; None where there is none."""
    said = []
    for arguments in (("status", "--porcelain"), ("rev-parse", "HEAD")):
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        if done.returncode:
            return None
        said.append(done.stdout.strip())
    changes, commit = said
    return None if changes else commit


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["passed"] = sorted(_before.passed)  # all of its processes leave out the same


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _left_out
    if left_out := [item for item in items if item.nodeid in _before.passed]:
        _left_out = len(left_out)
        items[:] = [item for item in items if item.nodeid not in _before.passed]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.passed:  # a test that was skipped may find what it needs another time
        item.stash[_fell] = report.longreprtext
    item.stash.setdefault(_took, {})[report.when] = round(report.duration, 3)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    done = yield
    now = _counted()
    new = {
        what: {subject: told for subject, told in now[what].items() if told != _put_down[what].get(subject)}
        for what in now
    }
    _put_down.update(now)
    why = item.stash.get(_fell, None)
    outcome = {"passed": True} if why is None else {"passed": False, "why": why}
    took = {"seconds": item.stash.get(_took, {})}
    _write({"process": os.getpid(), "after": item.nodeid, **outcome, **took, **{k: v for k, v in new.items() if v}})
    return done


def _counted() -> dict[str, Any]:
    return {"figures": copy.deepcopy(figures.FIGURES), "tally": tallies.plain()}


def _write(line: dict[str, Any]) -> None:
    if (path := os.environ.get(FILE)) is not None:
        with open(path, "a", encoding="utf-8") as file:  # one write, so that processes do not mix their lines
            file.write(json.dumps(line) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: all goes to the one that reports
        session.config.workeroutput.update(_counted(), left_out=_left_out)
    elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _left_out:
        session.exitstatus = pytest.ExitCode.OK  # all had passed


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    global _left_out
    output = getattr(node, "workeroutput", {})
    _left_out = max(_left_out, output.get("left_out", 0))
    for subject, told in output.get("figures", {}).items():
        figures.FIGURES.setdefault(subject, {}).update(told)
    tallies.add(output.get("tally", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for subject, told in _before.figures.items():
        figures.FIGURES[subject] = {**told, **figures.FIGURES.get(subject, {})}
    tallies.add(_before.tally)
    _section(terminalreporter, "attacks: inputs by parser and outcome", tallies.lines())
    _section(terminalreporter, "figures", figures.lines())
    if _before.passed:
        counted = f"{len(_before.passed):,} tests passed in earlier runs of commit {_before.commit[:9]}"
        _section(terminalreporter, "resumed", [f"{counted}; their figures are among those above"])


def _section(terminalreporter: pytest.TerminalReporter, title: str, lines: Iterable[str]) -> None:
    if lines := list(lines):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
