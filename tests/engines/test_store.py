"""The engine store: finding, reading, explaining, building once, and pruning."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from store_worker import CONTENT, sample_key, writer

from magicface_rt.engines import layout, locking
from magicface_rt.engines.locking import FileLock
from magicface_rt.engines.plan_key import SCHEMA, PlanKey
from magicface_rt.engines.store import Damaged, EngineStore, Plan
from magicface_rt.errors import PlanError, StoreError
from magicface_rt.files import atomic_files


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


def variants(count: int) -> list[PlanKey]:
    return [sample_key(flavour_version=f"1.{n}") for n in range(count)]


def files(store: EngineStore) -> list[str]:
    """Everything below the root but the folders of flavours and first digits."""
    return sorted(p.name for p in store.root.rglob("*") if len(p.relative_to(store.root).parts) > 2)


def used_at(store: EngineStore, plan: Plan, seconds: int) -> None:
    os.utime(plan.folder, (seconds, seconds))


# Finding and reading


def test_a_built_plan_is_found_again_with_its_facts(store: EngineStore) -> None:
    key = sample_key()
    assert store.find(key) is None
    built = store.build(key, writer(seconds=0, scratch_bytes=3, gate={"fused": 16}))
    again = EngineStore(store.root).get(sample_key())
    assert again == built
    assert (again.bytes, again.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert again.facts == {"scratch_bytes": 3, "gate": {"fused": 16}}
    assert again.key == key
    assert store.read(again) == CONTENT
    assert again.path == store.root / "tensorrt-rtx" / key.digest[:2] / key.digest / "plan"
    assert files(store) == sorted([key.digest, "plan", "manifest.json"])


def test_facts_come_back_as_json_has_them(store: EngineStore) -> None:
    facts = {"at": {10: "ten", 9: "nine"}, "pair": (1, 2.5), "name": "größer"}
    assert store.build(sample_key(), lambda path: [path.write_bytes(b"x"), facts][1]).facts == {
        "at": {"9": "nine", "10": "ten"},
        "pair": [1, 2.5],
        "name": "größer",
    }
    assert store.read(store.get(sample_key())) == b"x"


def test_the_store_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = EngineStore(tmp_path / "above" / "store")
        plan = store.build(sample_key(), writer())
    finally:
        os.umask(before)
    paths = [store.root, *store.root.rglob("*")]
    assert len(paths) == 6
    modes = {stat.S_IMODE(p.lstat().st_mode) for p in paths if p.is_dir()}
    assert modes == {0o700}
    assert {stat.S_IMODE(p.lstat().st_mode) for p in paths if p.is_file()} == {0o600}
    assert plan.path in paths


def test_a_missing_plan_is_an_error_that_says_what_to_type(store: EngineStore) -> None:
    with pytest.raises(PlanError) as error:
        store.get(sample_key())
    for part in (str(store.root), "denoise_step", "tensorrt-rtx 1.7.1.116", "holds no plan of this graph"):
        assert part in str(error.value)
    assert f"`magicface-rt build BUNDLE --flavour tensorrt-rtx --store {store.root}`" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"graph_hash": "f" * 64}, "graph_hash", "the bundle changed"),
        ({"flavour_version": "1.8.0"}, "flavour_version", "another version of the flavour"),
        ({"precision": "bf16"}, "precision", "another precision"),
        ({"compute_capabilities": ("12.0",)}, "compute_capabilities", "other GPUs"),
        ({"builder_options": {}}, "builder_options", "another builder option"),
        ({"schema": SCHEMA + 1}, "schema", "keeps plans differently"),
    ],
)
def test_a_stale_plan_is_refused_by_the_field(
    store: EngineStore, changes: dict[str, Any], field: str, reason: str
) -> None:
    store.build(sample_key(), writer())
    wanted = sample_key(**changes)
    assert store.find(wanted) is None
    with pytest.raises(PlanError, match=rf"stale: {field}.*{reason}"):
        store.get(wanted)
    ((plan, differences),) = store.why(wanted)
    assert plan.key == sample_key()
    assert {d.field.partition(".")[0] for d in differences} == {field}


def test_why_puts_the_closest_plan_first_and_leaves_other_graphs_out(store: EngineStore) -> None:
    near = sample_key(precision="bf16")
    far = sample_key(precision="bf16", flavour_version="1.6", graph_hash="a" * 64)
    other_flavour = sample_key(precision="bf16", flavour="tensorrt")
    for key in (far, other_flavour, near, sample_key(graph="vae_decoder")):
        store.build(key, writer())
    found = store.why(sample_key())
    assert [plan.key for plan, _ in found] == [near, other_flavour, far]
    assert [len(differences) for _, differences in found] == [1, 2, 3]
    with pytest.raises(PlanError, match=r"stale: precision \(another precision\): found bf16, expected fp16\. Build"):
        store.get(sample_key())
    assert store.why(near)[0][1] == []


def test_many_differences_are_cut_short(store: EngineStore) -> None:
    store.build(sample_key(builder_options={str(n): n for n in range(9)}), writer())
    with pytest.raises(PlanError, match="and 8 more"):
        store.get(sample_key())


# Building


def test_a_sound_plan_is_not_built_again(store: EngineStore) -> None:
    built = store.build(sample_key(), writer())

    def make(_: Path) -> dict[str, Any]:
        raise AssertionError("built again")

    assert store.build(sample_key(), make) == built


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_an_error_of_the_builder_passes_and_leaves_nothing(store: EngineStore, kind: type[BaseException]) -> None:
    def make(path: Path) -> dict[str, Any]:
        path.write_bytes(CONTENT[:100])
        raise kind("stopped")

    with pytest.raises(kind, match="stopped"):
        store.build(sample_key(), make)
    assert files(store) == []
    assert store.read(store.build(sample_key(), writer())) == CONTENT


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: {}, "wrote no plan"),
        (lambda path: [path.write_bytes(b""), {}][1], "wrote no plan"),
        (lambda path: [path.symlink_to("/bin/sh"), {}][1], "wrote no plan"),
        (lambda path: [path.write_bytes(b"x"), {"ms": float("nan")}][1], "JSON cannot hold the facts"),
        (lambda path: [path.write_bytes(b"x"), {"object": object()}][1], "JSON cannot hold the facts"),
        (lambda path: [path.write_bytes(b"x"), None][1], "JSON cannot hold the facts"),
        (lambda path: [path.write_bytes(b"x"), {"log": "x" * (1 << 22)}][1], "expected at most"),
    ],
)
def test_a_builder_that_breaks_its_contract_is_told(store: EngineStore, make: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.build(sample_key(), make)
    assert files(store) == []


def test_only_the_plan_file_is_kept(store: EngineStore) -> None:
    def make(path: Path) -> dict[str, Any]:
        (path.parent / "scratch").mkdir()
        (path.parent / "scratch" / "file").write_bytes(b"x")
        (path.parent / "link").symlink_to(Path(__file__))
        return dict(writer()(path))

    plan = store.build(sample_key(), make)
    assert sorted(p.name for p in plan.folder.iterdir()) == ["manifest.json", "plan"]
    assert Path(__file__).is_file()


def test_threads_of_one_process_build_a_plan_once(store: EngineStore) -> None:
    made: list[int] = []
    started = threading.Barrier(4)

    def make(path: Path) -> dict[str, Any]:
        made.append(1)
        return dict(writer(seconds=0.1)(path))

    plans: list[Plan] = []

    def work() -> None:
        started.wait()
        plans.append(EngineStore(store.root).build(sample_key(), make))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(plans) == 4
    assert files(store) == sorted([sample_key().digest, "plan", "manifest.json"])


def test_a_wait_that_is_too_long_is_an_error_and_is_announced_once(store: EngineStore) -> None:
    folder = store.build(sample_key(), writer()).folder
    (folder / "plan").write_bytes(b"damaged")
    waits: list[int] = []
    lock = FileLock.acquire(layout.lock_path(folder))
    assert lock is not None
    with lock, pytest.raises(StoreError, match=r"another process builds the same plan.*within 0\.2 s"):
        store.build(sample_key(), writer(), timeout=0.2, on_wait=lambda: waits.append(1))
    assert waits == [1]
    assert store.read(store.build(sample_key(), writer(), on_wait=lambda: waits.append(1))) == CONTENT
    assert waits == [1]


# Locks


def test_the_lock_of_a_removed_file_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a waiter's open and its lock the holder lets go and another process takes a new file's lock."""
    path = tmp_path / "lock"
    first = FileLock.acquire(path)
    assert first is not None
    third: list[FileLock | None] = []
    real = locking._open

    def open_slowly(where: Path, flags: int) -> Any:
        stream = real(where, flags)
        if not third:
            third.append(None)
            first.release()
            third[0] = FileLock.acquire(path)
        return stream

    monkeypatch.setattr(locking, "_open", open_slowly)
    assert FileLock.acquire(path, timeout=0) is None
    assert third[0] is not None
    third[0].release()
    assert not path.exists()


