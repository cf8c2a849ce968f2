"""The interface between the server's HTTP application and whatever makes the pictures: this process, or replicas
elsewhere.

Everything that passes through it can be pickled. To stop a call, cancel the task that awaits it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..request import Progress
from .schemas import BundleInfo, ConceptInfo, ConceptPut, Erasure, PictureOrder, Warned

__all__ = ["Accepted", "ConceptUpload", "Listener", "Outcome", "Service", "Upload"]


@dataclass(frozen=True)
class Accepted:
    """A request has a place in the queue, behind `waiting` others."""

    waiting: int


Listener = Callable[[Accepted | Progress], object]
"""Called with a request's progress, in the event loop's thread."""


@dataclass(frozen=True)
class Upload:
    """A reference as it was uploaded: the bytes of its files."""

    image: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    prompt: str = ""


@dataclass(frozen=True)
class ConceptUpload:
    """A concept to be prepared and kept. `steps`: None for the service's default."""

    references: Sequence[Upload]
    word: str | None = None
    steps: int | None = None
    reference_seed: int = 0
    storage: str = "exact"
    mask_threshold: int = 128
    resample: str = "lanczos"


@dataclass(frozen=True, eq=False)
class Outcome:
    """The pictures of a request.

    pngs      the files' bytes, as `Result.images[k].save` writes them
    regions   int64 [B,h/2,w/2]
    names     of the regions
    timings   seconds by stage, and `queued`
    batch     pictures that were made together
    settings  what run.json of a saved result holds
    regions_per_step    uint8 [T,B,h/2,w/2], None if the order did not ask for them
    warnings  what was done to the request that may not have been meant
    """

    pngs: Sequence[bytes]
    regions: NDArray[np.int64]
    names: Sequence[str]
    timings: dict[str, Any]
    batch: int
    settings: dict[str, Any]
    regions_per_step: NDArray[np.uint8] | None = None
    warnings: Sequence[Warned] = ()


class Service(ABC):
    """Makes pictures and keeps concepts. It raises `MagicFaceError`s; `problems.Problem.of` gives each one's status."""

    async def start(self) -> None:  # noqa: B027 - a service may be ready as it is
        """Begin to work. Called once, in the event loop that all other calls come from."""

    async def drain(self, seconds: float) -> int:
        """Take no more work, and wait up to `seconds` for the requests there are. Returns how many were cut off."""
        return 0

    async def close(self) -> None:  # noqa: B027 - not every service holds something
        """Free everything."""

    def failure(self) -> BaseException | None:
        """Return why the service will never be ready, or never again; None if it is, or may still become so."""
        return None

    @abstractmethod
    def not_ready(self) -> str | None:
        """Return why the service should get no requests for now; None if it should."""

    @abstractmethod
    async def bundle(self) -> BundleInfo:
        """Return what is served."""

    @abstractmethod
    async def generate(self, order: PictureOrder, *, owner: str, listener: Listener | None = None) -> Outcome:
        """Make pictures."""

    @abstractmethod
    async def put_concept(self, upload: ConceptUpload, *, owner: str) -> tuple[ConceptPut, bool]:
        """Prepare a concept and keep it. Returns it, and whether it was new, that is, not kept already."""

    @abstractmethod
    async def concepts(self) -> list[ConceptInfo]:
        """Return all kept concepts, oldest first."""

    @abstractmethod
    async def concept(self, id: str) -> ConceptInfo:
        """Return the kept concept with this id."""

    @abstractmethod
    async def erase(self, id: str) -> Erasure:
        """Remove a concept from memory, disk and device; returns once it is gone."""
