"""Opens image files with Pillow within bounds: what it would unfold from a small file is taken out or refused before.

Pillow copies every value of a directory of tags (EXIF, MPF, TIFF) as it reads the directory, and any number of entries
may name the same bytes, so a file of 1 MB can ask for 60 GB. libjpeg decodes any number of scans, each over all pixels.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image

__all__ = ["MAX_JPEG_BYTES", "ExcessError", "check_exif", "open_bytes", "open_stream", "reduce_exif"]

MAX_JPEG_BYTES = 1 << 28
"""Four bytes for each of the most pixels that are read; no camera's JPEG takes one."""

MAX_SCANS = 100
"""Scans of a JPEG. Encoders make 1 for a baseline image and about 10 for a progressive one."""

MAX_ENTRIES = 65_535
"""What a directory of TIFF has at most; one of BigTIFF may claim more."""

_SLACK = 1 << 16
"""Bytes by which a directory's values may exceed what holds them: damaged ones, which overlap, exist."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value by the type of a tag (TIFF 6.0, section 2; the BigTIFF design)."""

_NUMBERS = {1: "B", 3: "H", 4: "L"}

_JPEG = b"\xff\xd8\xff"

# A segment of EXIF or MPF (CIPA DC-007) as Pillow knows it: marker, length, name. In the data of a scan a byte FF is
# followed by 00 or by a marker of another kind, so no pixel is changed with these.
_UNFOLDING = re.compile(rb"\xff\xe1..(Exif\0\0)|\xff\xe2..(MPF\0)", re.DOTALL)
_NAMES = re.compile(rb"(Exif\0\0)*")
_MARKER = re.compile(rb"\xff+([^\0\xff\x01\xd0-\xd8])")
_START_OF_SCAN, _END = 0xDA, 0xD9


class ExcessError(ValueError):
    """A file would take far more memory or time than its size and its pixels explain. The message follows its name."""


class _Entry(NamedTuple):
    """tag; type of its values; how many there are; the 4 bytes (BigTIFF: 8) that hold them or say where they are."""

    tag: int
    type: int
    number: int
    held: bytes

    @property
    def size(self) -> int:
        return self.number * _SIZES.get(self.type, 0)


class _Directory(NamedTuple):
    """order: "<" or ">". The entries of the first directory; none where there is no sound one."""

    order: str
    entries: Sequence[_Entry]


