"""Read arrays from an `.npz` that somebody else may have made; none is read before its size is known and allowed.

Supported is what `numpy.savez` and `savez_compressed` write for plain numbers, in a file under 4 GB. Objects,
structures, other compressions and encryption are refused.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from magicface_rt.files.plain_file import open_plain
from magicface_rt.process.interrupts import reraise_if_interrupt

__all__ = ["read_npz"]

Array = npt.NDArray[Any]
Header = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and dtype."""

_LIST_BYTES = 1 << 16
"""Largest size of the zip's list of its members; a list of 12 takes 700."""
_END = struct.Struct("<4s4xHHIIH")
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<>|]?(?:b1|[iu][1248]|f[248]))', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), ?\} *\n"
)
_BLOCK = 1 << 20
_UNREADABLE = (EOFError, LookupError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error)
"""What zipfile raises for files that it cannot read, besides OSError and ValueError. It raises RuntimeError for an
encrypted member, and a subclass of that for a version or a compression that it does not know."""


def read_npz(
    path: str | os.PathLike[str], names: Sequence[str], accept: Callable[[str, Header], object], most: int
) -> dict[str, Array]:
    """Read the arrays of these names.

    accept  called with each array's name, shape and dtype before its numbers are read; raises ValueError or an error of
            this package to refuse it
    most    most bytes that the file may have, and that its arrays may take together

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is missing, of another form or damaged, or it holds too much.
        LookupError: arrays are missing; the message lists the names of all that are.
    """
    arrays: dict[str, Array] = {}
    with open_plain(path, most) as stream:
        archive = _archive(stream)
        members = _members(archive)
        missing = [name for name in names if f"{name}.npy" not in members]
        if missing:
            raise LookupError(", ".join(missing))
        left = most
        for name in names:
            info = members[f"{name}.npy"]
            if info.file_size > left:
                raise ValueError(f"{name} has {info.file_size:,} bytes, where {left:,} of {most:,} are left")
            left -= info.file_size
            with _opened(archive, info) as member:
                shape, dtype, order = _header(name, member, info.file_size)
                accept(name, (shape, dtype))
                arrays[name] = (
                    _numbers(name, member, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape, order=order)
                )
    return arrays


def _archive(stream: BinaryIO) -> zipfile.ZipFile:
    """Open the zip, after checking that its list of members is short."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _END.size))
    end = stream.read(_END.size)
    if len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise ValueError("it is no .npz, or not all of one")
    _, _, count, nbytes, start, comment = _END.unpack(end)
    if start + nbytes + _END.size != size:
        raise ValueError("something stands before it, or between its arrays and their list")
    if comment or nbytes > _LIST_BYTES or count == 0xFFFF:
        raise ValueError(f"its list of arrays has {nbytes:,} bytes, expected at most {_LIST_BYTES:,} and no comment")
    stream.seek(max(0, size - _END.size - 20))
    if stream.read(4) == b"PK\x06\x07":
        raise ValueError("it is a zip of more than 4 GB, or says so")
    with _as_value_error():
        return zipfile.ZipFile(stream)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name."""
    members = archive.infolist()
    found = {member.filename: member for member in members}
    if len(found) < len(members):
        raise ValueError("two of its arrays have one name")
    return found


@contextmanager
def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise ValueError(f"{info.filename[:100]!r} is compressed or encrypted in a way that NumPy does not write")
    with _as_value_error(), archive.open(info) as member:
        yield member


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        reraise_if_interrupt(error)
        raise ValueError(f"{type(error).__name__}: {str(error)[:200] or 'an array ends too soon'}") from error


def _header(name: str, member: IO[bytes], nbytes: int) -> tuple[tuple[int, ...], np.dtype[Any], str]:
    """Read an array's shape, dtype and order, and check that they fit the member's size."""
    begin = member.read(len(_MAGIC) + 2)
    length = int.from_bytes(begin[len(_MAGIC) :], "little")
    match = _HEADER.fullmatch(member.read(length)) if begin.startswith(_MAGIC) else None
    if match is None:
        raise ValueError(f"{name} is no array of plain numbers as numpy.savez writes it")
    shape = tuple(int(size) for size in re.findall(rb"\d+", match.group(3)))
    dtype = np.dtype(match.group(1).decode("ascii"))
    found, expected = nbytes - len(begin) - length, math.prod(shape) * dtype.itemsize
    if found != expected or len(shape) > 16:
        raise ValueError(f"{name} has {found:,} bytes of numbers, expected {expected:,} by its shape")
    return shape, dtype, "F" if match.group(2) == b"True" else "C"


def _numbers(name: str, member: IO[bytes], nbytes: int) -> npt.NDArray[np.uint8]:
    """Read the rest of a member, which must have this many bytes and fit the zip's checksum."""
    found, filled = np.empty(nbytes, np.uint8), 0
    while block := member.read(_BLOCK):
        found[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
        filled += len(block)
    if filled != nbytes:
        raise ValueError(f"{name} ends after {filled:,} of {nbytes:,} bytes")
    return found