def test_releasing_a_lock_twice_leaves_the_next_holder_alone(tmp_path: Path) -> None:
    first = FileLock.acquire(tmp_path / "lock")
    assert first is not None
    first.release()
    second = FileLock.acquire(tmp_path / "lock")
    assert second is not None
    first.release()
    assert FileLock.acquire(tmp_path / "lock", timeout=0) is None
    second.release()


def test_a_holder_whose_file_was_taken_away_does_not_remove_its_successors(tmp_path: Path) -> None:
    """Someone cleans up by hand while the lock is held. The next one to come must still be seen by those after it."""
    path = tmp_path / "lock"
    first = FileLock.acquire(path)
    assert first is not None
    path.unlink()
    second = FileLock.acquire(path)
    assert second is not None
    first.release()
    assert FileLock.acquire(path, timeout=0) is None
    second.release()


def test_without_flock_reading_works_and_building_says_why(store: EngineStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = store.build(sample_key(), writer())
    monkeypatch.setattr(locking, "fcntl", None)
    with store.in_use(plan):
        assert store.read(store.get(sample_key())) == CONTENT
    with pytest.raises(StoreError, match="no flock"):
        store.build(sample_key(precision="bf16"), writer())
    with pytest.raises(StoreError, match="no flock"):
        store.prune(limit=0)
    assert store.plans() == [plan]


# Pruning


def test_the_least_recently_used_go_first(store: EngineStore) -> None:
    plans = [store.build(key, writer()) for key in variants(4)]
    for seconds, plan in zip((400, 100, 300, 200), plans, strict=True):
        used_at(store, plan, seconds)
    size = store.size(plans[0])
    assert size > len(CONTENT)
    assert store.prune(limit=2 * size + 10).entries == [plans[1], plans[3]]
    assert store.plans() == sorted([plans[0], plans[2]], key=lambda plan: plan.folder)
    assert store.prune(limit=2 * size + 10).entries == []
    assert store.prune().entries == []
    assert store.prune(limit=0).entries == [plans[2], plans[0]]
    assert files(store) == []


def test_reading_and_leasing_count_as_use_and_rewrite_nothing(store: EngineStore) -> None:
    read, leased, found = (store.build(key, writer()) for key in variants(3))
    for plan in (read, leased, found):
        used_at(store, plan, 100)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.root.rglob("*") if path.is_file()}
    store.read(read)
    store.in_use(leased).close()
    store.find(found.key)
    assert store.last_used(found) == 100
    assert store.last_used(read) > 100
    assert store.prune(limit=2 * store.size(read)).entries == [found]
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.root.rglob("*") if path.is_file()}
    assert after.items() <= before.items()
    assert len(after) == 4


