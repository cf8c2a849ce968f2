"""What is slow in silence: ONNX Runtime takes the CPU where a GPU was asked for and cannot start, or only in part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from magicface_rt import Session
from magicface_rt import backends as backends_module
from magicface_rt.backends import OnnxRuntime, open_backend, why_not
from magicface_rt.backends import onnxruntime as onnxruntime_module
from magicface_rt.backends.onnxruntime import DeviceRunner, import_onnxruntime
from magicface_rt.backends.ort_placement import left_to_the_cpu, record_placement
from magicface_rt.backends.sum_model import sum_model
from magicface_rt.bundle import Bundle
from magicface_rt.errors import BackendError
from tests.runtime.test_session import PROMPT

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Ort:
    """The module onnxruntime as its wheel for GPUs behaves, on a machine where CUDA does not start, or only partly.

    refuse     what CUDA says when a session is opened, "" where it opens; with `of_graphs` only for a CUDA graph
    placement  operators by the provider that they were put on; None before onnxruntime 1.24
    run_error  what the provider raises as it runs
    has_cuda   whether it is the wheel for GPUs at all
    """

    __version__ = "1.32"

    def __init__(
        self,
        *,
        refuse: str = "",
        of_graphs: bool = False,
        run_error: str = "",
        placement: Mapping[str, Sequence[str]] | None = None,
        lies: bool = False,
        has_cuda: bool = True,
    ) -> None:
        self.refuse, self.of_graphs, self.run_error = refuse, of_graphs, run_error
        self.placement, self.lies, self.has_cuda = placement, lies, has_cuda

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU] if self.has_cuda else [CPU]

    def SessionOptions(self) -> Any:  # noqa: N802
        entries: dict[str, str] = {}
        return SimpleNamespace(entries=entries, add_session_config_entry=entries.__setitem__)

    def InferenceSession(  # noqa: N802
        self, model: Any, options: Any, providers: Any = None, *, enable_fallback: int = 1
    ) -> Any:
        (name, settings), *_ = providers
        refuses = self.refuse and (not self.of_graphs or "enable_cuda_graph" in settings)
        if name == CUDA and refuses:
            if not enable_fallback:
                raise RuntimeError(self.refuse)
            print(f"EP Error {self.refuse}\nFalling back to ['{CPU}'] and retrying.")
            name = CPU
        return _Opened(self, CPU if self.lies else name, options, bool(enable_fallback))


class _Opened:
    """An InferenceSession."""

    def __init__(self, ort: Ort, provider: str, options: Any, falls_back: bool) -> None:
        self.ort, self.provider, self.options, self.falls_back = ort, provider, options, falls_back

    def get_providers(self) -> list[str]:
        return [self.provider]

    def io_binding(self) -> None:
        return None

    def run(self, outputs: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.ort.run_error and self.provider == CUDA:
            if not self.falls_back:
                raise RuntimeError(self.ort.run_error)
            print(f"Falling back to ['{CPU}'] and retrying.")
            self.provider = CPU
        return [inputs["x"] + 1]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        if self.ort.placement is None or self.options.entries.get("session.record_ep_graph_assignment_info") != "1":
            raise RuntimeError("not recorded")
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k) for k in kinds])
            for name, kinds in self.ort.placement.items()
        ]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


def use(monkeypatch: pytest.MonkeyPatch, ort: Ort) -> None:
    monkeypatch.setattr(onnxruntime_module, "import_onnxruntime", lambda: ort)
    monkeypatch.setattr(backends_module, "import_onnxruntime", lambda: ort)


def test_a_gpu_that_does_not_start_is_an_error_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "CUDA failure 35: CUDA driver version is insufficient"
    use(monkeypatch, Ort(refuse=reason))
    with (
        Session(bundle, backend="onnxruntime-cuda") as session,
        pytest.raises(BackendError, match=f"onnxruntime-cuda refused .*{reason}"),
    ):
        session.generate(PROMPT, steps=1)
    assert capsys.readouterr().out == "", "it was made anew on the CPU"


def test_a_session_that_says_it_is_on_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    use(monkeypatch, Ort(lies=True))
    with (
        Session(bundle, backend="onnxruntime-cuda") as session,
        pytest.raises(BackendError, match=f"graph text_encoder: onnxruntime fell back to {CPU} instead of {CUDA}"),
    ):
        session.generate(PROMPT, steps=1)


def test_without_cuda_graph_it_is_served_and_said(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, Ort(refuse="not all nodes are on the GPU", of_graphs=True, placement={CUDA: ["Conv"]}))
    assert isinstance(OnnxRuntime("cuda").load(bundle, "denoise_step"), DeviceRunner)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "without CUDA graph: not all nodes are on the GPU" in record.getMessage()


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        ({CUDA: ["Conv", "MatMul"], CPU: ["MatMul", "Shape", "Conv", "Conv"]}, "2 Conv, 1 MatMul"),
        ({CUDA: ["Conv"], CPU: ["Shape", "Gather", "Unsqueeze"]}, ""),
    ],
    ids=["a part", "shapes"],
)
def test_a_part_on_the_cpu_is_said(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Bundle,
    caplog: pytest.LogCaptureFixture,
    placement: Mapping[str, Sequence[str]],
    said: str,
) -> None:
    use(monkeypatch, Ort(placement=placement))
    assert isinstance(OnnxRuntime("cuda", cuda_graphs=False).load(bundle, "denoise_step"), DeviceRunner)
    expected = [f"onnxruntime-cuda computes a part of graph denoise_step on the CPU, and is slow there: {said}"]
    assert [record.getMessage() for record in caplog.records] == (expected if said else [])


def test_that_an_older_onnxruntime_does_not_know_its_placement_is_said_once(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    ort = Ort(placement=None)
    ort.__version__ = "1.23.2"
    use(monkeypatch, ort)
    backend = OnnxRuntime("cuda", cuda_graphs=False)
    for graph in ("text_encoder", "denoise_step"):
        backend.load(bundle, graph)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "onnxruntime 1.23.2 does not say what it leaves to the CPU" in record.getMessage()


def test_a_gpu_that_fails_as_it_runs_is_not_taken_for_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe computes 1 + 1, which the CPU can do as well."""
    use(monkeypatch, Ort(run_error="CUBLAS failure 1"))
    assert "CUBLAS failure 1" in why_not("onnxruntime-cuda")
    use(monkeypatch, Ort())
    assert why_not("onnxruntime-cuda") == ""


