"""Files of kept concepts, spoiled by who knows the format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corruptions import as_json, packed, places, trees_of, unpacked, with_key_twice
from hypothesis import strategies as st
from outcomes import inputs, judged, loop
from single_files import BY_NAME, kept_concept, numbers_of, origin

from magicface_rt import KeptConcept, KeptConceptError
from magicface_rt.kept import KeptReference
from magicface_rt.kept.files import METADATA
from magicface_rt.kept.reference import EightBit, Exact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cap.concept"


def parts(storage: str = "exact") -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, manifest and tensors."""
    header, body = unpacked(BY_NAME["kept concept" if storage == "exact" else "kept concept 8-bit"].sample())
    return header, json.loads(header["__metadata__"][METADATA]), body


def with_manifest(header: dict[str, Any], manifest: str) -> dict[str, Any]:
    digest = hashlib.sha256(manifest.encode("utf-8", "surrogatepass")).hexdigest()
    return {**header, "__metadata__": {METADATA: manifest, "manifest_sha256": digest}}


def load(path: Path, *, check_hashes: bool = True) -> KeptConcept | None:
    return judged("kept concept, edited", lambda: KeptConcept.load(path, check_hashes=check_hashes), names=path)


@inputs
@pytest.mark.parametrize("storage", ["exact", "8-bit"])
@pytest.mark.parametrize("part", ["header", "manifest"])
def test_any_other_value(inputs: int, storage: str, part: str, path: Path) -> None:
    header, manifest, body = parts(storage)
    # A few of the many tensors and hashes, which are all alike.
    in_header = [at for at in places(header) if at[0].startswith("0.k_ref_13")]
    in_manifest = [at for at in places(manifest) if at[0] != "sha256" or len(at) == 1 or at[1].startswith("0.k_ref_13")]

    sound = numbers_of(kept_concept("exact" if storage == "exact" else "8-bit"))
    texts = (
        trees_of(header, in_header).map(as_json)
        if part == "header"
        else trees_of(manifest, in_manifest).map(lambda tree: json.dumps(with_manifest(header, as_json(tree))))
    )

    def check(one: tuple[str, bool]) -> None:
        text, check_hashes = one
        path.write_bytes(packed(text, body))
        kept = load(path, check_hashes=check_hashes)
        if kept is not None:
            again = KeptConcept.load(kept.save(path, overwrite=True))
            assert again.to_dict() == kept.to_dict()
            if check_hashes:
                assert numbers_of(kept) == sound

    loop(inputs, st.tuples(texts, st.booleans()), check)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets", "0.k_ref_10", "manifest_sha256"])
def test_a_key_that_stands_twice_in_the_header(key: str, path: Path) -> None:
    """Another reader of safetensors would take the first, so it would be another concept to it."""
    header, _, body = parts()
    path.write_bytes(packed(with_key_twice(json.dumps(header), key), body))
    with pytest.raises(KeptConceptError, match=f"'{key}' stands twice"):
        KeptConcept.load(path)


def test_a_key_that_stands_twice_in_the_manifest(path: Path) -> None:
    header, manifest, body = parts()
    text = with_key_twice(json.dumps(manifest), "weight", "99.0")
    path.write_bytes(packed(with_manifest(header, text), body))
    with pytest.raises(KeptConceptError, match="'weight' stands twice"):
        KeptConcept.load(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_that_are_no_numbers(value: float, dtype: str, path: Path) -> None:
    """Sound by every hash: whoever made the file made it so."""
    kept = kept_concept(dtype="float32" if dtype == "bfloat16" else dtype)
    written: float = value
    if dtype == "bfloat16":
        kept = KeptConcept("hat", [_as_bits(one) for one in kept.references], origin("bfloat16"))
        bits = {np.nan: 0x7FC0, np.inf: 0x7F80, -np.inf: 0xFF80}
        written = next(b for v, b in bits.items() if v is value or v == value)
    array = kept.references[1].tensors["v_ref_13"].arrays[""]
    array.setflags(write=True)
    array[2, 4, 1] = written
    kept.save(path)
    with pytest.raises(KeptConceptError, match=r"cap\.concept.*1\.v_ref_13 holds 1 values that are NaN or infinite"):
        KeptConcept.load(path)
    KeptConcept.load(path, check_hashes=False)


def _as_bits(reference: KeptReference) -> KeptReference:
    tensors = {
        name: Exact((stored.arrays[""].view(np.uint32) >> 16).astype(np.uint16))
        for name, stored in reference.tensors.items()
    }
    return KeptReference("key", "a", "exact", reference.tokens, tensors)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", np.nan), ("low", np.inf), ("scale", 1e38), ("low", -3e38), ("scale", 1000.0)]
)
def test_eight_bits_that_become_no_numbers(name: str, value: float, path: Path) -> None:
    """Also where only the decoded values would be too large for the bundle's dtype."""
    kept = kept_concept("8-bit", "float16")
    stored = kept.references[0].tensors["k_ref_10"]
    assert isinstance(stored, EightBit)
    array = getattr(stored, name)
    array.setflags(write=True)
    array[1, 3] = value
    kept.save(path)
    with pytest.raises(KeptConceptError, match=r"0\.k_ref_10 holds \d+ values that are NaN or infinite"):
        KeptConcept.load(path)


