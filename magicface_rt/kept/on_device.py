"""Keys of all steps in a device's memory, for one request after the other. Thread-safe."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from ..backends.device import Buffer, Device
from ..backends.host import host_dtype
from ..backends.pieces import DeviceArray
from ..backends.shelf import Shelf
from ..bundle import Bundle
from ..errors import KeptConceptError
from ..shown import shown
from .awaited import Awaited
from .reference import KeptReference

StepKeys = Mapping[tuple[int, str], DeviceArray]


class OnDevice:
    """References by their identity, on one device. What no request uses makes room for whatever needs it there.

    A content key is what a file says, so it does for forgetting and for plans, and never to find keys by.
    """

    def __init__(self) -> None:
        # Never held while keys go up, or while anything waits for the device. A Session may be closed in between.
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._device: Device | None = None

    @contextmanager
    def use(
        self,
        reference: KeptReference,
        shelf: Shelf,
        bundle: Bundle,
        steps: int,
        waiting: Callable[[], object] = lambda: None,
    ) -> Iterator[StepKeys]:
        """The keys by step and name, which stay for the block, and until others need their room.

        While another thread brings them up, `waiting` is called from time to time, and may raise. However the block
        ends, what it enqueued on the shelf's lane is waited for: it may still read them.

        Raises:
            DeviceMemoryError: the device has not enough memory, even without what no request uses.
            DeviceError: a copy failed.
            KeptConceptError: keys of another size are there under the same identity; or its file was written to.
        """
        user = _User()
        try:
            yield self._take(user, reference, shelf, bundle, steps, waiting).arrays
        finally:
            try:
                shelf.lane.settle()
            finally:
                # No call of ours, at whose beginning Ctrl-C could leave the user there for ever.
                user.entry.users.discard(user)

    def has(self, reference: KeptReference) -> bool:
        """Whether its keys are there, or on their way."""
        with self._lock:
            return reference.identity in self._present()

    def holds(self, key: str) -> bool:
        """Whether any are there, or on their way, that have this content key."""
        with self._lock:
            return any(entry.key == key for entry in self._present().values())

    @property
    def nbytes(self) -> int:
        """What it holds now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._present().values())

    def unused_bytes(self, wanted: Iterable[str]) -> int:
        """What could be freed, and what is there already of the wanted content keys."""
        with self._lock:
            chosen = set(wanted)
            return sum(e.nbytes for e in self._present().values() if e.key in chosen or not e.users)

    def reclaim(self, nbytes: float) -> int:
        """Free what was used longest ago and no request uses, until it is so many bytes; returns how many it is."""
        with self._lock:
            unused = self._remove(nbytes, ())
        return _free(unused)

    def trim(self, nbytes: int, wanted: Collection[Hashable]) -> None:
        """The same, until no more than so many bytes are left beside those with the wanted identities, or all that is
        left is used.
        """
        with self._lock:
            beside = sum(entry.nbytes for identity, entry in self._present().items() if identity not in wanted)
            unused = self._remove(beside - nbytes, wanted)
        _free(unused)

    def free_unused(self) -> None:
        """Free what no request uses; all of it, when none runs."""
        self.reclaim(math.inf)

    def forget(self, keys: Collection[str] | None = None) -> None:
        """Free what has these content keys and no request uses; None: everything that none uses."""
        with self._lock:
            others = () if keys is None else {i for i, entry in self._present().items() if entry.key not in keys}
            unused = self._remove(math.inf, others)
        _free(unused)

    def close(self) -> None:
        """Free what no request uses, and let the device go."""
        self.free_unused()
        with self._lock:
            device, self._device = self._device, None
        if device is not None:
            device.no_longer_from(self.reclaim)

    def _take(
        self,
        user: _User,
        reference: KeptReference,
        shelf: Shelf,
        bundle: Bundle,
        steps: int,
        waiting: Callable[[], object],
    ) -> _Entry:
        """The entry, with one user more. Who comes while another thread brings it up waits for that."""
        sizes = _sizes(reference, bundle, steps)
        while True:
            mine = _Entry(reference.key, sizes)
            try:  # from before it is registered on: Ctrl-C may come at any moment
                with self._lock:
                    self._serve(shelf.lane.device)
                    entry = self._present().setdefault(reference.identity, mine)
                    entry.check(sizes)
                    self._entries.move_to_end(reference.identity)
                    user.entry = entry
                    entry.users.add(user)
                if entry is mine:
                    buffer, arrays = shelf.keep(sizes, lambda key: reference.tensors[key[1]].step(key[0]))
                    try:
                        reference.check_unwritten()  # or others of its identity would find another one's keys
                    except BaseException:
                        buffer.free()
                        raise
                    mine.buffer, mine.arrays = buffer, arrays
                else:
                    entry.wait(waiting)
            finally:
                mine.over = True
                mine.wake()
                with self._lock:
                    self._present()
            if entry.buffer is not None:
                return entry
            # The other's attempt failed; whoever waited for it makes one of its own.

    def _serve(self, device: Device) -> None:
        if self._device is None:
            device.reclaim_from(self.reclaim)  # which may be said twice
            self._device = device

    def _present(self) -> OrderedDict[Hashable, _Entry]:
        """The entries, without those of which it is known that they will not be there."""
        for identity, entry in list(self._entries.items()):
            if entry.over and entry.buffer is None:
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
    """`key`: the content key; `sizes`: bytes by step and name."""

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
        """Raises KeptConceptError where other sizes are wanted: copied, such keys would run into their neighbours."""
        if sizes != self.sizes:
            raise KeptConceptError(
                f"kept keys {shown(self.key[:16])} on the device have {sum(self.sizes.values())} bytes, and a request "
                f"wants {sum(sizes.values())} bytes of them, laid out otherwise; expected the same for one reference. "
                "Prepare the concept again, or forget what is kept (`Session.forget`)."
            )


class _User:
    """One use of an entry; at first of none that is there."""

    def __init__(self) -> None:
        self.entry = _Entry("", {})


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
