"""Fixtures that several test folders share: a tiny checkpoint and its bundle, made once for a test run."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from once import made_once

import magicface_rt.cli._verbs  # noqa: F401 - else a verb that is loaded while a test has something replaced keeps it

pytest_plugins = ["record"]

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.fixture(scope="module", autouse=True)
def _what_is_loaded_is_not_collected() -> None:
    """Many tests have the garbage collector find out whether something is gone. Searching all that PyTorch, ONNX and
    Ray have loaded takes it a second each time, so it leaves out what stood before the test's file began.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take long come first, or at the end one process would wait for another."""
    slow, ray, exports = (
        {item.path for item in items if item.get_closest_marker(name)} for name in ("slow", "ray", "exports")
    )
    files = sorted(dict.fromkeys(item.path for item in items), key=lambda path: (path not in slow, path not in ray))
    # Nearly all files need the tiny bundle: beside the first of them, which makes it, a second process makes another.
    ranks = {path: 0.5 if path in exports else float(place) for place, path in enumerate(files)}
    items.sort(key=lambda item: ranks[item.path])
