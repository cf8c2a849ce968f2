"""Opens image files with Pillow within bounds: what it would unfold from a small file is taken out or refused before.

Pillow copies every value of a directory of tags (EXIF, MPF, TIFF) as it reads the directory, and all of its 65,535
entries may name the same bytes. libjpeg decodes any number of scans, each over all pixels.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

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
"""Places in a file at which metadata might begin, and names that may stand before a block of EXIF."""

MAX_PACKED = 32
"""Chunks of a PNG that Pillow unpacks, besides those with pixels: texts and profiles of colours. Each has at most 1 MB,
or four times as much in Python's own form of a text.
"""

MAX_PROFILE_TEXT = 1 << 20
"""Characters of EXIF that is written as text; EXIF itself has at most 64 KB."""

MAX_ENTRIES = 65_535
"""Entries of the directories of tags of a file, all together. Photographs have some hundreds."""

_SLACK = 1 << 16
"""Bytes by which a directory's values may exceed what holds them: damaged ones, which overlap, exist."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value by the type of a tag (TIFF 6.0, section 2; the BigTIFF design)."""

_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}
_POINTERS = {3: "H", 4: "L", 8: "h", 9: "l", 13: "L", 16: "Q", 18: "Q"}
_WITHIN = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop)

_JPEG, _PNG, _AVIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"ftyp"
_EXIF = b"Exif\0\0"
_UNFOLDING = (re.compile(rb"\xff\xe1..Exif\0\0", re.DOTALL), re.compile(rb"\xff\xe2..MPF\0", re.DOTALL))
_TIFF = re.compile(rb"(?:II|MM)(?:[*+]\0|\0[*+])")  # Pillow takes both orders of the number for both of the bytes

# What stands alone in the data of a scan (00, 01 and the restarts) is none of these, nor are those that libjpeg skips
# there without a length (02 to BF). Written without a repetition, since a run of FF would be searched again and again.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_START_OF_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xDE)
"""Markers of which an image has one. Of each Pillow keeps the components, and libjpeg refuses a second."""
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
"""Frames that are coded arithmetically: no camera or browser writes any, and their scans take time without data."""
_NO_LENGTH = (0xC8, *range(0xF0, 0xFE))
"""Markers after which Pillow expects no length, although others do. libjpeg knows none of them."""

_PACKED = (b"iCCP", b"zTXt")
_MOST = {
    b"IHDR": 13,
    b"PLTE": 768,
    b"tRNS": 256,
    b"cHRM": 32,
    b"gAMA": 4,
    b"sRGB": 1,
    b"pHYs": 9,
    b"acTL": 8,
    b"fcTL": 26,
}
"""Bytes of chunks of a PNG whose size is limited by what they are. Pillow makes numbers of however many there are."""


class ExcessError(ValueError):
    """A file would take far more memory or time than its size and its pixels explain. The message follows its name."""


def open_bytes(data: bytes, formats: tuple[str, ...], *, pixels: int) -> Image.Image:
    """Open an image of one of Pillow's formats, as `Image.open` does, with no more of its EXIF than the orientation.

    pixels  the most that are read. The caller checks what it gets; only an animated PNG would be filled before

    Raises `ExcessError`, and whatever Pillow raises for damaged files.
    """
    if data.startswith(_JPEG):
        return _open_jpeg(data, formats)
    return open_stream(io.BytesIO(data), formats, pixels=pixels)


def open_stream(stream: BinaryIO, formats: tuple[str, ...], *, pixels: int) -> Image.Image:
    """Open an image as `open_bytes` does; Pillow reads its pixels from the stream later.

    Raises `ExcessError`, and whatever Pillow raises for damaged files.
    """
    start = stream.read(8)
    if start.startswith(_JPEG):
        return _open_jpeg(_buffered(stream, "JPEG"), formats)
    if start == _PNG:
        _check_chunks(stream, pixels)
    elif start[4:8] == _AVIF:
        _check_avif(_buffered(stream, "AVIF"))
    elif _TIFF.match(start):
        _Directories(stream, "TIFF").check()
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
    if len(image.info.get("Raw profile type exif", "")) > MAX_PROFILE_TEXT:
        raise ExcessError(f"has EXIF of more than {MAX_PROFILE_TEXT:,} characters. Save the image again without it.")
    if isinstance(named := image.info.get("exif"), bytes) and named.startswith(MAX_NAMES * _EXIF):
        raise ExcessError(f"has EXIF behind more than {MAX_NAMES:,} names. Save the image again without it.")
    block = _block(image)
    if block is not None:
        _Directories(io.BytesIO(block), "EXIF").check()


