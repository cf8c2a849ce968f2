"""`build` and `engines`: plans of the tiny bundle's smallest graph, from the command line."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")

from magicface_rt.cli import main
from magicface_rt.cli.build import _watched
from magicface_rt.engines import caches
from magicface_rt.engines.store import EngineStore, Plan
from magicface_rt.errors import OptionError
from magicface_rt.values.sizes import parse_size
from tests.engines.store_worker import sample_key, writer

TARGET = ["--target", "rtx-4090"]


@pytest.fixture(scope="module")
def built(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store with a plan of the text encoder, and what `build` said of it."""
    folder = tmp_path_factory.mktemp("engines")
    said = folder / "build.json"
    arguments = ["build", str(tiny_bundle), "--store", str(folder / "store"), "--graph", "text_encoder", *TARGET]
    assert main([*arguments, "--json", str(said)]) == 0
    return folder / "store", json.loads(said.read_text())


@pytest.fixture
def store(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built[0], tmp_path / "store"))


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main([*arguments, "--json", "-"])
    return code, json.loads(capsys.readouterr().out)


def test_build_says_what_it_made(built: tuple[Path, dict[str, Any]]) -> None:
    store, said = built
    (plan,) = said["plans"]
    assert said["target"] == "rtx-4090"
    assert plan["graph"] == "text_encoder"
    assert plan["compute_capabilities"] == ["8.9"]
    assert Path(plan["path"]).stat().st_size == plan["bytes"]
    assert Path(plan["path"]).is_relative_to(store)
    assert plan["facts"]["gate"]["verdict"] == "fine"
    assert plan["facts"]["gate"]["scratch_bytes"] > 0
    assert said["peak_host_bytes"] > 10**7


def test_a_limit_below_what_is_built_is_said_and_removes_none_of_it(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_one(bundle: object, graph: str, flavour: object, target: object, store: EngineStore, **_: object) -> Plan:
        gate = {"fused": 0, "expected": 0, "scratch_bytes": None, "verdict": "fine"}
        return store.build(sample_key(graph=graph), writer(bytes(100_000), gate=gate))

    monkeypatch.setattr("magicface_rt.engines.builder.build_plan", build_one)
    build = ["build", str(tiny_bundle), "--store", str(tmp_path), *TARGET]
    code, said = outcome(capsys, *build, "--limit", "250kB")
    assert code == 0
    assert len(said["plans"]) == 5
    assert all(Path(plan["path"]).is_file() for plan in said["plans"])
    assert main([*build, "--limit", "250kB"]) == 0
    assert "more than --limit 244.1 KiB: the plans of this build, and those in use" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main([*build, "--limit", "1MB"]) == 0
    assert "more than --limit" not in capsys.readouterr().err


def test_list_verify_and_why(store: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, listed = outcome(capsys, "engines", "list", "--store", str(store))
    assert code == 0
    assert [plan["graph"] for plan in listed["plans"]] == ["text_encoder"]
    assert outcome(capsys, "engines", "verify", "--store", str(store))[0] == 0
    code, said = outcome(capsys, "engines", "why", str(tiny_bundle), "--store", str(store), *TARGET)
    assert code == 1  # the other graphs have no plan
    assert said["graphs"]["text_encoder"]["serves"]
    assert said["graphs"]["denoise_step"]["serves"] is None


def test_why_names_the_field_by_which_a_plan_is_stale(
    store: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engines", "why", str(tiny_bundle), "--store", str(store), "--target", "turing"]) == 1
    said = capsys.readouterr().out
    assert 'compute_capabilities (made for other GPUs): found ["8.9"], expected ["7.5"]' in said
    assert "magicface-rt build" in said


def test_a_damaged_plan_is_told_and_pruned(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = next(store.rglob("plan"))
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    code, said = outcome(capsys, "engines", "verify", "--store", str(store))
    assert code == 1
    assert said["entries"][0]["fault"]
    code, said = outcome(capsys, "engines", "prune", "--store", str(store), "--limit", "0")
    assert code == 0
    assert len(said["removed"]) == 1
    assert said["bytes"] == 0


def test_prune_says_which_caches_it_removed_and_what_it_could_not_remove(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [store / "runtime-cache" / f"{digit * 32}-sm89.cache" for digit in "ab"]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(bytes(1000))
    real = caches.remove

    def remove(path: Path) -> None:
        if path == paths[0]:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path)

    monkeypatch.setattr(caches, "remove", remove)
    arguments = ["engines", "prune", "--store", str(store), "--limit", "1GiB"]
    code, said = outcome(capsys, *arguments)
    assert code == 2
    assert (said["removed"], said["removed_cache_files"], said["removed_cache_bytes"]) == ([], 1, 1000)
    assert said["cache_bytes"] == 1000
    (fault,) = said["faults"]
    assert str(paths[0]) in fault
    assert [path.exists() for path in paths] == [True, False]
    monkeypatch.undo()
    assert main(arguments) == 0
    assert "0 plans and 1 cache files (1000 B) removed" in capsys.readouterr().out
    assert not paths[0].exists()


def test_a_folder_that_is_no_store_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = tmp_path / "onnxruntime-linux-x64-gpu-1.23.2" / "libonnxruntime.so"
    library.parent.mkdir()
    library.write_bytes(bytes(1000))
    for verb in (["list"], ["verify"], ["prune", "--limit", "0"]):
        assert main(["engines", *verb, "--store", str(tmp_path)]) == 2
        assert "'onnxruntime-linux-x64-gpu-1.23.2'" in capsys.readouterr().err
    assert library.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["engines", "list", "--store", "{}/nowhere"], 2, "no such folder"),
        (["engines", "prune", "--store", "{}", "--limit", "much"], 2, "'much', expected a size"),
        (["build", "{}/nowhere", "--store", "{}/s"], 2, "no such folder"),
        (["build", "{}", "--store", "{}/s", "--flavour", "tensorflow"], 2, "expected tensorrt or tensorrt-rtx"),
        (["build", "{}", "--store", "{}/s", "--target", "rtx-5090"], 2, "'rtx-5090' is not known"),
        (["build", "{}", "--store", "{}/s", "--target", "h100"], 2, "h100 is for tensorrt"),
        (["build", "{}", "--store", "{}/s", "--limit", "-1"], 2, "--limit is '-1'"),
    ],
)
def test_what_cannot_be_used_is_told(
    tmp_path: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(tmp_path) for argument in arguments]) == code
    found = capsys.readouterr().err
    assert said in found
    assert found.startswith("error: ")
    assert not (tmp_path / "s").exists()


