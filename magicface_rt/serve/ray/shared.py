"""The shared folder of concepts, as the replicas and the front see it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection

from ...kept import KeptConcept
from ..concepts import FolderConcepts, StoredConcept, stamp_of, unknown
from ..erasure import Trace

__all__ = ["SharedConcepts"]


class SharedConcepts(FolderConcepts):
    """Maps files of the folder, and remembers which concepts' keys have been in memory.

    A concept that is being erased appears not to exist, whether or not its file still does.
    """

    def __init__(self, folder: str | os.PathLike[str], *, most: int = 1000, most_bytes: int = 2**33) -> None:
        super().__init__(folder, most=most, most_bytes=most_bytes)
        self._watching = threading.Lock()
        self._traces: dict[str, list[tuple[weakref.ref[KeptConcept], Trace]]] = {}
        self._erasing: frozenset[str] = frozenset()

    @property
    def erasing(self) -> frozenset[str]:
        """The ids that are being erased."""
        return self._erasing

    def set_erasing(self, ids: Collection[str]) -> None:
        """Set the ids that are being erased from now on; all others are not."""
        self._erasing = frozenset(ids)

    def get(self, id: str) -> StoredConcept:
        if id in self._erasing:
            raise unknown(id)
        stored = super().get(id)
        self._watch(id, stored.concept)
        if id in self._erasing:  # it began in the meantime, when there was no map to release
            self.unmap(id)
            del stored  # or the error would hold it
            raise unknown(id)
        return stored

    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        self._watch(id, concept)  # the prepared keys are in memory, besides the file that is mapped below
        stored = super().put(id, concept)
        self._watch(id, stored.concept)
        return stored

    def has(self, id: str) -> bool:
        """Return whether the concept has a file, which may be damaged."""
        path = self._path(id)
        return id not in self._erasing and path is not None and self._keeps(id)

    def is_id(self, id: str) -> bool:
        """Return whether a text has the form of an id."""
        return self._path(id) is not None

    def peek(self, id: str) -> StoredConcept:
        """Return a concept as its file describes it, without reading its keys or remembering it.

        Raises:
            UnknownConceptError: there is none, or its file is damaged.
        """
        path = self._path(id)
        stamp = None if path is None or id in self._erasing else stamp_of(path)
        if path is None or stamp is None:
            raise unknown(id)
        return self._read(id, path, stamp, check_hashes=False)

    def unmap(self, id: str) -> None:
        """Release this store's map of a concept. Callers that use the concept keep it, and the file stays."""
        with self._lock:
            self._mapped.pop(id, None)

    def traces(self, id: str) -> list[Trace]:
        """Return the traces of everything under this id that was in memory since it was last forgotten."""
        with self._watching:
            return [trace for _, trace in self._traces.get(id, ())]

    def forget(self, id: str) -> None:
        """Drop the traces of a concept: nothing of it is in memory."""
        with self._watching:
            self._traces.pop(id, None)

    def _watch(self, id: str, concept: KeptConcept) -> None:
        """Keep a trace of each map of a concept. The last one stays even after its memory is freed, because a Session
        may have copied keys.
        """
        with self._watching:
            known = self._traces.get(id, [])
            if not any(ref() is concept for ref, _ in known):
                alive = [(ref, trace) for ref, trace in known if trace.alive()]
                self._traces[id] = [*alive, (weakref.ref(concept), Trace(concept))]