@pytest.mark.parametrize("name", ["auto", "onnxruntime"])
def test_a_choice_of_the_cpu_where_a_gpu_is_expected_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    use(monkeypatch, Ort(has_cuda=False))
    assert open_backend(name).name == "onnxruntime-cpu"
    assert not caplog.records, "with the wheel for CPUs nobody expects a GPU"
    use(monkeypatch, Ort(refuse="CUDA failure 35"))
    assert open_backend(name).name == "onnxruntime-cpu"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(rf"backend '{name}': onnxruntime-cuda is not used, .*the CPU computes: .*35", record.getMessage())


def test_the_stand_in_does_what_onnxruntime_does(capsys: pytest.CaptureFixture[str]) -> None:
    """The real one: a session whose provider fails is made anew on the CPU unless that is forbidden; placement."""
    ort = import_onnxruntime()
    wrong = [(CPU, 5)]  # options are a dict
    options = ort.SessionOptions()
    record_placement(options)
    for allowed in (0, 1):
        try:
            session = ort.InferenceSession(sum_model(), options, providers=wrong, enable_fallback=allowed)
        except (ValueError, RuntimeError):
            assert not allowed
            assert capsys.readouterr().out == ""
        else:
            assert allowed
            assert "Falling back to" in capsys.readouterr().out
    assert session.get_providers() == [CPU]
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        assert left_to_the_cpu(session) is None
        return
    kinds = [n.op_type for p in session.get_provider_graph_assignment_info() for n in p.get_nodes()]
    assert kinds == ["Add"]
    assert left_to_the_cpu(session) == ""
