"""Arrays of keys in a device's memory: kept there, or uploaded ahead of need on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .device import ALIGNMENT, Buffer, Event, Staging, Stream
from .pieces import DeviceArray
from .worker_stream import Slot, WorkerStream

Key = TypeVar("Key", bound=Hashable)

DEPTH = 2
"""The number of steps on the device: the one in use, and the one that is being uploaded."""


class KeyUploader:
    """Brings one worker's keys to the device. Close it before the last binding of its worker stream.

    graph     the graph that reads the keys, for error messages
    contents  what the keys are, for error messages
    """

    def __init__(self, worker_stream: WorkerStream, graph: str, contents: str) -> None:
        self.worker_stream = worker_stream
        self._graph = graph
        self._contents = contents
        self._stream: Stream | None = None
        self._staged: list[_StagedStep] = []
        self._next = 0

    def keep(
        self, sizes: Mapping[Key, int], array: Callable[[Key], NDArray[Any]]
    ) -> tuple[Buffer, dict[Key, DeviceArray]]:
        """Copy arrays into memory of their own, for the caller to free. They are there when this returns.

        sizes: the bytes of each; array: returns the array of a key, called for one after the other.

        Raises:
            DeviceMemoryError: the device has not enough memory, or the host not enough that can be page-locked.
            DeviceError: a copy failed. In both cases nothing stays allocated.
        """
        device = self.worker_stream.device
        with self.worker_stream.naming(self._graph, f": {self._contents}"):
            offsets, nbytes = _offsets(sizes)
            device.require(nbytes, self._contents)
            staging = Staging(device)
            buffer: Buffer | None = None
            try:
                buffer = Buffer(device, nbytes)
                for key in sizes:
                    staging.upload(array(key), buffer, self.worker_stream.stream, offset=offsets[key])
                self.worker_stream.wait(self._graph)
            except BaseException:
                self.worker_stream.wait_quietly()
                if buffer is not None:
                    buffer.free()
                raise
            finally:
                staging.free()
        return buffer, {key: DeviceArray(buffer, offsets[key], size) for key, size in sizes.items()}

    def bring(self, arrays: Mapping[Key, NDArray[Any]]) -> dict[Key, DeviceArray]:
        """Start uploading arrays while the worker computes; what was uploaded `DEPTH` calls before is overwritten.

        Call `used` when everything on the worker stream that reads them is enqueued.

        Raises:
            DeviceMemoryError: the device has not enough memory, or the host not enough that can be page-locked.
            DeviceError: a copy failed.
        """
        with self.worker_stream.naming(self._graph, f": {self._contents}"):
            self.worker_stream.device.use()
            if self._stream is None:
                self._stream = Stream(self.worker_stream.device)
            while len(self._staged) < DEPTH:
                self._staged.append(_StagedStep(self.worker_stream, self._graph, self._contents))
            staged = self._staged[self._next]
            self._next = (self._next + 1) % DEPTH
            return staged.bring(arrays, self._stream)

    def used(self) -> None:
        """Note that everything that reads what `bring` uploaded last is enqueued on the worker stream."""
        if self._staged:
            self._staged[self._next - 1].used(self.worker_stream.stream)

    def close(self) -> None:
        """Free what was uploaded by `bring`; what `keep` copied is the caller's. May be called twice."""
        if self._stream is None:
            return
        device, stream, self._stream = self.worker_stream.device, self._stream, None
        self.worker_stream.wait_quietly()
        device.release("cudaStreamSynchronize", stream.handle)
        for staged in self._staged:
            staged.free()
        self._staged = []
        stream.destroy()


class _StagedStep:
    """Device memory for one step's keys, and the page-locked memory through which they are uploaded."""

    def __init__(self, worker_stream: WorkerStream, graph: str, contents: str) -> None:
        self._worker_stream = worker_stream
        self._graph = graph
        self._contents = contents
        self._slot = Slot()
        self._staging = Staging(worker_stream.device)
        self._ready = Event(worker_stream.device)
        self._used = Event(worker_stream.device)
        self._in_use = False

    def bring(self, arrays: Mapping[Key, NDArray[Any]], stream: Stream) -> dict[Key, DeviceArray]:
        offsets, nbytes = _offsets({key: array.nbytes for key, array in arrays.items()})
        if self._slot.nbytes < nbytes:
            stream.synchronize()
            self._worker_stream.reserve({self._slot: nbytes}, self._graph, f": {self._contents}")
        elif self._in_use:
            stream.wait_for(self._used)
        self._in_use = False
        assert self._slot.buffer
        memory = self._staging.memory(nbytes)
        for key, array in arrays.items():
            _bytes_into(memory[offsets[key] : offsets[key] + array.nbytes], array)
        self._staging.send(nbytes, self._slot.buffer, stream)
        self._ready.record(stream)
        return {
            key: DeviceArray(self._slot.buffer, offsets[key], array.nbytes, self._ready)
            for key, array in arrays.items()
        }

    def used(self, by: Stream) -> None:
        self._used.record(by)
        self._in_use = True

    def free(self) -> None:
        self._staging.free()
        self._slot.free()
        self._ready.destroy()
        self._used.destroy()


def _bytes_into(memory: NDArray[np.uint8], array: NDArray[Any]) -> None:
    memory[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _offsets(sizes: Mapping[Key, int]) -> tuple[dict[Key, int], int]:
    """Return where each array begins when they are laid end to end, and how many bytes that takes."""
    offsets, end = {}, 0
    for key, nbytes in sizes.items():
        offsets[key] = end
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end
