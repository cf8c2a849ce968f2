"""The layer over CUDA on a real device."""

from __future__ import annotations

import numpy as np
import pytest

from magicface_rt.backends.device import Buffer, Device, Event, Staging, Stream, capture
from magicface_rt.errors import DeviceError


def test_arrays_go_up_and_come_back_and_memory_is_free_again(device: Device) -> None:
    stream, staging = Stream(device), Staging(device)
    before, total = device.memory()
    assert 0 < before <= total
    buffer = Buffer(device, 64 << 20)
    assert device.memory()[0] <= before - (64 << 20)
    array = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    back = np.empty_like(array)
    staging.upload(array, buffer, stream)
    stream.download(buffer, back)
    np.testing.assert_array_equal(back, array)
    buffer.free()
    assert device.memory()[0] >= before - (4 << 20)
    staging.free()
    stream.destroy()


def test_a_captured_copy_is_done_at_each_launch(device: Device) -> None:
    stream, staging = Stream(device), Staging(device)
    source, target = Buffer(device, 1024), Buffer(device, 1024)
    kind = device.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    with capture(stream) as made:
        device.call("cudaMemcpyAsync", target.address, source.address, 1024, kind, stream.handle)
    before, after = Event(device), Event(device)
    for number in range(3):
        staging.upload(np.full(256, number, np.float32), source, stream)
        before.record(stream)
        made.graph.launch(stream)
        after.record(stream)
        back = np.empty(256, np.float32)
        stream.download(target, back)
        assert (back == number).all()
        assert after.seconds_since(before) >= 0
    made.graph.destroy()
    for thing in (source, target, staging):
        thing.free()
    for event in (before, after):
        event.destroy()
    stream.destroy()


def test_a_capture_that_fails_leaves_the_stream_usable(device: Device) -> None:
    stream = Stream(device)
    with pytest.raises(DeviceError), capture(stream):
        stream.synchronize()
    stream.synchronize()
    stream.destroy()


def test_what_does_not_fit_is_refused(device: Device) -> None:
    _, total = device.memory()
    with pytest.raises(DeviceError, match="needs"):
        device.require(2 * total, "the test")
    with pytest.raises(DeviceError, match="cudaMalloc"):
        Buffer(device, 2 * total)
    Buffer(device, 1024).free()