def _buffered(stream: BinaryIO, kind: str) -> bytes:
    if stream.seek(0, os.SEEK_END) > MAX_BUFFERED_BYTES:
        raise ExcessError(f"is a file of {kind} of more than {MAX_BUFFERED_BYTES:,} bytes, which no image has.")
    stream.seek(0)
    return stream.read()


# ---------------------------------------------------------------------------------------------------------- JPEG, PNG


def _open_jpeg(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open a JPEG of which Pillow finds no EXIF and no MPF, and give it its orientation."""
    block = _checked_segments(data)
    image = Image.open(io.BytesIO(_without_names(data)), formats=formats)
    _put_orientation(image, _orientation(_unnamed(block)))
    return image


def _without_names(data: bytes) -> bytes:
    """Rename EXIF and MPF (CIPA DC-007) wherever Pillow could take it for such. In the data of a scan FF is followed by
    00 or by a marker of another kind, so no pixel changes.
    """
    changed: bytearray | None = None
    for named in _UNFOLDING:
        for count, found in enumerate(named.finditer(data)):
            if count == MAX_NAMES:
                raise ExcessError(f"is a JPEG with more than {MAX_NAMES:,} pieces of metadata. Save it without them.")
            changed = bytearray(data) if changed is None else changed
            changed[found.start() + 4] = ord("-")
    return data if changed is None else bytes(changed)


def _checked_segments(data: bytes) -> bytes:
    """Go through a JPEG as libjpeg does, up to the end of the image: what follows is another, or a film. Return its
    EXIF, which lies before the first scan, in one segment or several.
    """
    exif, frames, scans, count, junk, at = list[bytes](), 0, 0, 0, 0, 2
    while (found := _MARKER.search(data, at)) is not None:
        marker, start = found[1][0], found.end() + 2
        count += 1
        if not scans:
            junk += found.start() - at
            frames += marker in _FRAMES
            if marker in _ARITHMETIC:
                raise ExcessError("is a JPEG of arithmetic coding, expected Huffman's. Save it again.")
            if marker in (_END, *_NO_LENGTH) or frames > 1:
                raise ValueError(f"a JPEG with marker FF{marker:02X} at a place where none may be")
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
            exif.append(data[start + len(_EXIF) : end])
        at = end
    if not scans:  # Pillow would look for one byte by byte
        raise ValueError("a JPEG without pixels")
    return b"".join(exif)


def _check_chunks(stream: BinaryIO, pixels: int) -> None:
    """Go through the chunks of a PNG. (PNG, third edition, section 5)"""
    of_pixels = others = packed = 0
    size = animated = None
    while len(head := stream.read(8)) == 8 and (name := head[4:]) != b"IEND":
        length = int.from_bytes(head[:4], "big")
        if length > _MOST.get(name, length) or (name == b"IHDR") != (size is None) or (size is None and length != 13):
            raise ValueError(f"a PNG with a chunk {name!r} of {length:,} bytes at a place where none may be")
        if name == b"IHDR":
            size = struct.unpack(">LL", stream.read(8).rjust(8, b"\0"))
            length -= 8
        elif name == b"iTXt":
            start = stream.read(min(length, 82))  # a keyword of at most 79 bytes, 0, and whether the text is packed
            packed += start.partition(b"\0")[2][:1] != b"\0"
            length -= len(start)
        elif name in (b"acTL", b"fcTL"):
            animated = True
        of_pixels += name in (b"IDAT", b"fdAT")
        others += name not in (b"IDAT", b"fdAT")
        packed += name in _PACKED
        if animated and size is not None and size[0] * size[1] > pixels:
            raise ExcessError(
                f"is {size[0]} x {size[1]}, more than the {pixels:,} pixels that are read. Scale it down."
            )
        if others > MAX_SEGMENTS or of_pixels > MAX_CHUNKS or packed > MAX_PACKED:
            raise ExcessError(
                f"is a PNG of more than {MAX_SEGMENTS:,} chunks, {MAX_CHUNKS:,} with pixels or {MAX_PACKED} that are "
                "packed. Save it again."
            )
        stream.seek(max(0, length) + 4, os.SEEK_CUR)


# ----------------------------------------------------------------------------------------------------- EXIF and TIFF


def _check_avif(data: bytes) -> None:
    """Check whatever could be EXIF in a file whose boxes are not looked at: Pillow reads it as it opens the file."""
    directories = _Directories(io.BytesIO(data), "EXIF")
    for count, found in enumerate(_TIFF.finditer(data)):
        if count == MAX_NAMES:
            raise ExcessError(f"is a file of AVIF with over {MAX_NAMES:,} pieces of metadata. Save it without them.")
        directories.check(found.start())


def _block(image: Image.Image) -> bytes | None:
    """Return the EXIF that Pillow would read from an image's `info`, without its name, which may stand there often."""
    block, text = image.info.get("exif"), image.info.get("Raw profile type exif")
    if block is None and isinstance(text, str) and len(text) <= MAX_PROFILE_TEXT:
        try:  # which ImageMagick writes: hexadecimal, after three lines
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return None
    return _unnamed(block) if isinstance(block, bytes) else None


def _unnamed(block: bytes) -> bytes:
    at = 0
    while block.startswith(_EXIF, at):
        at += len(_EXIF)
    return block[at:]


def _put_orientation(image: Image.Image, orientation: object) -> None:
    if orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        image.info["exif"] = exif.tobytes()


def _orientation(block: bytes) -> int | None:
    """Read the orientation from the first directory of a block of EXIF, 1 where it is none of the eight; None where the
    directory has none, and XMP's counts.
    """
    found = None
    order = _order(block)
    for tag, kind, number, held in _entries(io.BytesIO(block), _first(block, big=False), order, big=False):
        if tag == ExifTags.Base.Orientation and number and kind in _SIZES:  # of two Pillow takes the last
            whole = kind in _NUMBERS and number * _SIZES[kind] <= len(held)
            value = struct.unpack_from(order + _NUMBERS[kind], held)[0] if whole else 1
            found = value if value in range(1, 9) else 1
    return found


class _Directories:
    """The directories of tags that Pillow would read in a file (TIFF 6.0, section 2; BigTIFF; EXIF has TIFF's form).

    What several of them unfold to counts together.
    """

    def __init__(self, stream: BinaryIO, what: str) -> None:
        self._stream, self._what = stream, what
        self._length = stream.seek(0, os.SEEK_END)
        self._entries = self._unfolded = 0

    def check(self, start: int = 0) -> None:
        """Check the structure that begins there.

        Raises `ExcessError`.
        """
        self._stream.seek(start)
        head = self._stream.read(16)
        if head[2:3] == b"+":
            self._add(head, start, big=True)
        else:
            self._add(head, start, big=False)
            if head[3:4] == b"+":  # Pillow's releases do not agree on whether that is BigTIFF
                self._add(head, start, big=True)
        if self._unfolded > 2 * self._length + _SLACK:
            raise ExcessError(
                f"has {self._what} data whose values name the same bytes again and again: {self._unfolded:,} bytes "
                f"from {self._length:,}. Save the image again without it."
            )

    def _add(self, head: bytes, base: int, *, big: bool) -> None:
        order, held_bytes = _order(head), 8 if big else 4
        left, seen = [_first(head, big=big)], set[int | None]()
        while left:
            directory = left.pop()
            if directory in seen:
                continue
            seen.add(directory)
            for tag, kind, number, held in _entries(self._stream, directory, order, big=big, base=base):
                self._entries += 1
                if self._entries > MAX_ENTRIES:
                    raise ExcessError(
                        f"has {self._what} data of more than {MAX_ENTRIES:,} entries. Save the image again without it."
                    )
                (where,) = struct.unpack(order + ("Q" if big else "L"), held)
                size = number * _SIZES.get(kind, 0)
                if tag in _WITHIN and size and kind in _POINTERS:  # Pillow seeks no other kind of value
                    if number != 1 or size > held_bytes:
                        raise ValueError(f"tag {tag} says in no known way where a directory is")
                    left.append(struct.unpack_from(order + _POINTERS[kind], held)[0])
                if size > held_bytes and base + where + size <= self._length:  # else Pillow reads none of it
                    self._unfolded += size


def _order(head: bytes) -> str:
    return ">" if head[:2] == b"MM" else "<"


def _first(head: bytes, *, big: bool) -> int | None:
    """Return where the first directory is; None if the head is not one."""
    if head[:2] not in (b"II", b"MM") or len(head) < (16 if big else 8):
        return None
    return int(struct.unpack_from(_order(head) + ("Q" if big else "L"), head, 8 if big else 4)[0])


def _entries(
    stream: BinaryIO, start: int | None, order: str, *, big: bool, base: int = 0
) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield the entries of a directory, one more than may be at most: tag, type, number of values, and the bytes that
    hold them or say where they are, counted from `base`.
    """
    counted = 8 if big else 2
    if start is None or not 0 <= start <= stream.seek(0, os.SEEK_END) - counted - base:
        return iter(())
    stream.seek(base + start)
    (count,) = struct.unpack(order + ("Q" if big else "H"), stream.read(counted))
    form = struct.Struct(order + ("HHQ8s" if big else "HHL4s"))
    data = stream.read(min(MAX_ENTRIES + 1, count) * form.size)
    return form.iter_unpack(data[: len(data) // form.size * form.size])
