"""A stand-in for `cuda.bindings.runtime`: device memory is bytes behind made-up addresses.

Work on a stream is done when something waits for it and not before, as on a device at its latest: what reads a result
or overwrites an upload's source without waiting gets the wrong bytes. Memory that was freed, or never was, raises.
Freeing waits for nothing.

Each thread chooses its device, and one that chose none has none: calls that depend on it raise, and so does work on a
stream or event of another device. What CUDA lets any thread do (wait, free, destroy) is not checked.
"""

# ruff: noqa: N802, N815 - the names are the libraries'

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

GIGABYTE = 10**9
ILLEGAL_IN_CAPTURE = 900
KERNEL_FAILED = 719


class Status(int):
    """A status as an enumeration member: an int that is no plain one."""


class Handle(int):
    """A stream, event or graph."""


class _Stream:
    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None


class FakeCuda:
    """The functions that the runtime uses, with their real signatures and results."""

    cudaStreamNonBlocking = 1
    cudaEventDefault = 0
    cudaMemcpyKind = IntEnum(
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
    )
    cudaStreamCaptureMode = IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaDeviceAttr = IntEnum(
        "cudaDeviceAttr",
        {
            "cudaDevAttrIntegrated": 18,
            "cudaDevAttrComputeCapabilityMajor": 75,
            "cudaDevAttrComputeCapabilityMinor": 76,
        },
    )

    def __init__(self, *, devices: int = 1, memory: int = 8 * GIGABYTE, capability: tuple[int, int] = (8, 9)) -> None:
        self.devices, self.total, self.capability = devices, memory, capability
        self.driver, self.runtime = 13020, 13000
        self.count_status = 0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: dict[str, int] = {}
        """Status by function; the call fails and does nothing."""
        self.kernel_error = 0
        self.memory: dict[int, np.ndarray] = {}
        self.most = 0
        """The most bytes that were allocated at one time; a test may set it back."""
        self.pinned: dict[int, Any] = {}
        self.lockable: int | None = None
        """Bytes that can be page-locked in all; None for no limit."""
        self.engines: dict[int, int] = {}
        """Device memory that TensorRT took, by what it took it for."""
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, tuple[int | None, float]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.integrated = False
        self.owners: dict[int, int] = {}
        """The device of each stream, event, graph and block of memory."""
        self._here = threading.local()
        self.clock = 0.0
        self._next = 0x7000_0000_0000

    @property
    def current(self) -> int | None:
        """The device that the calling thread chose."""
        return getattr(self._here, "device", None)

    def check_device(self, *things: int) -> None:
        """The calling thread chose the device that these are of."""
        assert self.current is not None, f"{threading.current_thread().name} chose no device"
        for thing in things:
            owner = self.owners[int(thing)]
            assert owner == self.current, f"{thing:#x} is of device {owner}, and device {self.current} is chosen"

    # ------------------------------------------------------------------------------------------- what tests ask

    def alive(self) -> dict[str, int]:
        """How many of each thing are there now."""
        kinds = ("memory", "pinned", "streams", "events", "graphs", "executables")
        return {kind: len(getattr(self, kind)) for kind in kinds if getattr(self, kind)}

    def count(self, name: str) -> int:
        return Counter(call for call, _ in self.calls)[name]

    def uploads(self) -> list[int]:
        """Device addresses that host arrays were copied to, in order."""
        return [a[0] for name, a in self.calls if name == "cudaMemcpyAsync" and a[3] == 1]

    def downloads(self) -> list[int]:
        return [a[1] for name, a in self.calls if name == "cudaMemcpyAsync" and a[3] == 2]

    def allocated(self) -> int:
        return sum(len(block) for block in list(self.memory.values())) + sum(list(self.engines.values()))

    def locked(self) -> int:
        return sum(len(block) for block in list(self.pinned.values()))

    # ---------------------------------------------------------------------------------------- what engines do

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Enqueue work, or record it while the stream is being captured."""
        found = self.streams[int(stream)]
        (found.queue if found.recording is None else found.recording).append(work)

    def capturing(self, stream: int) -> bool:
        return self.streams[int(stream)].recording is not None

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """Live device memory."""
        for start, block in list(self.memory.items()):
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"device memory {address:#x} of {nbytes} bytes is freed or never was allocated")

    # ------------------------------------------------------------------------------------------------ the API

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if name in self.fail:
                return (Status(self.fail[name]), *([None] * (name not in ("cudaFree", "cudaSetDevice"))))
            result = value(*arguments)
            status, *rest = result if isinstance(result, tuple) else (result,)
            return (Status(status), *rest)

        return call

    def _handle(self) -> Handle:
        self.check_device()
        self._next += 0x1000
        self.owners[self._next] = self.current or 0
        return Handle(self._next)

    def _drain(self, stream: int) -> int:
        found = self.streams[int(stream)]
        if found.recording is not None:
            return ILLEGAL_IN_CAPTURE
        while found.queue:
            found.queue.pop(0)()
        return self.kernel_error

    def cudaGetDeviceCount(self) -> Any:
        return (self.count_status, self.devices if self.count_status == 0 else None)

    def cudaDriverGetVersion(self) -> Any:
        return 0, self.driver

    def cudaRuntimeGetVersion(self) -> Any:
        return 0, self.runtime

    def cudaGetErrorName(self, status: int) -> Any:
        return 0, f"cudaError{int(status)}".encode()

    def cudaGetErrorString(self, status: int) -> Any:
        return 0, b"made up"

    def cudaSetDevice(self, ordinal: int) -> Any:
        assert 0 <= ordinal < self.devices
        self._here.device = ordinal
        return 0

    def cudaDeviceGetAttribute(self, attribute: int, ordinal: int) -> Any:
        if attribute == self.cudaDeviceAttr.cudaDevAttrIntegrated:
            return 0, int(self.integrated)
        return 0, self.capability[attribute == self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor]

    def cudaMemGetInfo(self) -> Any:
        self.check_device()
        return 0, self.total - self.allocated(), self.total

    def cudaMalloc(self, nbytes: int) -> Any:
        if any(s.recording is not None for s in list(self.streams.values())):
            return ILLEGAL_IN_CAPTURE, None
        if nbytes > self.total - self.allocated():
            return 2, None
        address = int(self._handle())
        self._next += -(-nbytes // 0x1000) * 0x1000
        self.memory[address] = np.full(nbytes, 0xCD, np.uint8)  # what was never written is no zero
        self.most = max(self.most, self.allocated())
        return 0, address

    def cudaFree(self, address: int) -> Any:
        return 0 if self.memory.pop(address, None) is not None else 1

    def cudaHostAlloc(self, nbytes: int, flags: int) -> Any:
        self.check_device()
        if self.lockable is not None and nbytes > self.lockable - self.locked():
            return 2, None
        block = (ctypes.c_ubyte * nbytes)()
        self.pinned[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> Any:
        return 0 if self.pinned.pop(address, None) is not None else 1

    def cudaMemcpy(self, to: int, source: int, nbytes: int, kind: int) -> Any:
        """From the start of a block of the device's. It waits for no stream but the default one."""
        assert kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.check_device(source)
        ctypes.memmove(to, self.view(source, nbytes).ctypes.data, nbytes)
        return 0

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> Any:
        self.check_device(stream)

        def copy() -> None:
            if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
                block = self.view(to, nbytes)
                ctypes.memmove(block.ctypes.data, source, nbytes)
            elif kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
                self.view(to, nbytes)[:] = self.view(source, nbytes)
            else:
                ctypes.memmove(to, self.view(source, nbytes).ctypes.data, nbytes)

        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            pinned = list(self.pinned.items())
            assert any(start <= source < start + len(b) for start, b in pinned), "source is not pinned"
        self.submit(stream, copy)
        return 0

    def cudaMemsetAsync(self, to: int, value: int, nbytes: int, stream: int) -> Any:
        self.check_device(stream)
        self.submit(stream, lambda: self.view(to, nbytes).fill(value))
        return 0

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> Any:
        """The other stream runs on as far as it can, past the event: what must not overtake has to wait itself."""
        assert flags == 0
        recorded = self.events[event][0]
        if recorded is not None and recorded != stream:
            self.submit(stream, lambda: self._run_ahead(recorded))
        return 0

    def _run_ahead(self, stream: int) -> None:
        found = self.streams.get(int(stream))
        while found is not None and found.queue:
            found.queue.pop(0)()

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        handle = self._handle()
        self.streams[handle] = _Stream()
        return 0, handle

    def cudaStreamSynchronize(self, stream: int) -> Any:
        return self._drain(stream)

    def cudaStreamDestroy(self, stream: int) -> Any:
        self._drain(stream)
        del self.streams[stream]
        return 0

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        handle = self._handle()
        self.events[handle] = (None, 0.0)
        return 0, handle

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        self.check_device(event, stream)

        def passed() -> None:
            self.clock += 1.0
            if event in self.events:
                self.events[event] = (stream, self.clock)

        self.events[event] = (stream, -1.0)
        self.submit(stream, passed)
        return 0

    def cudaEventSynchronize(self, event: int) -> Any:
        stream, _ = self.events[event]
        return 0 if stream is None else self._drain(stream)

    def cudaEventElapsedTime(self, start: int, end: int) -> Any:
        times = self.events[start][1], self.events[end][1]
        return (600, None) if min(times) < 0 else (0, times[1] - times[0])

    def cudaEventDestroy(self, event: int) -> Any:
        del self.events[event]
        return 0

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.check_device(stream)
        self.streams[stream].recording = []
        return 0

    def cudaStreamEndCapture(self, stream: int) -> Any:
        recorded, self.streams[stream].recording = self.streams[stream].recording, None
        assert recorded is not None
        handle = self._handle()
        self.graphs[handle] = recorded
        return 0, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        handle = self._handle()
        self.executables[handle] = self.graphs[graph]
        return 0, handle

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return 0

    def cudaGraphLaunch(self, executable: int, stream: int) -> Any:
        self.check_device(executable, stream)
        for work in self.executables[executable]:
            self.submit(stream, work)
        return 0

    def cudaGraphExecDestroy(self, executable: int) -> Any:
        del self.executables[executable]
        return 0
