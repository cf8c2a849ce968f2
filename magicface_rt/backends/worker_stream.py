"""What the bindings of one worker share: a stream, and scratch memory that only one of them uses at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import DeviceError, DeviceMemoryError
from .device import Buffer, CudaCallError, Device, Stream


class Slot:
    """Device memory that grows when more is needed than there is. Growing moves it, and loses what it held."""

    def __init__(self) -> None:
        self.buffer: Buffer | None = None

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes if self.buffer else 0

    def free(self) -> None:
        if self.buffer:
            self.buffer.free()
            self.buffer = None


class WorkerStream:
    """The stream and the scratch memory of one worker. Made by its first binding; freed when the last one has left."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream: Stream
        self.scratch = Slot()
        self._users = 0
        self._enqueued: list[str] = []

    def join(self) -> None:
        """Register one more binding. Raises DeviceError if no stream can be made; then none was registered."""
        self.device.use()
        if self._users == 0:
            self.stream = Stream(self.device)
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            self.wait_quietly()
            self.scratch.free()
            self.stream.destroy()

    def enqueued(self, graph: str) -> None:
        """Remember a graph for error messages: CUDA reports its failure at some later call."""
        if graph not in self._enqueued:
            self._enqueued.append(graph)

    @contextmanager
    def naming(self, graph: str, what: str = "") -> Iterator[None]:
        """Make failures of CUDA calls in the block name the graphs that may have caused them; the block is `graph`'s.

        Raises:
            DeviceMemoryError: a call found too little memory.
            DeviceError: a call failed.
        """
        try:
            yield
        except CudaCallError as error:
            before = error.may_be_of_earlier_work and self._enqueued
            which = f"graph {' or '.join(self._enqueued)} failed on the device" if before else f"graph {graph}{what}"
            self._enqueued = []
            kind = DeviceMemoryError if isinstance(error, DeviceMemoryError) else DeviceError
            raise kind(f"{which}: {error}") from error

    def wait_quietly(self) -> None:
        """Wait for all that was enqueued, whatever has failed, before what it uses is freed. Never raises."""
        self.device.release("cudaSetDevice", self.device.ordinal)
        self.device.release("cudaStreamSynchronize", self.stream.handle)

    def wait(self, graph: str) -> None:
        """Wait for all that was enqueued.

        Raises:
            DeviceError: something failed there; the message names the graphs that may have.
        """
        with self.naming(graph):
            self.stream.synchronize()
        self._enqueued = []

    def reserve(self, needs: Mapping[Slot, int], graph: str, what: str = "") -> bool:
        """Grow the slots that are too small; return whether any moved.

        Raises:
            DeviceMemoryError: the device has not enough memory, even after reclaiming. If that was known beforehand,
                nothing was allocated; otherwise a slot may be left without memory.
        """
        small = {slot: nbytes for slot, nbytes in needs.items() if slot.nbytes < nbytes}
        if not small:
            return False
        self.device.require(sum(small.values()) - sum(slot.nbytes for slot in small), f"graph {graph}{what}")
        self.wait(graph)  # what is enqueued may still use the old memory; that cudaFree waits for it is not promised
        for slot, nbytes in small.items():
            slot.free()
            slot.buffer = Buffer(self.device, nbytes)
        return True
