"""The pieces that an input is put together from, on the host or on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .checks import Shape
from .device import Buffer, Event

if TYPE_CHECKING:
    from .binding import Binding


@dataclass(frozen=True)
class DeviceArray:
    """`nbytes` bytes of a buffer from `offset` on. `ready`: passes when they are there; None if they are already."""

    buffer: Buffer
    offset: int
    nbytes: int
    ready: Event | None = None


@dataclass(frozen=True)
class OutputRows:
    """Rows `first` to `first + count` of a binding's output [M, C], as it is when the pieces are laid."""

    binding: Binding
    output: str
    first: int
    count: int


@dataclass(frozen=True)
class Piece:
    """`count` tokens for an input [K, M, C], put at [row, start:start + count]. `source`: [count, C]."""

    row: int
    start: int
    count: int
    source: NDArray[Any] | DeviceArray | OutputRows

    def first_element(self, shape: Shape) -> int:
        """Return where the piece begins in an array of that shape, in elements."""
        return (self.row * shape[1] + self.start) * math.prod(shape[2:])


Layout = tuple[Shape, tuple[tuple[int, int, int], ...]]


def layout(shape: Shape, pieces: Sequence[Piece]) -> Layout:
    """Return which part of an input the pieces cover."""
    return shape, tuple((piece.row, piece.start, piece.count) for piece in pieces)


def lay_on_host(into: NDArray[Any], pieces: Sequence[Piece]) -> None:
    """Put pieces of host arrays and of outputs into an array [K, M, C]."""
    for piece in pieces:
        source = piece.source
        if isinstance(source, OutputRows):
            source = source.binding.read(source.output)[source.first : source.first + source.count]
        if isinstance(source, DeviceArray):
            raise TypeError("an array on the device cannot be laid on the host")
        if source.dtype != into.dtype:  # ml_dtypes' bfloat16, where `into` holds bits
            source = source.view(np.uint16)
        into[piece.row, piece.start : piece.start + piece.count] = source
