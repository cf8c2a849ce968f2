from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import results
from magicface_rt.concept import Concept, Reference
from magicface_rt.errors import OptionError, OutputError
from magicface_rt.files import atomic_files
from magicface_rt.options import Options
from magicface_rt.provenance import read_provenance, software
from magicface_rt.results import Result, Timings

ARRAY = np.full((4, 5, 3), 9, np.uint8)
FILES = ["image-0.png", "image-1.png", "regions-0.png", "regions-1.png", "regions.npz", "run.json"]


def result(**changes: Any) -> Result:
    regions = np.zeros((2, 4, 4), np.int64)
    regions[0, 1:3, 1:3] = 2
    fields: dict[str, Any] = {
        "images": [Image.new("RGB", (64, 64), (k, 0, 0)) for k in range(2)],
        "regions": regions,
        "latents": np.zeros((2, 4, 8, 8), np.float32),
        "prompt": "a man with a hat",
        "concepts": [
            Concept("man", Reference("/secret/man.jpg", mask="/secret/mask.png", prompt="a man"), weight=2.5),
            Concept("hat", Reference(ARRAY, mask=ARRAY[..., 0]), name="Hüt"),
        ],
        "token_indices": [(2,), (5,)],
        "options": Options(seed=7, images=2),
        "timings": Timings(denoising=1.5, total=2.0, steps=(0.5, 1.0)),
        "bundle_hash": "abc123",
        "backend": "onnxruntime (CPUExecutionProvider)",
        "details": {"size": [64, 64]},
    }
    return Result(**{**fields, **changes})


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_result_is_saved_whole(tmp_path: Path) -> None:
    folder = result().save(tmp_path / "new" / "out")
    assert listing(folder) == FILES
    assert listing(tmp_path / "new") == ["out"]
    with Image.open(folder / "image-1.png") as image:
        assert image.getpixel((0, 0)) == (1, 0, 0)
    arrays = np.load(folder / "regions.npz")
    np.testing.assert_array_equal(arrays["regions"], result().regions)
    assert arrays["regions"].dtype == np.int64
    assert arrays["concept_names"].tolist() == ["man", "Hüt"]


def test_run_json_has_every_setting(tmp_path: Path) -> None:
    run = json.loads((result().save(tmp_path / "out") / "run.json").read_text(encoding="utf-8"))
    assert run["prompt"] == "a man with a hat"
    assert run["options"] == {**Options(seed=7, images=2).to_dict(), "effective_ca_scale": 0.6}
    assert run["timings"]["steps"] == [0.5, 1.0]
    assert run["timings"]["denoising"] == 1.5
    assert (run["bundle_hash"], run["backend"], run["software"]) == ("abc123", result().backend, software())
    man, hat = run["concepts"]
    assert (man["name"], man["word"], man["weight"], man["tokens"]) == ("man", "man", 2.5, [2])
    assert man["references"] == [
        {
            "image": "/secret/man.jpg",
            "mask": "/secret/mask.png",
            "prompt": "a man",
            "mask_threshold": 128,
            "resample": "lanczos",
        }
    ]
    assert hat["references"][0]["image"]["shape"] == [4, 5, 3]
    assert len(hat["references"][0]["image"]["sha256"]) == 64
    assert run["details"] == {"size": [64, 64]}
    assert run["images"] == ["image-0.png", "image-1.png"]


def test_saved_pictures_say_how_they_were_made_but_not_from_which_files(tmp_path: Path) -> None:
    folder = result().save(tmp_path / "out")
    for name in ("image-1.png", "regions-1.png"):
        found = read_provenance(folder / name)
        assert found is not None
        assert found["image_index"] == 1
        assert found["bundle_hash"] == "abc123"
        assert found["options"]["seed"] == 7
        assert found["concepts"][0]["reference_prompts"] == ["a man"]
        assert b"secret" not in (folder / name).read_bytes()


def test_pictures_saved_by_hand_say_it_too(tmp_path: Path) -> None:
    result().images[0].save(tmp_path / "out.png")
    found = read_provenance(tmp_path / "out.png")
    assert found is not None
    assert found["prompt"] == "a man with a hat"


def test_provenance_can_be_switched_off(tmp_path: Path) -> None:
    folder = result(provenance=False).save(tmp_path / "out")
    for name in ("image-0.png", "regions-0.png"):
        assert read_provenance(folder / name) is None
        assert b"trainedAlgorithmicMedia" not in (folder / name).read_bytes()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"out' exists\. Choose another"):
        result().save(tmp_path / "out")
    assert listing(tmp_path / "out") == []
    assert listing(tmp_path) == ["out"]


