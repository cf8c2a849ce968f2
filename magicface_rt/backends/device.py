"""A thin layer over CUDA's runtime (cuda-bindings): a device, memory, streams, events, captured graphs.

Every failed call is a `DeviceError` that names the call. What is allocated here is freed by `free` or `destroy`, which
may be called twice and never raise, since they also run after something else has failed.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendMissingError, DeviceError, DeviceMemoryError
from ..process.interrupts import reraise_if_interrupt
from ..values.sizes import megabytes

ALIGNMENT = 256
_NO_DEVICE = 100
_OLD_DRIVER = 35
_OUT_OF_MEMORY = 2
_LOCKING = "cudaHostAlloc"
_HOST_MEMORY = Path("/proc/meminfo")

Reclaim = Callable[[int], int]
"""Frees device memory that is not needed now, at least so many bytes if it can, and returns how many it freed."""

logger = logging.getLogger("magicface_rt.device")


def import_cuda() -> Any:
    """Import the module `cuda.bindings.runtime`.

    Raises:
        BackendMissingError: cuda-bindings is not installed or does not load.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError, RuntimeError) as error:
        reraise_if_interrupt(error)
        raise BackendMissingError(
            f"cuda-bindings is not installed or does not load ({type(error).__name__}: {error}). Install it with the "
            "backend that needs it: pip install 'magicface_rt[tensorrt]', 'magicface_rt[tensorrt-rtx]' or "
            "'magicface_rt[gpu]'"
        ) from error


class CudaCallError(DeviceError):
    """A call of CUDA's runtime failed. `code`: its status."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def may_be_of_earlier_work(self) -> bool:
        """Whether earlier work may have failed: CUDA reports that at a later call. A lack of memory is this call's."""
        return self.code != _OUT_OF_MEMORY


class CudaMemoryError(CudaCallError, DeviceMemoryError):
    """A call failed because there is too little memory."""