def test_the_limit_is_kept_after_a_build_but_not_at_the_cost_of_that_plan(tmp_path: Path) -> None:
    store = EngineStore(tmp_path, size_limit=len(CONTENT) * 5 // 2)
    plans = [store.build(key, writer()) for key in variants(3)]
    assert {plan.key for plan in store.plans()} == {plans[1].key, plans[2].key}
    tiny = EngineStore(tmp_path, size_limit=1)
    newest = tiny.build(variants(4)[3], writer())
    assert tiny.plans() == [newest]
    assert tiny.read(newest) == CONTENT


def test_a_plan_in_use_or_to_be_kept_or_being_built_stays(store: EngineStore) -> None:
    used, kept, building, idle = (store.build(key, writer()) for key in variants(4))
    lease = store.in_use(used)
    lock = FileLock.acquire(layout.lock_path(building.folder))
    assert lock is not None
    with store.in_use(used), lock:
        assert store.prune(limit=0, keep=[kept.key]).entries == [idle]
    assert store.prune(limit=0, keep=[kept.key]).entries == [building]
    assert not store.remove(used)
    lease.close()
    lease.close()
    assert store.remove(used)
    assert not store.remove(used)
    assert store.plans() == [kept]


def test_a_plan_that_was_pruned_is_neither_leased_nor_read(store: EngineStore) -> None:
    plan = store.build(sample_key(), writer())
    store.prune(limit=0)
    with pytest.raises(PlanError, match=r"was removed from the store\. Build it: `magicface-rt build"):
        store.in_use(plan)
    with pytest.raises(PlanError, match="was removed from the store"):
        store.read(plan)


def test_a_lease_that_comes_while_a_plan_is_removed_is_refused(
    store: EngineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader opens the plan, the pruner removes it, then the reader gets its lock: on a file that is gone."""
    plan = store.build(sample_key(), writer())
    real = locking._open

    def open_slowly(where: Path, flags: int) -> Any:
        stream = real(where, flags)
        monkeypatch.setattr(locking, "_open", real)
        assert store.remove(plan)
        return stream

    monkeypatch.setattr(locking, "_open", open_slowly)
    with pytest.raises(PlanError, match="was removed"):
        store.in_use(plan)


def test_what_else_is_in_the_folder_is_left_alone(store: EngineStore) -> None:
    plan = store.build(sample_key(), writer())
    strangers = [store.root / "timing.cache", plan.folder.parent / "notes", store.root / "jit" / "aa" / "cache"]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert store.entries() == [plan]
    assert store.prune(limit=0).entries == [plan]
    assert all(path.read_text() == "mine" for path in strangers)


def test_damaged_entries_go_before_sound_ones(store: EngineStore) -> None:
    plans = [store.build(key, writer()) for key in variants(2)]
    used_at(store, plans[0], 100)
    plans[1].path.write_bytes(b"")
    (removed,) = store.prune(limit=store.size(plans[0])).entries
    assert isinstance(removed, Damaged)
    assert removed.folder == plans[1].folder
    assert store.plans() == [plans[0]]


# Caches beside the plans

ORT_CACHE = f"onnxruntime-tensorrt/{'5' * 64}/TensorrtExecutionProvider"


def cache(store: EngineStore, name: str, count: int, age: float = 0) -> Path:
    path = store.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(count))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_runtime_cache_goes_with_its_plan(store: EngineStore) -> None:
    plan = store.build(sample_key(), writer(seconds=0))
    mine = cache(store, f"runtime-cache/{plan.key.digest[:32]}-sm89.cache", 10)
    orphan = cache(store, f"runtime-cache/{'0' * 32}-sm89.cache", 10)
    store.prune()
    assert mine.exists()
    assert not orphan.exists()
    store.prune(0)
    store.prune()
    assert not mine.exists()


@pytest.mark.skipif(os.name == "nt", reason="needs locks")
@pytest.mark.parametrize("name", ["timing-caches/tensorrt-10.0-9.0.bin", f"runtime-cache/{'0' * 32}-sm89.cache"])
def test_what_killed_processes_left_of_a_cache_goes_and_what_is_being_written_stays(
    store: EngineStore, name: str
) -> None:
    written = store.root / name
    left = cache(store, os.fspath(written.with_name(f".{written.name}.{'0' * 32}.part")), 10)
    other = cache(store, os.fspath(written.with_name(f".{written.stem}.1{written.suffix}.{'0' * 32}.part")), 10)
    foreign = cache(store, os.fspath(written.with_name(f".other.{'0' * 32}.part")), 10)
    with atomic_files.temporary_sibling(written) as part:
        assert not left.exists(), "whoever writes the same removes it"
        part.write_bytes(bytes(1000))
        assert store.prune(0).entries == []
        assert not other.exists()
        assert foreign.exists()
        atomic_files.replace_into_place(part, written)
    assert written.stat().st_size == 1000


def test_caches_count_and_go_before_plans(store: EngineStore) -> None:
    plan = store.build(sample_key(), writer(seconds=0))
    old = cache(store, f"{ORT_CACHE}_TRTKernel_graph_0_0_sm89.engine", 1000, age=100)
    new = cache(store, "timing-caches/tensorrt-10.0-9.0.bin", 1000)
    assert store.cache_size() == 2000
    pruned = store.prune(store.size(plan) + 1500)
    assert (pruned.entries, pruned.cache_files, pruned.cache_bytes) == ([], 1, 1000)
    assert not old.exists()
    assert new.exists()
    assert store.prune(store.size(plan)).entries == []
    assert not new.exists()
    assert store.find(plan.key) is not None


def test_only_files_that_the_sdk_or_onnx_runtime_made_are_caches(store: EngineStore) -> None:
    """ONNX Runtime's own releases unpack into `onnxruntime-linux-...`, and folders may have the names of others'."""
    store.build(sample_key(), writer())
    digest = "5" * 64
    foreign = [
        "onnxruntime-linux-x64-gpu-1.23.2/lib/libonnxruntime.so",
        "onnxruntime-x/a.engine",
        f"onnxruntime-x/{digest}/TensorrtExecutionProvider_TRTKernel_graph_0.engine",
        "onnxruntime-tensorrt/old.engine",
        f"onnxruntime-tensorrt/{digest}/notes.txt",
        f"onnxruntime-tensorrt/{digest}/deeper/TensorrtExecutionProvider_TRTKernel_graph_0.engine",
        "onnxruntime-tensorrt/mine/TensorrtExecutionProvider_TRTKernel_graph_0.engine",
        f"onnxruntime-nv-tensorrt-rtx/{digest}/TensorrtExecutionProvider_TRTKernel_graph_0.engine",
        "runtime-cache/mine.cache",
        f"runtime-cache/{digest}/{digest[:32]}-sm89.cache",
        f"runtime-cache/{digest[:32]}-sm89.txt",
        "timing-caches/mine.bin",
        "timing-caches/old/tensorrt-10.0-9.0.bin",
    ]
    made = [
        f"onnxruntime-tensorrt/{digest}/TensorrtExecutionProvider_TRTKernel_graph_main_0_0_sm89.engine",
        f"onnxruntime-tensorrt/{digest}/TensorrtExecutionProvider_TRTKernel_graph_main_0_0_sm89.profile",
        f"onnxruntime-nv-tensorrt-rtx/{digest}/NvTensorRTRTXExecutionProvider_TRTKernel_graph_main_0_0",
        f"runtime-cache/{digest[:32]}-sm8.9-driver13000-1.7.1.116.cache",
        "timing-caches/tensorrt-rtx-1.7.1.116-none.bin",
    ]
    strangers = [cache(store, name, 1000, age=1000) for name in foreign]
    caches = [cache(store, name, 10) for name in made]
    assert store.cache_size() == 10 * len(caches)
    pruned = store.prune(limit=0)
    assert (pruned.cache_files, pruned.cache_bytes) == (len(caches), 10 * len(caches))
    assert [path for path in strangers if not path.exists()] == []
    assert [path for path in caches if path.exists()] == []


@pytest.mark.parametrize("linked", ["onnxruntime-tensorrt", f"onnxruntime-tensorrt/{'5' * 64}", "timing-caches"])
def test_a_cache_is_not_looked_for_behind_a_link(store: EngineStore, linked: str) -> None:
    store.build(sample_key(), writer())
    paths = [
        cache(store, f"{ORT_CACHE}_TRTKernel_graph_0_0_sm89.engine", 10),
        cache(store, "timing-caches/tensorrt-10.0-9.0.bin", 10),
    ]
    link, elsewhere = store.root / linked, store.root.parent / "elsewhere"
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    behind = [path for path in paths if path.is_relative_to(link)]
    store.prune(limit=0)
    assert all(path.exists() for path in behind)
    assert not any(path.exists() for path in paths if path not in behind)


@pytest.mark.parametrize("flavour", ["data", "sha256", "tensorflow"])
def test_files_by_digest_in_a_folder_of_no_flavour_are_not_plans(store: EngineStore, flavour: str) -> None:
    """Other programs keep files in `data/<two digits>/<digest>` too."""
    store.build(sample_key(), writer())
    shard = store.root / flavour / "ab"
    mine = [shard / ("ab" * 32), shard / ("ac" * 32) / "data", shard / f".{'ab' * 32}.{'0' * 32}.part"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert len(store.entries()) == 1
    assert len(store.prune(limit=0).entries) == 1
    assert all(path.read_text() == "mine" for path in mine)


def test_a_folder_that_is_no_store_is_named_and_left_alone(tmp_path: Path) -> None:
    for name in ("", "nowhere"):
        assert EngineStore(tmp_path / name).prune(limit=0).entries == [], "an empty or missing folder is a new store"
    mine = cache(EngineStore(tmp_path), "onnxruntime-linux-x64-gpu-1.23.2/lib/libonnxruntime.so", 10, age=100)
    cache(EngineStore(tmp_path), "tensorrt", 10)  # a file, where a store would have a folder
    with pytest.raises(StoreError, match=r"is not one.*'onnxruntime-linux-x64-gpu-1\.23\.2', 'tensorrt', expected"):
        EngineStore(tmp_path).prune(limit=0)
    assert mine.exists()
    for name in ("lost+found", ".snapshot"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    assert EngineStore(tmp_path / "disk").prune(limit=0).entries == [], "an empty disk is a new store"
    plan = EngineStore(tmp_path / "new").build(sample_key(), writer())
    EngineStore(tmp_path / "new").prune(limit=0)
    assert not plan.folder.exists()
    assert EngineStore(tmp_path / "new").prune(limit=0).entries == [], "a store without plans is one"
