"""Graphs on the CPU share their working memory, and a Session that is closed leaves none behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicface_rt import Bundle, Session
from magicface_rt.backends.onnxruntime import OnnxRuntime
from magicface_rt.backends.ort_arena import give_back

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="reads resident memory as Linux tells it")

WORKING = 256 * 2**20


def resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sum_of_ones() -> bytes:
    """A model whose working memory is one tensor of `WORKING` bytes."""
    onnx = pytest.importorskip("onnx")
    float32 = onnx.TensorProto.FLOAT
    shape = onnx.numpy_helper.from_array(np.array([WORKING // 4]), "shape")
    nodes = [
        onnx.helper.make_node("Expand", ["x", "shape"], ["many"]),
        onnx.helper.make_node("ReduceSum", ["many"], ["total"], keepdims=0),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "sum_of_ones",
        [onnx.helper.make_tensor_value_info("x", float32, [1])],
        [onnx.helper.make_tensor_value_info("total", float32, [])],
        [shape],
    )
    opset = onnx.helper.make_opsetid("", 18)
    return bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString())


def test_graphs_work_in_the_same_memory_and_give_it_back() -> None:
    backend, model, x = OnnxRuntime("cpu"), sum_of_ones(), {"x": np.ones(1, np.float32)}
    backend.run_model(model, x)  # what is loaded once
    give_back(backend._ort)
    before = resident()
    sessions: list[Any] = [backend._open(model, None, {})[0] for _ in range(3)]
    for session in sessions:
        session.run(None, x)
    while_open = resident() - before
    assert 0.9 * WORKING < while_open < 1.5 * WORKING, "each graph has kept working memory of its own"
    backend.close()
    assert resident() - before < 0.2 * WORKING, "closing the backend has left working memory behind"
    assert sessions[0].run(None, x)[0] == WORKING // 4  # and graphs go on


def test_where_nothing_can_be_given_back_that_is_logged_and_closing_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """What a Session was asked for is done by then, and an error that closed it is to be seen."""
    backend = OnnxRuntime("cpu")
    backend.run_model(sum_of_ones(), {"x": np.ones(1, np.float32)})

    class Short:
        def __getattr__(self, name: str) -> Any:
            return getattr(ort, name)

        def InferenceSession(self, *_: object, **__: object) -> None:  # noqa: N802
            raise RuntimeError("made to fail")

    ort, backend._ort = backend._ort, Short()
    backend.close()
    assert "stays with this process: made to fail" in caplog.text


FORKING = """
import os, signal, threading
import numpy as np
from magicface_rt.backends.onnxruntime import OnnxRuntime
from magicface_rt.backends.ort_arena import registering
from magicface_rt.backends.sum_model import sum_model

def hold():
    with registering():
        holding.set()
        let_go.wait()

holding, let_go = threading.Event(), threading.Event()
holder = threading.Thread(target=hold)
holder.start()
holding.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    OnnxRuntime("cpu", threads=1).run_model(sum_model(), {"x": np.ones(1, np.float32)})
    os._exit(7)
let_go.set()
holder.join()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_while_a_thread_opens_a_graph_opens_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True)
    assert done.returncode == 7, f"it hung: {done.returncode} {done.stderr}"


def test_sessions_that_open_and_close_leave_no_memory(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    weights = (tiny_bundle / "weights.bin").stat().st_size

    def cycle() -> int:
        with Session(bundle, backend="onnxruntime-cpu") as session:
            session.generate("a man", steps=1)
        return resident()

    cycle()
    readings = [cycle() for _ in range(6)]
    # A leak adds up with every cycle; one reading may stand high by memory that the system takes back a moment later.
    # What is far smaller than the weights is found in tests/faults/test_faults_slopes.py.
    grown = np.diff(readings)
    assert np.median(grown) < weights / 16, grown
