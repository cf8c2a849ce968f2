"""Keys of all steps in a device's memory, for one request after the other. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from ..backends.device import Buffer
from ..backends.host import host_dtype
from ..backends.pieces import DeviceArray
from ..backends.shelf import Shelf
from ..bundle import Bundle
from ..errors import DeviceError
from .reference import KeptReference

StepKeys = Mapping[tuple[int, str], DeviceArray]


class OnDevice:
    """References by their content key. What no request uses makes room for what one needs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def take(self, reference: KeptReference, shelf: Shelf, bundle: Bundle, steps: int) -> StepKeys:
        """The keys by step and name; until `release` they stay.

        Raises:
            DeviceError: the device has not enough memory, even without what no request uses.
        """
        with self._lock:
            entry = self._entries.get(reference.key)
            if entry is None:
                entry = self._upload(reference, shelf, bundle, steps)
                self._entries[reference.key] = entry
            self._entries.move_to_end(reference.key)
            entry.users += 1
            return entry.arrays

    def release(self, keys: Iterable[str]) -> None:
        """As often as each was taken."""
        with self._lock:
            for key in keys:
                self._entries[key].users -= 1

    def unused_bytes(self, wanted: Iterable[str]) -> int:
        """What could be freed, and what is there already of the wanted keys."""
        with self._lock:
            chosen = set(wanted)
            return sum(e.buffer.nbytes for key, e in self._entries.items() if key in chosen or not e.users)

    def free_unused(self) -> None:
        """Free what no request uses; all of it, when none runs."""
        with self._lock:
            while self._free_one():
                pass

    def _upload(self, reference: KeptReference, shelf: Shelf, bundle: Bundle, steps: int) -> _Entry:
        itemsize = host_dtype(bundle.dtype).itemsize
        sizes = {
            (step, f"{kind}_ref_{layer.index}"): reference.tokens[layer.factor] * layer.width * itemsize
            for step in range(steps)
            for layer in bundle.injection_layers
            for kind in "kv"
            if reference.tokens[layer.factor]
        }
        while True:
            try:
                buffer, arrays = shelf.keep(sizes, lambda key: reference.tensors[key[1]].step(key[0]))
                return _Entry(buffer, arrays)
            except DeviceError:
                if not self._free_one():
                    raise

    def _free_one(self) -> bool:
        for key, entry in self._entries.items():
            if not entry.users:
                entry.buffer.free()
                del self._entries[key]
                return True
        return False


class _Entry:
    def __init__(self, buffer: Buffer, arrays: StepKeys) -> None:
        self.buffer = buffer
        self.arrays = arrays
        self.users = 0
