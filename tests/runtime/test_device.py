"""The layer over CUDA, with a stand-in for it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from magicface_rt.backends import device as device_module
from magicface_rt.backends.device import Buffer, CudaCallError, CudaMemoryError, Device, Event, Staging, Stream, capture
from magicface_rt.backends.worker_stream import Slot, WorkerStream
from magicface_rt.errors import BackendMissingError, DeviceError
from tests.runtime.fake_cuda import ILLEGAL_IN_CAPTURE, KERNEL_FAILED, FakeCuda


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    made = FakeCuda()
    yield made
    assert not made.alive()


def test_without_a_gpu_the_message_says_what_to_do() -> None:
    cuda = FakeCuda()
    cuda.count_status = 100
    with pytest.raises(DeviceError, match=r"no NVIDIA GPU was found.*onnxruntime-cpu"):
        Device(0, cuda=cuda)


@pytest.mark.parametrize(("driver", "found"), [(0, "no NVIDIA driver was found"), (12040, r"supports CUDA 12\.4 only")])
def test_an_old_driver_is_named_beside_what_is_needed(driver: int, found: str) -> None:
    cuda = FakeCuda()
    cuda.count_status, cuda.driver = 35, driver
    with pytest.raises(DeviceError, match=rf"{found}, and CUDA 13\.0 or newer is needed"):
        Device(0, cuda=cuda)


@pytest.mark.parametrize("ordinal", [-1, 2, True, "0"])
def test_a_device_that_does_not_exist_is_refused(ordinal: int) -> None:
    with pytest.raises(DeviceError, match=r"does not exist; there are 2, 0 to 1"):
        Device(ordinal, cuda=FakeCuda(devices=2))


def test_without_cuda_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(device_module.importlib, "import_module", missing)
    with pytest.raises(BackendMissingError, match=r"pip install 'magicface_rt\[tensorrt\]'"):
        Device(0)


def test_a_device_is_chosen_and_described(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    assert cuda.current == 0
    assert (device.compute_capability, device.driver_version) == ("8.9", "13.2")
    free, total = device.memory()
    buffer = Buffer(device, 1000)
    assert device.memory() == (free - 1024, total)
    assert buffer.address % 256 == 0
    buffer.free()
    buffer.free()
    assert cuda.count("cudaFree") == 1


def test_a_failed_call_is_named(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    cuda.fail["cudaStreamCreateWithFlags"] = 46
    with pytest.raises(DeviceError, match=r"CUDA call cudaStreamCreateWithFlags failed on device 0 with error 46"):
        Stream(device)


@pytest.mark.parametrize("kind", [CudaCallError, CudaMemoryError])
def test_a_failed_call_comes_out_of_another_process_as_it_was(kind: type[CudaCallError]) -> None:
    """Else whoever waits for a replica takes it for lost, and has another do the same."""
    found = pickle.loads(pickle.dumps(kind("CUDA call x failed", 46)))
    assert (type(found), str(found), found.code) == (kind, "CUDA call x failed", 46)


def test_what_needs_too_much_is_refused_with_both_numbers(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceError, match=r"plan of graph x needs 9,000\.0 MB more, and 8,000\.0 MB of 8,000\.0 MB"):
        Device(0, cuda=cuda).require(9 * 10**9, "plan of graph x")
    assert not cuda.count("cudaMalloc")


def test_a_gpu_that_shares_the_hosts_memory_has_what_the_host_would_give_up(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n")
    monkeypatch.setattr(device_module, "_HOST_MEMORY", said)
    cuda.total = 6 * 10**6
    device = Device(0, cuda=cuda)
    held = Buffer(device, 4 * 10**6)
    free = 6 * 10**6 - held.nbytes
    assert device.memory() == (free, 6 * 10**6)
    cuda.integrated = True
    assert device.memory() == (5_120_000, 6 * 10**6)
    device.require(5 * 10**6, "a plan")
    said.write_text("MemAvailable:  9000 kB\n")
    assert device.memory() == (6 * 10**6, 6 * 10**6)
    for content in ("MemAvailable:\n", "MemAvailable: much\n", ""):
        said.write_text(content)
        assert device.memory() == (free, 6 * 10**6)
    said.unlink()
    assert device.memory() == (free, 6 * 10**6)
    held.free()


def test_arrays_go_up_and_come_back(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    stream, staging, buffer = Stream(device), Staging(device), Buffer(device, 64)
    for number in range(5):
        array = np.full((2, 3), number, np.float32)
        staging.upload(array, buffer, stream)
        array[:] = -1  # ours to change at once
        back = np.empty((2, 3), np.float32)
        stream.download(buffer, back)
        assert (back == number).all()
    with pytest.raises(ValueError, match="do not fit"):
        staging.upload(np.zeros(1000), buffer, stream)
    for thing in (staging, buffer):
        thing.free()
    stream.destroy()


def test_staging_memory_is_not_overwritten_before_it_was_copied(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    stream, staging = Stream(device), Staging(device)
    first, second = Buffer(device, 4), Buffer(device, 4)
    staging.upload(np.array([1], np.int32), first, stream)
    staging.upload(np.array([2], np.int32), second, stream)
    back = np.empty(1, np.int32)
    stream.download(first, back)
    assert back[0] == 1
    for thing in (staging, first, second):
        thing.free()
    stream.destroy()


def test_events_tell_how_long_work_took(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    stream, before, after = Stream(device), Event(device), Event(device)
    before.record(stream)
    after.record(stream)
    after.wait()
    assert after.seconds_since(before) == pytest.approx(0.001)
    before.destroy()
    after.destroy()
    stream.destroy()


def test_captured_work_is_done_at_each_launch_and_not_before(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    stream, done = Stream(device), []
    with capture(stream) as made:
        cuda.submit(stream.handle, lambda: done.append(1))
    stream.synchronize()
    assert not done
    for _ in range(3):
        made.graph.launch(stream)
    assert not done
    stream.synchronize()
    assert done == [1, 1, 1]
    made.graph.destroy()
    made.graph.destroy()
    stream.destroy()


def test_a_capture_that_fails_leaves_the_stream_usable(cuda: FakeCuda) -> None:
    device = Device(0, cuda=cuda)
    stream = Stream(device)
    refused = f"cudaMalloc failed on device 0 with error {ILLEGAL_IN_CAPTURE}"
    with pytest.raises(DeviceError, match=refused), capture(stream):
        Buffer(device, 16)
    stream.synchronize()
    cuda.fail["cudaGraphInstantiate"] = 1
    with pytest.raises(DeviceError, match="cudaGraphInstantiate"), capture(stream):
        pass
    stream.destroy()


def test_a_worker_stream_names_the_graphs_that_may_have_failed(cuda: FakeCuda) -> None:
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    worker_stream.enqueued("reference_kv")
    worker_stream.enqueued("denoise_step")
    cuda.kernel_error = KERNEL_FAILED
    with pytest.raises(DeviceError, match=r"graph reference_kv or denoise_step failed on the device: .* 719"):
        worker_stream.wait("vae_decoder")
    with pytest.raises(DeviceError, match=r"graph vae_decoder: CUDA call"):
        worker_stream.wait("vae_decoder")
    cuda.kernel_error = 0
    worker_stream.leave()


def test_slots_grow_together_or_not_at_all(cuda: FakeCuda) -> None:
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    small, large = Slot(), Slot()
    assert worker_stream.reserve({small: 100, large: 1000}, "x")
    assert not worker_stream.reserve({small: 50, large: 1000}, "x")
    kept = small.buffer
    with pytest.raises(DeviceError, match="graph x needs"):
        worker_stream.reserve({small: 5000, large: 9 * 10**9}, "x")
    assert small.buffer is kept
    assert kept is not None
    assert not kept.freed
    small.free()
    large.free()
    worker_stream.leave()


def test_memory_that_is_still_written_is_not_freed_to_grow(cuda: FakeCuda) -> None:
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    slot, staging = Slot(), Staging(worker_stream.device)
    worker_stream.reserve({slot: 100}, "x")
    assert slot.buffer
    staging.upload(np.ones(100, np.uint8), slot.buffer, worker_stream.stream)
    worker_stream.reserve({slot: 1000}, "x")
    worker_stream.wait("x")
    staging.free()
    slot.free()
    worker_stream.leave()
