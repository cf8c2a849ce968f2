"""Recordings of `verify --case`, the only archives that are read: bombs, lies about sizes, and what is no array."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corruptions import DAMAGES, NAMES, NO_NAMES, PLACES, cuts, flips, with_key_twice
from outcomes import judged

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from small_recording import CASE, INPUTS, RECORDED, loaded, npy, npz, npz_of, recording

from magicface_rt.errors import RecordingError
from magicface_rt.export.npz import read_npz
from magicface_rt.export.recordings import Recording, load_unet

FILES = ("case.json", "inputs.npz", "steps.npz", "model/config.json", "model/diffusion_pytorch_model.safetensors")
READ = FILES[:-1]
"""The weights are read when they are loaded."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return recording(tmp_path / "recording")


def members() -> dict[str, bytes]:
    return {name: npy(array) for name, array in INPUTS.items()}


def test_a_sound_recording_loads(folder: Path) -> None:
    found = loaded(folder)
    assert found is not None
    for name, array in {**INPUTS, **RECORDED}.items():
        holder = found.inputs if name in INPUTS else found.recorded
        np.testing.assert_array_equal(getattr(holder, name), array)


def test_arrays_are_those_that_numpy_reads(tmp_path: Path) -> None:
    """Of any byte order, and laid out by columns."""
    arrays: dict[str, Any] = {
        "a": np.arange(12, dtype=">f8").reshape(3, 4),
        "b": np.asfortranarray(np.arange(24, dtype=np.int16).reshape(2, 3, 4)),
        "c": np.array(5, np.uint8),
        "d": np.zeros((0, 7), np.float16),
        "e": np.array([True, False]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "some.npz", **arrays)
        found = read_npz(tmp_path / "some.npz", list(arrays), lambda *_: None, 1 << 20)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READ)
def test_a_damaged_file(name: str, damage: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    found = loaded(folder)
    assert found is None or damage in ("a byte order mark in front", "UTF-16")  # which JSON may have


@pytest.mark.parametrize("name", ["inputs.npz", "steps.npz"])
def test_an_archive_cut_or_flipped_anywhere_holds_the_same_numbers_or_is_refused(name: str, folder: Path) -> None:
    path = folder / name
    good = path.read_bytes()
    sound = INPUTS if name == "inputs.npz" else RECORDED
    for content in [*(good[:keep] for keep in cuts(good, most=60)), *flips(good, most=150)]:
        path.write_bytes(content)
        found = loaded(folder)
        if found is not None:  # flipped in what nobody reads, such as a time
            holder = found.inputs if name == "inputs.npz" else found.recorded
            for of, array in sound.items():
                np.testing.assert_array_equal(getattr(holder, of), array)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_something_else_in_the_place_of_a_file(name: str, place: str, folder: Path) -> None:
    PLACES[place](folder / name)
    found = loaded(folder)
    assert found is None or (name == FILES[-1] and place.startswith(("a tebibyte", "itself")))


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_folder_of_any_name(name: str, folder: Path) -> None:
    assert loaded(folder.rename(folder.parent / name)) is not None


@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
def test_a_name_that_no_folder_can_have(name: str, folder: Path) -> None:
    assert judged("recording", lambda: Recording.load(name), names=Path(name)) is None
    (folder / "case.json").write_text(json.dumps({**CASE, "model": name}))
    assert loaded(folder) is None


@pytest.mark.parametrize("key", ["steps", "beta_start", "eps_u"])
def test_a_key_of_a_recording_that_stands_twice(key: str, folder: Path) -> None:
    (folder / "case.json").write_text(with_key_twice(json.dumps(CASE), key))
    with pytest.raises(RecordingError, match=f"'{key}' stands twice"):
        Recording.load(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "9" * 400, "9" * 5000, "[" * 100_000, "true", '"3"'])
def test_a_number_that_is_none(value: str, folder: Path) -> None:
    (folder / "case.json").write_text(json.dumps(CASE).replace('"guidance_scale": 3.0', f'"guidance_scale": {value}'))
    assert loaded(folder) is None


@pytest.mark.parametrize("key", ["beta_schedule", "num_train_timesteps", "beta_end"])
def test_a_long_value_of_the_schedule_is_not_repeated(key: str, folder: Path) -> None:
    case = {**CASE, "scheduler": {**CASE["scheduler"], key: "x" * 5000}}
    (folder / "case.json").write_text(json.dumps(case))
    assert loaded(folder) is None


