"""Image files that are small and ask Pillow for much are refused or read without it, and others are read as before."""

from __future__ import annotations

import io
import itertools
import logging
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from magicface_rt import MaskError
from magicface_rt.decoding import decode
from magicface_rt.encoded_images import MAX_SCANS, ExcessError, open_bytes
from magicface_rt.errors import ImageError
from magicface_rt.serve.uploads import FORMATS, open_image

ENTRIES, BLOB = 2000, 60_000
MUCH = 20 << 20
"""Bytes. Unfolded, the entries would be six times as much; the files are under 1 MB."""


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
    found = [struct.pack(order + "HHLL", 0x8000 + n, 7, blob, start) for n in range(entries)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, entries + len(first))
    return head + b"".join(first + found) + bytes(4) + bytes(blob)


def png(block: bytes) -> bytes:
    out = io.BytesIO()
    picture().save(out, "PNG", exif=block)
    return out.getvalue()


def png_profile(block: bytes) -> bytes:
    """As ImageMagick writes EXIF."""
    from PIL.PngImagePlugin import PngInfo

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


def photo(block: bytes) -> bytes:
    return jpeg(block, b"MPF\0", b"\xff\xe2")


FILES: dict[str, Callable[[bytes], bytes]] = {
    "PNG": png,
    "PNG, a text": png_profile,
    "WEBP": webp,
    "JPEG": jpeg,
    "JPEG, MPF": photo,
}


def peak(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file", FILES)
def test_metadata_that_name_the_same_bytes_many_times_are_not_unfolded(file: str, tmp_path: Path) -> None:
    blob = BLOB if file != "JPEG, MPF" else 30_000  # Pillow joins no segments of these
    data = FILES[file](directory(6, blob=blob))
    assert len(data) < 1 << 20
    (tmp_path / "image").write_bytes(data)
    for read in (
        lambda: open_image(data, pixels=10**6, name="image", error=ImageError),
        lambda: decode(tmp_path / "image", "image", ImageError),
    ):
        read()  # what is imported late is there now
        assert peak(read) < MUCH


def test_the_attack_is_one() -> None:
    """What the test above tries does take much memory where nobody looks."""
    for data in (png(directory(6)), jpeg(directory(6))):
        assert peak(lambda data=data: Image.open(io.BytesIO(data)).getexif()) > 5 * MUCH  # type: ignore[misc]


def test_an_image_that_was_opened_elsewhere_is_refused_with_such_metadata() -> None:
    for make in (png, png_profile, webp):
        image = Image.open(io.BytesIO(make(directory(6))))
        with pytest.raises(MaskError, match=r"mask \(\w+\) has EXIF data whose values name the same bytes again"):
            decode(image, "mask", MaskError)


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_with_such_metadata_is_refused(big: bool, tmp_path: Path) -> None:
    out = io.BytesIO()
    picture().save(out, "TIFF", big_tiff=big)
    (tmp_path / "good.tiff").write_bytes(out.getvalue())
    decode(tmp_path / "good.tiff", "image", ImageError)
    if big:
        start = 16 + 8 + 20 * ENTRIES + 8
        entries = b"".join(struct.pack("<HHQQ", 0x8000 + n, 7, BLOB, start) for n in range(ENTRIES))
        data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, ENTRIES) + entries + bytes(8) + bytes(BLOB)
    else:
        data = directory()
    (tmp_path / "bad.tiff").write_bytes(data)
    with pytest.raises(ImageError, match=r"bad\.tiff' has TIFF data whose values name the same bytes again"):
        decode(tmp_path / "bad.tiff", "image", ImageError)


@pytest.mark.parametrize("orientation", [None, *range(1, 9), 0, 9])
@pytest.mark.parametrize("file", ["PNG", "PNG, a text", "WEBP", "JPEG"])
def test_the_orientation_is_what_pillow_reads(file: str, orientation: int | None, tmp_path: Path) -> None:
    for order in "<>":
        data = FILES[file](directory(orientation, entries=2, blob=8, order=order))
        (tmp_path / "image").write_bytes(data)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        found = decode(tmp_path / "image", "image", ImageError)
        assert np.array_equal(np.asarray(found.image), np.asarray(expected))
        uploaded = open_image(data, pixels=10**6, name="image", error=ImageError)
        assert np.array_equal(np.asarray(decode(uploaded, "image", ImageError).image), np.asarray(expected))


def test_damaged_metadata_do_not_keep_an_image() -> None:
    sound = directory(6, entries=2, blob=8)
    for cut in (*range(len(sound)), 0):
        for make in (png, jpeg):
            if sound[:cut] or make is jpeg:  # Pillow writes no empty chunk
                open_image(make(sound[:cut]), pixels=10**6, name="image", error=ImageError)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    out = io.BytesIO()
    picture().save(out, "JPEG", progressive=True)
    data = out.getvalue()
    assert 5 < data.count(b"\xff\xda") < 20
    open_bytes(data, FORMATS).load()
    last = data.rindex(b"\xff\xda")
    again = data[last:-2]
    many = data[:-2] + again * MAX_SCANS + data[-2:]
    with pytest.raises(ExcessError, match=r"more than 100 scans"):
        open_bytes(many, FORMATS)
    with pytest.raises(ImageError, match=r"image is a JPEG of more than 100 scans\. Save it again\."):
        open_image(many, pixels=10**6, name="image", error=ImageError)


def test_what_follows_an_image_is_not_counted_as_its_scans() -> None:
    """A phone writes a short film after a JPEG, and a thumbnail before it."""
    film = b"\xff\xda\0\2" * 5000
    plain = jpeg(b"")
    data = jpeg(b"\xff\xd8" + b"\xff\xda\0\2" * 500 + b"\xff\xd9", b"JFXX\0\x10", b"\xff\xe0") + film
    assert np.array_equal(np.asarray(open_bytes(data, FORMATS)), np.asarray(open_bytes(plain, FORMATS)))


def test_no_pixel_changes_where_a_name_of_metadata_is_taken_out() -> None:
    for quality, progressive, subsampling in itertools.product((30, 95), (False, True), (0, 2)):
        data = jpeg(directory(entries=3), quality=quality, progressive=progressive, subsampling=subsampling)
        assert np.array_equal(np.asarray(open_bytes(data, FORMATS)), np.asarray(Image.open(io.BytesIO(data))))


def test_what_a_photograph_says_of_a_person_is_not_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Jane Roe, Berlin"
    exif[ExifTags.Base.Orientation] = 6
    encoded = []
    for form in FORMATS:
        picture().save(out := io.BytesIO(), form, exif=exif)
        assert b"Jane Roe" in out.getvalue()
        encoded.append(out.getvalue())
    caplog.clear()
    caplog.set_level(logging.DEBUG)
    for data in encoded:
        (tmp_path / "image").write_bytes(data)
        open_image(data, pixels=10**6, name="image", error=ImageError)
        decode(tmp_path / "image", "image", ImageError)
    assert "PngImagePlugin" in caplog.text, "nothing is logged"
    assert "Jane" not in caplog.text
