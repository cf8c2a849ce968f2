"""Keys of all steps in a device's memory, for one request after the other. Thread-safe."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..backends.device import Buffer, Device
from ..backends.host import host_dtype
from ..backends.pieces import DeviceArray
from ..backends.shelf import Shelf
from ..bundle import Bundle
from .reference import KeptReference

StepKeys = Mapping[tuple[int, str], DeviceArray]


class OnDevice:
    """References by their content key, on one device. What no request uses makes room for whatever needs it there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # never held while keys go up, or while anything waits for the device
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._device: Device | None = None

    @contextmanager
    def use(self, reference: KeptReference, shelf: Shelf, bundle: Bundle, steps: int) -> Iterator[StepKeys]:
        """The keys by step and name, which stay for the block, and until others need their room.

        However the block ends, what it enqueued on the shelf's lane is waited for: it may still read them.

        Raises:
            DeviceMemoryError: the device has not enough memory, even without what no request uses.
            DeviceError: a copy failed.
        """
        entry = self._take(reference, shelf, bundle, steps)
        try:
            yield entry.arrays
        finally:
            try:
                shelf.lane.settle()
            finally:
                self._release(entry)

    def holds(self, key: str) -> bool:
        """Whether they are there, or on their way."""
        with self._lock:
            return key in self._entries

    @property
    def nbytes(self) -> int:
        """What it holds now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def unused_bytes(self, wanted: Iterable[str]) -> int:
        """What could be freed, and what is there already of the wanted keys."""
        with self._lock:
            chosen = set(wanted)
            return sum(e.nbytes for key, e in self._entries.items() if key in chosen or not e.users)

    def reclaim(self, nbytes: float) -> int:
        """Free what was used longest ago and no request uses, until it is so many bytes; returns how many it is."""
        with self._lock:
            unused = self._remove(nbytes, ())
        return _free(unused)

    def trim(self, nbytes: int, wanted: Collection[str]) -> None:
        """The same, until no more than so many bytes are left beside the wanted keys, or all that is left is used."""
        with self._lock:
            beside = sum(entry.nbytes for key, entry in self._entries.items() if key not in wanted)
            unused = self._remove(beside - nbytes, wanted)
        _free(unused)

    def free_unused(self) -> None:
        """Free what no request uses; all of it, when none runs."""
        self.reclaim(math.inf)

    def forget(self, keys: Collection[str] | None = None) -> None:
        """Free what has these content keys and no request uses; None: everything that none uses."""
        with self._lock:
            unused = self._remove(math.inf, () if keys is None else self._entries.keys() - set(keys))
        _free(unused)

    def close(self) -> None:
        """Free what no request uses, and let the device go."""
        self.free_unused()
        with self._lock:
            device, self._device = self._device, None
        if device is not None:
            device.no_longer_from(self.reclaim)

    def _take(self, reference: KeptReference, shelf: Shelf, bundle: Bundle, steps: int) -> _Entry:
        """The entry, with one user more. Who comes while another thread brings it up waits for that."""
        while True:
            with self._lock:
                self._serve(shelf.lane.device)
                entry = self._entries.get(reference.key)
                mine = entry is None
                if entry is None:
                    entry = self._entries[reference.key] = _Entry(_sizes(reference, bundle, steps))
                self._entries.move_to_end(reference.key)
                entry.users += 1
            try:
                if mine:
                    self._upload(entry, reference, shelf)
                else:
                    entry.done.wait()
            except BaseException:
                self._release(entry)
                raise
            if entry.buffer is not None:
                return entry
            # The other's attempt failed; whoever waited for it makes one of its own.

    def _serve(self, device: Device) -> None:
        if self._device is None:
            self._device = device
            device.reclaim_from(self.reclaim)

    def _upload(self, entry: _Entry, reference: KeptReference, shelf: Shelf) -> None:
        try:
            buffer, entry.arrays = shelf.keep(entry.sizes, lambda key: reference.tensors[key[1]].step(key[0]))
            entry.nbytes = buffer.nbytes
            entry.buffer = buffer
        finally:
            with self._lock:
                if entry.buffer is None:
                    del self._entries[reference.key]
            entry.done.set()

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1

    def _remove(self, nbytes: float, spared: Collection[str]) -> list[_Entry]:
        removed = []
        for key, entry in list(self._entries.items()):
            if nbytes > 0 and not entry.users and key not in spared:
                removed.append(self._entries.pop(key))
                nbytes -= entry.nbytes
        return removed


class _Entry:
    """`sizes`: bytes by step and name. `done`: it is there, or it is known that it will not be."""

    def __init__(self, sizes: Mapping[tuple[int, str], int]) -> None:
        self.sizes = sizes
        self.nbytes = sum(sizes.values())
        self.buffer: Buffer | None = None
        self.arrays: StepKeys = {}
        self.users = 0
        self.done = threading.Event()


def _sizes(reference: KeptReference, bundle: Bundle, steps: int) -> dict[tuple[int, str], int]:
    itemsize = host_dtype(bundle.dtype).itemsize
    return {
        (step, f"{kind}_ref_{layer.index}"): reference.tokens[layer.factor] * layer.width * itemsize
        for step in range(steps)
        for layer in bundle.injection_layers
        for kind in "kv"
        if reference.tokens[layer.factor]
    }


def _free(entries: Iterable[_Entry]) -> int:
    """Outside the lock: freeing may wait for the device."""
    freed = 0
    for entry in entries:
        assert entry.buffer
        freed += entry.buffer.nbytes
        entry.buffer.free()
    return freed
