"""Bundles: manifests that lie, files that are not what they are called, weights that are no numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_outline import opened
from corruptions import NAMES, PLACES, edits_of, places, texts_of, with_key_twice
from outcomes import MANY, QUICK, inputs, judged, loop

from magicface_rt import Bundle, BundleError, NonFiniteError, Session
from magicface_rt.backends.onnxruntime import OnnxRuntime
from magicface_rt.bundle import MANIFEST, MAX_MANIFEST_BYTES, WEIGHTS, sha256
from magicface_rt.errors import BackendError
from magicface_rt.session import tokenizer_of

SMALL = "text_encoder.onnxruntime.onnx"


def linked(bundle: Path, folder: Path) -> Path:
    """A bundle of the same files, whose manifest may be changed."""
    folder.mkdir()
    for file in bundle.iterdir():
        if file.name != MANIFEST:
            (folder / file.name).hardlink_to(file)
    shutil.copy(bundle / MANIFEST, folder)
    return folder


@pytest.fixture(scope="module")
def shared(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One whose manifest every test writes anew."""
    try:
        yield linked(tiny_bundle, tmp_path_factory.mktemp("faults") / "bundle")
    except OSError:  # another file system
        yield Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("faults") / "copy"))


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Any:
    return json.loads((tiny_bundle / MANIFEST).read_bytes())


# ---------------------------------------------------------------------------------------------------------- manifests


@inputs
def test_any_edit_of_the_manifest(inputs: int, shared: Path, tiny_bundle: Path) -> None:
    def check(content: bytes) -> None:
        (shared / MANIFEST).write_bytes(content)
        opened(shared)

    loop(inputs, edits_of((tiny_bundle / MANIFEST).read_bytes()), check)


@inputs
def test_any_other_value(inputs: int, shared: Path, manifest: Any) -> None:
    where = [at for at in places(manifest) if at[0] not in ("parity", "exporter") or len(at) == 1]

    def check(content: bytes) -> None:
        (shared / MANIFEST).write_bytes(content)
        opened(shared)

    loop(inputs, texts_of(manifest, where), check)


WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "an endless height": (("height",), float("inf"), "OverflowError|height is inf"),
    "a height of 1e999": (("height",), 1e308 * 10, "OverflowError|height is inf"),
    "a height below 0": (("height",), -64, "height is -64, expected a whole number from 64 to 4096"),
    "a height of terapixels": (("height",), 2**40, "height is 1099511627776"),
    "a height with a fraction": (("height",), 256.5, r"height is 256\.5"),
    "a height as text": (("height",), "256", "height is '256'"),
    "a height that is true": (("height",), True, "height is True"),
    "a width between": (("width",), 100, "width is 100, expected a multiple of 64"),
    "a factor of 0": (("vae_factor",), 0, "vae_factor is 0"),
    "a scaling factor that is no number": (("vae_scaling_factor",), float("nan"), "vae_scaling_factor is nan"),
    "a mask share of 2": (("expected_mask_share",), 2, "expected_mask_share is 2"),
    "a dtype of its own": (("dtype",), "complex128", "dtype is 'complex128'"),
    "a layer of factor 0": (("injection_layers", 0, "factor"), 0, r"injection_layers\[0\]\.factor is 0"),
    "a layer twice": (("injection_layers", 1, "index"), 10, r"injection_layers\[1\]\.index is 10"),
    "a layer of terabytes": (("injection_layers", 1, "width"), 2**40, r"injection_layers\[1\]\.width"),
    "no layers": (("injection_layers",), [], "injection_layers is"),
    "concepts beyond the channels": (("limits", "concepts"), 7, r"limits\.concepts is 7"),
    "tokens of a layer that there is not": (("limits", "kept_tokens", "16"), 5, r"limits\.kept_tokens is for"),
    "no tokens": (("limits", "kept_tokens", "1"), 0, r"limits\.kept_tokens\['1'\] is 0"),
    "a tokenizer that is text": (("tokenizer",), "none", "tokenizer is 'none'"),
    "a tokenizer without padding": (("tokenizer",), {"file": "tokenizer.json"}, "pad_token_id"),
    "an endless prompt": (("tokenizer", "max_length"), 10**12, r"tokenizer\.max_length"),
    "a size that is none": (("files", SMALL, "bytes"), None, r"bytes is None"),
    "a file that is no object": (("files", SMALL), 5, "TypeError|is 5, expected an object"),
    "a file that is empty": (("files", SMALL), {}, "KeyError"),
    "a hash that is none": (("files", SMALL, "sha256"), "", r"sha256 is '', expected 64"),
    "a graph of no shape": (("graphs", "text_encoder", "inputs", 0, "shape"), "B7", "shape is 'B7', expected a list"),
    "a graph of no inputs": (("graphs", "text_encoder", "inputs"), [], "inputs is"),
    "a graph of a shape below 0": (("graphs", "text_encoder", "inputs", 0, "shape", 1), -1, "shape is -1"),
    "a format that is true": (("format",), True, "format version True, expected 1"),
    "a format of 1.0": (("format",), 1.0, r"format version 1\.0, expected 1"),
    "a format of long text": (("format",), "1" * 10_000, "format version '111"),
    "a schedule of a million years": (("scheduler", "num_train_timesteps"), 10**9, "num_train_timesteps"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_with_a_value_that_no_exporter_writes(case: str, shared: Path, manifest: Any) -> None:
    place, value, said = WRONG[case]
    changed = json.loads(json.dumps(manifest))
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (shared / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(BundleError, match=said):
        Bundle.open(shared, check_hashes=False)
    assert opened(shared) is None


@pytest.mark.parametrize("key", ["format", "height", "files", "sha256", "tokenizer", WEIGHTS])
def test_a_key_of_a_manifest_that_stands_twice(key: str, shared: Path, manifest: Any) -> None:
    (shared / MANIFEST).write_text(with_key_twice(json.dumps(manifest), key))
    with pytest.raises(BundleError, match=f"'{key}' stands twice"):
        Bundle.open(shared, check_hashes=False)


def test_a_manifest_that_is_too_large_is_not_read_whole(shared: Path, manifest: Any) -> None:
    (shared / MANIFEST).write_text(json.dumps(manifest) + " " * MAX_MANIFEST_BYTES)
    assert opened(shared) is None
    os.truncate(shared / MANIFEST, 1 << 40)
    assert opened(shared) is None


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "\ud800"], ids=["long", "deep", "NUL", "surrogate"])
def test_a_name_that_no_folder_can_have(name: str) -> None:
    assert judged("bundle", lambda: Bundle.open(name), names=Path(name)) is None


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [MANIFEST, SMALL, WEIGHTS, "tokenizer.json"])
def test_something_else_in_the_place_of_a_file(place: str, name: str, copy: Path) -> None:
    PLACES[place](copy / name)
    assert opened(copy, check_hashes=True) is None


def test_files_that_were_renamed_into_each_other(copy: Path, manifest: Any) -> None:
    names = sorted(manifest["files"])
    for one, other in pairwise(names):
        if manifest["files"][one] == manifest["files"][other]:  # a graph that is the same for both runtimes
            continue
        (copy / one).rename(copy / "aside")
        (copy / other).rename(copy / one)
        (copy / "aside").rename(copy / other)
        assert opened(copy, check_hashes=True) is None
        (copy / one).rename(copy / "aside")
        (copy / other).rename(copy / one)
        (copy / "aside").rename(copy / other)
    assert opened(copy, check_hashes=True) is not None


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_folder_of_any_name(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / name))
    bundle = opened(folder, check_hashes=True)
    assert bundle is not None
    assert tokenizer_of(bundle).encode("a man").shape == (77,)
    (folder / SMALL).unlink()
    assert opened(folder) is None


