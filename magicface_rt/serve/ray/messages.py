"""What goes between the front, the replicas and the roster. Everything here can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..schemas import BundleInfo

__all__ = ["Ended", "Part", "Tally", "Verdict", "View"]


@dataclass(frozen=True)
class Tally:
    """What a replica has done since its last answer, for the metrics of the front.

    replica        its name
    batches        pictures of each batch that it made
    prepared       concepts that it prepared
    hits, misses   concepts that were wanted, and were there or not
    session_bytes  of references that its Session keeps by content, now
    device_bytes   of keys in its device memory, now
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

    An error that is raised through Ray would be wrapped, and written to Ray's log with its text, which may quote the
    request.
    """

    result: Any = field(default=None, repr=False)
    error: Exception | None = field(default=None, repr=False)
    tally: Tally | None = None


@dataclass(frozen=True)
class Part:
    """A replica's part of an erasure.

    found    whether it ever had the concept in memory
    stopped  requests that used it
    place    where something of it is left, in words; None where nothing is
    """

    found: bool = False
    stopped: int = 0
    place: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What came of an erasure.

    files   that were removed
    parts   of the replicas that have answered, by their names
    silent  names of replicas that live, or may live, and have not answered in time
    left    where something is in the shared folder, in words; None where nothing is
    begun   whether another erasure of it was over in time
    """

    files: int = 0
    parts: Mapping[str, Part] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    left: str | None = None
    begun: bool = True


@dataclass(frozen=True)
class View:
    """What the roster knows, at one version of it.

    known      whether whoever asked is on the roster; a replica that is not must register again
    condemned  ids that are being erased: no replica may take one into use
    ready      replicas that are warm, the one that came last behind, with what they serve
    front      when the newest front began, in seconds since 1970; 0 where none has said so
    """

    version: int
    known: bool
    condemned: frozenset[str] = frozenset()
    ready: Mapping[str, BundleInfo] = field(default_factory=dict)
    front: float = 0.0
