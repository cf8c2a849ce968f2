"""Pictures and masks: bombs, and damage that must not pass for a picture."""

from __future__ import annotations

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

from magicface_rt.decoding import MAX_FILE_BYTES, MAX_PIXELS, MAX_SIDE
from magicface_rt.errors import ImageError, MaskError
from magicface_rt.images import load_image
from magicface_rt.provenance import read_provenance
from magicface_rt.serve.uploads import from_base64, open_image

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
