"""Where a service keeps its concepts: by an id that names their content, in memory or in a folder of files.

An id is a SHA-256 over the content keys of the references, which are over everything that their keys and values depend
on. So what lies under an id never changes, and the same upload has the same id in every process.
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

from .. import unfinished
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
from ..kept import KeptConcept
from ..kept.files import save
from .problems import refused

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
"""The word of a concept that was put without one; a request must name one then."""

_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class StoredConcept:
    """created: seconds since 1970."""

    id: str
    concept: KeptConcept
    created: float


def concept_id(keys: Sequence[str]) -> str:
    """The id of a concept with references of these content keys, in that order."""
    return hashlib.sha256("\n".join(keys).encode("ascii")).hexdigest()


def load_own(id: str, path: Path, *, check_hashes: bool = True) -> KeptConcept:
    """The concept of a file that has the name of an id.

    Raises:
        KeptConceptError: it is damaged, or holds another concept, such as one that was copied to the wrong name.
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
    """Whether an answer can hold it, which half of a surrogate pair it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unknown(id: str) -> UnknownConceptError:
    """To raise for an id that is not there; what is no id is not repeated at length."""
    shown = id if _ID.fullmatch(id) else ascii(id[:80])
    return UnknownConceptError(f"concept {shown} is not kept here: it was never put, or it was erased. Put it again.")


def unreadable(error: OSError) -> AnswerError:
    """To raise where it cannot be seen what is there: that is not the same as nothing."""
    logger.error("the folder of concepts cannot be read: %s", error)
    return refused(503, "store-unusable", "the folder of concepts cannot be read; the service's log says more.")


class ConceptStore(ABC):
    """Kept concepts by id. Thread-safe; calls may block while files are read or written.

    Whatever looks at files raises AnswerError, 503 `store-unusable`, where it cannot.
    """

    @abstractmethod
    def get(self, id: str) -> StoredConcept:
        """The concept of that id.

        Raises:
            UnknownConceptError: there is none, or its file is damaged; putting it again replaces that.
        """

    @abstractmethod
    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        """Keep a concept, and give it back as it is kept. What is there under the id is replaced. Of several that put
        at once without having reserved, all may find the same room.

        Raises:
            StoreFullError: there is no room.
            OutputError: a file cannot be written.
            ErasedError: another process erased it as it was put.
        """

    @abstractmethod
    def erase(self, id: str) -> int:
        """Remove a concept from memory and disk; who holds it goes on holding it. Returns how many files went. What
        another process is writing stays: it puts the concept again.

        Raises:
            UnknownConceptError: there is none.
            EraseError: a file cannot be removed.
        """

    @abstractmethod
    def left(self, id: str) -> str | None:
        """Where something of that id is, in words; None where nothing is. After `erase` it was put again, or is being
        put, by another process.
        """

    @abstractmethod
    def entries(self) -> list[StoredConcept]:
        """All that can be read, the oldest first."""

    @abstractmethod
    def used(self) -> tuple[int, int]:
        """Number of concepts, and bytes of them."""

    @abstractmethod
    def reserve(self, id: str, nbytes: int) -> Callable[[], object]:
        """Hold room for a concept of so many bytes, which is not computed yet. What it returns gives the room back:
        call it when the concept was put, or will not be. Once for an id at a time.

        Raises:
            StoreFullError: they do not fit beside what is kept and what else is held.
        """

    def take_vanished(self) -> frozenset[str]:
        """Ids of concepts that were in this process's memory and that another process has erased, found since the last
        call. The store holds nothing of them any more; a Session may.
        """
        return frozenset()

    def close(self) -> None:  # noqa: B027 - not every store holds something
        """Let go of what is in memory."""


class _Limited(ConceptStore):
    def __init__(self, *, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._room = threading.Lock()
        self._reserving = threading.Lock()  # of its own: whoever gives room back does not wait for a disk
        self._reserved: dict[str, int] = {}

    def reserve(self, id: str, nbytes: int) -> Callable[[], object]:
        with self._room:
            with self._reserving:
                reserved = dict(self._reserved)
            self._check_room(nbytes, [held for other, held in reserved.items() if not self._keeps(other)])
            with self._reserving:
                self._reserved[id] = nbytes

        def release() -> None:
            with self._reserving:
                del self._reserved[id]

        return release

    @abstractmethod
    def _keeps(self, id: str) -> bool:
        """Whether `used` counts it."""

    def _check_room(self, nbytes: int, others: Sequence[int] = ()) -> None:
        """others: bytes of concepts that are about to be kept as well."""
        count, held = self.used()
        count, held = count + len(others), held + sum(others)
        if count >= self._most:
            raise StoreFullError(f"{count} concepts are kept, which is the limit. Erase one that is not needed.")
        if held + nbytes > self._most_bytes:
            raise StoreFullError(
                f"the concept needs {nbytes:,} bytes, and {held:,} of {self._most_bytes:,} are used. Erase concepts, "
                "or put it with fewer steps, a smaller mask or 8-bit storage."
            )


class MemoryConcepts(_Limited):
    """In this process, for as long as it lives. `most` concepts, `most_bytes` of them."""

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

    def close(self) -> None:
        with self._lock:
            self._entries.clear()


class FolderConcepts(_Limited):
    """In a folder, as `ID.concept`, mapped into memory; several processes may share it.

    Another process's concepts are found when they are asked for, and those that it erased are not found any more.
    The folder is made where it is missing, for its owner only.

    Raises OutputError where the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], *, most: int = 1000, most_bytes: int = 2**33) -> None:
        super().__init__(most=most, most_bytes=most_bytes)
        self.folder = Path(folder).absolute()
        self._make_folder()
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise OutputError(f"folder of concepts {str(folder)!r} may not be read and written.")
        self._lock = threading.Lock()
        self._mapped: dict[str, tuple[_Stamp, StoredConcept]] = {}
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
            if error.__cause__ is not None:  # it is damaged
                logger.warning("%s", error.__cause__)
            raise
        with self._lock:
            self._mapped[id] = (stamp, stored)
        return stored

    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        path = self._path(id)
        assert path is not None, id
        if stamp_of(path) is None:
            self._check_room(concept.nbytes)
        self._make_folder()
        try:
            save(concept, path, with_image=False, overwrite=True, follow=False)  # nothing is written outside the folder
            stamp = stamp_of(path)
            if stamp is None:
                raise unknown(id)
            with _reading(id, path):
                stored = StoredConcept(id, KeptConcept.load(path, check_hashes=False), stamp.seconds)
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
            if file != path and unfinished.is_live(file):
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
            with contextlib.suppress(UnknownConceptError):  # damaged: `get` says so
                found.append(self._read(id, path, stamp, check_hashes=False))
        return sorted(found, key=lambda stored: stored.created)

    def _keeps(self, id: str) -> bool:
        return stamp_of(self.folder / f"{id}{SUFFIX}") is not None

    def used(self) -> tuple[int, int]:
        self._let_go_of_what_is_gone()
        stamps = [stamp_of(path) for path in self._all()]
        sizes = [stamp.nbytes for stamp in stamps if stamp is not None]
        return len(sizes), sum(sizes)

    def take_vanished(self) -> frozenset[str]:
        with self._lock:
            found, self._vanished = frozenset(self._vanished), set()
        return found

    def close(self) -> None:
        with self._lock:
            self._mapped.clear()

    def _let_go_of_what_is_gone(self) -> None:
        """Another process tells nobody when it erases: its file is gone."""
        with self._lock:
            mapped = set(self._mapped)
        self._let_go({id for id in mapped if not self._keeps(id)})

    def _let_go(self, ids: Collection[str]) -> None:
        with self._lock:
            self._vanished.update(id for id in ids if self._mapped.pop(id, None) is not None)

    def _make_folder(self) -> None:
        try:
            unfinished.make_folder(self.folder, mode=0o700)
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
        names = (name for name in self._names() if name.endswith(SUFFIX) and _ID.fullmatch(name.removesuffix(SUFFIX)))
        return [self.folder / name for name in names]

    def _files(self, path: Path) -> list[Path]:
        """A concept's file, and those that a process has begun: they begin with a dot and have the same content."""
        names = (name for name in self._names() if name == path.name or name.startswith(f".{path.name}."))
        return [self.folder / name for name in names]

    @staticmethod
    def _read(id: str, path: Path, stamp: _Stamp, *, check_hashes: bool = True) -> StoredConcept:
        with _reading(id, path):
            return StoredConcept(id, load_own(id, path, check_hashes=check_hashes), stamp.seconds)

    def _path(self, id: str) -> Path | None:
        """None for what is no id, so that no name leads out of the folder."""
        return self.folder / f"{id}{SUFFIX}" if _ID.fullmatch(id) else None


@dataclass(frozen=True)
class _Stamp:
    """What tells a file from one that was put in its place."""

    inode: int
    nbytes: int
    changed: int

    @property
    def seconds(self) -> float:
        return self.changed / 1e9


_NOT_THERE = (FileNotFoundError, NotADirectoryError)


def stamp_of(path: Path) -> _Stamp | None:
    """None where there is nothing.

    Raises:
        AnswerError: that cannot be seen.
    """
    try:
        found = path.stat()
    except _NOT_THERE:
        return None
    except OSError as error:
        raise unreadable(error) from error
    return _Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


@contextlib.contextmanager
def _reading(id: str, path: Path) -> Iterator[None]:
    """Raises UnknownConceptError where the file has gone meanwhile; and because of a KeptConceptError where it is
    damaged.
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
    """`used`, and NaN where that cannot be seen."""
    try:
        return store.used()
    except ServiceError:
        return math.nan, math.nan


def without_source(concept: KeptConcept, word: str | None) -> KeptConcept:
    """A prepared concept under the word that requests use unless they say otherwise, without the images that it was
    made from: only keys are kept.
    """
    return KeptConcept(word or NO_WORD, concept.references, concept.origin)
