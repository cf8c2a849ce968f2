"""Image files that are small and ask Pillow for much are refused or read without it, and others are read as before."""

from __future__ import annotations

import io
import itertools
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from allocated import peak_of
from PIL import ExifTags, Image, ImageOps, features
from PIL.PngImagePlugin import PngInfo

from magicface_rt import MaskError
from magicface_rt.decoding import as_seen, decode
from magicface_rt.encoded_images import MAX_SCANS, ExcessError, open_bytes
from magicface_rt.errors import ImageError
from magicface_rt.serve.uploads import FORMATS, open_image
from tests.runtime.encoded_pictures import (
    BLOB,
    ENTRIES,
    FILES,
    directory,
    jpeg,
    jpeg_of_scans,
    picture,
    png,
    png_profile,
    webp,
)

MUCH = 20 << 20
"""Bytes. Unfolded, the entries would be six times as much; the files are under 1 MB."""


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
        assert peak_of(read) < MUCH


def test_the_attack_is_one() -> None:
    """What the test above tries does take much memory where nobody looks."""
    for data in (png(directory(6)), jpeg(directory(6))):
        assert peak_of(lambda data=data: Image.open(io.BytesIO(data)).getexif()) > 5 * MUCH  # type: ignore[misc]


def test_an_image_that_was_opened_elsewhere_is_refused_with_such_metadata() -> None:
    for make in (png, png_profile, webp):
        image = Image.open(io.BytesIO(make(directory(6))))
        with pytest.raises(MaskError, match=r"mask \(\w+\) has EXIF data whose values name the same bytes again"):
            decode(image, "mask", MaskError)


@pytest.mark.parametrize("head", [b"II*\0", b"II\0*", b"MM\0*", b"MM*\0"])
def test_a_tiff_is_looked_at_under_every_name_that_pillow_takes(head: bytes, tmp_path: Path) -> None:
    data = directory(order="<" if head[:1] == b"I" else ">")
    (tmp_path / "bad.tiff").write_bytes(head + data[4:])
    with pytest.raises(ImageError, match="has TIFF data whose values name the same bytes again"):
        decode(tmp_path / "bad.tiff", "image", ImageError)


@pytest.mark.parametrize("padding", [0, 65_535])
def test_entries_behind_many_others_count(padding: int, tmp_path: Path) -> None:
    count = padding + ENTRIES
    start = 16 + 8 + 20 * count + 8
    entries = [struct.pack("<HHQQ", 0x7000, 1, 1, 0)] * padding
    entries += [struct.pack("<HHQQ", 0x7000 + n, 7, BLOB, start) for n in range(ENTRIES)]
    data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count) + b"".join(entries) + bytes(8) + bytes(BLOB)
    (tmp_path / "bad.tiff").write_bytes(data)
    with pytest.raises(
        ImageError, match=r"has TIFF data (of more than 65,535 entries|whose values name the same bytes)"
    ):
        decode(tmp_path / "bad.tiff", "image", ImageError)


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_with_such_metadata_is_refused(big: bool, tmp_path: Path) -> None:
    out = io.BytesIO()
    picture().save(out, "TIFF", big_tiff=big)
    (tmp_path / "good.tiff").write_bytes(out.getvalue())
    decode(tmp_path / "good.tiff", "image", ImageError)
    if big:
        start = 16 + 8 + 20 * ENTRIES + 8
        entries = b"".join(struct.pack("<HHQQ", 0x7000 + n, 7, BLOB, start) for n in range(ENTRIES))
        data = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, ENTRIES) + entries + bytes(8) + bytes(BLOB)
    else:
        data = directory()
    (tmp_path / "bad.tiff").write_bytes(data)
    with pytest.raises(ImageError, match=r"bad\.tiff' has TIFF data whose values name the same bytes again"):
        decode(tmp_path / "bad.tiff", "image", ImageError)


@pytest.mark.parametrize("orientation", [None, *range(1, 10), 0])
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


