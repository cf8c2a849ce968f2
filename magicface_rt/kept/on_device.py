"""Keys of all steps in a device's memory, kept there from one request to the next. Thread-safe."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..backends.device import Buffer, Device
from ..backends.host import host_dtype
from ..backends.key_uploader import KeyUploader
from ..backends.pieces import DeviceArray
from ..bundle import Bundle, reference_tensor_names
from ..errors import KeptConceptError
from ..values.shown import shown
from .awaited import Awaited
from .reference import KeptReference

StepKeys = Mapping[tuple[int, str], DeviceArray]


class OnDevice:
    """References on one device, by their identity. Those that no request uses make room for whatever needs it there.

    A content key is only what a file says, so it serves for forgetting and for plans, and never for finding keys.
    """

    def __init__(self) -> None:
        # Never held while keys are uploaded or anything waits for the device. A Session may be closed in between.
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._device: Device | None = None

    @contextmanager
    def use(
        self,
        reference: KeptReference,
        key_uploader: KeyUploader,
        bundle: Bundle,
        steps: int,
        waiting: Callable[[], object] = lambda: None,
    ) -> Iterator[StepKeys]:
        """Provide a reference's keys, by step and name. They stay for the block, and then until others need their room.

        While another thread uploads them, `waiting` is called from time to time, and may raise. However the block ends,
        what it enqueued on the key uploader's worker stream is waited for, since it may still read them.

        Raises:
            DeviceMemoryError: the device has not enough memory, even without what no request uses.
            DeviceError: a copy failed.
            KeptConceptError: keys of another size are there under the same identity; or the reference's file was
                written to.
        """
        user = _User()
        try:
            yield self._take(user, reference, key_uploader, bundle, steps, waiting).arrays
        finally:
            try:
                key_uploader.worker_stream.wait_quietly()
            finally:
                # A method of C (rule R3 of `interrupts`): an interrupt at the beginning of one of ours would leave the
                # user there for ever.
                user.entry.users.discard(user)

    def has(self, reference: KeptReference) -> bool:
        """Whether the keys of a reference are on the device, or being uploaded."""
        with self._lock:
            return reference.identity in self._present()

    def holds(self, key: str) -> bool:
        """Whether any keys with this content key are on the device, or being uploaded."""
        with self._lock:
            return any(entry.key == key for entry in self._present().values())

    @property
    def nbytes(self) -> int:
        """The bytes that are held now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._present().values())

    def unused_bytes(self, wanted: Iterable[str]) -> int:
        """Return the bytes that could be freed, or that belong to the wanted content keys and are there already."""
        with self._lock:
            chosen = set(wanted)
            return sum(e.nbytes for e in self._present().values() if e.key in chosen or not e.users)

    def reclaim(self, nbytes: float) -> int:
        """Free what no request uses, least recently used first, until `nbytes` are freed; return how many were."""
        with self._lock:
            unused = self._remove(nbytes, ())
        return _free(unused)

    def trim(self, nbytes: int, wanted: Collection[Hashable]) -> None:
        """Free what no request uses, least recently used first, until no more than `nbytes` are left beside the wanted
        identities, or all that is left is in use.
        """
        with self._lock:
            beside = sum(entry.nbytes for identity, entry in self._present().items() if identity not in wanted)
            unused = self._remove(beside - nbytes, wanted)
        _free(unused)

    def free_unused(self) -> None:
        """Free what no request uses, which is everything when none is running."""
        self.reclaim(math.inf)

    def forget(self, keys: Collection[str] | None = None) -> None:
        """Free what has these content keys and is not in use by a request; None: everything that is not in use."""
        with self._lock:
            others = () if keys is None else {i for i, entry in self._present().items() if entry.key not in keys}
            unused = self._remove(math.inf, others)
        _free(unused)

    def close(self) -> None:
        """Free what no request uses, and let go of the device."""
        self.free_unused()
        with self._lock:
            device, self._device = self._device, None
        if device is not None:
            device.no_longer_from(self.reclaim)

    def _take(
        self,
        user: _User,
        reference: KeptReference,
        key_uploader: KeyUploader,
        bundle: Bundle,
        steps: int,
        waiting: Callable[[], object],
    ) -> _Entry:
        """Return the entry of a reference with `user` added to it; upload its keys if they are not there. If another
        thread is uploading them, wait for that.
        """
        sizes = _sizes(reference, bundle, steps)
        while True:
            mine = _Entry(reference.key, sizes)
            try:  # before `mine` is registered (rule R2 of `interrupts`)
                with self._lock:
                    self._serve(key_uploader.worker_stream.device)
                    entry = self._present().setdefault(reference.identity, mine)
                    entry.check(sizes)
                    self._entries.move_to_end(reference.identity)
                    user.entry = entry
                    entry.users.add(user)
                if entry is mine:
                    buffer, arrays = key_uploader.keep(sizes, lambda key: reference.tensors[key[1]].step(key[0]))
                    try:
                        reference.check_not_modified()  # or others with its identity would find another one's keys
                    except BaseException:
                        buffer.free()
                        raise
                    mine.buffer, mine.arrays = buffer, arrays
                else:
                    entry.wait(waiting)
            finally:
                mine.finished = True  # before any call (rule R1)
                mine.wake()
                with self._lock:
                    self._present()
            if entry.buffer is not None:
                return entry
            # The other thread's attempt failed; each thread that waited for it makes its own.

    def _serve(self, device: Device) -> None:
        if self._device is None:
            device.reclaim_from(self.reclaim)  # may be called twice
            self._device = device

    def _present(self) -> OrderedDict[Hashable, _Entry]:
        """Return the entries, after removing those of which it is known that they will not be there."""
        for identity, entry in list(self._entries.items()):
            if entry.finished and entry.buffer is None:
                self._entries.pop(identity, None)
        return self._entries

    def _remove(self, nbytes: float, spared: Collection[Hashable]) -> list[_Entry]:
        removed = []
        for identity, entry in list(self._present().items()):
            if nbytes > 0 and not entry.users and identity not in spared:
                removed.append(self._entries.pop(identity))
                nbytes -= entry.nbytes
        return removed


