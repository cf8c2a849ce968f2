"""What every contender does in its own process, whatever it computes with."""

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
    """Who runs what. `folder` is for files that processes hand each other."""

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

    rows, flops, bytes by stage, for one step; empty where it was not counted. sixteen_bit: whether it was computed so.
    margin: of each cell's last region, [B, h/2, w/2], what it would take to become another; None where it is not known.
    """

    latents: NDArray[np.float32]
    regions: NDArray[np.int64]
    rows: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    sixteen_bit: bool = False
    margin: NDArray[np.float32] | None = None


class Runner(ABC):
    """A contender. `notes`: what a reader of its figures should know; `on_device`: it computes on a GPU; `latents`
    [B, 4, h, w]: of the last request."""

    notes: tuple[str, ...] = ()
    on_device: bool = False
    latents: NDArray[np.float32] | None = None

    @abstractmethod
    def load(self) -> None:
        """Load all that a request needs, where that has not happened yet."""

    @abstractmethod
    def run(self) -> Run:
        """`Workload.run` for parity, which warms up as well. PyTorch's work is counted on the way."""

    @abstractmethod
    def step(self, stage: str) -> dict[str, float]:
        """One step of `Workload.moment`. Seconds by name: the stage's, and "reference_pass" where there is one."""

    @abstractmethod
    def request(self) -> dict[str, float]:
        """A whole request, from prompt and images to pictures. Seconds by stage, and "total"."""

    def kept_bytes(self) -> int:
        """Of keys and values that a step reads and that were made before."""
        return 0

    def threads(self) -> int | None:
        """Threads that it computes with on the CPU, where that can be told."""
        return None

    def close(self) -> None:  # noqa: B027 - not every contender holds something
        """Free what it holds."""


def load(task: Task) -> Runner:
    """The contender of a task. Imports torch only for those that need it, which their memory shows."""
    if task.contender.ours:
        from .ours import Ours

        return Ours(task)
    from .pytorch import PyTorch

    return PyTorch(task)


def as_torch(array: NDArray[Any], like: Any) -> Any:
    """To a tensor's device, and for floats to its dtype."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
