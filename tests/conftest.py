"""Fixtures that several test folders share: a tiny checkpoint and its bundle, made once for a test run."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint of Stable Diffusion's layout, 256 px."""
    pytest.importorskip("torch")
    from magicface_rt.export.random_weights import write_checkpoint

    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint("tiny", out, seed=0)
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `tiny_checkpoint`, with all five graphs."""
    from magicface_rt.export.checkpoint import Checkpoint
    from magicface_rt.export.exporter import export_bundle

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export_bundle(Checkpoint.open(tiny_checkpoint), out)
    return out
