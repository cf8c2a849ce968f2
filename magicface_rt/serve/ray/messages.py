"""The messages between the front, the replicas and the roster. All of them can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..schemas import BundleInfo

__all__ = ["Ended", "ErasureReport", "ReplicaErasure", "Tally", "View"]


@dataclass(frozen=True)
class Tally:
    """What a replica has done since its last answer, for the metrics of the front.

    replica        its name
    batches        pictures of each batch that it made
    prepared       concepts that it prepared
    hits, misses   concepts that were looked up, and were there or not
    session_bytes  bytes of references that its Session keeps by content, now
    device_bytes   bytes of keys in its device memory, now
    """

    replica: str
    batches: tuple[int, ...] = ()
    prepared: int = 0
    hits: int = 0
    misses: int = 0
    session_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Ended:
    """The last message of a call: its result, or its error as a value.

    If the error were raised through Ray, it would be wrapped, and written to Ray's log with its text, which may quote
    the request.
    """

    result: Any = field(default=None, repr=False)
    error: Exception | None = field(default=None, repr=False)
    tally: Tally | None = None


@dataclass(frozen=True)
class ReplicaErasure:
    """A replica's part of an erasure.

    found    whether it ever had the concept in memory
    stopped  how many requests used it, and were ended
    place    where something of it is left, in words; None if nothing is
    """

    found: bool = False
    stopped: int = 0
    place: str | None = None


@dataclass(frozen=True)
class ErasureReport:
    """The result of an erasure.

    files   how many were removed
    parts   of the replicas that have answered, by their names
    silent  names of replicas that live, or may live, and have not answered in time
    left    where something is left in the shared folder, in words; None if nothing is
    begun   False if another erasure of the same concept did not end in time
    """

    files: int = 0
    parts: Mapping[str, ReplicaErasure] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    left: str | None = None
    begun: bool = True


@dataclass(frozen=True)
class View:
    """What the roster knows, at one version of it.

    known    whether the caller is on the roster; a replica that is not must register again
    erasing  ids that are being erased: no replica may start to use them
    parts    ids whose erasure waits for the caller's part, with which erasure of this id it is
    ready    replicas that are warm, with what they serve; the most recent one is last
    front    when the newest front began, in seconds since 1970; 0 if none has reported
    """

    version: int
    known: bool
    erasing: frozenset[str] = frozenset()
    parts: Mapping[str, str] = field(default_factory=dict)
    ready: Mapping[str, BundleInfo] = field(default_factory=dict)
    front: float = 0.0
