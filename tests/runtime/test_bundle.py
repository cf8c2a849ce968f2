"""Opening bundles: what is refused, and how it is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from magicface_rt import BackendError, Bundle, BundleError
from magicface_rt.backends.base import check_inputs
from magicface_rt.export.samples import sample_inputs

SIZES = {"B": 2, "R": 2, "K": 1, "M1": 5, "M2": 4}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def test_an_exported_bundle_opens_and_tells_its_contract(tiny_bundle: Path) -> None:
    opened = Bundle.open(tiny_bundle)
    assert sorted(opened.graphs) == ["denoise_step", "reference_kv", "text_encoder", "vae_decoder", "vae_encoder"]
    assert [layer.index for layer in opened.injection_layers] == list(range(10, 16))
    assert opened.factors == (1, 2)
    assert opened.grid(2) == (16, 16)


def test_a_missing_folder_and_a_foreign_folder_are_told_apart(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="export it first"):
        Bundle.open(tiny_checkpoint)


@pytest.mark.parametrize("name", ["weights.bin", "denoise_step.onnxruntime.onnx", "tokenizer.json"])
def test_a_missing_a_shortened_and_a_changed_file_are_named(bundle: Path, name: str) -> None:
    path = bundle / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=f"{name} has"):
        Bundle.open(bundle)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{name} was changed"):
        Bundle.open(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(bundle)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    stamp = path.stat()
    os.utime(other, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as `cp -p` and rsync leave it
    other.replace(path)


def written_to(path: Path) -> None:
    earlier = path.stat().st_mtime_ns
    with path.open("r+b") as stream:
        stream.write(b"else")
    os.utime(path, ns=(earlier + 1, earlier + 1))  # a fast machine writes it within one tick of the disk's clock


@pytest.mark.parametrize("name", ["weights.bin", "denoise_step.onnxruntime.onnx", "tokenizer.json"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced, "was replaced since .*Open it again"),
        (written_to, "was replaced since"),
        (Path.unlink, "was removed"),
    ],
)
def test_a_file_that_changes_after_opening_is_named(
    bundle: Path, name: str, change: Callable[[Path], object], said: str
) -> None:
    opened = Bundle.open(bundle, check_hashes=False)
    opened.check_unchanged()
    change(bundle / name)
    with pytest.raises(BundleError, match=f"{name} {said}"):
        opened.check_unchanged()


@pytest.mark.parametrize("name", ["weights.bin", "denoise_step.onnxruntime.onnx", "tokenizer.json"])
def test_of_a_bundle_in_use_no_file_is_written_to_and_others_may_take_its_place(bundle: Path, name: str) -> None:
    opened = Bundle.open(bundle, check_hashes=False)
    written_to(bundle / name)
    with pytest.raises(BundleError, match=f"{name} was written to since .*by renaming only"):
        opened.check_not_modified()
    replaced(bundle / name)
    opened.check_not_modified()
    (bundle / name).unlink()
    opened.check_not_modified()
    bundle.rename(bundle.with_name("aside"))
    opened.check_not_modified()


def test_an_opened_bundle_is_found_from_anywhere(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened = Bundle.open("bundle", check_hashes=False)
    monkeypatch.chdir("/")
    opened.check_unchanged()


def test_an_opened_bundle_is_the_one_that_the_link_named(bundle: Path, tmp_path: Path) -> None:
    other, current = shutil.copytree(bundle, tmp_path / "other"), tmp_path / "current"
    current.symlink_to(bundle)
    opened = Bundle.open(current, check_hashes=False)
    current.unlink()
    current.symlink_to(other)
    opened.check_unchanged()
    assert opened.path == bundle.resolve()


def test_links_and_permissions_of_an_opened_bundle_may_change(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle, check_hashes=False)
    os.link(bundle / "weights.bin", tmp_path / "link")
    (bundle / "weights.bin").chmod(0o400)
    bundle.rename(tmp_path / "aside").rename(bundle)
    opened.check_unchanged()


def test_a_newer_format_asks_for_an_upgrade(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(format=2))
    with pytest.raises(BundleError, match="Upgrade magicface_rt"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/passwd", "a/b", "", ".hidden"])
def test_a_path_that_leaves_the_folder_is_refused(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="only plain file names"):
        Bundle.open(bundle)


def test_a_symbolic_link_is_refused(bundle: Path, tiny_bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to(tiny_bundle / "weights.bin")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(bundle)


@pytest.mark.parametrize("key", ["graphs", "limits", "scheduler", "injection_layers", "height"])
def test_a_manifest_without_a_key_is_refused(bundle: Path, key: str) -> None:
    edit(bundle, lambda m: m.pop(key))
    with pytest.raises(BundleError, match="expected form"):
        Bundle.open(bundle)


def test_a_value_of_another_form_is_named(bundle: Path) -> None:
    edit(bundle, lambda m: m.update(height="512 px"))
    with pytest.raises(BundleError, match=r"height is '512 px', expected a whole number from 64 to 4096"):
        Bundle.open(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": "1"}', "\x00"])
def test_a_manifest_that_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json|format version"):
        Bundle.open(bundle)


def test_inputs_are_compared_with_the_contract(tiny_bundle: Path) -> None:
    contract = Bundle.open(tiny_bundle, check_hashes=False).graph("denoise_step")
    good = sample_inputs(contract.inputs, SIZES, seed=0)
    check_inputs(contract, good)
    with pytest.raises(BackendError, match=r"missing inputs \['latents'\]"):
        check_inputs(contract, {k: v for k, v in good.items() if k != "latents"})
    with pytest.raises(BackendError, match=r"unknown inputs \['other'\]"):
        check_inputs(contract, {**good, "other": good["latents"]})
    with pytest.raises(BackendError, match="input latents is float64"):
        check_inputs(contract, {**good, "latents": good["latents"].astype("float64")})
    with pytest.raises(BackendError, match="M1 = 5"):
        check_inputs(contract, {**good, "key_bias_1": good["key_bias_1"][:, :-1]})
    three = sample_inputs(contract.inputs, {**SIZES, "K": 3}, seed=0)
    with pytest.raises(BackendError, match="K = 3"):
        check_inputs(contract, three)
