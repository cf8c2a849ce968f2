"""The interface that every contender implements in its own process, whatever it computes with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicface_rt import Bundle

from .settings import Case, Contender, Settings
from .workload import Workload


@dataclass(frozen=True)
class Task:
    """A contender and what it is to run. `folder`: for files that the processes pass to each other."""

    contender: Contender
    bundle: str
    case: Case
    settings: Settings
    folder: str

    def open(self) -> tuple[Bundle, Workload]:
        bundle = Bundle.open(self.bundle, check_hashes=False)
        return bundle, Workload.of(bundle, self.case, self.settings.seed)


@dataclass(frozen=True)
class Run:
    """A whole run in a few steps: latents [B, 4, h, w], last regions [B, h/2, w/2], and what each stage's step cost.

    rows, flops, bytes: of one step, by stage; empty if they were not counted. sixteen_bit: whether it was computed in
    16 bits. margin [B, h/2, w/2]: how far each cell's last region is from becoming another; None if not known.
    """

    latents: NDArray[np.float32]
    regions: NDArray[np.int64]
    rows: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    sixteen_bit: bool = False
    margin: NDArray[np.float32] | None = None


class Runner(ABC):
    """A contender.

    `notes`: what a reader of its figures should know; `on_device`: whether it computes on a GPU; `latents`
    [B, 4, h, w]: of the last request.
    """

    notes: tuple[str, ...] = ()
    on_device: bool = False
    latents: NDArray[np.float32] | None = None

    @abstractmethod
    def load(self) -> None:
        """Load everything that a request needs, unless that has happened already."""

    @abstractmethod
    def run(self) -> Run:
        """Do `Workload.run` for parity, which also warms up. PyTorch's work is counted on the way."""

    @abstractmethod
    def step(self, stage: str) -> dict[str, float]:
        """Do one step of `Workload.moment`; return seconds by name: the stage's, and "reference_pass" if it runs."""

    @abstractmethod
    def request(self) -> dict[str, float]:
        """Make a whole request, from prompt and images to pictures; return seconds by stage, and "total"."""

    def kept_bytes(self) -> int:
        """Bytes of the keys and values that a step reads and that were made before."""
        return 0

    def threads(self) -> int | None:
        """Number of CPU threads that it computes with; None if not known."""
        return None

    def close(self) -> None:  # noqa: B027 - not every contender holds something
        """Free what it holds."""


def load(task: Task) -> Runner:
    """Create the contender of a task. torch is imported only for those that need it, because it counts as memory."""
    if task.contender.ours:
        from .ours import Ours

        return Ours(task)
    from .pytorch import PyTorch

    return PyTorch(task)


def as_torch(array: NDArray[Any], like: Any) -> Any:
    """Convert an array to a tensor on the device of `like`, and for floats with its dtype."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