@pytest.mark.parametrize(
    ("layers", "steps", "count"),
    [
        pytest.param([[1, 1, 1]] * 100_000, 1, 2_000, id="one layer many times"),
        pytest.param([[1, 1, 1]], 1_000_000, 1_000, id="many steps"),
        pytest.param([[1, 1, 1]], 1_000, 2_000, id="many references"),
    ],
)
def test_what_stands_many_times_does_not_multiply_the_work(layers: Any, steps: int, count: int, path: Path) -> None:
    """A header of 4 MB could name so many layers, steps or references that each was held against each for hours."""
    entry = {"dtype": "F32", "shape": [steps, 0, 1], "data_offsets": [0, 0]}
    header = {f"{k}.{kind}_ref_1": entry for k in range(count) for kind in "kv"}
    empty = hashlib.sha256(b"").hexdigest()
    one = {"key": "", "prompt": "", "storage": "exact", "tokens": {"1": 0}, "error": 0}
    of = {**origin().to_dict(), "layers": layers, "timesteps": [1] * steps}
    manifest = {
        "format": 1,
        "word": "a",
        "name": "a",
        "weight": 1,
        "token_index": None,
        "origin": of,
        "references": [one] * count,
        "sha256": dict.fromkeys(header, empty),
    }
    text = json.dumps(manifest, separators=(",", ":"))
    path.write_bytes(packed(json.dumps(with_manifest(header, text), separators=(",", ":"))))
    with pytest.raises(KeptConceptError, match="expected at most"):
        KeptConcept.load(path)


def test_many_tensors_that_are_none_of_a_concepts_do_not_multiply_the_work(path: Path) -> None:
    header, manifest, body = parts()
    more = {f"z{k}": {"dtype": "U8", "shape": [0], "data_offsets": [len(body)] * 2} for k in range(20_000)}
    manifest["sha256"] |= dict.fromkeys(more, "")
    text = json.dumps(manifest, separators=(",", ":"))
    path.write_bytes(packed(json.dumps(with_manifest({**header, **more}, text), separators=(",", ":")), body))
    assert load(path) is None


@pytest.mark.parametrize("tokens", [2**40, 2**62, 2**63])
def test_tokens_for_which_there_is_no_room(tokens: int, path: Path) -> None:
    """Header and manifest agree on a tensor of terabytes that the file does not have."""
    header, manifest, body = parts()
    for entry in manifest["references"]:
        entry["tokens"] = {"1": tokens, "2": tokens}
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"][1] = tokens
    path.write_bytes(packed(with_manifest(header, json.dumps(manifest)), body))
    assert load(path) is None
    assert load(path, check_hashes=False) is None


def test_a_long_name_is_not_repeated_in_the_message(path: Path) -> None:
    header, manifest, body = parts()
    header["n" * 100_000] = {"dtype": "U8", "shape": [0], "data_offsets": [7, 7]}
    manifest["sha256"]["n" * 100_000] = ""
    path.write_bytes(packed(with_manifest(header, json.dumps(manifest)), body))
    assert load(path) is None


def test_pictures_of_other_sizes_than_they_say(path: Path) -> None:
    header, manifest, body = parts()
    for shape in ([2**31, 2**31, 3], [0, 2**63, 3], [4, 4, 4], [-1, 4, 3], [[], 1, 3], "abc"):
        header["image_0"] = {"dtype": "U8", "shape": shape, "data_offsets": [len(body), len(body) + 48]}
        manifest["sha256"]["image_0"] = hashlib.sha256(bytes(48)).hexdigest()
        path.write_bytes(packed(with_manifest(header, json.dumps(manifest)), body + bytes(48)))
        assert load(path) is None