def test_an_existing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not a folder"):
            result().save(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_overwriting_replaces_an_earlier_result(tmp_path: Path) -> None:
    result().save(tmp_path / "out")
    one = result(
        images=[Image.new("RGB", (64, 64))], regions=np.zeros((1, 4, 4), np.int64), latents=np.zeros((1, 4, 8, 8))
    )
    one.save(tmp_path / "out", overwrite=True)
    assert listing(tmp_path / "out") == ["image-0.png", "regions-0.png", "regions.npz", "run.json"]
    assert listing(tmp_path) == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_portraits_that_were_private_stay_so(tmp_path: Path) -> None:
    one = result(
        images=[Image.new("RGB", (64, 64))], regions=np.zeros((1, 4, 4), np.int64), latents=np.zeros((1, 4, 8, 8))
    )
    umask = os.umask(0o022)
    try:
        folder = one.save(tmp_path / "out")
        for path in folder.glob("*.png"):
            path.chmod(0o600)
        result().save(folder, overwrite=True)
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o755
    pictures = dict.fromkeys(FILES[:4], 0o600)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        **pictures,
        "regions.npz": 0o644,
        "run.json": 0o644,
    }


def test_overwriting_never_removes_other_files(tmp_path: Path) -> None:
    folder = result().save(tmp_path / "out")
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"'thesis.txt'"):
        result().save(folder, overwrite=True)
    assert listing(folder) == sorted([*FILES, "thesis.txt"])


def _photographs(folder: Path) -> None:
    folder.mkdir()
    for k in range(2):
        Image.new("RGB", (9, 9)).save(folder / f"image-{k}.png")


def _says(text: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        _photographs(folder)
        (folder / "run.json").write_text(text)

    return put


def _another_image(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(result().save(folder) / "image-2.png")


def _folder_of_that_name(folder: Path) -> None:
    (result().save(folder) / "image-1.png").unlink()
    (folder / "image-1.png").mkdir()
    (folder / "image-1.png" / "thesis.txt").write_text("mine")


def _link_of_that_name(folder: Path) -> None:
    (result().save(folder) / "run.json").rename(folder.parent / "elsewhere.json")
    (folder / "run.json").symlink_to("../elsewhere.json")


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (_photographs, "it holds 'image-0.png' and 1 more, but no run.json, by which a result is known"),
        (_says("mine"), "its run.json, by which a result is known, cannot be read"),
        (_says("[]"), "its run.json is no result's"),
        (_says('{"images": ["image-0.png", "image-1.png"]}'), "its run.json is no result's"),
        (_says('{"software": "magicface_rtx 1", "images": ["image-0.png", "image-1.png"]}'), "is no result's"),
        (_says(json.dumps({"software": software(), "images": ["image-0.png", "b.png"]})), "names other images than"),
        (_another_image, "it holds 'image-2.png', which is none of the 2 images that its run.json names"),
        (_folder_of_that_name, "it holds 'image-1.png', which is no plain file"),
        (_link_of_that_name, "it holds 'run.json', which is no plain file"),
    ],
)
def test_files_that_are_only_named_as_a_results_are_not_replaced(
    tmp_path: Path, put: Callable[[Path], None], says: str
) -> None:
    put(tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as refused:
        result().save(tmp_path / "out", overwrite=True)
    for part in (str(tmp_path / "out"), "is not replaced", says, "Choose another folder"):
        assert part in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_empty_folder_and_a_result_that_lacks_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = result().save(tmp_path / "out", overwrite=True)
    for name in ("image-1.png", "regions.npz"):
        (folder / name).unlink()
    result().save(folder, overwrite=True)
    assert listing(folder) == FILES


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("moment", ["while it is written", "as it is replaced"])
def test_files_that_appear_meanwhile_are_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, moment: str
) -> None:
    folder = result().save(tmp_path / "out")
    before = (folder / "run.json").read_bytes()
    real = {"encode_png": results.encode_png, "exchange": atomic_files.exchange, "rename": Path.rename}

    def appears(name: str, *arguments: Any) -> Any:
        if (folder / "run.json").exists() and not (folder / "thesis.txt").exists():
            (folder / "thesis.txt").write_text("mine")
        return real[name](*arguments)

    if moment == "while it is written":
        monkeypatch.setattr(results, "encode_png", lambda *arguments: appears("encode_png", *arguments))
    elif exchange:
        monkeypatch.setattr(atomic_files, "exchange", lambda *arguments: appears("exchange", *arguments))
    if not exchange:
        monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
        if moment == "as it is replaced":
            monkeypatch.setattr(Path, "rename", lambda *arguments: appears("rename", *arguments))
    with pytest.raises(OutputError, match=r"out' is not replaced: it holds 'thesis.txt', which no result writes"):
        result(prompt="another").save(folder, overwrite=True)
    assert listing(tmp_path) == ["out"]
    assert listing(folder) == sorted([*FILES, "thesis.txt"])
    assert (folder / "run.json").read_bytes() == before


