"""Engine stores, spoiled by who may write into them and knows the format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from corruptions import DAMAGES, NAMES, PLACES, cuts, edits_of, flips, trees_of
from outcomes import inputs, loop
from plan_store import PLAN, sample_key, spoiled, used, with_a_plan, writer

from magicface_rt.engines import layout, manifest
from magicface_rt.engines.store import EngineStore, Plan
from magicface_rt.errors import PlanError


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one plan. It is made once: a build waits for the disk, and there are many tests."""
    root = tmp_path_factory.mktemp("built") / "store"
    return with_a_plan(EngineStore(root)).root


@pytest.fixture
def plan(store: EngineStore, built: Path) -> Plan:
    shutil.copytree(built, store.root)
    return store.get(sample_key())


def test_a_sound_store(store: EngineStore, plan: Plan) -> None:
    assert used(store, plan.key) == PLAN


@inputs
@pytest.mark.parametrize("name", ["plan", "manifest.json"])
def test_any_edit(inputs: int, name: str, store: EngineStore, plan: Plan) -> None:
    path = plan.folder / name
    good = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        assert (used(store, plan.key) == PLAN) == (content == good)

    loop(inputs, edits_of(good), check)


@inputs
def test_any_other_value(inputs: int, store: EngineStore, plan: Plan) -> None:
    """With a checksum that is right, in the folder that is right: whoever did it knows the format."""
    content = json.loads((plan.folder / "manifest.json").read_bytes())
    content.pop("checksum")

    def check(changed: Any) -> None:
        shutil.rmtree(store.root, ignore_errors=True)
        spoiled(store, changed)
        for key in (plan.key, sample_key(graph="other")):
            found = used(store, key)
            assert found in (None, PLAN)

    trees = trees_of(content).map(lambda tree: json.loads(json.dumps(tree).replace("\\ud800", "x")))
    loop(inputs, trees, check)


@pytest.mark.parametrize("depth", [50, 200, 900])
def test_a_key_that_is_nested_deeply(depth: int, store: EngineStore, plan: Plan) -> None:
    """Also where it can just be read, telling how it differs from another key goes no deeper than Python calls."""
    content = json.loads((plan.folder / "manifest.json").read_bytes())
    content.pop("checksum")
    deep: Any = {"a": 1}
    for _ in range(depth):
        deep = {"a": deep}
    content["key"] = {**content["key"], "builder_options": deep}
    text = manifest._text({**content, "checksum": manifest._checksum(content)})
    digest = hashlib.sha256(json.dumps(content["key"], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    folder = layout.plan_folder(store.root, "tensorrt-rtx", digest)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(text)
    (folder / "plan").write_bytes(PLAN)
    assert used(store, sample_key(precision="bf16")) is None
    assert used(store, plan.key) == PLAN


@pytest.mark.parametrize(("field", "value"), [("bytes", 1024.0), ("bytes", "1024"), ("bytes", True), ("sha256", 5)])
def test_a_manifest_whose_size_or_hash_is_of_another_kind(
    field: str, value: Any, store: EngineStore, plan: Plan
) -> None:
    content = json.loads((plan.folder / "manifest.json").read_bytes())
    content.pop("checksum")
    shutil.rmtree(store.root)
    spoiled(store, {**content, field: value})
    with pytest.raises(PlanError, match="does not have the expected form"):
        store.get(plan.key)


@pytest.mark.parametrize("name", ["plan", "manifest.json"])
@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_the_place_of_a_file(name: str, place: str, store: EngineStore, plan: Plan) -> None:
    PLACES[place](plan.folder / name)
    assert used(store, plan.key) is None


def test_a_plan_for_which_there_is_no_memory(store: EngineStore, plan: Plan) -> None:
    """Size and manifest agree on a tebibyte, of which the disk holds nothing."""
    content = json.loads((plan.folder / "manifest.json").read_bytes())
    content.pop("checksum")
    shutil.rmtree(store.root)
    folder = spoiled(store, {**content, "bytes": 1 << 40})
    os.truncate(folder / "plan", 1 << 40)
    found = store.get(plan.key)
    with pytest.raises(PlanError, match="1099511627776 bytes, more than there is memory for"):
        store.read(found)


def test_plan_and_manifest_that_changed_places(store: EngineStore, plan: Plan) -> None:
    (plan.folder / "plan").rename(plan.folder / "aside")
    (plan.folder / "manifest.json").rename(plan.folder / "plan")
    (plan.folder / "aside").rename(plan.folder / "manifest.json")
    assert used(store, plan.key) is None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["plan", "manifest.json"])
def test_a_damaged_file(name: str, damage: str, store: EngineStore, plan: Plan) -> None:
    path = plan.folder / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert used(store, plan.key) is None


@pytest.mark.parametrize("name", ["plan", "manifest.json"])
def test_a_file_cut_or_flipped_anywhere(name: str, store: EngineStore, plan: Plan) -> None:
    path = plan.folder / name
    good = path.read_bytes()
    for content in [*(good[:keep] for keep in cuts(good, most=100)), *flips(good, most=100)]:
        path.write_bytes(content)
        assert used(store, plan.key) is None


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_store_and_strangers_in_it_of_any_name(name: str, tmp_path: Path) -> None:
    store = EngineStore(tmp_path / name)
    plan = store.build(sample_key(), writer(PLAN))
    for above in (store.root, plan.folder.parent.parent, plan.folder.parent, plan.folder):
        (above / name).mkdir()
        (above / f"{name}.part").write_bytes(b"x")
    assert used(store, plan.key) == PLAN


def test_a_cache_that_is_nested_deeply(store: EngineStore, plan: Plan) -> None:
    """Folders in folders, deeper than Python calls."""
    top = store.root / "runtime-cache"
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        assert used(store, plan.key) == PLAN
    finally:  # Python's own rmtree goes no deeper either
        subprocess.run(["rm", "-rf", top], check=True)


@pytest.mark.parametrize("gate", [None, 5, [], "x", {"scratch_bytes": "much"}, {"scratch_bytes": -1}])
def test_facts_that_cannot_be_computed_with(gate: Any, store: EngineStore, plan: Plan) -> None:
    """The memory that a plan needs is planned with before it is read."""
    content = json.loads((plan.folder / "manifest.json").read_bytes())
    content.pop("checksum")
    shutil.rmtree(store.root)
    spoiled(store, {**content, "facts": {"gate": gate}})
    with pytest.raises(PlanError, match="scratch_bytes"):
        store.get(plan.key)
