"""Fixtures of the tests of kills and of bad disks: `pytest_plugins = ("killing_fixtures",)` brings them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import killing_targets
import pytest
from killing import Forks, forking
from killing_checks import write_job
from killing_targets import GetForks, Target

from magicface_rt.bundle import Bundle


@pytest.fixture(scope="session")
def forks(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetForks]:
    """The process that forks, with that library; started when it is first wanted."""
    started: dict[str, Forks] = {}
    with ExitStack() as stack:

        def of(library: str) -> Forks:
            if library not in started:
                folder = tmp_path_factory.mktemp(f"forks-{library}")
                started[library] = stack.enter_context(forking(folder, tiny_bundle, library))
            return started[library]

        yield of


@pytest.fixture(scope="session")
def man_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with one concept."""
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def kept_man(forks: GetForks, tiny_bundle: Path, man_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `prepare` writes for that job."""
    below = tmp_path_factory.mktemp("source")
    ended = forks("cli").run("cli", [killing_targets.prepare_arguments(tiny_bundle, man_job, below)], below)
    assert ended.code == 0, ended.said
    return below / "man.concept"


@pytest.fixture(scope="session")
def pair_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with two concepts."""
    return write_job(tmp_path_factory.mktemp("pair"), ("man", "hat"))


@pytest.fixture(scope="session")
def kept_pair(forks: GetForks, tiny_bundle: Path, pair_job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `prepare` writes for that job."""
    below = tmp_path_factory.mktemp("sources")
    ended = forks("cli").run("cli", [killing_targets.prepare_arguments(tiny_bundle, pair_job, below)], below)
    assert ended.code == 0, ended.said
    return below


@pytest.fixture(scope="session")
def exported(
    forks: GetForks, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """What `export` writes with its computing left out, where it is not killed."""
    pytest.importorskip("torch")
    below = tmp_path_factory.mktemp("exported")
    arguments = killing_targets.export_arguments(tiny_checkpoint, below / "bundle", tiny_bundle)
    ended = forks("export").run("export", [arguments, os.fspath(tiny_bundle)], below)
    assert ended.code == 0, ended.said
    return Bundle.open(below / "bundle")


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """The folder that is written to."""
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def target(request: pytest.FixtureRequest, tiny_bundle: Path, below: Path) -> Target:
    """The writer whose name is the test's parameter."""
    name, get = request.param, request.getfixturevalue
    if name == "result.save":
        return killing_targets.result(below)
    if name == "KeptConcept.save":
        return killing_targets.concept(below, get("kept_man"))
    if name == "prepare":
        return killing_targets.prepare(below, tiny_bundle, get("man_job"), get("kept_man"))
    if name == "prepare of two":
        return killing_targets.prepare_pair(below, tiny_bundle, get("pair_job"), get("kept_pair"))
    if name == "build":
        pytest.importorskip("tensorrt_rtx")
        return killing_targets.build(below, tiny_bundle)
    assert name == "export"
    return killing_targets.export(below, tiny_bundle, get("tiny_checkpoint"), get("exported"))
