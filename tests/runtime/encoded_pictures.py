"""Files of pictures with metadata as given, however much they claim."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ENTRIES, BLOB = 2000, 60_000


def picture(side: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (side, side + 8, 3), dtype=np.uint8))


def directory(orientation: int | None = None, *, entries: int = ENTRIES, blob: int = BLOB, order: str = "<") -> bytes:
    """A TIFF structure whose entries all name the same bytes, and the orientation before them."""
    first = (
        []
        if orientation is None
        else [struct.pack(order + "HHL", 0x0112, 3, 1) + struct.pack(order + "HH", orientation, 0)]
    )
    start = 8 + 2 + 12 * (entries + len(first)) + 4
    found = [struct.pack(order + "HHLL", 0x7000 + n, 7, blob, start) for n in range(entries)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, entries + len(first))
    return head + b"".join(first + found) + bytes(4) + bytes(blob)


def png(block: bytes) -> bytes:
    out = io.BytesIO()
    picture().save(out, "PNG", exif=block)
    return out.getvalue()


def png_profile(block: bytes) -> bytes:
    """As ImageMagick writes EXIF."""
    out, info = io.BytesIO(), PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(block)}\n{block.hex()}", zip=True)
    picture().save(out, "PNG", pnginfo=info)
    return out.getvalue()


def webp(block: bytes) -> bytes:
    out = io.BytesIO()
    picture().save(out, "WEBP", exif=b"Exif\0\0" + block, lossless=True)
    return out.getvalue()


def jpeg(block: bytes, name: bytes = b"Exif\0\0", marker: bytes = b"\xff\xe1", **options: Any) -> bytes:
    """With as many segments as the block fills, which Pillow joins."""
    out = io.BytesIO()
    picture().save(out, "JPEG", **options)
    data = out.getvalue()
    size = 65_000
    parts = [block[at : at + size] for at in range(0, len(block), size)]
    segments = (marker + struct.pack(">H", 2 + len(name) + len(part)) + name + part for part in parts)
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_of_scans(more: int) -> bytes:
    """A progressive one of about 10 scans, of which the last is repeated."""
    out = io.BytesIO()
    picture().save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + more * data[last:-2] + data[-2:]


def photo(block: bytes) -> bytes:
    return jpeg(block, b"MPF\0", b"\xff\xe2")


FILES: dict[str, Callable[[bytes], bytes]] = {
    "PNG": png,
    "PNG, a text": png_profile,
    "WEBP": webp,
    "JPEG": jpeg,
    "JPEG, MPF": photo,
}