def test_a_name_that_stands_twice_is_stripped_as_pillow_does() -> None:
    data = jpeg(b"Exif\0\0" + directory(6, entries=2, blob=8))
    assert Image.open(io.BytesIO(data)).getexif()[ExifTags.Base.Orientation] == 6
    found = open_image(data, pixels=10**6, name="image", error=ImageError)
    assert found.getexif()[ExifTags.Base.Orientation] == 6


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_orientation_of_xmp_counts_where_there_is_no_other(form: str, tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    out = io.BytesIO()
    if form == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        picture().save(out, form, pnginfo=info)
    elif form == "TIFF":
        picture().save(out, form, tiffinfo={700: xmp})
    else:
        picture().save(out, form, xmp=xmp, lossless=True)
    (tmp_path / "image").write_bytes(out.getvalue())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(out)))
    assert expected.shape[:2] == picture().size
    assert np.array_equal(np.asarray(decode(tmp_path / "image", "image", ImageError).image), expected)
    if form in FORMATS:
        uploaded = open_image(out.getvalue(), pixels=10**6, name="image", error=ImageError)
        assert np.array_equal(np.asarray(decode(uploaded, "image", ImageError).image), expected)


def test_the_orientation_of_another_image_in_the_file_does_not_count() -> None:
    """Phones write previews before, and further images after."""
    turned = jpeg(directory(6, entries=2, blob=8))
    for data in (jpeg(b"") + turned, jpeg(turned, b"JFXX\0\x10", b"\xff\xe0"), jpeg(turned, b"a preview", b"\xff\xe2")):
        assert open_image(data, pixels=10**6, name="image", error=ImageError).getexif() == {}


def test_an_orientation_in_numbers_of_another_type_is_read_as_pillow_reads_it() -> None:
    for kind, value in itertools.product((1, 3, 4, 6, 8, 9), (6, 0x60000, 0)):
        block = b"II*\0" + struct.pack("<LHHHLL", 8, 1, 0x0112, kind, 1, value) + bytes(4)
        data = jpeg(block)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
        found = decode(open_image(data, pixels=10**6, name="image", error=ImageError), "image", ImageError)
        assert found.image.size == expected


def test_scans_that_libjpeg_finds_where_it_looks_for_a_restart_are_counted() -> None:
    """A marker that libjpeg does not know has no length there, whatever stands behind it."""
    out = io.BytesIO()
    picture().save(out, "JPEG", progressive=True, restart_marker_blocks=1)
    data = out.getvalue()
    assert b"\xff\xdd" in data
    last = data.rindex(b"\xff\xda")
    hidden = data[:-2] + b"\xff\x02\xf0\xf0" + data[last:-2] * (2 * MAX_SCANS) + data[-2:]
    with pytest.raises(ExcessError, match=r"more than 100 scans"):
        open_bytes(hidden, FORMATS, pixels=10**6)


def test_directories_within_directories_are_looked_at(tmp_path: Path) -> None:
    """Pillow reads those of EXIF and GPS as it loads a TIFF, or writes the EXIF of a picture that was turned."""
    start = 8 + 2 + 2 * 12 + 4
    entries, blob = 700, 60_000
    values = start + 2 + 12 * entries + 4
    first = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHLL", 34665, 4, 1, start)
    within = struct.pack("<H", entries) + b"".join(
        struct.pack("<HHLL", 0x7000 + n, 7, blob, values) for n in range(entries)
    )
    block = b"II*\0" + struct.pack("<LH", 8, 2) + first + bytes(4) + within + bytes(4) + bytes(blob)
    with pytest.raises(ImageError, match="has EXIF data whose values name the same bytes again"):
        decode(Image.open(io.BytesIO(png(block))), "image", ImageError)
    (tmp_path / "a.tiff").write_bytes(block)
    with pytest.raises(ImageError, match="has TIFF data whose values name the same bytes again"):
        decode(tmp_path / "a.tiff", "image", ImageError)
    data = png(block)
    assert peak_of(lambda: open_image(data, pixels=10**6, name="image", error=ImageError)) < MUCH


