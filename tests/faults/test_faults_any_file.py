"""Attacks that every format of one file meets alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corruptions import DAMAGES, NAMES, NO_NAMES, PLACES, cuts, edits_of, flips
from outcomes import inputs, judged, loop
from single_files import FORMATS, Format

pytest.importorskip("torch")

each_format = pytest.mark.parametrize("one", FORMATS, ids=str)


def put(folder: Path, one: Format, content: bytes | None = None, name: str = "file") -> Path:
    path = folder / f"{name}.{one.suffix}"
    path.write_bytes(one.sample() if content is None else content)
    return path


def attack(one: Format, path: Path) -> Any:
    return judged(one.name, lambda: one.read(path), names=path, memory=one.memory)


def attack_by(one: Format, folder: Path, content: bytes) -> Any:
    """With an edit of the sound file. Where a format has lengths, one that is accepted is as long as they say; where it
    has hashes, it holds what it held.
    """
    found = attack(one, put(folder, one, content))
    assert found is None or one.whole(content)
    if found is not None and one.content is not None:
        assert one.content(found) == one.content(one.read(put(folder, one, name="sound")))
    return found


@each_format
def test_a_sound_file_is_read(one: Format, tmp_path: Path) -> None:
    assert attack(one, put(tmp_path, one)) is not None


@each_format
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(one: Format, damage: str, tmp_path: Path) -> None:
    found = attack_by(one, tmp_path, DAMAGES[damage](one.sample()))
    assert (found is not None) == (damage in one.harmless)


@each_format
def test_a_file_cut_anywhere(one: Format, tmp_path: Path) -> None:
    data = one.sample()
    for keep in cuts(data):
        found = attack_by(one, tmp_path, data[:keep])
        assert found is None or one.spare is None or len(data) - keep <= one.spare


@each_format
def test_a_flipped_bit_anywhere(one: Format, tmp_path: Path) -> None:
    for data in flips(one.sample()):
        attack_by(one, tmp_path, data)


@each_format
@inputs
def test_any_edit(one: Format, inputs: int, tmp_path: Path) -> None:
    loop(inputs, edits_of(one.sample()), lambda content: attack_by(one, tmp_path, content))


@each_format
@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_its_place(one: Format, place: str, tmp_path: Path) -> None:
    path = put(tmp_path, one)
    PLACES[place](path)
    found = attack(one, path)
    if "itself and" not in place:
        assert found is None


@each_format
def test_a_link_to_a_sound_file_is_followed(one: Format, tmp_path: Path) -> None:
    """Who names a file on the command line may name it by a link."""
    path = put(tmp_path, one)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to("elsewhere")
    assert attack(one, path) is not None


@each_format
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_that_a_file_can_have(one: Format, name: str, tmp_path: Path) -> None:
    attack(one, put(tmp_path, one, name=name))
    attack(one, put(tmp_path, one, b"", name=name))


@each_format
@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
def test_a_name_that_no_file_can_have(one: Format, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.{one.suffix}"
    assert judged(one.name, lambda: one.read(path), names=path, memory=one.memory) is None


PICTURES_ALIKE = ("picture", "mask", "provenance")


@each_format
@pytest.mark.parametrize("other", FORMATS, ids=str)
def test_files_that_were_renamed_into_each_other(one: Format, other: Format, tmp_path: Path) -> None:
    found = attack(one, put(tmp_path, one, other.sample()))
    kinds = {name.split()[0] for name in (one.name, other.name)}
    alike = one.sample() == other.sample() or len(kinds) == 1 or kinds <= {*PICTURES_ALIKE}
    if not alike and (one.name != "weights" or other.suffix != "concept"):  # which is safetensors as well
        assert found is None