@pytest.mark.parametrize("spoil", ["gone", "no manifest", "a manifest that lies"])
def test_the_command_line_names_a_folder_that_cannot_be_printed(spoil: str, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / NAMES[0]
    if spoil != "gone":
        folder.mkdir()
    if spoil == "a manifest that lies":
        (folder / MANIFEST).write_text('{"format": 1, "height": 1e999}')
    command = [sys.executable, "-m", "magicface_rt.cli", "inspect", os.fsencode(folder)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: bundle ")
    assert b"Traceback" not in done.stderr


# --------------------------------------------------------------------------- what only shows when a graph is used


def described(folder: Path, name: str) -> None:
    """Make the manifest agree with what a file has become."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_noticed_in_the_first_picture(value: float, copy: Path) -> None:
    weights = np.memmap(copy / WEIGHTS, np.float32, "r+")
    weights[weights.size // 2 :] = value
    weights.flush()
    described(copy, WEIGHTS)
    with Session(copy, backend="onnxruntime-cpu", threads=1) as session, pytest.raises(NonFiniteError, match="graph"):
        session.generate("a man", steps=1)


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"\xff" * 1000, bytes(1000)])
def test_a_graph_that_is_none_is_named(content: bytes, copy: Path) -> None:
    (copy / SMALL).write_bytes(content)
    described(copy, SMALL)
    with Session(copy, backend="onnxruntime-cpu", threads=1) as session, pytest.raises(BackendError, match=SMALL):
        session.generate("a man", steps=1)


GRAPHS = ("text_encoder", "vae_encoder", "vae_decoder", "reference_kv", "denoise_step")


@pytest.mark.parametrize(
    ("graph", "inputs"),
    [(graph, QUICK // 2 if graph == "text_encoder" else QUICK // 8) for graph in GRAPHS]
    + [pytest.param(graph, MANY, marks=pytest.mark.slow) for graph in GRAPHS],
)
def test_any_edit_of_a_graph(graph: str, inputs: int, copy: Path) -> None:
    """Whose hash its manifest has right: who made it meant it so. What is loaded need not compute anything sensible."""
    name = f"{graph}.onnxruntime.onnx"
    raw = (copy / name).read_bytes()
    backend = OnnxRuntime("cpu", threads=1)

    def check(content: bytes) -> None:
        (copy / name).write_bytes(content)
        described(copy, name)
        bundle = Bundle.open(copy, check_hashes=False)
        # The message names the file within its bundle, as there is one bundle in a Session.
        judged("graph", lambda: backend.load(bundle, graph), names=name, memory=2 << 30)

    loop(inputs, edits_of(raw), check)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "secret.bin", "weights.bin/../../secret.bin"])
def test_a_graph_whose_weights_lie_outside_the_bundle_reads_nothing_there(
    location: str, copy: Path, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    model = onnx.load(copy / SMALL, load_external_data=False)
    held = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in held.external_data if entry.key == "location").value = location
    next(entry for entry in held.external_data if entry.key == "offset").value = "0"
    onnx.save_model(model, copy / SMALL)
    described(copy, SMALL)
    with Session(copy, backend="onnxruntime-cpu", threads=1) as session, pytest.raises(BackendError, match=SMALL):
        session.generate("a man", steps=1)


@pytest.mark.parametrize(("key", "value"), [("offset", str(2**62)), ("length", str(2**62)), ("offset", "-1")])
def test_a_graph_whose_weights_are_not_where_it_says(key: str, value: str, copy: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(copy / SMALL, load_external_data=False)
    held = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    next(entry for entry in held.external_data if entry.key == key).value = value
    onnx.save_model(model, copy / SMALL)
    described(copy, SMALL)
    with Session(copy, backend="onnxruntime-cpu", threads=1) as session, pytest.raises(BackendError, match=SMALL):
        session.generate("a man", steps=1)
