"""A machine's limits, measured: multiply-adds of a large matrix product, bytes of a large copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Peaks:
    """flops: float32 multiply-adds by a large matrix product, 2 for each, per second; bytes_per_second: of a copy much
    larger than the caches, what is read and what is written counted; where: the device that was measured; by_library:
    the same flops by each library that was tried."""

    flops: float
    bytes_per_second: float
    where: str
    by_library: Mapping[str, float] = field(default_factory=dict)


def peaks_of(name: str) -> Peaks | None:
    """Of "cpu", or "cuda DTYPE"; None where torch is not there, or sees no GPU."""
    if name == "cpu":
        return measure_peaks()
    try:
        return _measure_cuda_peaks(name.partition(" ")[2])
    except (ImportError, RuntimeError, AssertionError):
        return None


def measure_peaks(size: int = 2048, megabytes: int = 256) -> Peaks:
    """Of the CPU, the best of a few: what the machine can do, not what it did on average. Takes seconds.

    The matrix product is that of the fastest library here: one whose kernels do not know the processor would set a
    limit that others pass.
    """
    found = {name: _best(work, 4) for name, work in _products(size).items()}
    fastest = min(found, key=found.__getitem__)
    source = np.ones(megabytes << 18, np.float32)
    target = np.empty_like(source)
    copying = _best(lambda: np.copyto(target, source), 4)
    flops = {name: 2 * size**3 / seconds for name, seconds in found.items()}
    return Peaks(flops[fastest], 2 * source.nbytes / copying, f"cpu, float32 ({fastest})", flops)


def _products(size: int) -> dict[str, Callable[[], object]]:
    """A product of two float32 matrices of that size, by each library that is installed."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    b, out = a.T.copy(), np.empty_like(a)
    found: dict[str, Callable[[], object]] = {"numpy": lambda: np.matmul(a, b, out=out)}
    with contextlib.suppress(ImportError):
        import torch

        x, y = torch.from_numpy(a), torch.from_numpy(b)
        found["torch"] = lambda: torch.matmul(x, y)
    with contextlib.suppress(ImportError):
        import onnxruntime
        from onnx import TensorProto, helper

        names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "abc"]
        graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", names[:2], names[2:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found["onnxruntime"] = lambda: session.run(None, {"a": a, "b": b})
    return found


def _measure_cuda_peaks(dtype: str) -> Peaks:
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, dtype))
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)

    def timed(work: Any) -> float:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return _best(run, 5)

    seconds = timed(lambda: torch.matmul(a, a))
    copying = timed(lambda: target.copy_(source))
    name = torch.cuda.get_device_name()
    return Peaks(2 * 8192**3 / seconds, 2 * source.numel() * 4 / copying, f"{name}, {dtype} (torch)")


def _best(work: Any, times: int) -> float:
    work()
    found = []
    for _ in range(times):
        start = perf_counter()
        work()
        found.append(perf_counter() - start)
    return min(found)