def header(descr: str, shape: str, order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


WRONG: dict[str, bytes] = {
    "16 TiB": header("'<f4'", "(1, 4, 1099511627776, 1)") + bytes(100),
    "16 TiB of the right shape": header("'<f4'", "(1, 4, 8, 8)") + bytes(100),
    "more than there are numbers for": header("'<f4'", f"(1, 4, 8, {'9' * 18})"),
    "a size of many digits": header("'<f4'", f"({'9' * 5000},)"),
    "a size below 0": header("'<f4'", "(1, 4, -8, -8)") + bytes(1024),
    "many dimensions": header("'<f4'", f"({'1, ' * 5000})") + bytes(4),
    "objects": npy(np.array([object()] * 256, dtype=object).reshape(1, 4, 8, 8)),
    "a structure": header("[('a', '<f4')]", "(1, 4, 8, 8)") + bytes(1024),
    "texts": header("'<U4'", "(1, 4, 8, 8)") + bytes(4096),
    "complex numbers": header("'<c8'", "(1, 4, 8, 8)") + bytes(2048),
    "a header that calls": header("__import__('os').abort()", "(1, 4, 8, 8)") + bytes(1024),
    "a deep header": b"\x93NUMPY\x01\x00" + (60_000).to_bytes(2, "little") + b"(" * 60_000,
    "a header of 4 GB": b"\x93NUMPY\x02\x00" + b"\xff\xff\xff\xff" + bytes(100),
    "no array": b"hello",
    "nothing": b"",
    "a number less": npy(INPUTS["x_T"])[:-4],
    "a number more": npy(INPUTS["x_T"]) + bytes(4),
    "NaN": npy(np.full((1, 4, 8, 8), np.nan, np.float32)),
    "more than float32 holds": npy(np.full((1, 4, 8, 8), 1e300)),
}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("case", WRONG)
def test_a_member_that_is_no_such_array(case: str, compression: int, folder: Path) -> None:
    content = npz_of({**members(), "x_T": WRONG[case]}, compression=compression)
    (folder / "inputs.npz").write_bytes(content)
    assert loaded(folder, memory=64 << 20) is None


def test_half_a_gigabyte_of_zeros_in_half_a_megabyte_is_not_unpacked(folder: Path) -> None:
    """Also where its shape is that of the case."""
    side = 1 << 13
    case = {**CASE, "latent_size": [side, side], "mask_size": [side // 2, side // 2]}
    (folder / "case.json").write_text(json.dumps(case))
    content = header("'<f2'", f"(1, 4, {side}, {side})") + bytes(8 * side * side)
    (folder / "inputs.npz").write_bytes(npz_of({**members(), "x_T": content}, compression=zipfile.ZIP_DEFLATED))
    del content
    assert (folder / "inputs.npz").stat().st_size < 1 << 20
    assert loaded(folder, memory=64 << 20) is None


def test_zeros_that_are_few_by_the_archives_list_are_not_unpacked(folder: Path) -> None:
    """What it says of a member's size is no more than a claim."""
    good = npz_of({**members(), "x_T": npy(INPUTS["x_T"]) + bytes(100 << 20)}, compression=zipfile.ZIP_DEFLATED)
    length = struct.pack("<I", len(npy(INPUTS["x_T"])) + (100 << 20))
    assert good.count(length) == 2
    (folder / "inputs.npz").write_bytes(good.replace(length, struct.pack("<I", len(npy(INPUTS["x_T"])))))
    assert loaded(folder, memory=64 << 20) is None


def test_an_array_that_nobody_asked_for_is_not_unpacked(folder: Path) -> None:
    content = npz_of({**members(), "more": bytes(100 << 20)}, compression=zipfile.ZIP_DEFLATED)
    (folder / "inputs.npz").write_bytes(content)
    assert loaded(folder, memory=64 << 20) is not None


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_numpy_does_not_write(compression: int, folder: Path) -> None:
    (folder / "inputs.npz").write_bytes(npz_of(members(), compression=compression))
    with pytest.raises(RecordingError, match=r"inputs\.npz.*a way that NumPy does not write"):
        Recording.load(folder)


def test_two_arrays_of_one_name(folder: Path) -> None:
    """One reader takes the first and another the last."""
    file = io.BytesIO(npz(INPUTS))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x_T.npy", npy(INPUTS["x_T"] + 1))
    (folder / "inputs.npz").write_bytes(file.getvalue())
    with pytest.raises(RecordingError, match="two of its arrays have one name"):
        Recording.load(folder)


def test_a_list_of_a_million_arrays_is_not_read(folder: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(60_000):
            archive.writestr(f"{number}.npy", b"")
    (folder / "inputs.npz").write_bytes(file.getvalue())
    del file, archive
    assert loaded(folder, memory=32 << 20) is None


@pytest.mark.parametrize(
    "change", [{"layers_per_block": 10**9}, {"block_out_channels": [2**40] * 4}, {"in_channels": 9}]
)
def test_a_network_that_would_be_built_for_ever(change: dict[str, Any], folder: Path) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert judged("recording", lambda: load_unet(path.parent), names=path.parent) is None