def open_bytes(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image of one of Pillow's formats, as `Image.open` does, with no more of its EXIF than the orientation.

    Raises `ExcessError`, and whatever Pillow raises for damaged files.
    """
    if not data.startswith(_JPEG):
        return open_stream(io.BytesIO(data), formats)
    _check_jpeg(len(data))
    _check_scans(data)
    orientation, plain = None, bytearray()
    done = 0
    for found in _UNFOLDING.finditer(data):
        if found[1] and orientation is None:
            length = int.from_bytes(data[found.start() + 2 : found.start() + 4], "big")
            orientation = _orientation(data[found.end() : found.start() + 2 + length])
        plain += data[done : found.end() - 1] + b"\1"  # another name, which Pillow leaves alone
        done = found.end()
    image = Image.open(io.BytesIO(bytes(plain) + data[done:] if done else data), formats=formats)
    if orientation is not None:
        image.info["exif"] = _exif(orientation)
    return image


def open_stream(stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Open an image of one of Pillow's formats, as `Image.open` does; Pillow reads its pixels from the stream later.

    Raises `ExcessError`, and whatever Pillow raises for damaged files.
    """
    start = stream.read(4)
    if start.startswith(_JPEG):
        _check_jpeg(stream.seek(0, os.SEEK_END))
        stream.seek(0)
        return open_bytes(stream.read(), formats)
    stream.seek(0)
    if start[:2] in (b"II", b"MM"):
        _check_directory(stream, "TIFF")
        stream.seek(0)
    return Image.open(stream, formats=formats)


def reduce_exif(image: Image.Image) -> None:
    """Leave no more than the orientation of a loaded image's EXIF, so that Pillow may read it."""
    block = image.info.pop("exif", None)
    text = image.info.pop("Raw profile type exif", None)
    if block is None and isinstance(text, str):
        block = _from_profile(text)
    if isinstance(block, bytes) and (orientation := _orientation(_unnamed(block))) is not None:
        image.info["exif"] = _exif(orientation)


def check_exif(image: Image.Image) -> None:
    """Check what Pillow would unfold from the EXIF of an image that somebody else opened.

    Raises `ExcessError`.
    """
    block, text = image.info.get("exif"), image.info.get("Raw profile type exif")
    if block is None and isinstance(text, str):
        block = _from_profile(text)
    if isinstance(block, bytes):
        _check_directory(io.BytesIO(_unnamed(block)), "EXIF")


def _unnamed(block: bytes) -> bytes:
    """Strip the name that a block of EXIF may begin with. Pillow strips it as often as it is there."""
    named = _NAMES.match(block)
    return block[named.end() :] if named else block


def _from_profile(text: str) -> bytes | None:
    """Decode EXIF that ImageMagick wrote into a text of a PNG: hexadecimal, after three lines."""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return None


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def _orientation(block: bytes) -> int | None:
    """Read the orientation from the first directory of a block of EXIF; None where it has none."""
    order, entries = _directory(io.BytesIO(block))
    for entry in reversed(entries):  # of two Pillow takes the last
        if entry.tag == ExifTags.Base.Orientation and entry.type in _NUMBERS and entry.number == 1:
            return int(struct.unpack_from(order + _NUMBERS[entry.type], entry.held)[0])
    return None


def _check_directory(stream: BinaryIO, what: str) -> None:
    length = stream.seek(0, os.SEEK_END)
    for big in (False, True):  # Pillow's releases do not agree on which files are BigTIFF
        order, entries = _directory(stream, big=big)
        unfolded = 0
        for entry in entries:
            if entry.size > len(entry.held):
                (start,) = struct.unpack(order + ("Q" if big else "L"), entry.held)
                unfolded += entry.size if start + entry.size <= length else 0  # else Pillow reads none of it
        if unfolded > 2 * length + _SLACK:
            raise ExcessError(
                f"has {what} data whose values name the same bytes again and again: {unfolded:,} bytes from "
                f"{length:,}. Save the image again without it."
            )


def _directory(stream: BinaryIO, *, big: bool = False) -> _Directory:
    """Read the first directory of tags. (TIFF 6.0, section 2; the BigTIFF design; EXIF's blocks have TIFF's form.)"""
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    head = stream.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < (16 if big else 8) or (big and 43 not in head[2:4]):
        return _Directory("<", ())
    (start,) = struct.unpack_from(order + ("Q" if big else "L"), head, 8 if big else 4)
    if start + (8 if big else 2) > length:
        return _Directory(order, ())
    stream.seek(start)
    (count,) = struct.unpack(order + ("Q" if big else "H"), stream.read(8 if big else 2))
    entries = stream.read(min(MAX_ENTRIES, count) * (20 if big else 12))
    return _Directory(order, tuple(_entries(entries, order, big=big)))


def _entries(data: bytes, order: str, *, big: bool) -> Iterator[_Entry]:
    form = struct.Struct(order + ("HHQ8s" if big else "HHL4s"))
    whole = len(data) // form.size * form.size
    return (_Entry(*fields) for fields in form.iter_unpack(data[:whole]))


def _check_jpeg(length: int) -> None:
    if length > MAX_JPEG_BYTES:
        raise ExcessError(f"is a JPEG of more than {MAX_JPEG_BYTES:,} bytes, which no image is that is read.")


def _check_scans(data: bytes) -> None:
    """Count the scans as libjpeg finds them: up to the end of the image, what follows is another or a film."""
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) is not None and found[1][0] != _END:
        scans += found[1][0] == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise ExcessError(f"is a JPEG of more than {MAX_SCANS} scans. Save it again.")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
