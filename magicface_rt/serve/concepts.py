"""Where the server keeps its concepts: in memory or in a folder of files, under ids that name their content.

An id is a SHA-256 over the content keys of the references, which in turn cover everything that the references' keys and
values depend on. So what an id stands for never changes, and the same upload has the same id in every process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    AnswerError,
    ErasedError,
    EraseError,
    KeptConceptError,
    OutputError,
    ServiceError,
    StoreFullError,
    UnknownConceptError,
)
from ..files import atomic_files
from ..files.stamps import Stamp
from ..kept import KeptConcept
from ..kept.files import save
from .problems import refusal

__all__ = [
    "NO_WORD",
    "SUFFIX",
    "ConceptStore",
    "FolderConcepts",
    "MemoryConcepts",
    "StoredConcept",
    "concept_id",
    "known_use",
]

logger = logging.getLogger("magicface_rt.serve")

SUFFIX = ".concept"
NO_WORD = "(none)"
"""The word of a concept that was uploaded without one; requests that use it must then name one."""

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class StoredConcept:
    """A concept as a store keeps it. `created`: seconds since 1970."""

    id: str
    concept: KeptConcept
    created: float


def concept_id(keys: Sequence[str]) -> str:
    """Return the id of a concept whose references have these content keys, in that order."""
    return hashlib.sha256("\n".join(keys).encode("ascii")).hexdigest()


def load_own(id: str, path: Path, *, check_hashes: bool = True) -> KeptConcept:
    """Load the concept from a file that is named after its id.

    Raises:
        KeptConceptError: the file is damaged, or holds another concept, for instance because it was copied to the wrong
            name.
    """
    concept = KeptConcept.load(path, check_hashes=check_hashes)
    keys = [reference.key for reference in concept.references]
    texts = (concept.word, concept.name, concept.origin.bundle_hash, *(one.prompt for one in concept.references))
    if not all(map(_ID.fullmatch, keys)) or not all(map(_is_unicode, texts)):
        raise KeptConceptError(f"file {path.name!r} holds what no concept of a service has. Put the concept again.")
    if (own := concept_id(keys)) != id:
        raise KeptConceptError(f"file {path.name!r} holds the concept {own}, expected that of its name.")
    return concept


def _is_unicode(text: str) -> bool:
    """Return whether an answer can hold the text, which it cannot if the text has half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unknown(id: str) -> UnknownConceptError:
    """Make the error for an id that is not kept. A text that is no id is quoted only in part."""
    shown = id if _ID.fullmatch(id) else ascii(id[:80])
    return UnknownConceptError(f"concept {shown} is not kept here: it was never put, or it was erased. Put it again.")


def unreadable(error: OSError) -> AnswerError:
    """Make the error for when it cannot be seen what is kept; that is not the same as nothing being kept."""
    logger.error("the folder of concepts cannot be read: %s", error)
    return refusal(503, "store-unusable", "the folder of concepts cannot be read; the service's log says more.")


