"""Opens image files with Pillow within bounds: what it would unfold from a small file is taken out or refused before.

Pillow copies every value of a directory of tags (EXIF, MPF, TIFF) as it reads the directory, and any number of entries
may name the same bytes, so a file of 1 MB can ask for 60 GB. libjpeg decodes any number of scans, each over all pixels.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image

__all__ = ["MAX_BUFFERED_BYTES", "ExcessError", "check_exif", "open_bytes", "open_stream", "reduce_exif"]

MAX_BUFFERED_BYTES = 1 << 28
"""Bytes of a JPEG or AVIF: four for each of the most pixels that are read. No camera's takes one."""

MAX_SCANS = 100
"""Scans of a JPEG. Encoders make 1 for a baseline image and about 10 for a progressive one."""

MAX_SEGMENTS = 5000
"""Segments of a JPEG, and chunks of a PNG besides those with pixels: each takes memory of its own."""

MAX_CHUNKS = 100_000
"""Chunks of a PNG. Encoders put 8 KB or more of pixels into each."""

MAX_JUNK = 1 << 16
"""Bytes between the segments before a JPEG's first scan, which Pillow goes through one by one."""

MAX_NAMES = 1000
"""Places in a file at which metadata might begin."""

MAX_ENTRIES = 65_535
"""What a directory of TIFF has at most; one of BigTIFF may claim more."""

MAX_DEPTH = 4
"""Directories within directories that are looked at: EXIF, GPS and interoperability need 2."""

_SLACK = 1 << 16
"""Bytes by which a directory's values may exceed what holds them: damaged ones, which overlap, exist."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value by the type of a tag (TIFF 6.0, section 2; the BigTIFF design)."""

_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}
_WITHIN = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)

_JPEG, _PNG, _AVIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"ftyp"
_EXIF, _MPF = b"Exif\0\0", b"MPF\0"
_NAMED = re.compile(rb"(?:Exif\0\0)*")
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")

# What stands alone in the data of a scan (00, 01 and the restarts) is none of these, nor are those that libjpeg skips
# there without a length (02 to BF). Written without a repetition, since a run of FF would be searched again and again.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_START_OF_SCAN, _END, _APP1, _APP2 = 0xDA, 0xD9, 0xE1, 0xE2
_NO_LENGTH = (0xC8, *range(0xF0, 0xFE))
"""Markers after which Pillow expects no length, although others do. libjpeg knows none of them."""


class ExcessError(ValueError):
    """A file would take far more memory or time than its size and its pixels explain. The message follows its name."""


class _Segment(NamedTuple):
    marker: int
    start: int
    end: int


