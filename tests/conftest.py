"""Fixtures that several test folders share: a tiny checkpoint and its bundle, made once for a test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import pytest
from filelock import FileLock

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


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: the figures go to the one that reports
        session.config.workeroutput["figures"] = figures.FIGURES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for subject, told in getattr(node, "workeroutput", {}).get("figures", {}).items():
        figures.FIGURES.setdefault(subject, {}).update(told)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.FIGURES:
        terminalreporter.section("figures")
        for line in figures.lines():
            terminalreporter.write_line(line)
