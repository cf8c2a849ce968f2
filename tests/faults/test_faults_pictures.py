"""Pictures and masks: bombs, and damage that must not pass for a picture."""

from __future__ import annotations

import functools
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from corruptions import cuts, edits_of, png_of
from hypothesis import strategies as st
from outcomes import inputs, judged, little_memory, loop
from PIL import Image, PngImagePlugin
from single_files import BY_NAME, FORMATS, PICTURE_MEMORY, encoded, read_mask, read_picture

from magicface_rt.decoding import MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE, decode
from magicface_rt.errors import ImageError, MaskError
from magicface_rt.images import load_image
from magicface_rt.provenance import read_provenance
from magicface_rt.serve.uploads import from_base64, open_image
from tests.runtime.encoded_pictures import jpeg, png, webp

PICTURES = [one for one in FORMATS if one.name.startswith("picture")]


@pytest.mark.parametrize("one", PICTURES, ids=str)
def test_a_cut_picture_is_refused_or_is_the_whole_picture(one: object, tmp_path: Path) -> None:
    """Half a face on a grey ground would be taken for a reference without a word."""
    data, path = one.sample(), tmp_path / "man.img"  # type: ignore[attr-defined]
    path.write_bytes(data)
    whole = np.asarray(read_picture(path))
    for keep in cuts(data, most=400):
        path.write_bytes(data[:keep])
        found = judged("picture, cut", lambda: read_picture(path), names=path, memory=PICTURE_MEMORY)
        if found is not None:
            np.testing.assert_array_equal(np.asarray(found), whole)


@pytest.mark.parametrize(
    ("width", "height"),
    [(0, 5), (1, 2**31 - 1), (8001, 8000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)],
)
def test_a_picture_of_more_pixels_than_are_read(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(width, height, bytes(1000)))
    for read, kind in (
        (read_picture, "picture, bomb"),
        (read_mask, "mask, bomb"),
        (read_provenance, "provenance, bomb"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert judged(kind, lambda read=read: read(path), names=path, memory=64 << 20) is None  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_the_largest_picture_of_sixteen_bits_takes_no_gigabytes(mode: str, tmp_path: Path) -> None:
    """It took eight bytes a pixel, three times over."""
    path = tmp_path / "grey.png"
    Image.new("I;16", (8000, 8000), 30_000).save(path, compress_level=1)
    with little_memory(1200 << 20):
        image = load_image(path, name="man: image")
    assert image.size == (8000, 8000)
    assert image.getpixel((4000, 4000)) == (30_000 >> 8,) * 3


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1)])
def test_a_picture_that_is_a_line_is_refused_before_it_is_resampled(size: tuple[int, int], tmp_path: Path) -> None:
    """Resampling takes memory for each pixel of a side, of which some kilobytes may hold millions."""
    path = tmp_path / "line.png"
    Image.new("L", size, 255).save(path)
    for read, error in ((read_picture, ImageError), (read_mask, MaskError)):
        with little_memory(64 << 20), pytest.raises(error, match=rf"line\.png.*{size[0]} x {size[1]}.*at most 65,535"):
            read(path)


def test_a_file_of_many_pixels_and_few_bytes_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    Image.new("L", (8000, 8000), 255).save(path)
    assert path.stat().st_size < 1 << 20
    image = judged("picture, bomb", lambda: read_picture(path), names=path, memory=1 << 30)
    assert image is not None
    assert image.width * image.height == MAX_PIXELS


def test_a_file_of_more_bytes_than_any_picture_has(tmp_path: Path) -> None:
    """Decoders of AVIF and WebP read the whole file before they look at it."""
    path = tmp_path / "man.webp"
    path.write_bytes(encoded("WEBP"))
    with path.open("r+b") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with little_memory(64 << 20), pytest.raises(ImageError, match=r"man\.webp.*larger than"):
        load_image(path, name="man: image")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "chunk",
    [
        _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)),
        _chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(100_000_000), 9)),
        _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000), 9)),
        _chunk(b"eXIf", b"II*\0" + b"\xff" * 4000),
        b"\x7f\xff\xff\xff" + b"tEXt" + b"a\0b",
    ],
    ids=["zTXt", "iTXt", "iCCP", "eXIf", "a length of 2 GB"],
)
def test_a_bomb_in_a_chunk(chunk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(8, 8, bytes(200), more=chunk))
    for read, kind in (
        (read_picture, "picture, bomb"),
        (read_mask, "mask, bomb"),
        (read_provenance, "provenance, bomb"),
    ):
        judged(kind, lambda read=read: read(path), names=path, memory=64 << 20)  # type: ignore[misc]