def test_metadata_of_an_avif_are_looked_at(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    for block, sound in ((directory(entries=2, blob=8), True), (directory(entries=800), False)):
        picture(64).save(tmp_path / "a.avif", exif=block)
        if sound:
            decode(tmp_path / "a.avif", "image", ImageError)
        else:
            with pytest.raises(ImageError, match="has EXIF data whose values name the same bytes again"):
                decode(tmp_path / "a.avif", "image", ImageError)


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_is_none_keeps_that_of_xmp_from_counting(orientation: int) -> None:
    data = jpeg(directory(orientation, entries=2, blob=8), xmp=b'<rdf:Description tiff:Orientation="6"/>')
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size
    assert expected == picture().size
    found = decode(open_image(data, pixels=10**6, name="image", error=ImageError), "image", ImageError)
    assert found.image.size == expected


def test_an_animated_png_is_not_filled_before_its_size_is_looked_at(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))

    side = 9000
    head = struct.pack(">LLBBBBB", side, side, 8, 6, 0, 0, 0)
    control = struct.pack(">LLLLLHHBB", 0, side, side, 0, 0, 1, 1, 1, 0)
    chunks = [chunk(b"IHDR", head), chunk(b"acTL", struct.pack(">LL", 1, 0)), chunk(b"fcTL", control)]
    small = chunk(b"IHDR", struct.pack(">LLBBBBB", 8, 8, 8, 6, 0, 0, 0))
    for parts, said in ((chunks, "is 9000 x 9000, more than the"), ([small, *chunks], "at a place where none may be")):
        data = b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", b"x")
        with pytest.raises(ValueError, match=said):
            open_bytes(data, FORMATS, pixels=10**6)
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ImageError, match=said):
            decode(tmp_path / "a.png", "image", ImageError)


def test_arithmetic_coding_is_refused_before_it_is_decoded() -> None:
    data = jpeg(b"")
    at = data.index(b"\xff\xc0")
    for frame in b"\xc9\xca\xcb\xcd\xce\xcf":
        with pytest.raises(ValueError, match="arithmetic coding"):
            open_bytes(data[: at + 1] + bytes((frame,)) + data[at + 2 :], FORMATS, pixels=10**6)


@pytest.mark.parametrize("pointer", ["at the beginning", "SHORT", "SLONG", "several"])
def test_a_directory_is_found_however_it_is_pointed_to(pointer: str) -> None:
    """Or refused, where Pillow might read another place than the one that is looked at."""
    entries, blob = 400, 60_000
    if pointer == "at the beginning":  # "II" is the number of its entries
        block = (b"II*\0" + bytes(4) + bytes(6)) + b"".join(
            struct.pack("<HHLL", 0x7000 + n, 7, blob, 400_000) for n in range(entries)
        )
        block = block.ljust(400_000 + blob, b"\0")
    else:
        kind, number = {"SHORT": (3, 1), "SLONG": (9, 1), "several": (4, 2)}[pointer]
        start = 8 + 2 + 12 + 4
        values = start + 2 + 12 * entries + 4 + 8
        first = struct.pack("<HHLL", 34665, kind, number, start if number == 1 else values - 8)
        within = struct.pack("<H", entries) + b"".join(
            struct.pack("<HHLL", 0x7000 + n, 7, blob, values) for n in range(entries)
        )
        block = b"II*\0" + struct.pack("<LH", 8, 1) + first + bytes(4) + within + bytes(4)
        block += struct.pack("<LL", start, start) + bytes(blob)
    image = Image.open(io.BytesIO(png(block)))
    with pytest.raises(ImageError, match=r"name the same bytes again|in no known way"):
        decode(image, "image", ImageError)


