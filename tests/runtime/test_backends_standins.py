"""The stand-ins for CUDA and TensorRT have what the real libraries have, where those are installed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from tests.runtime import fake_tensorrt
from tests.runtime.fake_cuda import FakeCuda


def public(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if not name.startswith("_") and callable(value)]


def test_every_cuda_function_is_there_with_as_many_arguments() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    for name in (n for n in public(FakeCuda) if n.startswith("cuda")):
        real, fake = getattr(runtime, name), getattr(FakeCuda, name)
        if isinstance(fake, type):
            for member in fake:
                assert int(getattr(real, member.name)) == int(member), f"{name}.{member.name}"
            continue
        # The first line of the documentation is the signature: "cudaMemcpyAsync(dst, src, size_t count, ...)".
        arguments = (real.__doc__ or "").splitlines()[0].partition("(")[2].rpartition(")")[0]
        expected = len(arguments.split(",")) if arguments else 0
        assert len(inspect.signature(fake).parameters) - 1 == expected, name
    for name in ("cudaStreamNonBlocking", "cudaEventDefault"):
        assert int(getattr(runtime, name)) == getattr(FakeCuda, name)


def test_a_call_returns_a_status_and_its_results() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    status, *rest = runtime.cudaDriverGetVersion()
    assert int(status) == 0
    assert len(rest) == 1
    assert len(runtime.cudaGetDeviceCount()) == 2
    for function in (runtime.cudaGetErrorName, runtime.cudaGetErrorString):
        assert isinstance(function(runtime.cudaError_t(35))[1], bytes)
    assert int(runtime.cudaStream_t(0)) == 0


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (fake_tensorrt.FakeEngine, "ICudaEngine"),
        (fake_tensorrt.FakeContext, "IExecutionContext"),
        (fake_tensorrt.FakeRuntimeCache, "IRuntimeCache"),
        (fake_tensorrt._Config, "IRuntimeConfig"),
    ],
)
def test_every_method_is_there(stand_in: type, real: str) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx")
    missing = [name for name in public(stand_in) if not hasattr(getattr(trt, real), name)]
    assert not missing


def test_every_name_of_the_module_is_there() -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx")
    names = {
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
        "CudaGraphStrategy": ["DISABLED"],
        "DynamicShapesKernelSpecializationStrategy": ["EAGER", "LAZY"],
        "TensorIOMode": ["INPUT", "OUTPUT"],
        "TensorLocation": ["DEVICE"],
        "DataType": ["FLOAT", "HALF", "BF16", "INT64", "INT32", "BOOL"],
        "IRuntimeConfig": ["cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"],
        "ICudaEngine": ["num_io_tensors"],
        "Runtime": ["deserialize_cuda_engine"],
    }
    for kind, members in names.items():
        assert all(hasattr(getattr(trt, kind), member) for member in members), kind
    assert trt.DataType.BF16.name == "BF16"
