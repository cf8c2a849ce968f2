"""Too little memory is said, whichever library finds it, and a Session goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
from threads_requests import HAT, MAN, PROMPT

from magicface_rt import Session
from magicface_rt.bundle import Bundle
from magicface_rt.errors import BackendError, BuildError, DeviceMemoryError, HostMemoryError, InputError, PromptError
from magicface_rt.process import host_memory
from magicface_rt.process.host_memory import _group_limits, as_host_memory_error, shortage
from tests.runtime.drawn_backend import Drawn

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError("Unable to allocate 3.00 TiB for an array"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 1"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        BackendError("graph denoise_step: onnxruntime failed: bad allocation"),
        BuildError("graph denoise_step: tensorrt could not build it. It said: std::bad_alloc"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_shortage_is_told_whichever_library_says_it(raised: Exception) -> None:
    said = r"too little memory on the host: .*Free some"
    with pytest.raises(HostMemoryError, match=said) as caught, as_host_memory_error():
        raise raised
    assert caught.value.exit_code == 3
    assert str(raised).rstrip(".") in str(caught.value)
    wrapped = BackendError("the graph was refused")
    wrapped.__cause__ = raised
    with pytest.raises(HostMemoryError), as_host_memory_error():
        raise wrapped


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("no memory of that"),
        OSError(28, "No space left on device"),
        DeviceMemoryError("graph denoise_step needs 3 MB more"),
        BackendError("graph vae_decoder: onnxruntime failed: an input is missing"),
        RuntimeError("CUDA out of memory"),
        PromptError("the word 'dog' is not in the prompt 'a bad allocation'"),
        InputError("image 'cannot allocate memory.png' does not exist"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_other_failures_stay_what_they_are(raised: Exception) -> None:
    assert shortage(raised) is None
    with pytest.raises(type(raised)) as caught, as_host_memory_error():
        raise raised
    assert caught.value is raised


class Short:
    """One of numpy's functions; the call with that number, from 0, finds no memory."""

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.fails = name, 0, -1
        self._real: Callable[..., Any] = getattr(np, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.fails:
            raise MemoryError("Unable to allocate 3.00 GiB for an array")
        return self._real(*arguments, **named)


def test_a_session_that_ran_out_of_memory_goes_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy finds no memory at one of many places of a request; each time it is said, and the next picture is right."""
    tried = 0
    with Session(bundle, backend=Drawn(), keep="8MiB") as session:

        def ask(short: Short, fails: int = -1, **options: Any) -> np.ndarray:
            session.forget()
            short.calls, short.fails = 0, fails
            with monkeypatch.context() as patch:
                patch.setattr(np, short.name, short)
                return session.generate(PROMPT, [MAN, HAT], **{"steps": 3, "seed": 1, **options}).latents

        for name in ("zeros", "concatenate", "full", "repeat"):
            short = Short(name)
            assert not np.array_equal(ask(short), ask(short, reference_seed=1)), "keys do not show in the latents"
            expected = ask(short)
            for fails in range(0, short.calls, max(1, short.calls // 10)):
                with pytest.raises(HostMemoryError, match="Unable to allocate"):
                    ask(short, fails)
                np.testing.assert_array_equal(ask(short), expected)
                tried += 1
    assert tried >= 20
    figures.tell("memory", "allocations failed in a request", f"{tried}, each said, and the next picture right")


def test_too_little_memory_for_an_image_is_not_the_images_fault(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are read before a graph is bound, in a request and where a concept is prepared by itself."""

    def short(*_: object, **__: object) -> Any:
        raise MemoryError("Unable to allocate 64.0 MB for an image")

    with Session(bundle, backend=Drawn()) as session:
        with monkeypatch.context() as patch:
            patch.setattr("magicface_rt.images.decode", short)
            with pytest.raises(HostMemoryError, match="Unable to allocate 64"):
                session.prepare(MAN, steps=3)
            with pytest.raises(HostMemoryError, match="Unable to allocate 64"):
                session.generate(PROMPT, [MAN], steps=3)
        assert session.prepare(MAN, steps=3).references


@pytest.mark.parametrize(
    "error",
    [
        ValueError("field 'target' is required for NamedExpr"),
        RuntimeError("can't start new thread"),
        SystemError("error return without exception set"),
    ],
    ids=["compiler", "thread", "none"],
)
def test_what_means_too_little_memory_under_a_limit_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_address_limit", list)
    assert shortage(error) is None
    monkeypatch.setattr(host_memory, "_address_limit", lambda: [("limit of addresses (ulimit -v)", 10**6)])
    found = shortage(error)
    assert found is not None
    assert str(error) in str(found)
    assert shortage(ValueError("field 'name' is required for the form")) is None


def test_a_process_that_is_started_has_all_addresses_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limit = 1 << 50
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(host_memory, "_group_limits", list)
    assert host_memory.available_bytes(to_another=True) == limit
    left = host_memory.available_bytes()
    assert left is not None
    assert left < limit - (10 << 20), "what this process takes does not count"


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_are_read(tmp_path: Path, version: int) -> None:
    root, of = tmp_path / "cgroup", tmp_path / "self"
    base = root if version == 2 else root / "memory"
    of.write_text("0::/outer/inner\n" if version == 2 else "3:cpu:/\n4:memory,hugetlb:/outer/inner\n0::/\n")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    none = "max" if version == 2 else str(2**63 - 4096)
    for name, limit, used in (("outer", "1000", "700"), ("outer/inner", none, "500")):
        (base / name).mkdir(parents=True)
        (base / name / names[0]).write_text(f"{limit}\n")
        (base / name / names[1]).write_text(f"{used}\n")
        lines = [f"{prefix}anon 400", f"{prefix}active_file 30", f"{prefix}inactive_file 20"]
        (base / name / "memory.stat").write_text("\n".join(lines))
    assert _group_limits(root, of) == [("control group's memory limit", 1000 - 700 + 30 + 20)]
    (base / "outer" / "memory.stat").write_text("nonsense")
    assert _group_limits(root, of) == []
    assert _group_limits(root, tmp_path / "none") == []