class Device:
    """One GPU, by its ordinal. `cuda`: the module `cuda.bindings.runtime`, or a stand-in for it.

    Holders of memory that they can do without register with `reclaim_from`, and are asked before memory is refused.

    Raises:
        BackendMissingError: cuda-bindings is not installed.
        DeviceError: there is no GPU, no such GPU, or the driver is too old.
    """

    def __init__(self, ordinal: int = 0, *, cuda: Any = None) -> None:
        self.cuda = cuda if cuda is not None else import_cuda()
        self.ordinal = ordinal
        self._logged_code = 0
        self._reclaims: list[Reclaim] = []
        count = self._count()
        if isinstance(ordinal, bool) or not isinstance(ordinal, int) or not 0 <= ordinal < count:
            there_are = "there is one, 0" if count == 1 else f"there are {count}, 0 to {count - 1}"
            raise DeviceError(f"device {ordinal!r} does not exist; {there_are}. CUDA_VISIBLE_DEVICES may hide others.")
        self.use()

    def __str__(self) -> str:
        return f"device {self.ordinal} (compute capability {self.compute_capability})"

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime; return its result, or a tuple of several, without the status.

        Raises:
            DeviceError: the call failed.
        """
        status, *results = getattr(self.cuda, name)(*arguments)
        if int(status) != 0:
            raise self._failed(name, status)
        return results[0] if len(results) == 1 else tuple(results)

    def use(self) -> None:
        """Make this the calling thread's device; other code in the thread may have chosen another one."""
        self.call("cudaSetDevice", self.ordinal)

    @property
    def compute_capability(self) -> str:
        """The compute capability, for example "8.9"."""
        attribute = self.cuda.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMajor, self.ordinal)
        minor = self.call("cudaDeviceGetAttribute", attribute.cudaDevAttrComputeCapabilityMinor, self.ordinal)
        return f"{int(major)}.{int(minor)}"

    @property
    def driver_version(self) -> str:
        """The newest CUDA version that the installed driver supports, for example "13.0"."""
        return _version(self.call("cudaDriverGetVersion"))

    @property
    def runtime_version(self) -> str:
        """The CUDA version that cuda-bindings brings."""
        return _version(self.call("cudaRuntimeGetVersion"))

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes.

        On a GPU that shares its memory with the host (Jetson), what the host would give up is free as well, which
        cudaMemGetInfo leaves out: after a bundle was read, much of the memory is cached files.
        """
        self.use()
        free, total = (int(nbytes) for nbytes in self.call("cudaMemGetInfo"))
        if self.integrated:
            free = min(max(free, _available_to_host()), total)
        return free, total

    @property
    def integrated(self) -> bool:
        """Whether the GPU shares its memory with the host."""
        return bool(self.call("cudaDeviceGetAttribute", self.cuda.cudaDeviceAttr.cudaDevAttrIntegrated, self.ordinal))

    def require(self, nbytes: int, what: str) -> None:
        """Make sure that `nbytes` are free, which `what` will hold. Allocates nothing.

        Raises:
            DeviceMemoryError: fewer are free, even after reclaiming.
        """
        free, total = self.memory()
        while nbytes > free and self.reclaim(nbytes - free):
            free, total = self.memory()
        if nbytes > free:
            raise DeviceMemoryError(
                f"{what} needs {megabytes(nbytes)} more, and {megabytes(free)} of {megabytes(total)} are free on "
                f"device {self.ordinal}. Ask for fewer images or references, use a smaller bundle, or free the device."
            )

    def reclaim_from(self, reclaim: Reclaim) -> None:
        """Have `reclaim` called when memory is short, in whichever thread; it must not wait for other threads' work."""
        if reclaim not in self._reclaims:
            self._reclaims.append(reclaim)

    def no_longer_from(self, reclaim: Reclaim) -> None:
        """Undo `reclaim_from`."""
        if reclaim in self._reclaims:
            self._reclaims.remove(reclaim)

    def reclaim(self, nbytes: int) -> int:
        """Free memory that nobody needs now, until `nbytes` are freed; return how many were."""
        freed = 0
        for reclaim in tuple(self._reclaims):
            if freed < nbytes:
                freed += reclaim(nbytes - freed)
        return freed

    def call_for_memory(self, name: str, *arguments: Any, nbytes: int = 1) -> Any:
        """Like `call`, for a function that takes about `nbytes` of device memory: if there is none, some is reclaimed.

        Raises:
            DeviceMemoryError: there is too little memory, even after reclaiming.
            DeviceError: the call failed.
        """
        while True:
            try:
                return self.call(name, *arguments)
            except CudaMemoryError:
                if not self.reclaim(nbytes):
                    raise

    def _count(self) -> int:
        status, *results = self.cuda.cudaGetDeviceCount()
        if int(status) == 0 and int(results[0]) > 0:
            return int(results[0])
        if int(status) in (0, _NO_DEVICE):
            raise DeviceError(
                "no NVIDIA GPU was found. Look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or use a CPU backend: "
                "backend='onnxruntime-cpu'."
            )
        if int(status) == _OLD_DRIVER:
            found = self.driver_version
            needed = self.runtime_version.split(".")[0] + ".0"
            driver = "no NVIDIA driver was found" if found == "0.0" else f"the NVIDIA driver supports CUDA {found} only"
            raise DeviceError(
                f"{driver}, and CUDA {needed} or newer is needed. Install a newer driver, or use a CPU backend: "
                "backend='onnxruntime-cpu'."
            )
        raise self._failed("cudaGetDeviceCount", status)

    def _failed(self, name: str, status: Any) -> CudaCallError:
        code = int(status)
        words = []
        for function in ("cudaGetErrorName", "cudaGetErrorString"):
            _, text = getattr(self.cuda, function)(status)
            words.append(text.decode() if isinstance(text, bytes) else str(text))
        said = f"CUDA call {name} failed on device {self.ordinal} with error {code} ({': '.join(words)})."
        if code != _OUT_OF_MEMORY:
            return CudaCallError(said, code)
        whose = "memory on the host, of which it could not lock enough" if name == _LOCKING else "the device's memory"
        return CudaMemoryError(f"{said} Free {whose}, or ask for fewer images or references.", code)

    def release(self, name: str, *arguments: Any) -> None:
        """Like `call`, for a function that frees something: a failure is logged, as its cause was raised before."""
        try:
            self.call(name, *arguments)
        except CudaCallError as error:
            # After a sticky CUDA error every later call fails the same way: warn once per code, then log at debug
            # level.
            level = logging.DEBUG if error.code == self._logged_code else logging.WARNING
            self._logged_code = error.code
            logger.log(level, "%s", error)


