"""Files of kept concepts: what comes back, and what is refused for which reason."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from magicface_rt import Concept, KeptConcept, KeptConceptError, MagicFaceError, OutputError, Reference
from magicface_rt.backends.host import from_bfloat16, to_bfloat16
from magicface_rt.cli import main
from magicface_rt.files import atomic_files
from magicface_rt.files.stamps import Stamp
from magicface_rt.images import load_reference
from magicface_rt.kept import KeptReference, Origin
from magicface_rt.kept.files import MAX_REFERENCES, METADATA, check_writable, difference
from magicface_rt.kept.origin import content_key
from magicface_rt.kept.reference import EightBit, empty_tensors
from magicface_rt.schedule import Schedule

LAYERS = ((10, 2, 24), (13, 1, 8))
STEPS = 3


def origin(dtype: str = "float32") -> Origin:
    schedule = Schedule()
    timesteps = tuple(int(t) for t in schedule.timesteps(STEPS))
    return Origin("b" * 64, "sd15", dtype, 64, 64, LAYERS, schedule.to_config(), timesteps, 5)


def made(dtype: str = "float32", storage: Any = "exact", *, tokens: tuple[int, int] = (7, 3)) -> KeptConcept:
    rng, of = np.random.default_rng(1), origin(dtype)
    references = []
    for number in range(2):
        tensors = empty_tensors(of, {1: tokens[0] + number, 2: tokens[1]}, storage)
        for name, (factor, width) in of.widths.items():
            for step in range(STEPS):
                count = tokens[0] + number if factor == 1 else tokens[1]
                values = rng.standard_normal((count, width)).astype(np.float32) + 3
                tensors[name].put(step, to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype))
        counts = {1: tokens[0] + number, 2: tokens[1]}
        references.append(KeptReference(f"key {number}", f"view {number}", storage, counts, tensors))
    return KeptConcept("red hat", references, of, weight=2.5, token_index=[3, 4], name="cap")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made().save(tmp_path / "cap.concept")


@pytest.mark.parametrize("storage", ["exact", "8-bit"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: str, storage: str) -> None:
    kept = made(dtype, storage)
    loaded = KeptConcept.load(kept.save(tmp_path / "deep" / "er" / "cap.concept"))
    assert loaded.to_dict() == kept.to_dict()
    assert (loaded.origin, loaded.nbytes) == (kept.origin, kept.nbytes)
    for ours, theirs in zip(loaded.references, kept.references, strict=True):
        assert ours.mapped
        for name in theirs.tensors:
            for step in range(STEPS):
                found = ours.tensors[name].step(step)
                np.testing.assert_array_equal(found, theirs.tensors[name].step(step))
                np.testing.assert_array_equal(ours.in_memory().tensors[name].step(step), found)
    again = loaded.save(tmp_path / "again.concept")
    assert again.read_bytes() == (tmp_path / "deep" / "er" / "cap.concept").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.concept", "deep"]


def test_a_note_stays_with_the_concept(tmp_path: Path, path: Path) -> None:
    note = "Agreed by the person shown, 2026-11-24, for one poster. \u00dc"
    kept = made().noted(note).renamed("blue hat")
    again = KeptConcept.load(kept.save(tmp_path / "noted.concept"))
    assert (again.note, again.renamed(weight=1.0).note, again.to_dict()["note"]) == (note, note, note)
    assert again.noted(None).note is None
    assert KeptConcept.load(path).note is None
    for note in ("x", "x" * 2000):
        assert made().noted(note).note == note


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = made().renamed(name="cap\x1b]0;title\x07").noted("first\r\x1b[2Jsecond")
    assert main(["inspect", str(kept.save(tmp_path / "cap.concept"))]) == 0
    told = capsys.readouterr().out
    assert "first \\x1b[2Jsecond" in told
    assert all(character.isprintable() or character == "\n" for character in told)


@pytest.mark.parametrize("note", ["", "x" * 2001, 7, b"text"])
def test_a_note_is_a_text_of_bounded_length(note: Any) -> None:
    with pytest.raises(KeptConceptError, match=r"'red hat' has a note of .*, expected a text of 1 to 2000 characters"):
        made().noted(note)


def test_a_reference_without_tokens_on_a_grid_comes_back(tmp_path: Path) -> None:
    for storage in ("exact", "8-bit"):
        kept = made(storage=storage, tokens=(7, 0))
        loaded = KeptConcept.load(kept.save(tmp_path / f"{storage}.concept"))
        assert loaded.references[0].tensors["k_ref_10"].step(0).shape == (0, 24)
        assert loaded.to_dict() == kept.to_dict()


def test_a_note_in_bytes_that_are_no_text_comes_back(tmp_path: Path) -> None:
    """As a command line gives them: lone surrogates, which UTF-8 cannot hold."""
    kept = made().noted(os.fsdecode(b"agreed \xff"))
    assert KeptConcept.load(kept.save(tmp_path / "cap.concept")).note == kept.note


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_a_file_is_safetensors(tmp_path: Path, dtype: str, name: str) -> None:
    path = made(dtype).save(tmp_path / "cap.concept")
    with safe_open(path, "np") as opened:
        assert set(opened.metadata()) == {"magicface_rt.kept_concept", "manifest_sha256"}
        piece = opened.get_slice("1.v_ref_13")
        assert (piece.get_shape(), piece.get_dtype()) == ([STEPS, 8, 8], name)
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0, "so that tensors lie well in memory"
    with safe_open(made(dtype, "8-bit").save(tmp_path / "small.concept"), "np") as opened:
        kinds = {of: opened.get_slice(f"0.k_ref_10.{of}") for of in ("levels", "scale", "low")}
        assert {of: (one.get_shape(), one.get_dtype()) for of, one in kinds.items()} == {
            "levels": ([STEPS, 3, 24], "U8"),
            "scale": ([STEPS, 24], "F32"),
            "low": ([STEPS, 24], "F32"),
        }


def test_a_header_of_4_mib_is_read_and_a_longer_one_is_not(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for more, refused in ((0, False), (1, True)):
        blanks = b" " * (4 * 2**20 + more - length)
        head = (4 * 2**20 + more).to_bytes(8, "little") + data[8 : 8 + length] + blanks
        path.write_bytes(head + data[8 + length :])
        if refused:
            with pytest.raises(KeptConceptError, match="its header would have 4194305 bytes"):
                KeptConcept.load(path)
        else:
            assert KeptConcept.load(path).name == "cap"


def test_keys_are_read_from_the_file_when_a_step_needs_them(path: Path) -> None:
    loaded = KeptConcept.load(path)
    values = loaded.references[0].tensors["k_ref_10"].step(0)
    base: Any = values
    while getattr(base, "base", None) is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_a_loaded_concept_outlives_a_new_file_in_its_place(path: Path) -> None:
    loaded = KeptConcept.load(path)
    before = loaded.references[0].tensors["k_ref_10"].step(1).copy()
    made(tokens=(30, 20)).save(path, overwrite=True)
    loaded.renamed("cap", weight=1).save(path, overwrite=True)
    np.testing.assert_array_equal(KeptConcept.load(path).references[0].tensors["k_ref_10"].step(1), before)


def write_other_keys(path: Path) -> None:
    """In the file's place, as `cp` does, and of the same size."""
    stamp, content = path.stat().st_mtime_ns, bytearray(path.read_bytes())
    content[-8:] = bytes(8)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stamp + 1, stamp + 1))  # a fast machine writes it within one tick of the disk's clock


