"""Measure a machine's peaks: multiply-adds of a large matrix product, bytes of a large copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from magicface_rt.process.cores import cores
from magicface_rt.process.host_memory import shortage
from magicface_rt.process.interrupts import reraise_if_interrupt


@dataclass(frozen=True)
class Peaks:
    """What a device can do.

    flops: multiply-adds of a large matrix product, 2 for each, per second; bytes_per_second: read and written by a copy
    much larger than the caches; where: the device and dtype that were measured; by_library: the flops of each library
    that was tried.
    """

    flops: float
    bytes_per_second: float
    where: str
    by_library: Mapping[str, float] = field(default_factory=dict)


def peaks_of(name: str, threads: int = 0) -> Peaks | None:
    """Measure "cpu", with `threads` threads (0 for one on each core), or "cuda DTYPE".

    Returns None for the latter if torch is not installed or sees no GPU.
    """
    if name == "cpu":
        return measure_peaks(threads=threads)
    try:
        return _measure_cuda_peaks(name.partition(" ")[2])
    except (ImportError, RuntimeError, AssertionError) as error:
        reraise_if_interrupt(error)
        if (short := shortage(error)) is not None:  # which says nothing of a GPU
            raise short from error
        return None


def measure_peaks(size: int = 2048, megabytes: int = 256, threads: int = 0) -> Peaks:
    """Measure the CPU, by the best of a few tries: what the machine can do, not what it did on average.

    Takes seconds. numpy's own threads are set by the environment that the process starts with. The matrix product is
    that of the fastest library here: one whose kernels do not know the processor would set a limit that others exceed.
    """
    found = {name: _best(work, 4) for name, work in _products(size, threads).items()}
    fastest = min(found, key=found.__getitem__)
    flops = {name: 2 * size**3 / seconds for name, seconds in found.items()}
    threads = threads or cores()
    where = f"cpu, float32 ({fastest}), {threads} thread{'s' if threads > 1 else ''}"
    return Peaks(flops[fastest], _copied_per_second(megabytes, threads), where, flops)


def _copied_per_second(megabytes: int, threads: int) -> float:
    """Bytes read and written per second, each thread copying its part: one alone may not fill the memory's channels."""
    source = np.ones(megabytes << 18, np.float32)
    target = np.empty_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        # numpy releases the interpreter's lock while it copies.
        seconds = _best(lambda: list(pool.map(lambda part: np.copyto(*part), parts)), 4)
    return 2 * source.nbytes / seconds


def _products(size: int, threads: int) -> dict[str, Callable[[], object]]:
    """Functions that multiply two float32 matrices, by each installed library. threads: 0 for the library's choice."""
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    b, out = a.T.copy(), np.empty_like(a)
    found: dict[str, Callable[[], object]] = {"numpy": lambda: np.matmul(a, b, out=out)}
    with contextlib.suppress(ImportError):
        import torch

        if threads:
            torch.set_num_threads(threads)
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        found["torch"] = lambda: torch.matmul(x, y)
    with contextlib.suppress(ImportError):
        import onnxruntime
        from onnx import TensorProto, helper

        names = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "abc"]
        graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", names[:2], names[2:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
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