class _Entry(Awaited):
    """The keys of one reference. `key`: its content key; `sizes`: bytes by step and name."""

    def __init__(self, key: str, sizes: Mapping[tuple[int, str], int]) -> None:
        super().__init__()
        self.key = key
        self.sizes = sizes
        self.buffer: Buffer | None = None
        self.arrays: StepKeys = {}
        self.users: set[_User] = set()

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes if self.buffer is not None else sum(self.sizes.values())

    def check(self, sizes: Mapping[tuple[int, str], int]) -> None:
        """Raise KeptConceptError if other sizes are wanted: such keys, when copied, would run into their neighbours."""
        if sizes != self.sizes:
            raise KeptConceptError(
                f"kept keys {shown(self.key[:16])} on the device have {sum(self.sizes.values())} bytes, and a request "
                f"wants {sum(sizes.values())} bytes of them, laid out otherwise; expected the same for one reference. "
                "Prepare the concept again, or forget what is kept (`Session.forget`)."
            )


class _User:
    """One use of an entry; at first, of one that is not on the device."""

    def __init__(self) -> None:
        self.entry = _Entry("", {})


def _sizes(reference: KeptReference, bundle: Bundle, steps: int) -> dict[tuple[int, str], int]:
    itemsize = host_dtype(bundle.dtype).itemsize
    return {
        (step, name): reference.tokens[layer.factor] * layer.width * itemsize
        for step in range(steps)
        for layer in bundle.injection_layers
        for name in reference_tensor_names(layer.index)
        if reference.tokens[layer.factor]
    }


def _free(entries: Iterable[_Entry]) -> int:
    """Free entries; return how many bytes were freed. Call this without the lock: freeing may wait for the device."""
    freed = 0
    for entry in entries:
        assert entry.buffer
        freed += entry.buffer.nbytes
        entry.buffer.free()
    return freed