def test_a_bigtiff_whose_directory_is_behind_its_pixels_is_read(tmp_path: Path) -> None:
    """Read as a TIFF, its address and its pixels would be a directory."""
    pixels = np.full((300, 200), 7, np.uint8)
    start = 16 + pixels.size
    tags = [(256, 3, 200), (257, 3, 300), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 16), (278, 3, 300)]
    tags += [(277, 3, 1), (279, 4, pixels.size)]
    entries = b"".join(struct.pack("<HHQQ", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    data = b"II+\0" + struct.pack("<HHQ", 8, 0, start) + pixels.tobytes()
    data += struct.pack("<Q", len(tags)) + entries + bytes(8)
    (tmp_path / "a.tiff").write_bytes(data)
    assert np.array_equal(np.asarray(decode(tmp_path / "a.tiff", "image", ImageError).image), pixels)


def test_names_that_no_marker_stands_before_are_no_metadata() -> None:
    """Of a film behind the image, say."""
    data = jpeg(b"") + b"MPF\0Exif\0\0" * 100_000
    assert np.array_equal(
        np.asarray(open_bytes(data, FORMATS, pixels=10**6)), np.asarray(open_bytes(jpeg(b""), FORMATS, pixels=10**6))
    )


def test_many_names_before_exif_are_refused_where_pillow_strips_them_one_by_one() -> None:
    image = Image.open(io.BytesIO(png(b"Exif\0\0" * 2000 + directory(6, entries=2, blob=8))))
    with pytest.raises(ImageError, match="has EXIF behind more than 1,000 names"):
        decode(image, "image", ImageError)


def test_an_image_is_described_within_the_same_bounds() -> None:
    with pytest.raises(ImageError, match="the image has EXIF data whose values name the same bytes again"):
        as_seen(Image.open(io.BytesIO(png(directory(6)))))


def test_texts_in_any_language_are_read_where_they_are_not_packed() -> None:
    info = PngInfo()
    for number in range(60):
        info.add_itxt(f"key {number}", "мужчина")
    picture().save(out := io.BytesIO(), "PNG", pnginfo=info)
    open_image(out.getvalue(), pixels=10**6, name="image", error=ImageError)
    for number in range(60):
        info.add_itxt(f"packed {number}", "мужчина", zip=True)
    picture().save(out := io.BytesIO(), "PNG", pnginfo=info)
    with pytest.raises(ImageError, match="32 that are packed"):
        open_image(out.getvalue(), pixels=10**6, name="image", error=ImageError)


@pytest.mark.parametrize("kind", [1, 7])
def test_bytes_that_stand_where_a_pointer_is_expected_are_left_as_pillow_leaves_them(kind: int) -> None:
    block = b"II*\0" + struct.pack("<LH", 8, 1) + struct.pack("<HHLL", 34665, kind, 4, 8) + bytes(40)
    decode(Image.open(io.BytesIO(png(block))), "image", ImageError)


def test_damaged_metadata_do_not_keep_an_image() -> None:
    sound = directory(6, entries=2, blob=8)
    for cut in (*range(len(sound)), 0):
        for make in (png, jpeg):
            if sound[:cut] or make is jpeg:  # Pillow writes no empty chunk
                open_image(make(sound[:cut]), pixels=10**6, name="image", error=ImageError)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    data = jpeg_of_scans(0)
    assert 5 < data.count(b"\xff\xda") < 20
    open_bytes(data, FORMATS, pixels=10**6).load()
    many = jpeg_of_scans(MAX_SCANS)
    with pytest.raises(ExcessError, match=r"more than 100 scans"):
        open_bytes(many, FORMATS, pixels=10**6)
    with pytest.raises(ImageError, match=r"image is a JPEG of more than 100 scans\. Save it again\."):
        open_image(many, pixels=10**6, name="image", error=ImageError)


def test_what_follows_an_image_is_not_counted_as_its_scans() -> None:
    """A phone writes a short film after a JPEG, and a thumbnail before it."""
    film = b"\xff\xda\0\2" * 5000
    plain = jpeg(b"")
    data = jpeg(b"\xff\xd8" + b"\xff\xda\0\2" * 500 + b"\xff\xd9", b"JFXX\0\x10", b"\xff\xe0") + film
    assert np.array_equal(
        np.asarray(open_bytes(data, FORMATS, pixels=10**6)), np.asarray(open_bytes(plain, FORMATS, pixels=10**6))
    )


def test_no_pixel_changes_where_a_name_of_metadata_is_taken_out() -> None:
    for quality, progressive, subsampling in itertools.product((30, 95), (False, True), (0, 2)):
        data = jpeg(directory(entries=3), quality=quality, progressive=progressive, subsampling=subsampling)
        assert np.array_equal(
            np.asarray(open_bytes(data, FORMATS, pixels=10**6)), np.asarray(Image.open(io.BytesIO(data)))
        )


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