def open_bytes(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image of one of Pillow's formats, as `Image.open` does, with no more of its EXIF than the orientation.

    Raises `ExcessError`, and whatever Pillow raises for damaged files.
    """
    if data.startswith(_JPEG):
        return _open_jpeg(data, formats)
    return open_stream(io.BytesIO(data), formats)


def open_stream(stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Open an image of one of Pillow's formats, as `Image.open` does; Pillow reads its pixels from the stream later.

    Raises `ExcessError`, and whatever Pillow raises for damaged files.
    """
    start = stream.read(8)
    if start.startswith(_JPEG):
        return _open_jpeg(_buffered(stream, "JPEG"), formats)
    if start == _PNG:
        _check_chunks(stream)
    elif start[4:8] == _AVIF:
        _check_avif(_buffered(stream, "AVIF"))
    elif _TIFF.match(start):
        _check_directories(stream, "TIFF")
    stream.seek(0)
    return Image.open(stream, formats=formats)


def reduce_exif(image: Image.Image) -> None:
    """Leave no more than the orientation of a loaded image's EXIF and XMP, so that Pillow may read it."""
    block = _block(image)
    image.info.pop("exif", None)
    image.info.pop("Raw profile type exif", None)
    if block is not None:
        _put_orientation(image, _orientation(block))
    _put_orientation(image, image.getexif().get(ExifTags.Base.Orientation))  # which may be XMP's or TIFF's


def check_exif(image: Image.Image) -> None:
    """Check what Pillow would unfold from the EXIF of an image that somebody else opened.

    Raises `ExcessError`.
    """
    block = _block(image)
    if block is not None:
        _check_directories(io.BytesIO(block), "EXIF")


def _buffered(stream: BinaryIO, kind: str) -> bytes:
    if stream.seek(0, os.SEEK_END) > MAX_BUFFERED_BYTES:
        raise ExcessError(f"is a file of {kind} of more than {MAX_BUFFERED_BYTES:,} bytes, which no image has.")
    stream.seek(0)
    return stream.read()


# ---------------------------------------------------------------------------------------------------------- JPEG, PNG


def _open_jpeg(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open a JPEG of which Pillow finds no EXIF and no MPF, and give it its orientation."""
    block = b"".join(data[part.start + len(_EXIF) : part.end] for part in _checked_segments(data))
    image = Image.open(io.BytesIO(_without_names(data)), formats=formats)
    _put_orientation(image, _orientation(block))
    return image


def _without_names(data: bytes) -> bytes:
    """Rename EXIF and MPF (CIPA DC-007) wherever Pillow could take it for such. In the data of a scan FF is followed by
    00 or by a marker of another kind, so no pixel changes.
    """
    changed: bytearray | None = None
    for name, marker in ((_EXIF, _APP1), (_MPF, _APP2)):
        at, found = data.find(name), 0
        while at >= 0:
            found += 1
            if found > MAX_NAMES:
                raise ExcessError(f"is a JPEG with more than {MAX_NAMES:,} pieces of metadata. Save it without them.")
            if data[at - 4 : at - 2] == bytes((0xFF, marker)):
                changed = bytearray(data) if changed is None else changed
                changed[at] = ord("-")
            at = data.find(name, at + 1)
    return data if changed is None else bytes(changed)


def _checked_segments(data: bytes) -> list[_Segment]:
    """Go through a JPEG as libjpeg does, up to the end of the image: what follows is another, or a film. Returns the
    segments before the first scan that hold EXIF.
    """
    exif, scans, count, junk, at = list[_Segment](), 0, 0, 0, 2
    while (found := _MARKER.search(data, at)) is not None:
        marker, start = found[1][0], found.end() + 2
        count += 1
        if not scans:
            junk += found.start() - at
            if marker in (_END, *_NO_LENGTH):
                raise ValueError(f"a JPEG with marker FF{marker:02X} before its pixels")
        if marker == _END:
            break
        end = found.end() + max(2, int.from_bytes(data[found.end() : start], "big"))
        scans += marker == _START_OF_SCAN
        if scans > MAX_SCANS:
            raise ExcessError(f"is a JPEG of more than {MAX_SCANS} scans. Save it again.")
        if count > MAX_SEGMENTS or junk > MAX_JUNK:
            raise ExcessError(
                f"is a JPEG with more than {MAX_SEGMENTS:,} segments, or bytes between them. Save it again."
            )
        if marker == _APP1 and not scans and data.startswith(_EXIF, start):
            exif.append(_Segment(marker, start, end))
        at = end
    if not scans:  # Pillow would look for one byte by byte
        raise ValueError("a JPEG without pixels")
    return exif


def _check_chunks(stream: BinaryIO) -> None:
    """Count the chunks of a PNG. (PNG, third edition, section 5.3)"""
    pixels = others = 0
    while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
        if head[4:] in (b"IDAT", b"fdAT"):
            pixels += 1
        else:
            others += 1
        if others > MAX_SEGMENTS or pixels > MAX_CHUNKS:
            raise ExcessError(
                f"is a PNG of more than {MAX_SEGMENTS:,} chunks, or {MAX_CHUNKS:,} with pixels. Save it again."
            )
        stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)


# ----------------------------------------------------------------------------------------------------- EXIF and TIFF


def _check_avif(data: bytes) -> None:
    """Check whatever could be EXIF in a file whose boxes are not looked at: Pillow reads it as it opens the file."""
    for count, found in enumerate(_TIFF.finditer(data)):
        if count == MAX_NAMES:
            raise ExcessError(f"is a file of AVIF with over {MAX_NAMES:,} pieces of metadata. Save it without them.")
        _check_directories(io.BytesIO(data[found.start() :]), "EXIF")


def _block(image: Image.Image) -> bytes | None:
    """Return the EXIF that Pillow would read from an image's `info`, without its name, which may stand there often."""
    block, text = image.info.get("exif"), image.info.get("Raw profile type exif")
    if block is None and isinstance(text, str):  # which ImageMagick writes: hexadecimal, after three lines
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return None
    if not isinstance(block, bytes):
        return None
    named = _NAMED.match(block)
    return block[named.end() :] if named is not None else block


def _put_orientation(image: Image.Image, orientation: object) -> None:
    if orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image.info["exif"] = exif.tobytes()


def _orientation(block: bytes) -> int | None:
    """Read the orientation from the first directory of a block of EXIF; None where it has none."""
    found = None
    order = _order(block)
    for tag, kind, number, held in _entries(io.BytesIO(block), _first(block, big=False), order, big=False):
        if tag == ExifTags.Base.Orientation and kind in _NUMBERS and number == 1:
            (found,) = struct.unpack_from(order + _NUMBERS[kind], held)  # of two Pillow takes the last
    return found


def _check_directories(stream: BinaryIO, what: str) -> None:
    """Check the directories of tags that Pillow would read. (TIFF 6.0, section 2; BigTIFF; EXIF has TIFF's form)"""
    stream.seek(0)
    head = stream.read(16)
    length = stream.seek(0, os.SEEK_END)
    for big in (False, True):  # Pillow's releases do not agree on which files are BigTIFF
        if not big or 43 in head[2:4]:
            unfolded = _unfolded(stream, _first(head, big=big), _order(head), length, MAX_DEPTH, big=big)
            if unfolded > 2 * length + _SLACK:
                raise ExcessError(
                    f"has {what} data whose values name the same bytes again and again: {unfolded:,} bytes from "
                    f"{length:,}. Save the image again without it."
                )


def _unfolded(stream: BinaryIO, start: int, order: str, length: int, depth: int, *, big: bool) -> int:
    """Return how many bytes the values of a directory, and of those within it, take."""
    form, total, within = order + ("Q" if big else "L"), 0, list[int]()
    for tag, kind, number, held in _entries(stream, start, order, big=big):
        (where,) = struct.unpack(form, held)
        size = number * _SIZES.get(kind, 0)
        if tag in _WITHIN and len(within) < MAX_DEPTH:
            within.append(where)
        if size > len(held) and where + size <= length:  # else Pillow reads none of it
            total += size
    if depth:
        total += sum(_unfolded(stream, where, order, length, depth - 1, big=big) for where in within)
    return total


def _order(head: bytes) -> str:
    return ">" if head[:2] == b"MM" else "<"


def _first(head: bytes, *, big: bool) -> int:
    """Return where the first directory is; 0, where none can be, if the head is not one."""
    if head[:2] not in (b"II", b"MM") or len(head) < (16 if big else 8):
        return 0
    return int(struct.unpack_from(_order(head) + ("Q" if big else "L"), head, 8 if big else 4)[0])


def _entries(stream: BinaryIO, start: int, order: str, *, big: bool) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the entries of a directory: tag, type, number of values, and the bytes that hold them or say where."""
    counted = 8 if big else 2
    if not 0 < start <= stream.seek(0, os.SEEK_END) - counted:
        return iter(())
    stream.seek(start)
    (count,) = struct.unpack(order + ("Q" if big else "H"), stream.read(counted))
    form = struct.Struct(order + ("HHQ8s" if big else "HHL4s"))
    data = stream.read(min(MAX_ENTRIES, count) * form.size)
    return form.iter_unpack(data[: len(data) // form.size * form.size])
