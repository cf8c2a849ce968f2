"""What is refused of a store that was damaged, and what is left when its disk fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_worker import CONTENT, sample_key, writer

from magicface_rt.engines import manifest
from magicface_rt.engines.store import Damaged, EngineStore, Plan
from magicface_rt.errors import PlanError, StoreError

SMALL = CONTENT[:700]


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


@pytest.fixture
def plan(store: EngineStore) -> Plan:
    return store.build(sample_key(), writer(SMALL, scratch=1.5, note="a b"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineStore, Plan]]:
    """A store that tests damage and mend."""
    store = EngineStore(tmp_path_factory.mktemp("shared"))
    yield store, store.build(sample_key(), writer(SMALL, scratch=1.5, note="a b"))
    assert store.verify()[0][1] is None


def rewrite(path: Path, content: bytes) -> None:
    """Change a file's content without emptying it first, which some file systems answer with a write to the disk."""
    with path.open("r+b") as stream:
        stream.write(content)
        stream.truncate()


def fault_with(store: EngineStore, plan: Plan, name: str, content: bytes) -> str:
    """The error with which the plan is refused while a file of it has this content; empty if it is not."""
    path = plan.folder / name
    good = path.read_bytes()
    rewrite(path, content)
    try:
        store.read(plan)
    except PlanError as error:
        return str(error)
    else:
        return ""
    finally:
        rewrite(path, good)


# Damage


@pytest.mark.parametrize(
    ("name", "mask"), [("plan", 0x01), ("manifest.json", 0x01), ("manifest.json", 0x20), ("manifest.json", 0xFF)]
)
def test_every_flipped_byte_is_refused(shared: tuple[EngineStore, Plan], name: str, mask: int) -> None:
    store, plan = shared
    good = (plan.folder / name).read_bytes()
    flipped = (good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :] for at in range(len(good)))
    assert [at for at, content in enumerate(flipped) if not fault_with(store, plan, name, content)] == []


@given(data=st.data(), name=st.sampled_from(["plan", "manifest.json"]))
def test_any_other_content_is_refused(shared: tuple[EngineStore, Plan], data: st.DataObject, name: str) -> None:
    """Some bytes anywhere replaced by others: flips, insertions, cuts."""
    store, plan = shared
    good = (plan.folder / name).read_bytes()
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 40)))
    content = good[:start] + data.draw(st.binary(max_size=40) | st.sampled_from([b" ", b"\n", b"\t"])) + good[end:]
    assert bool(fault_with(store, plan, name, content)) == (content != good)


