"""Reference keys in a device's memory: kept there, or uploaded ahead of need on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .device import ALIGNMENT, Buffer, Event, Staging, Stream
from .lane import Lane, Slot
from .pieces import DeviceArray

Key = TypeVar("Key", bound=Hashable)

DEPTH = 2
"""The number of steps on the device: the one in use, and the one that is being uploaded."""

GRAPH, WHAT = "denoise_step", "reference keys"


class Shelf:
    """One worker's reference keys on the device, beside its lane. Close it before the lane's last binding."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self._stream: Stream | None = None
        self._places: list[_Place] = []
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
        device = self.lane.device
        with self.lane.naming(GRAPH, f": {WHAT}"):
            offsets, nbytes = _offsets(sizes)
            device.require(nbytes, WHAT)
            staging = Staging(device)
            buffer: Buffer | None = None
            try:
                buffer = Buffer(device, nbytes)
                for key in sizes:
                    staging.upload(array(key), buffer, self.lane.stream, offset=offsets[key])
                self.lane.wait(GRAPH)
            except BaseException:
                self.lane.settle()
                if buffer is not None:
                    buffer.free()
                raise
            finally:
                staging.free()
        return buffer, {key: DeviceArray(buffer, offsets[key], size) for key, size in sizes.items()}

    def bring(self, arrays: Mapping[Key, NDArray[Any]]) -> dict[Key, DeviceArray]:
        """Start uploading arrays while the lane computes; what was uploaded `DEPTH` calls before is overwritten.

        Call `used` when everything on the lane that reads them is enqueued.

        Raises:
            DeviceMemoryError: the device has not enough memory, or the host not enough that can be page-locked.
            DeviceError: a copy failed.
        """
        with self.lane.naming(GRAPH, f": {WHAT}"):
            self.lane.device.use()
            if self._stream is None:
                self._stream = Stream(self.lane.device)
            while len(self._places) < DEPTH:
                self._places.append(_Place(self.lane))
            place = self._places[self._next]
            self._next = (self._next + 1) % DEPTH
            return place.bring(arrays, self._stream)

    def used(self) -> None:
        """Note that everything that reads what `bring` uploaded last is enqueued on the lane."""
        if self._places:
            self._places[self._next - 1].used(self.lane.stream)

    def close(self) -> None:
        """Free what was uploaded by `bring`; what `keep` copied is the caller's. May be called twice."""
        if self._stream is None:
            return
        device, stream, self._stream = self.lane.device, self._stream, None
        self.lane.settle()
        device.release("cudaStreamSynchronize", stream.handle)
        for place in self._places:
            place.free()
        self._places = []
        stream.destroy()


class _Place:
    """Device memory for one step's keys, and the page-locked memory through which they are uploaded."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._slot = Slot()
        self._staging = Staging(lane.device)
        self._ready = Event(lane.device)
        self._used = Event(lane.device)
        self._in_use = False

    def bring(self, arrays: Mapping[Key, NDArray[Any]], stream: Stream) -> dict[Key, DeviceArray]:
        offsets, nbytes = _offsets({key: array.nbytes for key, array in arrays.items()})
        if self._slot.nbytes < nbytes:
            stream.synchronize()
            self._lane.reserve({self._slot: nbytes}, GRAPH, f": {WHAT}")
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