class ConceptStore(ABC):
    """Kept concepts by id. Thread-safe; calls may block while files are read or written.

    Every method that looks at files raises AnswerError, 503 `store-unusable`, if it cannot.
    """

    @abstractmethod
    def get(self, id: str) -> StoredConcept:
        """Return the concept with this id.

        Raises:
            UnknownConceptError: there is none, or its file is damaged; putting the concept again replaces the file.
        """

    @abstractmethod
    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        """Keep a concept, replacing what is there under the id, and return it as it is kept. Several threads that put
        at once without having reserved may all be given the same room.

        Raises:
            StoreFullError: there is no room.
            OutputError: a file cannot be written.
            ErasedError: another process erased the concept while it was being put.
        """

    @abstractmethod
    def erase(self, id: str) -> int:
        """Remove a concept from memory and disk, and return how many files were removed. Callers that hold the concept
        go on holding it. A file that another process is still writing stays: that process is putting the concept again.

        Raises:
            UnknownConceptError: there is no such concept.
            EraseError: a file cannot be removed.
        """

    @abstractmethod
    def held(self, id: str) -> StoredConcept | None:
        """Return what is in this process's memory under this id, or None. Files are not looked at: the concept's may
        have been damaged, replaced or removed since.
        """

    @abstractmethod
    def left(self, id: str) -> str | None:
        """Say in words where something of this id is, or return None if nothing is. Something that is left after
        `erase` was put again, or is being put, by another process.
        """

    @abstractmethod
    def entries(self) -> list[StoredConcept]:
        """Return all concepts that can be read, oldest first."""

    @abstractmethod
    def used(self) -> tuple[int, int]:
        """Return the number of concepts, and their bytes."""

    @abstractmethod
    def reserve(self, id: str, nbytes: int) -> Callable[[], object]:
        """Reserve room for a concept of so many bytes that is not computed yet. The returned function gives the room
        back: call it when the concept has been put, or will not be. An id can be reserved only once at a time.

        Raises:
            StoreFullError: the bytes do not fit beside what is kept and what else is reserved.
        """

    def take_vanished(self) -> frozenset[str]:
        """Return the ids of concepts that were in this process's memory and were found, since the last call, to have
        been erased by another process. The store itself holds nothing of them any more; a Session may.
        """
        return frozenset()

    def close(self) -> None:  # noqa: B027 - not every store holds something
        """Release what is in memory."""


