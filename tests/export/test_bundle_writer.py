"""What the writer of a bundle takes for a fault of the bundle's place."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from magicface_rt.errors import OutputError
from magicface_rt.export.bundle_writer import BundleWriter


def test_what_fails_elsewhere_is_not_said_of_the_bundles_folder(tmp_path: Path) -> None:
    """Whoever is told to free space there would look at the wrong disk."""
    elsewhere = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/temporary/weights.bin")
    with pytest.raises(OSError, match="/temporary") as raised, BundleWriter(tmp_path / "bundle"):
        raise elsewhere
    assert raised.value is elsewhere
    assert list(tmp_path.iterdir()) == []


def fails_to_add(writer: BundleWriter, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "write_text", full)
    writer.add_file("tokenizer.json", "{}")


def fails_to_describe(writer: BundleWriter, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(json, "dump", full)
    writer.write_manifest({})


def fails_to_finish(writer: BundleWriter, patch: pytest.MonkeyPatch) -> None:
    (writer.folder / "bundle.json").touch()
    patch.setattr(os, "fsync", full)
    writer.finish()


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", [fails_to_add, fails_to_describe, fails_to_finish])
def test_what_fails_as_it_is_written_is_said_of_the_bundles_folder(
    step: Callable[[BundleWriter, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(OutputError, match=r"bundle cannot be written: .*Free some space"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        step(writer, monkeypatch)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
