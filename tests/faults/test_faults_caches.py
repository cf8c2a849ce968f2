"""TensorRT's caches, spoiled: whatever is wrong with one costs time and nothing else, and none of it is run.

The library is a stand-in here: what it is given is what is looked at.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from corruptions import DAMAGES, PLACES, cuts, edits_of, flips
from outcomes import inputs, little_memory, loop, no_hang
from runtime_caches import BLOB, SOUND, given

from magicface_rt.engines import timing_cache


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # ten thousand warnings would be held


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "runtime-cache" / "plan.cache"
    file.parent.mkdir(mode=0o700)
    file.write_bytes(SOUND)
    return file


def test_a_sound_cache_is_given_to_the_library(path: Path) -> None:
    assert given(path) == BLOB


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache(damage: str, path: Path) -> None:
    path.write_bytes(DAMAGES[damage](SOUND))
    assert given(path) == b""


def test_a_cache_cut_or_flipped_anywhere(path: Path) -> None:
    for content in [*(SOUND[:keep] for keep in cuts(SOUND)), *flips(SOUND)]:
        path.write_bytes(content)
        assert given(path) == (BLOB if content == SOUND else b"")


@inputs
def test_any_edit(inputs: int, path: Path) -> None:
    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert given(path) == (BLOB if content == SOUND else b"")

    loop(inputs, edits_of(SOUND), check)


@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_its_place(place: str, path: Path) -> None:
    PLACES[place](path)
    assert given(path) == b""


@pytest.mark.skipif(os.name != "posix", reason="permissions are told in another way")
@pytest.mark.parametrize("mode", [0o660, 0o606])
def test_a_cache_that_others_may_write_is_not_used_and_is_replaced(mode: int, path: Path) -> None:
    path.chmod(mode)
    assert given(path) == b""
    assert path.stat().st_mode & 0o777 == 0o600, "it was written anew, for its owner only"
    assert given(path) == BLOB


@pytest.mark.parametrize("whose", ["the group's", "everybody's", "another user's", "a link to it"])
def test_a_cache_in_a_folder_that_others_may_write_into_is_left_alone(
    whose: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digest says nothing of who wrote it, and what is in it is run on the GPU."""
    folder = path.parent
    if whose == "another user's":
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    elif whose == "a link to it":
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to(folder.with_name("elsewhere"))
    else:
        folder.chmod(0o770 if whose == "the group's" else 0o702)
    assert given(path) == b""
    assert path.read_bytes() == SOUND
    if whose in ("the group's", "everybody's"):
        folder.chmod(0o755)  # to read is no harm
        assert given(path) == BLOB


# -------------------------------------------------------------------------------------------------------------- timing


class Config:
    """A builder's configuration, which takes what the library reads, and only that."""

    def __init__(self, reads: bool) -> None:
        self.reads = reads
        self.made: list[bytes] = []
        self.set: bytes | None = None

    def create_timing_cache(self, content: bytes) -> Any:
        self.made.append(content)
        return SimpleNamespace(content=content) if self.reads or not content else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch  # measurements of another GPU would be taken for this one's
        self.set = cache.content
        return True


@pytest.mark.parametrize("reads", [True, False], ids=["readable", "not readable"])
@pytest.mark.parametrize("place", [None, *PLACES])
def test_a_timing_cache_is_a_hint(place: str | None, reads: bool, tmp_path: Path) -> None:
    flavour: Any = SimpleNamespace(name="tensorrt", version="10.0")
    path = timing_cache.cache_file(tmp_path, flavour, 0)
    path.parent.mkdir()
    path.write_bytes(BLOB)
    if place is not None:
        PLACES[place](path)
    config = Config(reads)
    with no_hang(), little_memory(256 << 20):
        timing_cache.load(tmp_path, flavour, 0, config)
    assert config.set == (BLOB if reads and place is None else b"")