@pytest.mark.parametrize("name", ["plan", "manifest.json"])
def test_every_truncation_is_refused_before_the_plan_is_read(
    shared: tuple[EngineStore, Plan], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = shared
    good = (plan.folder / name).read_bytes()

    def read_checked(_: Plan) -> bytes:
        raise AssertionError("a truncated plan was read")

    monkeypatch.setattr(manifest, "read_checked", read_checked)
    assert all(fault_with(store, plan, name, good[:length]) for length in range(len(good)))


def test_nothing_is_handed_out_before_it_was_hashed(store: EngineStore, plan: Plan) -> None:
    """A change of the same length, which size and manifest cannot show, is found by `read`, `verify` and `build`."""
    plan.path.write_bytes(SMALL[:-1] + b"!")
    assert store.find(sample_key()) == plan
    with pytest.raises(PlanError, match=r"plan was changed: its SHA-256.*Build it again: `magicface-rt build"):
        store.read(plan)
    ((_, fault),) = store.verify()
    assert fault is not None
    assert "was changed" in fault
    again = store.build(sample_key(), writer())
    assert store.read(again) == CONTENT
    assert store.verify() == [(again, None)]
    assert sorted(p.name for p in again.folder.parent.iterdir()) == [again.folder.name]


def damage_missing_plan(plan: Plan) -> None:
    plan.path.unlink()


def damage_missing_manifest(plan: Plan) -> None:
    (plan.folder / "manifest.json").unlink()


def damage_link_to_plan(plan: Plan) -> None:
    plan.path.rename(plan.folder / "elsewhere")
    plan.path.symlink_to("elsewhere")


def damage_link_to_manifest(plan: Plan) -> None:
    (plan.folder / "manifest.json").rename(plan.folder / "elsewhere")
    (plan.folder / "manifest.json").symlink_to("elsewhere")


def damage_link_to_folder(plan: Plan) -> None:
    plan.folder.rename(plan.folder.parent / "elsewhere")
    plan.folder.symlink_to("elsewhere")


def damage_file_for_folder(plan: Plan) -> None:
    shutil.rmtree(plan.folder)
    plan.folder.write_bytes(b"")


def damage_folder_for_plan(plan: Plan) -> None:
    plan.path.unlink()
    plan.path.mkdir()


def damage_pipe_for_manifest(plan: Plan) -> None:
    (plan.folder / "manifest.json").unlink()
    os.mkfifo(plan.folder / "manifest.json")


def damage_huge_manifest(plan: Plan) -> None:
    os.truncate(plan.folder / "manifest.json", manifest.MAX_MANIFEST_BYTES + 1)


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_reported_refused_and_replaced(
    store: EngineStore, plan: Plan, damage: Callable[[Plan], None]
) -> None:
    damage(plan)
    assert store.find(sample_key()) is None
    assert store.plans() == []
    (entry,) = store.entries()
    assert isinstance(entry, Damaged)
    for refused in (lambda: store.get(sample_key()), lambda: store.read(plan)):
        with pytest.raises(PlanError) as error:
            refused()
        assert entry.reason in str(error.value)
        assert "Build it again" in str(error.value)
    assert store.read(store.build(sample_key(), writer())) == CONTENT
    assert isinstance(store.entries()[0], Plan)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_can_be_removed(store: EngineStore, plan: Plan, damage: Callable[[Plan], None]) -> None:
    damage(plan)
    (entry,) = store.entries()
    assert store.prune(limit=-1).entries == [entry]
    assert store.entries() == []
    assert not os.path.lexists(plan.folder)


def test_a_damaged_entry_that_was_repaired_meanwhile_is_not_removed(store: EngineStore, plan: Plan) -> None:
    plan.path.write_bytes(b"")
    (entry,) = store.entries()
    again = store.build(sample_key(), writer())
    assert not store.remove(entry)
    assert store.read(again) == CONTENT


def test_an_entry_that_is_pruned_while_it_is_listed_is_not_called_damaged(
    store: EngineStore, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = manifest._read

    def read_late(path: Path, limit: int) -> bytes:
        monkeypatch.setattr(manifest, "_read", real)
        assert store.remove(plan)
        return real(path, limit)

    monkeypatch.setattr(manifest, "_read", read_late)
    assert store.entries() == []


@pytest.mark.parametrize("level", ["flavour", "digits"])
def test_a_linked_folder_of_the_store_is_not_followed(store: EngineStore, plan: Plan, level: str) -> None:
    link = plan.folder.parent if level == "digits" else plan.folder.parent.parent
    elsewhere = store.root.parent / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    with pytest.raises(PlanError, match="is a symbolic link"):
        store.get(sample_key())
    with pytest.raises(PlanError, match="is a symbolic link"):
        store.read(plan)
    with pytest.raises(StoreError, match="not a folder of the store's own"):
        store.build(sample_key(), writer())
    assert store.entries() == []
    assert store.prune(limit=0).entries == []
    assert len(list(elsewhere.rglob("plan"))) == 1


@pytest.mark.skipif(os.name != "posix", reason="permissions are told in another way")
@pytest.mark.parametrize("level", range(5), ids=["plan", "folder", "shard", "flavour", "root"])
def test_a_plan_that_every_user_may_replace_is_not_read(store: EngineStore, plan: Plan, level: int) -> None:
    """It is native code. Where others may not enter, what is inside has any permissions."""
    place = (plan.path, *plan.path.parents)[level]
    for folder in plan.path.parents[:4]:
        folder.chmod(0o755)
    mode = place.stat().st_mode & 0o777
    place.chmod(mode | 0o002)
    refused = rf"every user may write to {re.escape(str(place))} \(mode .*chmod o-w"
    for use in (lambda: store.read(plan), lambda: store.get(plan.key)):
        with pytest.raises(PlanError, match=refused):
            use()
    with pytest.raises(StoreError, match=refused):
        store.build(plan.key, writer(SMALL))
    ((_, fault),) = store.verify()
    assert re.search(refused, fault or "")
    place.chmod(mode | 0o020)
    assert store.read(plan) == SMALL, "a group that shares a store is trusted"
    assert store.verify()[0][1] is None
    if place != store.root:
        place.chmod(0o777)
        store.root.chmod(0o700)
        assert store.read(plan) == SMALL
    store.root.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="permissions are told in another way")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_nothing_is_built_into_a_store_to_which_every_user_may_add(store: EngineStore, mode: int) -> None:
    """A plan is found by its key, so that one that others have added would be taken."""
    store.root.mkdir()
    store.root.chmod(mode)
    with pytest.raises(StoreError, match=r"every user may write to .* or name a folder of your own"):
        store.build(sample_key(), writer(SMALL))
    assert list(store.root.iterdir()) == []


def test_a_plan_of_another_key_in_the_place_is_refused(store: EngineStore, plan: Plan) -> None:
    """A sound folder, moved under the name of another key or among another key's neighbours."""
    wanted = sample_key(precision="bf16")
    place = store.root / "tensorrt-rtx" / wanted.digest[:2] / wanted.digest
    shutil.copytree(plan.folder, place)
    with pytest.raises(PlanError, match=r"manifest\.json is that of the plan"):
        store.get(wanted)
    moved = store.root / "tensorrt" / plan.folder.parent.name / plan.folder.name
    shutil.copytree(plan.folder, moved)
    assert {entry.folder: isinstance(entry, Plan) for entry in store.entries()} == {
        plan.folder: True,
        place: False,
        moved: False,
    }
    assert store.read(store.build(wanted, writer())) == CONTENT


# Disks


def fail(monkeypatch: pytest.MonkeyPatch, name: str, code: int, below: Path, call: int = 0) -> None:
    """Let the call with this number, and those after it, of a function of `os` fail for paths below a folder."""
    real = getattr(os, name)
    calls = 0

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        writes = name != "open" or args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if where.startswith(str(below)) and writes:
            calls += 1
            if calls > call:
                raise OSError(code, os.strerror(code), where)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, name, failing)


