from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import Bundle
from magicface_rt.cli import main
from magicface_rt.files import atomic_files
from magicface_rt.provenance import DIGITAL_SOURCE_TYPE, read_provenance

BUNDLE = "magicface-demo-bundle"


class Demo:
    """The command in a folder, on the tiny checkpoint. `passes` is the parity's verdict; `exported` counts exports."""

    def __init__(self, folder: Path, job: Path, checkpoint: Path) -> None:
        self.out, self.bundle = folder / "demo-out", folder / "work" / BUNDLE
        self.passes, self.exported = True, 0
        self._arguments = ["demo", "--job", job, "--steps", 1, "--work", folder / "work", "--checkpoint", checkpoint]

    def run(self) -> int:
        return main([*map(str, self._arguments), "--out", str(self.out)])


@pytest.fixture
def demo(tiny_bundle: Path, tiny_checkpoint: Path, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """Its bundle is copied and not exported, and nothing is compared."""
    demo = Demo(tmp_path, job, tiny_checkpoint)
    versions = dict(Bundle.open(tiny_bundle, check_hashes=False).exporter)

    def export(checkpoint: object, folder: Path, **_: object) -> Bundle:
        demo.exported += 1
        atomic_files.make_folder(folder.parent)
        with atomic_files.temporary_sibling(folder, folder=True) as part:
            shutil.copytree(tiny_bundle, part, dirs_exist_ok=True)
            atomic_files.replace_into_place(part, folder, overwrite=False)
        return Bundle.open(folder)

    def compare(*_: object, **__: object) -> Any:
        report = SimpleNamespace(passed=demo.passes, to_json=dict, summary=list)
        return parity.Verdict("the bundle", (report,))

    from magicface_rt.export import exporter, parity

    monkeypatch.setattr(exporter, "export_bundle", export)
    monkeypatch.setattr(exporter, "exporter_versions", lambda: versions)
    monkeypatch.setattr(parity, "verify_bundle", compare)
    return demo


def test_a_demo_replaces_its_own_and_its_sheet_says_how_it_was_made(demo: Demo) -> None:
    assert demo.run() == 0
    made = read_provenance(demo.out / "portrait" / "image-0.png")
    assert made is not None
    said = read_provenance(demo.out / "sheet.png")
    assert said is not None
    assert said.pop("tiles") == ["reference: man", "reference: hat", "without references", "with them", "regions"]
    assert said == made
    assert DIGITAL_SOURCE_TYPE.encode() in (demo.out / "sheet.png").read_bytes()
    assert demo.run() == 0
    assert demo.exported == 1
    with (demo.bundle / "weights.bin").open("r+b") as stream:
        stream.truncate(100)
    demo.passes = False
    assert demo.run() == 1, "a check failed"
    assert demo.exported == 2
    assert sorted(path.name for path in demo.out.iterdir()) == ["portrait", "sheet.png"]


def test_a_demo_that_is_ended_as_it_removes_an_earlier_bundle_works_when_it_is_given_again(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.run() == 0
    with (demo.bundle / "weights.bin").open("r+b") as stream:
        stream.truncate(100)
    unlink = os.unlink

    def ended(path: Any, **named: Any) -> None:
        unlink(path, **named)
        if os.path.basename(path) == "bundle.json":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", ended)
        assert demo.run() == 130
    assert not list(demo.bundle.parent.iterdir())
    left = demo.bundle.with_name(f".{BUNDLE}.{'0' * 32}.part")  # as of one that is killed
    left.mkdir()
    (left / "weights.bin").write_bytes(b"half")
    assert demo.run() == 0
    assert [path.name for path in demo.bundle.parent.iterdir()] == [BUNDLE]


def _thesis(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")


def _thesis_in_a_bundle(place: Path) -> None:
    _thesis(place)
    (place / "bundle.json").write_text('{"files": {"weights.bin": {}}}')


def _link(place: Path) -> None:
    _thesis_in_a_bundle(place.parent / "elsewhere")
    (place.parent / "elsewhere" / "thesis.txt").rename(place.parent / "weights.bin")
    place.symlink_to(place.parent / "elsewhere")


def _file(place: Path) -> None:
    place.parent.mkdir(parents=True)
    place.write_text("mine")


def _photograph(place: Path) -> None:
    _picture(place / "image-0.png")


def _picture(place: Path) -> None:
    place.parent.mkdir(parents=True)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(place)


@pytest.mark.parametrize(
    ("where", "put", "says"),
    [
        ("bundle", _thesis, "its bundle.json cannot be read"),
        ("bundle", _thesis_in_a_bundle, "it holds 'thesis.txt', which its bundle.json does not name"),
        ("bundle", _link, "it is a link"),
        ("bundle", _file, "it is not a folder"),
        ("out/sheet.png", _picture, "--out"),
        ("out/sheet.png", _file, "--out"),
        ("out/sheet.png", _thesis, "--out"),
        ("out/portrait", _thesis, "it holds 'thesis.txt', which no result writes"),
        ("out/portrait", _photograph, "it holds 'image-0.png', but no run.json"),
    ],
)
def test_a_demo_replaces_nothing_of_somebody_else(
    demo: Demo, where: str, put: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of, _, name = where.partition("/")
    place: Path = getattr(demo, of) / name
    put(place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert demo.run() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(place) in line
    assert says in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not demo.exported
