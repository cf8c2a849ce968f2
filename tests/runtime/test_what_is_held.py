"""What of a person a kept concept's file, a result's folder and a picture hold, and what they do not: docs/privacy.md.

Made by the commands from photographs in files, in a block that allows no connection, with every file that is opened to
write noted.
"""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from connections import Connections
from PIL import Image, ImageDraw
from safetensors import safe_open
from writes import Writes

from magicface_rt import KeptConcept
from magicface_rt.bundle import Bundle
from magicface_rt.cli import main
from magicface_rt.images import layer_mask, load_image, load_mask
from magicface_rt.kept.files import METADATA
from magicface_rt.provenance import read_provenance

NOTE = "agreed by the person shown"
STEPS = 2


@dataclass(frozen=True)
class Made:
    """`folder` holds the photographs man.png and hat.png, with a mask each, the concept of the first and the result."""

    folder: Path
    bundle: Bundle
    written: list[Path]

    @property
    def concept(self) -> Path:
        return self.folder / "kept" / "man.concept"

    @property
    def out(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def made(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("of-somebody")
    concepts = []
    for number, word in enumerate(("man", "hat")):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{word}.png")
        mask = Image.new("L", (64, 64))
        ImageDraw.Draw(mask).ellipse((9, 5, 50 - 5 * number, 60), fill=255)
        mask.save(folder / f"mask-of-{word}.png")
        image, mask_file = folder / f"{word}.png", folder / f"mask-of-{word}.png"
        concepts.append(f"word={word},image={image},mask={mask_file},prompt=a tall {word}")
    bundle, writes = str(tiny_bundle), Writes()
    threads = ["--threads", "1"]
    main(["inspect", bundle])  # what is loaded late is loaded now
    with Connections().forbidden(), writes.noted() as written:
        kept = ["--steps", str(STEPS), "--note", NOTE, "--out", str(folder / "kept")]
        assert main(["prepare", bundle, "--concept", concepts[0], *kept, *threads]) == 0
        asked = ["--prompt", "a man with a hat", "--kept", str(folder / "kept" / "man.concept")]
        asked += ["--concept", concepts[1], "--out", str(folder / "out"), "--images", "2"]
        assert main(["run", bundle, *asked, *threads]) == 0
        assert main(["inspect", str(folder / "kept" / "man.concept")]) == 0
    return Made(folder, Bundle.open(tiny_bundle, check_hashes=False), written)


def traces(made: Made, word: str) -> Iterator[bytes]:
    """What a file would hold if it held a photograph or its mask: the files, or any row of pixels in some form."""
    for name in (f"{word}.png", f"mask-of-{word}.png"):
        yield (made.folder / name).read_bytes()[64:256]
    image = load_image(made.folder / f"{word}.png", name="x")
    mask = load_mask(made.folder / f"mask-of-{word}.png", image_size=None, name="x")
    large = image.resize((made.bundle.width, made.bundle.height), Image.Resampling.LANCZOS)
    for pixels in (np.asarray(image), np.asarray(large)):
        for row in pixels[::7]:
            yield row.tobytes()
            yield row[:, 0].tobytes()
            yield (row[:, 0] / np.float32(127.5) - 1).astype(np.float32).tobytes()
    row = np.asarray(mask)[32]
    assert row.any()
    assert not row.all()
    yield row.astype(np.uint8).tobytes()
    yield (row * np.uint8(255)).tobytes()


def names_of_files(made: Made, word: str) -> list[bytes]:
    return [name.encode() for name in (made.folder.name, f"{word}.png", f"mask-of-{word}")]


def test_preparing_and_drawing_open_no_connection(made: Made) -> None:
    """They have done so already, where one would have failed: here is shown that it does."""
    guard = Connections()
    with guard.forbidden(), pytest.raises(AssertionError, match=r"socket\.__new__"):
        socket.socket()
    with guard.forbidden(), pytest.raises(AssertionError, match=r"socket\.getaddrinfo"):
        socket.getaddrinfo("localhost", 80)
    assert (made.out / "run.json").is_file()


def test_preparing_and_drawing_write_only_where_they_were_told(made: Made) -> None:
    assert {path.name for path in made.folder.iterdir()} == {
        "man.png", "hat.png", "mask-of-man.png", "mask-of-hat.png", "kept", "out"
    }  # fmt: skip
    elsewhere = [path for path in made.written if not path.is_relative_to(made.folder) and path != Path("/dev/null")]
    assert made.written
    assert not elsewhere


def test_a_concepts_file_holds_keys_and_what_was_said_and_no_photograph(made: Made) -> None:
    with safe_open(made.concept, "np") as opened:
        names, manifest = set(opened.keys()), json.loads(opened.metadata()[METADATA])
    layers = made.bundle.injection_layers
    assert names == {f"0.{kind}_ref_{layer.index}" for layer in layers for kind in "kv"}
    assert manifest.keys() == {
        "format", "word", "name", "weight", "token_index", "references", "origin", "note", "sha256"
    }  # fmt: skip
    (reference,) = manifest["references"]
    assert reference.keys() == {"key", "prompt", "storage", "tokens", "error"}
    assert (manifest["note"], manifest["word"], reference["prompt"]) == (NOTE, "man", "a tall man")
    mask = load_mask(made.folder / "mask-of-man.png", image_size=(64, 64), name="x")
    for factor in made.bundle.factors:
        assert reference["tokens"][str(factor)] == layer_mask(mask, *made.bundle.grid(factor)).sum()
    for stored in KeptConcept.load(made.concept).references[0].tensors.values():
        assert len(stored.arrays[""]) == STEPS
    content = made.concept.read_bytes()
    assert b"a tall man" in content
    assert not [trace for trace in (*traces(made, "man"), *names_of_files(made, "man")) if trace in content]


def test_a_results_folder_holds_what_was_asked_for_and_no_photograph(made: Made) -> None:
    assert {path.name for path in made.out.iterdir()} == {
        "image-0.png", "image-1.png", "regions-0.png", "regions-1.png", "regions.npz", "run.json"
    }  # fmt: skip
    run = json.loads((made.out / "run.json").read_text(encoding="utf-8"))
    assert run.keys() == {
        "software", "bundle_hash", "backend", "prompt", "options", "created", "concepts", "timings", "images", "size",
        "details",
    }  # fmt: skip
    hat, man = run["concepts"]
    assert (run["prompt"], man["word"], hat["word"]) == ("a man with a hat", "man", "hat")
    assert man["references"][0].keys() == {"kept", "prompt", "storage"}  # the first a hash of what it was made from
    assert hat["references"][0]["image"] == str(made.folder / "hat.png")
    assert hat["references"][0]["prompt"] == "a tall hat"
    with np.load(made.out / "regions.npz") as arrays:
        assert set(arrays.files) == {"regions", "concept_names"}
    for path in made.out.iterdir():
        content = path.read_bytes()
        if path.suffix == ".png":
            with Image.open(path) as picture:
                content += picture.tobytes()
        for word in ("man", "hat"):
            assert not [trace for trace in traces(made, word) if trace in content], path


def test_a_pictures_file_says_what_was_asked_for_and_names_no_file(made: Made) -> None:
    path = made.out / "image-1.png"
    found = read_provenance(path)
    assert found is not None
    assert found.keys() == {
        "software", "bundle_hash", "backend", "prompt", "options", "concepts", "image_index"
    }  # fmt: skip
    assert [concept["reference_prompts"] for concept in found["concepts"]] == [["a tall hat"], ["a tall man"]]
    content = path.read_bytes()
    assert b"trainedAlgorithmicMedia" in content
    assert not [name for word in ("man", "hat") for name in names_of_files(made, word) if name in content]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at what is mapped")
def test_a_file_that_was_removed_is_held_until_it_is_let_go_of(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "gone.concept"
    path.write_bytes(made.concept.read_bytes())

    def mapped() -> bool:
        gc.collect()
        return "gone.concept" in Path("/proc/self/maps").read_text()

    loaded = KeptConcept.load(path)
    path.unlink()
    assert mapped()
    assert np.isfinite(loaded.references[0].tensors["k_ref_10"].step(1)).all()
    del loaded
    assert not mapped()
