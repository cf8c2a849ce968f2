"""Processes that train together on one machine: each takes its part of every batch, and their gradients are averaged.

They are meant to have one thread each: the layers are too small to be shared among threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)
"""How long processes wait for one that is drawing a sheet, or on a busy machine."""


class Crew:
    """One of `size` processes, of which rank 0 reports, saves and decides. By default it is the only one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def part(self, numbers: range) -> range:
        """This process's part of a batch's pictures.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        if len(numbers) % self.size:
            raise ValueError(f"a batch of {len(numbers)} cannot be shared out among {self.size} processes")
        each = len(numbers) // self.size
        return numbers[self.rank * each : (self.rank + 1) * each]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its mean over all processes."""
        if self.size == 1:
            return
        listed = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in listed])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, mean in zip(listed, flat.split([tensor.numel() for tensor in listed]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def agree(self, go_on: bool = True) -> bool:
        """Return, in every process, what the deciding one passed."""
        if self.size == 1:
            return go_on
        word = torch.tensor([int(go_on)])
        dist.broadcast(word, src=0)
        return bool(word.item())


@contextlib.contextmanager
def crew_of(size: int, helper: Callable[..., object], *arguments: object) -> Iterator[Crew]:
    """Yield a crew; `helper(crew, *arguments)` is what the others run, each in a process of its own.

    They end with the block, or with this process.
    """
    if size == 1:
        yield Crew()
        return
    with tempfile.TemporaryDirectory(prefix="miniature-crew-") as folder:
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_help, args=(rank, size, folder, helper, arguments), daemon=True)
            for rank in range(1, size)
        ]
        for process in others:
            process.start()
        try:
            with _joined(0, size, folder) as crew:
                yield crew
            for process in others:
                process.join(60)
        finally:
            for process in others:
                process.kill()


def _help(rank: int, size: int, folder: str, helper: Callable[..., object], arguments: tuple[object, ...]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets it as well, and decides
    with _joined(rank, size, folder) as crew:
        helper(crew, *arguments)


@contextlib.contextmanager
def _joined(rank: int, size: int, folder: str) -> Iterator[Crew]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing leaves the machine
    meeting = f"file://{Path(folder) / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Crew(rank, size)
    finally:
        dist.destroy_process_group()