WRITES = [("mkdir", 0), ("mkdir", 1), ("mkdir", 3), ("open", 0), ("open", 1), *(("fsync", n) for n in range(4))]


@pytest.mark.parametrize(("name", "call"), [*WRITES, ("rename", 0)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failing_disk_is_an_error_that_names_the_place_and_leaves_no_half_plan(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch, name: str, call: int, code: int
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, name, code, store.root, call)
        with pytest.raises(StoreError) as error:
            store.build(sample_key(), writer())
    advice = {
        errno.ENOSPC: "Free some space",
        errno.EROFS: "Make the store writable",
        errno.EIO: "Look at the store and its disk",
    }
    for part in (str(store.root), "cannot be written", os.strerror(code), advice[code], "--store DIR"):
        assert part in str(error.value)
    assert store.entries() == [], "what was said to have failed is not there"
    assert list(store.root.rglob(".*")) == []
    assert store.read(store.build(sample_key(), writer(SMALL))) == SMALL


def test_a_disk_that_is_full_while_the_builder_writes(store: EngineStore) -> None:
    def make(path: Path) -> dict[str, Any]:
        path.write_bytes(CONTENT)
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(CONTENT)
        return {}

    with pytest.raises(StoreError, match=r"No space left on device.*Free some space"):
        store.build(sample_key(), make)
    assert list(store.root.rglob("*.part")) == []
    assert store.entries() == []


def test_a_file_that_the_builder_misses_is_not_the_stores_error(store: EngineStore) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights\.bin"):
        store.build(sample_key(), lambda path: {"": Path("/nowhere/weights.bin").read_bytes()})


def test_a_read_only_store_serves_what_it_has(store: EngineStore, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkdir", "open", "rename", "unlink", "utime", "chmod", "rmdir"):
        fail(monkeypatch, name, errno.EROFS, store.root)
    assert store.build(sample_key(), writer()) == plan
    with store.in_use(store.get(sample_key())):
        assert store.read(plan) == SMALL
    assert store.verify() == [(plan, None)]
    assert store.prune().entries == []
    with pytest.raises(StoreError, match=r"Read-only file system.*Make the store writable"):
        store.build(sample_key(precision="bf16"), writer())
    with pytest.raises(StoreError, match="Read-only file system"):
        store.prune(limit=0)
    assert store.plans() == [plan]


def test_a_store_of_another_user_is_not_taken_for_an_empty_one(
    store: EngineStore, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "lstat", errno.EACCES, store.root)
    with pytest.raises(StoreError, match=r"cannot be read.*Permission denied"):
        store.get(sample_key())


@pytest.mark.parametrize("root", ["/proc/store", "/dev/null/store"])
def test_a_root_that_cannot_be_made(root: str) -> None:
    store = EngineStore(root)
    assert store.entries() == []
    assert store.prune().entries == []
    with pytest.raises(PlanError, match="no plan for graph"):
        store.get(sample_key())
    with pytest.raises(StoreError, match=root):
        store.build(sample_key(), writer())


def test_a_file_in_the_place_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("mine")
    with pytest.raises(StoreError, match="not a folder"):
        EngineStore(tmp_path / "store").build(sample_key(), writer())
    assert (tmp_path / "store").read_text() == "mine"


def orphan(store: EngineStore, digit: str, size: int = 10) -> Path:
    """A runtime cache of a plan that is gone."""
    path = store.root / "runtime-cache" / f"{digit * 32}-sm89.cache"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def test_a_build_stands_though_its_store_cannot_be_pruned(
    store: EngineStore, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache of a plan that is gone, in the folder of another user of the store."""
    stuck = orphan(store, "a")
    fail(monkeypatch, "unlink", errno.EPERM, stuck)
    key = sample_key(precision="bf16")
    built = store.build(key, writer())
    assert store.read(built) == CONTENT
    (line,) = [record for record in caplog.records if record.name == "magicface_rt.engines"]
    assert line.levelname == "WARNING"
    assert f"the plan was built; pruning the store afterwards: engine store {store.root}: {stuck}" in line.message
    assert "Operation not permitted" in line.message


def test_a_build_stands_in_a_store_that_cannot_be_listed(
    store: EngineStore, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise StoreError("engine store: it cannot be read.")

    monkeypatch.setattr(store, "entries", refuse)
    assert store.read(store.build(sample_key(precision="bf16"), writer())) == CONTENT
    assert "it cannot be read" in caplog.text


def test_pruning_goes_on_past_what_cannot_be_removed_and_reports_it(
    store: EngineStore, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, loose = orphan(store, "a"), orphan(store, "b")
    fail(monkeypatch, "unlink", errno.EPERM, stuck)
    with pytest.raises(StoreError, match=re.escape(f"{stuck} cannot be written (Operation not permitted)")):
        store.prune()
    assert not loose.exists()
    faults: list[StoreError] = []
    loose = orphan(store, "b", 20)
    pruned = store.prune(limit=0, on_fault=faults.append)
    assert (pruned.entries, pruned.cache_files, pruned.cache_bytes) == ([plan], 1, 20)
    assert [str(stuck) in str(fault) for fault in faults] == [True]
    assert stuck.exists()
