"""What the tests of the PyTorch side share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from once import made_once

from tests.locations import DATA

SHIPPED = DATA / "recordings" / "guidance-3"


@pytest.fixture(scope="session")
def shipped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle of the shipped recording's model, made once for a test run."""
    pytest.importorskip("torch")
    from magicface_rt.export.parity import _case_bundle
    from magicface_rt.export.recordings import Recording

    def export(out: Path) -> None:
        _case_bundle(Recording.load(SHIPPED), out, lambda _: None)

    return made_once(tmp_path_factory, "shipped-recording", export)


@pytest.fixture(scope="module")
def work(shipped_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bundles of the recordings' models are kept: a folder for each file of tests, as two may run at once."""
    return Path(shutil.copytree(shipped_bundle, tmp_path_factory.mktemp("recordings") / "work"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, as the recordings were made: with small tensors two threads wait more than they work."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