class Buffer:
    """Device memory. `address` is valid until `free`."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device = device
        self.nbytes = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        self.address = int(device.call_for_memory("cudaMalloc", self.nbytes, nbytes=self.nbytes))
        self.freed = False

    def free(self) -> None:
        if not self.freed:
            self.freed = True
            self.device.release("cudaFree", self.address)


class Staging:
    """Page-locked host memory through which one input is uploaded, so that the upload does not block the host."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._address = 0
        self._nbytes = 0
        self._copied = Event(device)
        self._in_flight = False

    def upload(self, array: NDArray[Any], to: Buffer, stream: Stream, *, offset: int = 0) -> None:
        """Enqueue a copy of the array to `offset` of the buffer; the array may be changed as soon as this returns."""
        if offset + array.nbytes > to.nbytes:
            raise ValueError(f"{array.nbytes} bytes do not fit into a buffer of {to.nbytes} at {offset}.")
        self.memory(array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.send(array.nbytes, to, stream, offset=offset)

    def memory(self, nbytes: int) -> NDArray[np.uint8]:
        """Return page-locked bytes to write into, once their last content has been copied; `send` enqueues the copy."""
        if self._in_flight:
            self._copied.wait()
            self._in_flight = False
        if nbytes > self._nbytes:
            self._free_memory()
            self._address = int(self._device.call(_LOCKING, nbytes, 0))
            self._nbytes = nbytes
        pinned = (ctypes.c_ubyte * nbytes).from_address(self._address)
        return np.frombuffer(memoryview(pinned), np.uint8)

    def send(self, nbytes: int, to: Buffer, stream: Stream, *, offset: int = 0) -> None:
        """Enqueue a copy of the first `nbytes` of `memory` to `offset` of the buffer."""
        kind = self._device.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._device.call("cudaMemcpyAsync", to.address + offset, self._address, nbytes, kind, stream.handle)
        self._copied.record(stream)
        self._in_flight = True

    def free(self) -> None:
        if self._in_flight:
            self._in_flight = False
            self._device.release("cudaEventSynchronize", self._copied.handle)
        self._copied.destroy()
        self._free_memory()

    def _free_memory(self) -> None:
        if self._address:
            address, self._address, self._nbytes = self._address, 0, 0
            self._device.release("cudaFreeHost", address)


class Stream:
    """A CUDA stream: a queue of work on the device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = device.call("cudaStreamCreateWithFlags", device.cuda.cudaStreamNonBlocking)
        self._destroyed = False

    def synchronize(self) -> None:
        self.device.call("cudaStreamSynchronize", self.handle)

    def copy(self, source: int, to: int, nbytes: int) -> None:
        """Enqueue a copy from device memory to device memory, by address."""
        kind = self.device.cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.device.call("cudaMemcpyAsync", to, source, nbytes, kind, self.handle)

    def clear(self, buffer: Buffer) -> None:
        """Enqueue filling a buffer with zeros."""
        self.device.call("cudaMemsetAsync", buffer.address, 0, buffer.nbytes, self.handle)

    def wait_for(self, event: Event) -> None:
        """Make what is enqueued from now on wait for an event of another stream; the host does not wait."""
        self.device.call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def download(self, buffer: Buffer, into: NDArray[Any]) -> None:
        """Copy a buffer to the host, after the work enqueued before; return when the copy is there."""
        if into.nbytes > buffer.nbytes or not into.flags.c_contiguous:
            raise ValueError(f"{into.nbytes} bytes cannot be read from a buffer of {buffer.nbytes}.")
        kind = self.device.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.device.call("cudaMemcpyAsync", into.ctypes.data, buffer.address, into.nbytes, kind, self.handle)
        self.synchronize()

    def destroy(self) -> None:
        if not self._destroyed:
            self._destroyed = True
            self.device.release("cudaStreamDestroy", self.handle)


class Event:
    """A point in a stream's work, with its time."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.handle = device.call("cudaEventCreateWithFlags", device.cuda.cudaEventDefault)
        self._destroyed = False

    def record(self, stream: Stream) -> None:
        self.device.call("cudaEventRecord", self.handle, stream.handle)

    def wait(self) -> None:
        self.device.call("cudaEventSynchronize", self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Return the seconds since an earlier event; both must have passed."""
        return float(self.device.call("cudaEventElapsedTime", earlier.handle, self.handle)) / 1000

    def destroy(self) -> None:
        if not self._destroyed:
            self._destroyed = True
            self.device.release("cudaEventDestroy", self.handle)


class CapturedGraph:
    """Work that was recorded once and is launched as one thing."""

    def __init__(self, device: Device, executable: Any) -> None:
        self.device = device
        self._executable = executable
        self._destroyed = False

    def launch(self, stream: Stream) -> None:
        self.device.call("cudaGraphLaunch", self._executable, stream.handle)

    def destroy(self) -> None:
        if not self._destroyed:
            self._destroyed = True
            self.device.release("cudaGraphExecDestroy", self._executable)


class Capture:
    """The result of `capture`: after the block, `graph` holds what was enqueued in it."""

    graph: CapturedGraph


@contextmanager
def capture(stream: Stream) -> Iterator[Capture]:
    """Record what the block enqueues on the stream instead of running it.

    Raises:
        DeviceError: something in the block cannot be recorded. The stream is usable again.
    """
    device, made = stream.device, Capture()
    # Thread-local: what other threads allocate meanwhile does not spoil the recording.
    device.call(
        "cudaStreamBeginCapture", stream.handle, device.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    )
    try:
        yield made
    except BaseException:
        _, *graphs = device.cuda.cudaStreamEndCapture(stream.handle)
        if graphs and graphs[0] is not None and int(graphs[0]):
            device.release("cudaGraphDestroy", graphs[0])
        raise
    graph = device.call("cudaStreamEndCapture", stream.handle)
    try:
        made.graph = CapturedGraph(device, device.call_for_memory("cudaGraphInstantiate", graph, 0))
    finally:
        device.release("cudaGraphDestroy", graph)


def _available_to_host() -> int:
    """Return the bytes that a program can get without swapping; 0 if the system does not say."""
    try:
        for line in _HOST_MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _version(number: Any) -> str:
    return f"{int(number) // 1000}.{int(number) % 1000 // 10}"