def test_an_unknown_graph_is_told_before_anything_is_built(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(tiny_bundle), "--store", str(tmp_path / "s"), "--graph", "denoiser"]
    assert main(arguments) == 2
    assert "no graph 'denoiser'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text, "--limit") for text in ("1024", "4GiB", "1.5 kB", "2mb")] == [
        1024,
        4 << 30,
        1500,
        2 * 10**6,
    ]
    for text in ("", "GiB", "4 apples", "-4GiB"):
        with pytest.raises(OptionError, match="--limit"):
            parse_size(text, "--limit")


def test_doctor_says_that_plans_can_be_built_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = outcome(capsys, "doctor")
    assert code == 0
    assert found["build"]["works"]
    assert found["versions"]["tensorrt-rtx"]
    for backend in found["backends"]:
        assert backend["works"] or (backend["found"] and backend["command"]), backend


def test_a_build_that_is_interrupted_as_its_thread_starts_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def make(advance: Callable[[str, int, int], bool]) -> Any:
        told.append(advance("building", 0, 1))
        raise AssertionError("told to stop")

    real = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        """As Thread.start, where Ctrl-C comes when the thread has begun."""
        if thread.name == "build x":
            threads.append(thread)
            monkeypatch.undo()
            real(thread)
            raise KeyboardInterrupt
        real(thread)

    threads: list[threading.Thread] = []
    hold = threading.Lock()
    hold.acquire()

    def held(advance: Callable[[str, int, int], bool]) -> Any:
        with hold:
            return make(advance)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    threading.Timer(0.5, hold.release).start()
    with pytest.raises(KeyboardInterrupt):
        _watched("x", held)
    threads[0].join(30)
    assert told == [False], "it went on with the build"