def test_a_loaded_concept_whose_file_was_written_to_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = KeptConcept.load(Path(path.name))
    loaded.check_not_modified()
    monkeypatch.chdir("/")
    write_other_keys(path)
    for of_it in (
        loaded.check_not_modified,
        loaded.renamed("hat").check_not_modified,
        loaded.references[1].check_not_modified,
    ):
        with pytest.raises(KeptConceptError, match=r"'cap\.concept' was written to since it was loaded.*Load it again"):
            of_it()
    with pytest.raises(KeptConceptError, match="was written to since it was loaded"):
        loaded.save(tmp_path / "copy.concept")
    assert os.listdir(tmp_path) == ["cap.concept"]
    loaded.references[1].in_memory().check_not_modified()


def test_a_writer_that_restores_size_and_time_goes_unseen(path: Path) -> None:
    loaded, found = KeptConcept.load(path), path.stat()
    write_other_keys(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    loaded.check_not_modified()


SHORTENED = """
import os
import resource
import sys
from magicface_rt import KeptConcept, KeptConceptError

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
loaded = KeptConcept.load(sys.argv[1])
os.truncate(sys.argv[1], 100)
try:
    loaded.check_not_modified()
except KeptConceptError as error:
    print(error, flush=True)
loaded.references[0].tensors["k_ref_10"].step(1).sum()
print("went on", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="needs SIGBUS")
def test_a_file_that_is_shortened_is_noticed_between_requests_and_ends_the_process_that_reads_it(path: Path) -> None:
    """The first page may still be there, so the file has to have more of them."""
    made(tokens=(700, 300)).save(path, overwrite=True)
    ended = subprocess.run([sys.executable, "-c", SHORTENED, str(path)], capture_output=True, text=True, timeout=300)
    assert "was written to since it was loaded" in ended.stdout, ended.stderr
    assert "went on" not in ended.stdout
    assert ended.returncode == -signal.SIGBUS


def test_a_file_that_is_written_to_while_it_is_copied_is_not_copied(path: Path, tmp_path: Path) -> None:
    loaded, sound = KeptConcept.load(path), KeptConcept.check_not_modified
    calls = []

    def later(concept: KeptConcept) -> None:
        sound(concept)
        calls.append(concept)
        if len(calls) == 1:
            write_other_keys(path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(KeptConcept, "check_not_modified", later)
        with pytest.raises(KeptConceptError, match="was written to since it was loaded"):
            loaded.save(tmp_path / "copy.concept")
    assert os.listdir(tmp_path) == ["cap.concept"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
@pytest.mark.parametrize(
    ("of", "function"),
    [
        (atomic_files, "resolve_target"),
        (atomic_files, "replace_into_place"),
        (atomic_files, "check_writable"),
        (Stamp, "of"),
        (Stamp, "was_modified"),
    ],
)
def test_a_time_limit_that_ends_meanwhile_is_no_fault_of_the_file(
    of: Any, function: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a task's queue sets one: `TimeoutError` is an OSError, as those of a disk are."""

    def ends(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("time is up")

    loaded, other = KeptConcept.load(path), path.with_name("other.concept")
    uses: dict[str, Callable[[], object]] = {
        "resolve_target": lambda: loaded.save(other),
        "replace_into_place": lambda: loaded.save(other),
        "check_writable": lambda: check_writable(other, overwrite=False),
        "of": lambda: KeptConcept.load(path),
        "was_modified": loaded.check_not_modified,
    }
    before = signal.signal(signal.SIGUSR1, ends)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(of, function, lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
            with pytest.raises(TimeoutError, match="time is up"):
                uses[function]()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert os.listdir(path.parent) == [path.name]
    uses[function]()


def test_a_file_that_cannot_be_looked_at_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = KeptConcept.load(path)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Stamp, "was_modified", broken)
    with pytest.raises(KeptConceptError, match=r"'cap\.concept' cannot be looked at: Input/output error"):
        loaded.check_not_modified()


def test_what_takes_the_place_of_a_loaded_file_is_no_harm(path: Path) -> None:
    loaded = KeptConcept.load(path)
    made().save(path, overwrite=True)
    loaded.check_not_modified()
    path.unlink()
    loaded.check_not_modified()
    path.parent.rename(path.parent.with_name("aside"))
    loaded.check_not_modified()


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_is_followed_as_it_is_where_results_are_saved(path: Path, tmp_path: Path) -> None:
    link, nowhere, loop = (tmp_path / name for name in ("link.concept", "nowhere.concept", "loop.concept"))
    link.symlink_to(path.name)
    with pytest.raises(OutputError, match=r"link\.concept' exists already"):
        made().save(link)
    assert made().noted("new").save(link, overwrite=True) == path
    assert link.is_symlink()
    assert KeptConcept.load(path).note == "new"
    nowhere.symlink_to("deep/cap.concept")
    check_writable(nowhere, overwrite=False)
    assert made().save(nowhere) == tmp_path / "deep" / "cap.concept"
    loop.symlink_to(loop.name)
    for write in (lambda: made().save(loop, overwrite=True), lambda: check_writable(loop, overwrite=True)):
        with pytest.raises(OutputError, match=r"loop\.concept' cannot be written: .*symbolic links"):
            write()


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="No file can have this name"):
        made().save(name)


@pytest.mark.parametrize("storage", ["exact", "8-bit"])
def test_keys_cannot_be_changed(tmp_path: Path, storage: str) -> None:
    kept = made(storage=storage)
    loaded = KeptConcept.load(kept.save(tmp_path / "cap.concept"))
    for reference in (*kept.references, *loaded.references, loaded.references[0].in_memory()):
        for stored in reference.tensors.values():
            for array in stored.arrays.values():
                with pytest.raises(ValueError, match="read-only"):
                    array *= 0


@pytest.fixture(params=["link", "rename", "look"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a system can do to put a file only where there is none."""

    def cannot(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param != "link":
        monkeypatch.setattr(os, "link", cannot)
    if request.param == "look":
        monkeypatch.setattr(atomic_files, "_rename", lambda *_: False)


@pytest.mark.usefixtures("system")
def test_a_file_that_somebody_puts_there_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settle = tmp_path / "cap.concept", atomic_files.fsync_tree

    def slow(new: Path) -> None:
        path.write_bytes(b"somebody's")
        settle(new)

    with monkeypatch.context() as patched:
        patched.setattr(atomic_files, "fsync_tree", slow)
        with pytest.raises(OutputError, match=r"cap.concept' exists already. Give another path, or allow overwriting"):
            made().save(path)
        assert path.read_bytes() == b"somebody's"
        assert os.listdir(tmp_path) == ["cap.concept"]
        made().save(path, overwrite=True)
    path.unlink()
    assert KeptConcept.load(made().save(path)).name == "cap"
    assert os.listdir(tmp_path) == ["cap.concept"]
    assert os.stat(path).st_nlink == 1


def test_of_two_that_save_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settle, both = tmp_path / "cap.concept", atomic_files.fsync_tree, threading.Barrier(2)
    ended: list[str] = []

    def together(new: Path) -> None:
        settle(new)
        both.wait(60)

    def save(name: str) -> None:
        try:
            made().renamed(name=name).save(path)
            ended.append(name)
        except OutputError as error:
            ended.append("exists already" if "exists already" in str(error) else str(error))

    monkeypatch.setattr(atomic_files, "fsync_tree", together)
    threads = [threading.Thread(target=save, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ended) == sorted(["exists already", KeptConcept.load(path).name])


def test_references_are_alike_where_all_that_was_looked_at_is(tmp_path: Path, path: Path) -> None:
    def identities(loaded: KeptConcept) -> list[object]:
        return [one.identity for one in loaded.references]

    first, again = KeptConcept.load(path), KeptConcept.load(path)
    assert identities(first) == identities(again) == identities(first.renamed("hat"))
    assert [one.in_memory().identity for one in first.references] == identities(first)
    unchecked = [KeptConcept.load(path, check_hashes=False) for _ in range(2)]
    apart = {one for loaded in (first, *unchecked, made()) for one in identities(loaded)}
    assert len(apart) == 8
    other = made(tokens=(30, 20)).save(tmp_path / "other.concept")
    assert set(identities(KeptConcept.load(other))).isdisjoint(identities(first)), "with the same keys"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("storage", ["exact", "8-bit"])
@pytest.mark.parametrize("where", ["memory", "file", "unchecked file"])
def test_a_copy_is_the_same_reference_and_cannot_be_changed(
    tmp_path: Path, where: str, storage: Any, copied: Callable[[Any], Any]
) -> None:
    kept = made(storage=storage)
    if where != "memory":
        kept = KeptConcept.load(kept.save(tmp_path / "man.concept"), check_hashes=where == "file")
    for one, other in zip(kept.references, copied(kept).references, strict=True):
        assert [other.key, other.prompt, other.storage] == [one.key, one.prompt, one.storage]
        assert (other.tokens, other.error, other.nbytes) == (one.tokens, one.error, one.nbytes)
        if where == "file":
            assert other.identity == one.identity
        for name, stored in other.tensors.items():
            for suffix, array in stored.arrays.items():
                np.testing.assert_array_equal(array, one.tensors[name].arrays[suffix])
                with pytest.raises(ValueError, match="read-only"):
                    array[:] = 0
            with pytest.raises(AttributeError):
                setattr(stored, "levels" if storage == "8-bit" else "values", 0)
        with pytest.raises(TypeError):
            other.tensors["k_ref_10"] = other.tensors["v_ref_10"]  # type: ignore[index]


@pytest.mark.parametrize("storage", ["exact", "8-bit"])
def test_a_reference_is_described_by_what_it_was_prepared_from(storage: Any) -> None:
    (reference, *_) = made(storage=storage).references
    assert reference.describe() == {"kept": reference.key, "storage": storage, "prompt": reference.prompt}
    assert copy.copy(reference) is reference


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_outlives_the_file_and_is_none_of_what_was_written_to_it(
    path: Path, copied: Callable[[Any], Any]
) -> None:
    loaded, late = KeptConcept.load(path), KeptConcept.load(path)
    own, expected = copied(loaded), made()
    write_other_keys(path)
    assert not any(reference.mapped for reference in own.references)
    own.check_not_modified()
    for one, other in zip(expected.references, own.references, strict=True):
        for name, stored in one.tensors.items():
            np.testing.assert_array_equal(other.tensors[name].step(1), stored.step(1))
    with pytest.raises(KeptConceptError, match="was written to since it was loaded"):
        copied(late)


def with_keys_of(source: Concept) -> KeptConcept:
    """As if it had been prepared from those images."""
    kept = made()
    references = []
    for one, of in zip(kept.references, source.references, strict=True):
        key = content_key(kept.origin, load_reference(of, name="x"), of.prompt, one.storage)
        references.append(replace(one, prompt=of.prompt, key=key))
    return KeptConcept("cap", references, kept.origin, source=source)


def test_an_image_is_stored_only_where_asked(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    with_source = with_keys_of(Concept("cap", *(Reference(pixels, mask=np.ones((20, 30), bool)) for _ in range(2))))
    bare = KeptConcept.load(with_source.save(tmp_path / "bare.concept"))
    assert not bare.pictures
    full = KeptConcept.load(with_source.save(tmp_path / "full.concept", with_image=True))
    np.testing.assert_array_equal(full.pictures["image_1"], pixels)
    assert full.pictures["mask_0"].shape == (128, 128)
    full.save(tmp_path / "copy.concept", with_image=True)
    with pytest.raises(KeptConceptError, match="without images"):
        bare.save(tmp_path / "no.concept", with_image=True)
    assert not (tmp_path / "no.concept").exists()


@pytest.mark.parametrize("changed", ["man.png", "mask.png"])
def test_an_image_that_has_changed_since_is_not_stored_as_what_was_used(tmp_path: Path, changed: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    mask = np.full((20, 30), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "man.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    other = Reference(pixels, mask=mask.copy(), prompt="side")
    kept = with_keys_of(Concept("cap", other, Reference(tmp_path / "man.png", mask=tmp_path / "mask.png", prompt="a")))
    kept.save(tmp_path / "before.concept", with_image=True)
    mask[:10] = 0
    Image.fromarray({"man.png": 255 - pixels, "mask.png": mask}[changed]).save(tmp_path / changed)
    with pytest.raises(KeptConceptError, match="image or mask of reference 2 is not what its keys were made from"):
        kept.save(tmp_path / "after.concept", with_image=True)
    assert not (tmp_path / "after.concept").exists()
    kept.save(tmp_path / "after.concept")


def test_a_source_has_the_references_of_its_keys() -> None:
    kept, source = made(), Concept("cap", Reference(np.zeros((8, 8, 4), np.uint8)))
    with pytest.raises(KeptConceptError, match="2 references, and its source 1"):
        KeptConcept("cap", kept.references, kept.origin, source=source)


def test_whether_a_file_can_be_written_is_seen_without_leaving_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.concept").mkdir()
    check_writable(tmp_path / "deep" / "er" / "cap.concept", overwrite=False)
    check_writable(tmp_path / "file", overwrite=True)
    check_writable(tmp_path / ("c" * 255), overwrite=False)
    for path in ("deep/" + "c" * 256, "c" * 256 + "/deep"):
        with pytest.raises(OutputError, match=r"cannot be written: .*Choose another name"):
            check_writable(tmp_path / path, overwrite=False)
    for path, overwrite in (("file", False), ("folder.concept", True), ("file/cap.concept", True), ("c" * 256, False)):
        with pytest.raises(OutputError, match=r"exists already|cannot be written"):
            check_writable(tmp_path / path, overwrite=overwrite)
        with pytest.raises(OutputError, match=r"exists already|cannot be written"):
            made().save(tmp_path / path, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.concept"]


def test_a_folder_that_takes_files_and_lets_none_go_is_no_place_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An append-only folder: what is written there can take no other's place."""

    def stuck(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", stuck)
    with pytest.raises(OutputError, match=r"cap\.concept' cannot be written: .*ermi"):
        check_writable(tmp_path / "cap.concept", overwrite=False)


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, path = made(), tmp_path / "cap.concept"
    kept.save(path)
    with pytest.raises(OutputError, match="exists already"):
        kept.save(path)
    with pytest.raises(OutputError, match="exists already"):
        kept.save(tmp_path, overwrite=True)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("magicface_rt.kept.files.os.fsync", full)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="No space left"):
        made(tokens=(9, 9)).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cap.concept"]


# ----------------------------------------------------------------------------------------------------------- bad input


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def changed_manifest(data: bytes, **changes: Any) -> bytes:
    """A manifest that was changed by someone who knows the format."""
    header, body = header_of(data)
    manifest = json.dumps({**json.loads(header["__metadata__"][METADATA]), **changes})
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    header["__metadata__"] = {METADATA: manifest, "manifest_sha256": digest}
    return with_header(header, body)


def changed_origin(data: bytes, **changes: Any) -> bytes:
    return changed_manifest(data, origin={**origin().to_dict(), **changes})


def with_a_stowaway(data: bytes, name: str = "more", shape: Any = (4,)) -> bytes:
    """A tensor more, which header and manifest both name."""
    header, body = header_of(data)
    hashes = json.loads(header["__metadata__"][METADATA])["sha256"]
    header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [len(body), len(body) + 4]}
    return changed_manifest(
        with_header(header, body + b"more"), sha256={**hashes, name: hashlib.sha256(b"more").hexdigest()}
    )


def changed_reference(data: bytes, **changes: Any) -> bytes:
    """The second reference of the manifest."""
    references = json.loads(header_of(data)[0]["__metadata__"][METADATA])["references"]
    return changed_manifest(data, references=[references[0], {**references[1], **changes}])


def one_hash_that_is_no_text(data: bytes) -> bytes:
    hashes = json.loads(header_of(data)[0]["__metadata__"][METADATA])["sha256"]
    return changed_manifest(data, sha256={**hashes, "0.k_ref_10": 5})


def with_manifest(text: str) -> bytes:
    """A file of a manifest alone, with its hash."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return with_header({"__metadata__": {METADATA: text, "manifest_sha256": digest}}, b"")


def a_shifted_border(header: dict[str, Any]) -> None:
    """Four bytes of a tensor are said to be its neighbour's."""
    first, second = sorted((e for n, e in header.items() if n[0] != "_"), key=lambda entry: entry["data_offsets"])[:2]
    first["data_offsets"][1] -= 4
    second["data_offsets"][0] -= 4


def changed_header(data: bytes, change: Any) -> bytes:
    header, body = header_of(data)
    change(header)
    return with_header(header, body)


ATTACKS: dict[str, tuple[Any, str]] = {
    "empty": (lambda d: b"", "0 bytes"),
    "cut in the length": (lambda d: d[:5], "5 bytes"),
    "cut at the end of the length": (lambda d: d[:7], "it has 7 bytes"),
    "cut at the header": (lambda d: d[:8], r"its header would have \d+ bytes of the file's 8"),
    "a header over the end": (lambda d: (len(d) - 7).to_bytes(8, "little") + d[8:], "its header would have"),
    "cut in the header": (lambda d: d[:200], "its header would have"),
    "cut in the keys": (lambda d: d[:-10], r"it has \d+ bytes, expected \d+"),
    "longer": (lambda d: d + b"x", r"it has \d+ bytes, expected \d+"),
    "a huge header": (lambda d: (2**60).to_bytes(8, "little") + d[8:], f"its header would have {2**60} bytes"),
    "no JSON": (lambda d: d[:8] + b"[" + d[9:], "no JSON"),
    "a deep header": (lambda d: (100_000).to_bytes(8, "little") + b"[" * 100_000, "no JSON"),
    "a list": (lambda d: with_header([], b""), r"has no metadata\. Copy"),  # type: ignore[arg-type]
    "no kept concept": (lambda d: with_header({"__metadata__": {}}, b""), "holds no kept concept"),
    "a changed manifest": (lambda d: d.replace(b"red hat", b"bad hat", 1), r"its manifest was changed\. Copy"),
    "half a letter": (lambda d: with_manifest("\ud800"), "its manifest is no JSON"),
    "a manifest that ends too soon": (lambda d: with_manifest("{"), "its manifest is no JSON"),
    "a changed key": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), r"SHA-256 of 1\.v_ref_13"),
    "another version": (lambda d: changed_manifest(d, format=2), "format version 2, expected 1"),
    "a true version": (lambda d: changed_manifest(d, format=True), "format version True, expected 1"),
    "no origin": (lambda d: changed_manifest(d, origin={}), "origin is an object of 0, expected an object with"),
    "no schedule": (lambda d: changed_origin(d, scheduler=5), "scheduler is 5"),
    "a bottomless schedule": (lambda d: changed_origin(d, scheduler={"beta_end": float("nan")}), "scheduler is"),
    "no steps": (lambda d: changed_origin(d, timesteps=[]), "timesteps is empty"),
    "half a step": (lambda d: changed_origin(d, timesteps=[1, 2.5, 3]), "timesteps is 2.5"),
    "a flat layer": (lambda d: changed_origin(d, layers=[[10, 2]]), "layers is"),
    "a layer of no width": (lambda d: changed_origin(d, layers=[[10, 2, 0]]), "a width of 0"),
    "a dtype of its own": (lambda d: changed_origin(d, dtype="int4"), "dtype is 'int4'"),
    "a negative seed": (lambda d: changed_origin(d, reference_seed=-1), "reference_seed is -1"),
    "a hash that is no text": (
        lambda d: changed_manifest(d, sha256={"0.k_ref_10": 5}),
        r"sha256 is no object of texts\)\. Copy",
    ),
    "one hash that is no text": (one_hash_that_is_no_text, "sha256 is no object of texts"),
    "an endless weight": (lambda d: changed_manifest(d, weight=float("inf")), "weight"),
    "a weight of many digits": (lambda d: changed_manifest(d, weight=10**400), "expected form"),
    "no name": (lambda d: changed_manifest(d, name=None), "name is None"),
    "a stowaway": (with_a_stowaway, "'more' is none of a kept concept's"),
    "an image of a shape in words": (lambda d: with_a_stowaway(d, "image_0", ["two", 2, 3]), "shape is 'two'"),
    "endless offsets": (
        lambda d: changed_header(d, lambda h: h["0.k_ref_10"].update(data_offsets=[0, float("inf")])),
        "data_offsets is inf",
    ),
    "no references": (lambda d: changed_manifest(d, references=[]), "no reference"),
    "odd references": (lambda d: changed_manifest(d, references=[{"tokens": {"1": -1, "2": 3}}]), "KeyError|tokens"),
    "another storage": (lambda d: changed_reference(d, storage="4-bit"), "reference 1 has .*, storage '4-bit'"),
    "a grid too few": (lambda d: changed_reference(d, tokens={"1": 8}), "reference 1 has tokens an object of 1"),
    "less than no tokens": (lambda d: changed_reference(d, tokens={"1": 8, "2": -1}), "tokens is -1"),
    "less than no error": (lambda d: changed_reference(d, error=-1), "error is -1"),
    "an odd weight": (lambda d: changed_manifest(d, weight="heavy"), "weight"),
    "other tensors": (lambda d: changed_header(d, lambda h: h.pop("0.k_ref_10")), r"name different tensors\. Copy"),
    "a shifted border": (lambda d: changed_header(d, a_shifted_border), r"0\.\w_ref_\d+ has \d+ bytes"),
    "a shape in words": (
        lambda d: changed_header(d, lambda h: h["0.k_ref_10"].update(shape=["three", 3, 24])),
        "shape is 'three', expected a whole number",
    ),
    "a hole": (
        lambda d: changed_header(d, lambda h: h["0.k_ref_10"].update(data_offsets=[4, 100])),
        "lies at bytes 4 to 100, expected from 0",
    ),
    "another shape": (
        lambda d: changed_header(d, lambda h: h["0.k_ref_10"].update(shape=[STEPS, 24, 3])),
        r"0\.k_ref_10 is F32\[3, 24, 3\], expected F32\[3, 3, 24\]",
    ),
    "another dtype": (lambda d: changed_header(d, lambda h: h["0.k_ref_10"].update(dtype="I32")), "I32"),
    "no offsets": (lambda d: changed_header(d, lambda h: h["0.k_ref_10"].pop("data_offsets")), "expected form"),
    "a pickle": (lambda d: b"\x80\x04\x95" + d, "its header would have"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_file_is_refused_with_the_reason(path: Path, attack: str) -> None:
    spoil, reason = ATTACKS[attack]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(MagicFaceError, match=reason):
        KeptConcept.load(path)


def test_a_file_that_cannot_be_read_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np, "memmap", failing)
    with pytest.raises(KeptConceptError, match=r"cap\.concept' cannot be read: .*Input/output error"):
        KeptConcept.load(path)


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("at_once", [1, 1 << 24], ids=["a step at a time", "all steps together"])
def test_keys_that_are_no_numbers_are_found_by_the_full_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, step: int
) -> None:
    monkeypatch.setattr("magicface_rt.kept.files._AT_ONCE", at_once)
    kept = made()
    array = kept.references[1].tensors["v_ref_13"].arrays[""]
    array.setflags(write=True)
    array[step, 1, 3] = np.nan
    path = kept.save(tmp_path / "cap.concept")
    with pytest.raises(KeptConceptError, match=r"1\.v_ref_13 holds 1 values that are NaN or infinite"):
        KeptConcept.load(path)
    assert np.isnan(KeptConcept.load(path, check_hashes=False).references[1].tensors["v_ref_13"].step(step)[1, 3])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none.concept"):
        with pytest.raises(KeptConceptError, match="does not exist or is not a file"):
            KeptConcept.load(place)