class _Limited(ConceptStore):
    def __init__(self, *, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._room = threading.Lock()
        self._reserving = threading.Lock()  # a lock of its own, so that giving room back never waits for a disk
        self._reserved: dict[str, int] = {}

    def reserve(self, id: str, nbytes: int) -> Callable[[], object]:
        with self._room:
            with self._reserving:
                reserved = dict(self._reserved)
            self._check_room(nbytes, [room for other, room in reserved.items() if not self._keeps(other)])
            with self._reserving:
                self._reserved[id] = nbytes

        def release() -> None:
            with self._reserving:
                del self._reserved[id]

        return release

    @abstractmethod
    def _keeps(self, id: str) -> bool:
        """Return whether `used` counts this id."""

    def _check_room(self, nbytes: int, others: Sequence[int] = ()) -> None:
        """Raise StoreFullError if a concept does not fit. others: bytes of other concepts about to be kept."""
        count, used_bytes = self.used()
        count, used_bytes = count + len(others), used_bytes + sum(others)
        if count >= self._most:
            raise StoreFullError(f"{count} concepts are kept, which is the limit. Erase one that is not needed.")
        if used_bytes + nbytes > self._most_bytes:
            raise StoreFullError(
                f"the concept needs {nbytes:,} bytes, and {used_bytes:,} of {self._most_bytes:,} are used. Erase "
                "concepts, or put it with fewer steps, a smaller mask or 8-bit storage."
            )


class MemoryConcepts(_Limited):
    """Concepts in this process's memory, for as long as it lives: at most `most` of them, `most_bytes` in all."""

    def __init__(self, *, most: int = 1000, most_bytes: int = 2**33) -> None:
        super().__init__(most=most, most_bytes=most_bytes)
        self._lock = threading.Lock()
        self._entries: dict[str, StoredConcept] = {}

    def get(self, id: str) -> StoredConcept:
        with self._lock:
            found = self._entries.get(id)
        if found is None:
            raise unknown(id)
        return found

    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        stored = StoredConcept(id, concept, time.time())
        with self._lock:
            self._entries.pop(id, None)
        self._check_room(concept.nbytes)
        with self._lock:
            self._entries[id] = stored
        return stored

    def erase(self, id: str) -> int:
        with self._lock:
            if self._entries.pop(id, None) is None:
                raise unknown(id)
        return 0

    def left(self, id: str) -> str | None:
        with self._lock:
            return "memory" if id in self._entries else None

    def entries(self) -> list[StoredConcept]:
        with self._lock:
            return sorted(self._entries.values(), key=lambda stored: stored.created)

    def _keeps(self, id: str) -> bool:
        with self._lock:
            return id in self._entries

    def used(self) -> tuple[int, int]:
        with self._lock:
            return len(self._entries), sum(stored.concept.nbytes for stored in self._entries.values())

    def held(self, id: str) -> StoredConcept | None:
        with self._lock:
            return self._entries.get(id)

    def close(self) -> None:
        with self._lock:
            self._entries.clear()


class FolderConcepts(_Limited):
    """Concepts in a folder, as `ID.concept` files mapped into memory; several processes may share the folder.

    Another process's concepts are found when they are asked for, and concepts that it has erased are no longer found.
    The folder is created if it is missing, accessible to its owner only. What a killed process was storing there is
    removed first, unless `remove_abandoned` is false.

    Raises OutputError if the folder cannot be created or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        most: int = 1000,
        most_bytes: int = 2**33,
        remove_abandoned: bool = True,
    ) -> None:
        super().__init__(most=most, most_bytes=most_bytes)
        self.folder = Path(folder).absolute()
        self._make_folder()
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise OutputError(f"folder of concepts {str(folder)!r} may not be read and written.")
        if remove_abandoned:  # keys of a person that nobody could erase: whoever was sending them was not told an id
            atomic_files.remove_abandoned(self.folder, _is_concept_file)
        self._lock = threading.Lock()
        self._mapped: dict[str, tuple[Stamp, StoredConcept]] = {}
        self._vanished: set[str] = set()

    def get(self, id: str) -> StoredConcept:
        path = self._path(id)
        stamp = stamp_of(path) if path is not None else None
        if path is None or stamp is None:
            self._let_go({id})
            raise unknown(id)
        with self._lock:
            known = self._mapped.get(id)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            stored = self._read(id, path, stamp)
        except UnknownConceptError as error:
            if error.__cause__ is not None:  # the file is damaged
                logger.warning("%s", str(error.__cause__))  # a record that is kept would hold what the frames hold
            raise
        with self._lock:
            self._mapped[id] = (stamp, stored)
        if stamp_of(path) is None:  # erased as it was read, when there was no map to release
            self._let_go({id})
            del stored  # or the error would hold it
            raise unknown(id)
        return stored

    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        path = self._path(id)
        assert path is not None, id
        if stamp_of(path) is None:
            self._check_room(concept.nbytes)
        self._make_folder()
        try:
            save(concept, path, with_image=False, overwrite=True, follow=False)  # write nothing outside the folder
            stamp = stamp_of(path)
            if stamp is None:
                raise unknown(id)
            with _reading(id, path):
                stored = StoredConcept(id, KeptConcept.load(path, check_hashes=False), stamp.written / 1e9)
        except (OutputError, UnknownConceptError) as error:
            cause, written = error.__cause__, isinstance(error, UnknownConceptError)
            if not (cause is None if written else isinstance(cause, FileNotFoundError)):
                raise
            raise ErasedError(f"concept {id} was erased by another process as it was put. Put it again.") from None
        with self._lock:
            self._mapped[id] = (stamp, stored)
        return stored

    def erase(self, id: str) -> int:
        path = self._path(id)
        files = [] if path is None else self._files(path)
        with self._lock:
            mapped = self._mapped.pop(id, None)
        if not files and mapped is None:
            raise unknown(id)
        gone = 0
        for file in files:
            if file != path and atomic_files.is_live(file):
                continue
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                logger.error("a file of a concept cannot be removed: %s", error)
                raise EraseError(
                    f"file {file.name!r} of the concept cannot be removed: {error.strerror or error}."
                ) from error
            gone += 1
        return gone

    def left(self, id: str) -> str | None:
        path = self._path(id)
        with self._lock:
            if id in self._mapped:
                return "memory"
        return "a file" if path is not None and self._files(path) else None

    def entries(self) -> list[StoredConcept]:
        found = []
        self._let_go_of_what_is_gone()
        for path in self._all():
            id, stamp = path.stem, stamp_of(path)
            if stamp is None:
                continue
            with self._lock:
                known = self._mapped.get(id)
            if known is not None and known[0] == stamp:
                found.append(known[1])
                continue
            with contextlib.suppress(UnknownConceptError):  # damaged files are reported by `get`
                found.append(self._read(id, path, stamp, check_hashes=False))
        return sorted(found, key=lambda stored: stored.created)

    def _keeps(self, id: str) -> bool:
        return stamp_of(self.folder / f"{id}{SUFFIX}") is not None

    def used(self) -> tuple[int, int]:
        self._let_go_of_what_is_gone()
        stamps = [stamp_of(path) for path in self._all()]
        sizes = [stamp.size for stamp in stamps if stamp is not None]
        return len(sizes), sum(sizes)

    def take_vanished(self) -> frozenset[str]:
        with self._lock:
            found, self._vanished = frozenset(self._vanished), set()
        return found

    def held(self, id: str) -> StoredConcept | None:
        with self._lock:
            return self._mapped[id][1] if id in self._mapped else None

    def close(self) -> None:
        with self._lock:
            self._mapped.clear()

    def _let_go_of_what_is_gone(self) -> None:
        """Release concepts whose files are gone: a process that erases one does not tell the others."""
        with self._lock:
            mapped = set(self._mapped)
        self._let_go({id for id in mapped if not self._keeps(id)})

    def _let_go(self, ids: Collection[str]) -> None:
        with self._lock:
            self._vanished.update(id for id in ids if self._mapped.pop(id, None) is not None)

    def _make_folder(self) -> None:
        try:
            atomic_files.make_folder(self.folder, mode=0o700)
        except OSError as error:
            raise OutputError(f"folder of concepts {str(self.folder)!r} cannot be made: {error}.") from error

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except _NOT_THERE:
            return []
        except OSError as error:
            raise unreadable(error) from error

    def _all(self) -> list[Path]:
        return [self.folder / name for name in self._names() if _is_concept_file(name)]

    def _files(self, path: Path) -> list[Path]:
        """Return a concept's file and its unfinished copies, which begin with a dot and have the same content."""
        names = (name for name in self._names() if name == path.name or name.startswith(f".{path.name}."))
        return [self.folder / name for name in names]

    @staticmethod
    def _read(id: str, path: Path, stamp: Stamp, *, check_hashes: bool = True) -> StoredConcept:
        with _reading(id, path):
            return StoredConcept(id, load_own(id, path, check_hashes=check_hashes), stamp.written / 1e9)

    def _path(self, id: str) -> Path | None:
        """Return the path of a concept's file, or None for a text that is no id, so that no name leads out of the
        folder.
        """
        return self.folder / f"{id}{SUFFIX}" if _ID.fullmatch(id) else None


def _is_concept_file(name: str) -> bool:
    return name.endswith(SUFFIX) and _ID.fullmatch(name.removesuffix(SUFFIX)) is not None


_NOT_THERE = (FileNotFoundError, NotADirectoryError)


def stamp_of(path: Path) -> Stamp | None:
    """Return a file's stamp, or None if there is no file.

    Raises:
        AnswerError: the file cannot be looked at.
    """
    try:
        found = path.stat()
    except _NOT_THERE:
        return None
    except OSError as error:
        raise unreadable(error) from error
    return Stamp.of(found)


@contextlib.contextmanager
def _reading(id: str, path: Path) -> Iterator[None]:
    """Turn KeptConceptError into UnknownConceptError: without a cause if the file has gone meanwhile, caused by the
    KeptConceptError if the file is damaged. Raises AnswerError if the file cannot be read.
    """
    try:
        yield
    except KeptConceptError as error:
        if stamp_of(path) is None:
            raise unknown(id) from None
        if isinstance(error.__cause__, OSError):
            raise unreadable(error.__cause__) from error
        raise UnknownConceptError(f"the file of concept {id} is damaged. Put the concept again.") from error


def known_use(store: ConceptStore) -> tuple[float, float]:
    """Return what `store.used()` says, or NaN where that cannot be determined."""
    try:
        return store.used()
    except ServiceError:
        return math.nan, math.nan


def without_source(concept: KeptConcept, word: str | None) -> KeptConcept:
    """Return a prepared concept without the images that it was made from, since only keys are kept, under the word that
    requests use unless they name another.
    """
    return KeptConcept(word or NO_WORD, concept.references, concept.origin)