def test_many_frames_are_not_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (400, 400), shade % 256) for shade in range(300)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        path = tmp_path / f"film.{kind.lower()}"
        frames[0].save(path, kind, save_all=True, append_images=frames[1:])
        image = judged("picture, bomb", lambda path=path: read_picture(path), names=path, memory=64 << 20)  # type: ignore[misc]
        assert image is not None
        assert image.size == (400, 400)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "[]", "null", "NaN", "9" * 100_000, "{", '"\\ud800"']
)
def test_settings_in_a_picture_that_are_none(text: str, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("magicface_rt", text)
    path = tmp_path / "made.png"
    path.write_bytes(encoded("PNG"))
    Image.open(path).save(path, pnginfo=info)
    assert judged("provenance, edited", lambda: read_provenance(path), names=path) is None


@inputs
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_any_edit_of_an_upload(inputs: int, kind: str) -> None:
    """As a service reads it: of few formats, and within fewer pixels."""

    def check(content: bytes) -> None:
        found = judged(
            f"upload {kind}",
            lambda: open_image(content, pixels=10_000, name="the image", error=ImageError),
            names="the image",
            memory=256 << 20,
        )
        assert found is None or found.width * found.height <= 10_000

    loop(inputs, edits_of(BY_NAME[f"picture {kind}"].sample()), check)


@inputs
def test_any_text_for_base64(inputs: int) -> None:
    loop(
        inputs,
        st.text(max_size=40) | st.text("data:image/png;base64,ABC=+/ -_\n", max_size=60),
        lambda text: judged(
            "upload base64", lambda: from_base64(text, name="the mask", error=MaskError), names="the mask"
        ),
    )


# ------------------------------------------------------------------------------------- small files that ask for much


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_text(key: str, text: str) -> bytes:
    return png(b"")[:33] + chunk(b"tEXt", key.encode() + b"\0" + text.encode()) + png(b"")[33:]


ODD: dict[str, bytes] = {
    "a run of FF": b"\xff\xd8" + b"\xff" * 10**6 + b"\0",
    "junk": b"\xff\xd8\xff\xe0\0\2" + bytes(10**6),
    "runs of FF in a scan": jpeg(b"")[:-2] + b"\xff" * 10**6 + b"\0\xff\xd9",
    "names of EXIF": b"\xff\xd8" + b"\xff\xe1\xff\xffExif\0\0II*\0\x08\0\0\0" * 50_000,
    "directories in an overlap": jpeg(b"II*\0\x08\0\0\0\xff\xff" + bytes(64_000)),
    "empty segments": jpeg(b"")[:2] + b"\xff\xed\0\2" * 250_000 + jpeg(b"")[2:],
    "segments behind a marker without a length": jpeg(b"")[:2] + b"\xff\xf0\xff\xff" + b"\xff\xed\0\2" * 250_000,
    "segments behind an end": jpeg(b"")[:2] + b"\xff\xd9" + b"\xff\xed\0\2" * 250_000,
    "tables": jpeg(b"")[:2] + (b"\xff\xdb\xff\xf2" + bytes(65 * 1008)) * 15 + jpeg(b"")[2:],
    "frames": jpeg(b"")[:2] + (b"\xff\xc0\xff\xff\x08\0\x18\0\x20\xff" + bytes(65_527)) * 15 + jpeg(b"")[2:],
    "a profile of ends of lines": png_text("Raw profile type exif", "\n" * 10**6),
    "white points": png(b"")[:33] + chunk(b"cHRM", bytes(10**6)) + png(b"")[33:],
    "packed texts": png(b"")[:33] + chunk(b"iTXt", b"\0\1\0\0\0" + zlib.compress(bytes(1 << 20))) * 900 + png(b"")[33:],
    "names behind the image": jpeg(b"") + b"MPF\0Exif\0\0" * 100_000,
    "names in WebP": webp(b"Exif\0\0" * 170_000),
    "profiles of colours": png(b"")[:33]
    + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 900
    + png(b"")[33:],
    "empty chunks": png(b"")[:33] + chunk(b"teSt", b"") * 80_000 + png(b"")[33:],
    "empty chunks of pixels": png(b"")[:33] + chunk(b"IDAT", b"") * 160_000 + png(b"")[33:],
}
"""Files of about a megabyte. Some of these took minutes or hours, or gigabytes."""


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_of_a_megabyte_takes_little_time_and_memory(name: str) -> None:
    def read() -> Image.Image:
        return open_image(ODD[name], pixels=10**6, name="photograph", error=ImageError)

    judged("picture, odd", read, names="photograph", memory=64 << 20)


@pytest.mark.parametrize("heads", [1, 999])
def test_directories_that_name_each_other_are_read_once(heads: int, tmp_path: Path) -> None:
    """In a TIFF, and in an AVIF, of which every place is looked at where metadata could begin."""
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, 8) for tag in (34665, 34853, 40965, 34665)) * 10_000
    block = b"II*\0" + struct.pack("<LH", 8, 40_000) + entries + bytes(4)
    (tmp_path / "a.tiff").write_bytes(block)
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypavif" + bytes(16) + b"II*\0\x08\0\0\0" * (heads - 1) + block)
    for path in tmp_path.iterdir():
        read = functools.partial(decode, path, "image", ImageError)
        assert judged("picture, odd", read, names=path, memory=64 << 20) is None