def test_without_the_full_check_only_changed_keys_go_unseen(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    KeptConcept.load(path, check_hashes=False)
    path.write_bytes(data[:-1])
    with pytest.raises(KeptConceptError, match="bytes, expected"):
        KeptConcept.load(path, check_hashes=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_single_changed_byte_goes_unseen(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("byte") / "cap.concept"
    whole = bytearray(made().save(path).read_bytes())
    length = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.one_of(st.integers(0, length - 1), st.integers(length, len(whole) - 1)))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != whole[at]))
    blank = bytes(whole[at : at + 1]) in (b" ", b",", b":") or chr(value) in " \t\r\n"
    whole[at] = value
    path.write_bytes(bytes(whole))
    try:
        loaded = KeptConcept.load(path)
    except MagicFaceError:
        return
    # Blanks between the header's words, and nothing else, may be changed into other blanks.
    assert blank
    assert loaded.to_dict() == made().to_dict()


DEEP = "@deep@"
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 2**63, 2**64, 10**400, -(10**400), DEEP, "", "1", "\ud800", [], {}])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value, at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*at, key)
        yield from places(entry, (*at, key))


def with_value(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(tree)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return changed


@settings(max_examples=400, deadline=None)
@given(data=st.data(), depth=st.sampled_from([50, 900, 5000]), check_hashes=st.booleans())
@pytest.mark.parametrize("storage", ["exact", "8-bit"])
def test_a_value_of_another_kind_is_refused_or_does_no_harm(
    data: st.DataObject, depth: int, check_hashes: bool, storage: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One value of the header or of the manifest is replaced by someone who knows the format."""
    path = tmp_path_factory.mktemp("value") / "cap.concept"
    header, body = header_of(made(storage=storage).save(path).read_bytes())
    manifest = json.loads(header["__metadata__"][METADATA])
    # Few of the many hashes and tensors: they are all alike.
    in_manifest = [at for at in places(manifest) if at[0] != "sha256" or len(at) == 1 or at[1].startswith("0.k_ref_13")]
    in_header = [at for at in places(header) if at[0].startswith(("__", "1.v_ref_13"))]
    of_manifest = data.draw(st.booleans())
    at, value = data.draw(st.sampled_from(in_manifest if of_manifest else in_header)), data.draw(values)

    def as_json(tree: Any) -> str:
        return json.dumps(tree).replace(json.dumps(DEEP), "[" * depth + "]" * depth)

    if of_manifest:
        text = as_json(with_value(manifest, at, value))
        header["__metadata__"] = {METADATA: text, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
        text = json.dumps(header)
    else:
        text = as_json(with_value(header, at, value))
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + body)
    try:
        loaded = KeptConcept.load(path, check_hashes=check_hashes)
        loaded.origin.check(origin(), loaded.name)
    except KeptConceptError:
        return
    again = KeptConcept.load(loaded.save(path.with_name("again.concept")))
    assert again.to_dict() == loaded.to_dict()
    for reference in again.references:
        assert {stored.step(STEPS - 1).dtype for stored in reference.tensors.values()} == {np.dtype(np.float32)}


# -------------------------------------------------------------------------------------------------------------- 8 bits


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 40),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
def test_eight_bits_are_off_by_half_a_level_of_their_channel(seed: int, tokens: int, dtype: str, spread: float) -> None:
    rng = np.random.default_rng(seed)
    exact = (rng.standard_normal((tokens, 6)) * spread + rng.standard_normal(6) * 5).astype(np.float32)
    given_ = to_bfloat16(exact) if dtype == "bfloat16" else exact.astype(dtype)
    exact = from_bfloat16(given_) if dtype == "bfloat16" else given_.astype(np.float32)
    stored = EightBit.empty(1, tokens, 6, dtype)
    stored.put(0, given_)
    found = stored.step(0)
    assert (found.dtype, found.shape) == (given_.dtype, given_.shape)
    if not tokens:
        return
    values = from_bfloat16(found) if dtype == "bfloat16" else found.astype(np.float32)
    rounding = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    level = (exact.max(axis=0) - exact.min(axis=0)) / 255
    assert (np.abs(values - exact) <= 0.51 * level + rounding * np.abs(exact).max(axis=0) + 1e-7).all()


def test_eight_bits_take_half_of_sixteen() -> None:
    exact, small = made("float16", tokens=(400, 300)), made("float16", "8-bit", tokens=(400, 300))
    assert small.nbytes < 0.55 * exact.nbytes


def wanted(found: KeptConcept, **changes: Any) -> dict[str, Any]:
    """The arguments of `difference` that a file agrees with, except for the changes."""
    concept = {name: getattr(found, name) for name in ("word", "name", "weight", "token_index")}
    concept["references"] = [SimpleNamespace(prompt=one.prompt) for one in found.references]
    more: dict[str, Any] = {
        "origin": found.origin,
        "keys": [one.key for one in found.references],
        "storage": "exact",
        "note": found.note,
        "with_image": False,
    }
    concept.update({name: value for name, value in changes.items() if name in concept})
    more.update({name: value for name, value in changes.items() if name in more})
    assert set(changes) <= {*concept, *more}
    return {"concept": SimpleNamespace(**concept), **more}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"origin": replace(origin(), bundle_hash="c" * 64)}, "its bundle is 'bbbb.*, expected 'cccc.*"),
        ({"origin": replace(origin(), timesteps=(5,))}, f"its number of steps is {STEPS}, expected 1"),
        ({"origin": replace(origin(), reference_seed=6)}, "its reference_seed is 5, expected 6"),
        (
            {"origin": replace(origin(), scheduler={"x": 1})},
            "its schedule is an object of .*, expected an object of .*",
        ),
        ({"word": "hat"}, "its word is 'red hat', expected 'hat'"),
        ({"name": "hat"}, "its name is 'cap', expected 'hat'"),
        ({"weight": 1.0}, r"its weight is 2\.5, expected 1\.0"),
        ({"token_index": [3]}, "its token_index is .*, expected .*"),
        ({"note": "asked"}, "its note is None, expected 'asked'"),
        ({"references": []}, "its number of references is 2, expected 0"),
        ({"storage": "8-bit"}, "its storage is 'exact', expected '8-bit'"),
        (
            {"references": [SimpleNamespace(prompt="view 0"), SimpleNamespace(prompt="a cap")]},
            "the prompt of its reference 2 is 'view 1', expected 'a cap'",
        ),
        ({"keys": ["another", "key 1"]}, "its reference 1 was made from another image or mask"),
        ({"with_image": True}, "it holds no images, and they are to be stored"),
    ],
)
def test_in_what_a_file_differs_from_the_one_that_would_be_written(changes: dict[str, Any], said: str) -> None:
    found = made()
    assert re.fullmatch(said, difference(found, **wanted(found, **changes)))


def test_images_in_a_file_are_those_that_would_be_written() -> None:
    few, mask = made(), np.ones((8, 8), bool)
    nine, eight = (Reference(np.full((8, 8, 3), grey, np.uint8), mask=mask, prompt="view 0") for grey in (9, 8))
    loaded = load_reference(nine, name="hat")
    pictures = {"image_0": np.asarray(loaded.image), "mask_0": loaded.mask_grid}

    def said(held: dict[str, Any], reference: Reference, *, with_image: bool) -> str:
        found = KeptConcept("hat", [few.references[0]], few.origin, pictures=held)
        return difference(found, **wanted(found, references=[reference], with_image=with_image))

    assert said(pictures, nine, with_image=True) == ""
    assert said(pictures, nine, with_image=False) == "it holds its images, and none are to be stored"
    assert said(pictures, eight, with_image=True) == "the images in it are others"
    assert said({"image_0": pictures["image_0"]}, nine, with_image=True) == "the images in it are others"


def test_a_file_of_more_references_than_any_bundle_takes_is_refused(path: Path) -> None:
    assert MAX_REFERENCES == 64
    few = made()
    for count in (64, 65):
        many = KeptConcept("hat", [few.references[0]] * count, few.origin)
        many.save(path, overwrite=True)
        if count == 64:
            assert len(KeptConcept.load(path).references) == 64
        else:
            with pytest.raises(KeptConceptError, match="there are 65 references, expected at most 64"):
                KeptConcept.load(path)
