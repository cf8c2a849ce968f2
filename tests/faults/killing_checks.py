"""Whether what a killed or failed process left is whole: each of these fails where it is anything between."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from killing_writers import made_result
from PIL import Image

from magicface_rt import KeptConcept
from magicface_rt.bundle import Bundle
from magicface_rt.provenance import read_provenance

RESULT = ["image-0.png", "regions-0.png", "regions.npz", "run.json"]
SAID = ("software", "bundle_hash", "backend", "prompt", "options")
"""What a result's run.json and each of its pictures say alike."""


def whole_result(path: Path) -> dict[str, Any]:
    """What run.json says of a result of one picture whose files are all whole, and of the same request."""
    assert sorted(os.listdir(path)) == RESULT
    run: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
    for name in ("image-0.png", "regions-0.png"):
        provenance = read_provenance(path / name)  # reads all of it
        assert provenance is not None
        assert {key: provenance[key] for key in SAID} == {key: run[key] for key in SAID}, name
    with Image.open(path / "image-0.png") as image:
        assert list(image.size) == run["size"]
    with np.load(path / "regions.npz") as arrays:
        assert len(arrays["regions"]) == len(run["images"]) == 1
        assert len(arrays["concept_names"]) == len(run["concepts"])
    return run


def result_at(path: Path) -> int | None:
    """The mark of the result that stands there; None where none does."""
    if not os.path.lexists(path):
        return None
    mark = int(whole_result(path)["prompt"].removeprefix("a man, "))
    expected = made_result(mark)
    with Image.open(path / "image-0.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.images[0]))
    with np.load(path / "regions.npz") as arrays:
        np.testing.assert_array_equal(arrays["regions"], expected.regions)
    return mark


def concept_at(path: Path, source: KeptConcept) -> int | None:
    """The weight of the kept concept that stands there, whose keys are those of `source`; None where none does."""
    if not os.path.lexists(path):
        return None
    found = KeptConcept.load(path, check_hashes=True)
    for one, other in zip(arrays_of(found), arrays_of(source), strict=True):
        np.testing.assert_array_equal(one, other)
    return int(found.weight)


def arrays_of(concept: KeptConcept) -> list[np.ndarray[Any, Any]]:
    return [a for r in concept.references for stored in r.tensors.values() for a in stored.arrays.values()]


def bundle_at(path: Path, like: Bundle) -> bool:
    """Whether a bundle stands there, with the graphs and weights of another."""
    if not os.path.lexists(path):
        return False
    found = Bundle.open(path, check_hashes=True)
    assert list(found.graphs) == list(like.graphs)
    assert found.files["weights.bin"] == like.files["weights.bin"]
    return True


def plan_at(store: Path) -> bool:
    """Whether the one plan of a store is there."""
    from magicface_rt.engines.store import EngineStore, Plan

    opened = EngineStore(store)
    checked = opened.verify()
    assert [fault for _, fault in checked if fault is not None] == []
    for plan, _ in checked:
        assert isinstance(plan, Plan)
        assert len(opened.read(plan)) == plan.bytes > 0
    assert len(checked) <= 1
    return bool(checked)


def concepts_at(folder: Path, sources: Path) -> list[str]:
    """The names of the kept concepts in a folder, each whole and with the keys of its namesake in `sources`."""
    found = sorted(path.name for path in folder.glob("*.concept"))
    for name in found:
        concept_at(folder / name, KeptConcept.load(sources / name))
    return found


def write_job(folder: Path, words: Sequence[str] = ("man",)) -> Path:
    """A job with a concept for each of these words, and their images."""
    for number, word in enumerate(words):
        pixels = np.random.default_rng(5 + number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8:40] = 255
        Image.fromarray(np.dstack([pixels, mask])).save(folder / f"{word}.png")
    concepts = [{"word": word, "image": f"{word}.png", "prompt": f"a {word}"} for word in words]
    prompt = " and ".join(f"a {word}" for word in words)
    path = folder / "job.json"
    path.write_text(json.dumps({"prompt": prompt, "concepts": concepts, "steps": 2}), encoding="utf-8")
    return path