def test_a_folder_that_appears_meanwhile_is_refused_as_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = results.encode_png

    def slow(image: Image.Image) -> bytes:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "run.json").write_text("somebody's")
        return png(image)

    monkeypatch.setattr(results, "encode_png", slow)
    with pytest.raises(OutputError, match=r"out' exists. Choose another, or allow overwriting"):
        result().save(tmp_path / "out")
    assert (tmp_path / "out" / "run.json").read_text() == "somebody's"
    assert listing(tmp_path) == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OutputError, match="No space left"):
        result().save(tmp_path / "out")
    assert listing(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind_and_the_earlier_result_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = result().save(tmp_path / "out")
    before = (folder / "run.json").read_bytes()

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result().save(folder, overwrite=True)
    assert listing(tmp_path) == ["out"]
    assert (folder / "run.json").read_bytes() == before


def test_a_failed_exchange_brings_the_earlier_result_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = result().save(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("exchange failed")
        return rename(self, target)

    monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)  # a system that cannot
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="exchange failed"):
        result().save(folder, overwrite=True)
    assert listing(tmp_path) == ["out"]
    assert listing(folder) == FILES


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    result().save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert result().save(tmp_path / "link", overwrite=True) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_that_leads_nowhere_is_filled_and_one_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("deep/out")
    assert result().save(tmp_path / "dangling") == tmp_path / "deep" / "out"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match=r"loop' cannot be written: .*symbolic links"):
        result().save(tmp_path / "loop", overwrite=True)


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = result().save(tmp_path / "out")
    monkeypatch.chdir(folder)
    for name in (".", folder):
        with pytest.raises(OutputError, match="is the working directory, which is not replaced"):
            result().save(name, overwrite=True)
    assert listing(Path()) == FILES


@pytest.mark.skipif(os.name != "posix", reason="a working directory may be removed")
def test_a_working_directory_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OutputError, match="'out' cannot be written"):
        result().save("out")
    result().save(tmp_path / "out")
    result().save(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_result_that_came_from_another_process_is_saved_as_it_was(
    tmp_path: Path, copied: Callable[[Result], Result]
) -> None:
    again = copied(result()).save(tmp_path / "again")
    assert listing(again) == FILES
    assert json.loads((again / "run.json").read_text())["concepts"] == result().to_dict()["concepts"]
    (first, second) = (read_provenance(again / name) for name in ("image-1.png", "regions-1.png"))
    assert first == second == read_provenance(result().save(tmp_path / "out") / "image-1.png")
    with Image.open(again / "image-1.png") as image:
        assert image.getpixel((0, 0)) == (1, 0, 0)


def test_references_are_described_as_they_were_when_the_result_was_made(tmp_path: Path) -> None:
    values, image = ARRAY.copy(), Image.fromarray(ARRAY)
    made = result(concepts=[Concept("man", Reference(values, mask=image)), Concept("hat", Reference("hat.png"))])
    before = made.to_dict()["concepts"]
    values[:] = 0
    image.close()
    assert made.to_dict()["concepts"] == before
    assert json.loads((made.save(tmp_path / "out") / "run.json").read_text())["concepts"] == before


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        result().save(tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(OutputError, match="No file can have this name"):
        result().save(name)


@pytest.mark.skipif(os.name != "posix", reason="names have 255 bytes")
@pytest.mark.parametrize("name", ["n" * 217, "n" * 255, "\u00fc" * 127])
def test_the_longest_names_are_saved(tmp_path: Path, name: str) -> None:
    for overwrite in (False, True):
        assert listing(result().save(tmp_path / name, overwrite=overwrite)) == FILES
    assert listing(tmp_path) == [name]


def test_names_that_are_no_unicode_are_saved(tmp_path: Path) -> None:
    concepts = [Concept("man", Reference(ARRAY), name="m\udc80n"), Concept("hat", Reference(ARRAY))]
    folder = result(concepts=concepts).save(tmp_path / "out")
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["concepts"][0]["name"] == "m\udc80n"


def test_the_overlay_has_a_legend() -> None:
    assert result().overlay(0).height > result().overlay(0).width


def test_tokens_default_to_those_that_were_given() -> None:
    concepts = [Concept("man", Reference(ARRAY), token_index=3), Concept("hat", Reference(ARRAY))]
    run = result(concepts=concepts, token_indices=()).to_dict()
    assert [concept["tokens"] for concept in run["concepts"]] == [[3], []]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": []}, "0 images"),
        ({"regions": np.zeros((4, 4), np.int64)}, r"found \[4, 4\]"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, r"\[1, 4, 8, 8\]"),
        ({"regions": np.full((2, 4, 4), 3, np.int64)}, r"outside 0\.\.2"),
        ({"regions": np.full((2, 4, 4), -1, np.int64)}, r"outside 0\.\.2"),
        ({"token_indices": [(2,)]}, "1 entries for 2 concepts"),
        ({"references": [[{}]]}, "as many entries"),
    ],
)
def test_parts_that_do_not_fit_one_another_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        result(**changes)


def test_only_files_of_a_result_count_as_its_own() -> None:
    assert all(results._OWN_FILES.fullmatch(name) for name in FILES)
    assert not any(results._OWN_FILES.fullmatch(name) for name in ("image-0.png.bak", "image-a.png", "run.json5", "a"))
