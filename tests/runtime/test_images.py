from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, PngImagePlugin

from magicface_rt import images
from magicface_rt.concept import Reference
from magicface_rt.errors import ImageError, MaskError, NonFiniteError, OptionError
from magicface_rt.images import (
    image_to_pixels,
    layer_mask,
    load_image,
    load_mask,
    load_reference,
    mask_grid,
    pixels_to_images,
    region_overlay,
)
from magicface_rt.soft_warnings import MagicFaceWarning, attributed_to, collect_warnings, warn
from tests.locations import DATA, GOLDENS

IMAGES = DATA / "unit" / "images"
SHARED = GOLDENS / "unit"
RECORDED = np.load(DATA / "unit" / "images.npz")
needs_photographs = pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded photographs are not beside this tree")


def photograph(width: int = 60, height: int = 40) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# --- the recorded loaders


def recorded_mask(path: Path) -> npt.NDArray[np.uint8]:
    return mask_grid(load_mask(path, image_size=None, threshold=255, name="mask"))


@pytest.mark.parametrize("name", ["ramp", "odd"])
def test_masks_at_threshold_255_equal_the_recorded_ones(name: str) -> None:
    grid = recorded_mask(IMAGES / f"{name}.png")
    assert grid.dtype == np.uint8
    np.testing.assert_array_equal(grid, RECORDED[f"mask_{name}"][0, 0])


def test_nearest_pixels_equal_the_recorded_ones() -> None:
    pixels = image_to_pixels(load_image(IMAGES / "odd3.png", name="odd3"), 512, 512, "nearest")
    assert pixels.shape == (1, 3, 512, 512)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels[:, :, ::8, ::8], RECORDED["image_odd3_every8th"])


@needs_photographs
@pytest.mark.parametrize("index", [0, 1, 2])
def test_photographs_have_the_recorded_hashes(index: int) -> None:
    info = json.loads((SHARED / "images" / "info.json").read_text())[f"image_{index}.jpg"]
    pixels = image_to_pixels(load_image(SHARED / "images" / f"image_{index}.jpg", name="image"), 512, 512, "nearest")
    assert hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest() == info["sha256_of_output_float32_little_endian"]


@needs_photographs
@pytest.mark.parametrize("index", [0, 1, 2])
def test_photographed_masks_equal_the_recorded_ones(index: int) -> None:
    recorded = np.load(SHARED / "images.npz")[f"mask_{index}"][0, 0]
    np.testing.assert_array_equal(recorded_mask(SHARED / "images" / f"mask_{index}.jpg"), recorded)


# --- sampling


@given(rows=st.integers(1, 128), cols=st.integers(1, 128), seed=st.integers(0, 9))
def test_layer_mask_equals_a_loop(rows: int, cols: int, seed: int) -> None:
    grid = np.random.default_rng(seed).integers(0, 2, (128, 128), dtype=np.uint8)
    slow = [[bool(grid[128 * i // rows][128 * j // cols]) for j in range(cols)] for i in range(rows)]
    fast = layer_mask(grid, rows, cols)
    assert fast.dtype == np.bool_
    np.testing.assert_array_equal(fast, np.array(slow))


@given(height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 9))
def test_mask_grid_equals_a_loop(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    slow = [[int(mask[i * height // 128][j * width // 128]) for j in range(128)] for i in range(128)]
    np.testing.assert_array_equal(mask_grid(mask), np.array(slow, dtype=np.uint8))


def test_lanczos_is_the_default_and_keeps_the_range() -> None:
    image = photograph()
    pixels = image_to_pixels(image, 32, 48)
    assert pixels.shape == (1, 3, 32, 48)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    np.testing.assert_array_equal(pixels, image_to_pixels(image, 32, 48, "lanczos"))
    assert not np.array_equal(pixels, image_to_pixels(image, 32, 48, "nearest"))


def test_an_unknown_resampling_is_refused() -> None:
    with pytest.raises(OptionError, match="bicubic"):
        image_to_pixels(photograph(), 8, 8, "bicubic")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="resample is array"):
        image_to_pixels(photograph(), 8, 8, np.array(["nearest", "lanczos"]))  # type: ignore[arg-type]


def test_pixels_come_back_as_the_image_they_were() -> None:
    image = photograph(64, 32)
    (back,) = pixels_to_images(image_to_pixels(image, 32, 64, "nearest"))
    np.testing.assert_array_equal(np.asarray(back), np.asarray(image))


def test_pixels_outside_the_range_are_clipped() -> None:
    pixels = np.array([-3.0, 0.0, 3.0], np.float32).reshape(1, 3, 1, 1)
    assert pixels_to_images(pixels)[0].getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(bad: float) -> None:
    pixels = np.zeros((1, 3, 4, 4), np.float32)
    pixels[0, 1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match="1 of 48"):
        pixels_to_images(pixels)


def test_pixels_of_another_shape_are_refused() -> None:
    with pytest.raises(ImageError, match=r"\[1, 4, 2, 2\]"):
        pixels_to_images(np.zeros((1, 4, 2, 2), np.float32))


# --- reading images


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", "RGB"), ("L", "RGB"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "RGBA"), ("RGBA", "RGBA"), ("I;16", "RGB")],
)
def test_images_of_every_mode_come_as_rgb_or_rgba(tmp_path: Path, mode: str, expected: str) -> None:
    image = Image.new(mode, (5, 4))
    assert load_image(image, name="image").mode == expected
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    assert load_image(path, name="image").mode == expected


def test_a_palette_with_a_transparent_colour_has_alpha(tmp_path: Path) -> None:
    Image.new("P", (5, 4)).save(tmp_path / "image.png", transparency=0)
    assert load_image(tmp_path / "image.png", name="image").mode == "RGBA"


def test_sixteen_bit_greys_keep_their_brightness() -> None:
    image = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert load_image(image, name="image").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.array([[0, 255]], np.uint16), "from 0 to 255"),
        (np.array([[0, 1]], np.uint16), "from 0 to 1"),
        (np.array([[0, 255]], np.int32), "from 0 to 255"),
        (np.array([[0, 65536]], np.int32), "from 0 to 65536"),
        (np.array([[-1, 40000]], np.int32), "from -1 to 40000"),
    ],
)
def test_whole_numbers_that_would_be_black_or_cut_are_refused(values: Any, named: str, tmp_path: Path) -> None:
    image = Image.fromarray(values)
    with pytest.raises(ImageError, match=f"^image .*{named}, expected .* 65535.*8 bits a channel, or scale it"):
        load_image(image, name="image")
    image.save(tmp_path / "mask.tif")
    with pytest.raises(MaskError, match=f"mask.tif.*{named}"):
        load_mask(tmp_path / "mask.tif", image_size=None, name="mask")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_whole_numbers_of_sixteen_bits_and_black_ones_are_read(dtype: Any) -> None:
    bright, black = np.array([[0, 256, 65535]], dtype), np.zeros((1, 3), dtype)
    assert np.asarray(load_image(Image.fromarray(bright), name="image"))[0, :, 0].tolist() == [0, 1, 255]
    assert not np.asarray(load_image(Image.fromarray(black), name="image")).any()


def test_modes_that_pillow_cannot_convert_are_refused() -> None:
    with pytest.raises(ImageError, match=r"^image \(Image\) is of mode La, which cannot be converted.*Save it as"):
        load_image(Image.new("La", (4, 4)), name="image")
    for mode in ("La", "LAB"):
        with pytest.raises(MaskError, match=rf"^mask \(Image\) is of mode {mode}"):
            load_mask(Image.new(mode, (4, 4)), image_size=None, name="mask")


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(60, 40).save(tmp_path / "image.jpg", exif=exif)
    assert load_image(tmp_path / "image.jpg", name="image").size == (40, 60)


@pytest.mark.parametrize(
    ("of_image", "of_mask", "size", "doubtful"),
    [
        (6, 1, (64, 64), True),  # a quarter turn of a square
        (3, 1, (60, 40), True),  # the sizes fit either way
        (1, 3, (60, 40), True),
        (3, 4, (60, 40), True),
        (6, 1, (40, 60), False),  # the mask is as the image is seen
        (6, 6, (60, 40), False),  # turned alike
        (1, 1, (60, 40), False),
    ],
)
@pytest.mark.parametrize("from_file", [True, False])
def test_an_image_that_is_turned_away_from_its_mask_is_said(
    of_image: int, of_mask: int, size: tuple[int, int], doubtful: bool, from_file: bool, tmp_path: Path
) -> None:
    paths = []
    for name, orientation in (("image", of_image), ("mask", of_mask)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = (60, 40) if name == "image" and size == (40, 60) else size
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", stored, "white").save(paths[-1], exif=exif)
    image, mask = paths if from_file else [Image.open(path) for path in paths]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_reference(Reference(image, mask=mask), name="man")
    assert [bool(re.search("EXIF orientation .* says.*exif_transpose", str(one.message))) for one in caught] == (
        [True] if doubtful else []
    )
    assert all(one.category is MagicFaceWarning and one.filename == __file__ for one in caught)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_threads_may_share_an_image_that_is_not_read_yet(suffix: str, tmp_path: Path) -> None:
    """Pillow reads it when its pixels are wanted, from one file."""
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 500, 3), np.uint8)).save(path)
    expected = load_image(path, name="image").tobytes()
    for _ in range(5):
        with Image.open(path) as image, ThreadPoolExecutor(4) as threads:
            start = threading.Barrier(4)

            def read(image: Image.Image = image, start: threading.Barrier = start) -> bytes:
                start.wait()
                return load_image(image, name="image").tobytes()

            assert {one.result() for one in [threads.submit(read) for _ in range(4)]} == {expected}


def test_a_cut_image_that_pillow_is_told_to_take_for_whole_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph().save(tmp_path / "image.jpg")
    data = (tmp_path / "image.jpg").read_bytes()
    (tmp_path / "image.jpg").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.warns(MagicFaceWarning, match=r"image\.jpg.*LOAD_TRUNCATED_IMAGES is set.*Set it to False"):
        load_image(tmp_path / "image.jpg", name="image")


def test_sixteen_bits_that_hold_twelve_are_said(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 3952]], np.uint16)).save(tmp_path / "grey.png")
    with pytest.warns(MagicFaceWarning, match=r"grey\.png.*from 0 to 3952 of 65535.*nearly black.*scale"):
        load_image(tmp_path / "grey.png", name="image")


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_arrays_are_images(shape: tuple[int, ...]) -> None:
    image = load_image(np.full(shape, 200, np.uint8), name="image")
    assert image.size == (5, 4)
    assert np.asarray(image)[0, 0, 0] == 200


@pytest.mark.parametrize(
    ("array", "named"),
    [
        (np.zeros((4, 5, 3), np.float32), "float32"),
        (np.zeros((4, 5, 2), np.uint8), r"\[4, 5, 2\]"),
        (np.zeros((1, 3, 4, 5), np.uint8), r"\[1, 3, 4, 5\]"),
        (np.zeros((0, 5, 3), np.uint8), "5 x 0"),
        (np.zeros((4,), np.uint8), r"\[4\]"),
        (np.ones((4, 5, 3), np.bool_), r"bool \[4, 5, 3\], expected bool \[h,w\].*any\(axis=2\)"),
        (np.ma.masked_equal(np.ones((4, 5), np.uint8), 1), "masked values.*filled"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: Any, named: str) -> None:
    with pytest.raises(ImageError, match=named) as caught:
        load_image(array, name="man, reference 1: image")
    assert str(caught.value).startswith("man, reference 1: image")


def test_a_path_of_bytes_is_refused() -> None:
    class Place:
        def __fspath__(self) -> bytes:
            return b"man.jpg"

    with pytest.raises(ImageError, match=r"image: the path is b'man.jpg', expected text.*os\.fsdecode"):
        load_image(Place(), name="image")  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [None, 3, b"man.jpg", ["man.jpg"]])
def test_other_things_are_no_images(source: Any) -> None:
    with pytest.raises(ImageError, match="expected a path"):
        load_image(source, name="image")


def test_a_missing_file_a_folder_and_a_broken_name_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[str | Path, str]] = [
        (tmp_path / "none.png", "does not exist"),
        (tmp_path, "is a folder"),
        ("a\0b", "cannot be read|exist"),
    ]
    for path, said in cases:
        with pytest.raises(ImageError, match=said):
            load_image(path, name="image")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_truncated_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    photograph(200, 200).save(path)
    whole = path.read_bytes()
    for keep in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:keep])
        with pytest.raises(ImageError, match="cut"):
            load_image(path, name="image")


@given(position=st.integers(0, 2000), value=st.integers(0, 255))
def test_damaged_files_give_an_image_or_an_image_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "image.png"
    photograph(20, 20).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] = value
    path.write_bytes(damaged)
    with contextlib.suppress(ImageError):
        load_image(path, name="image")


def test_formats_that_start_other_programs_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "image.eps"
    photograph().save(path)
    with pytest.raises(ImageError, match=r"cannot be read.*UnidentifiedImageError"):
        load_image(path, name="image")


def test_decompression_bombs_are_refused(tmp_path: Path) -> None:
    action: Literal["ignore", "error"]
    for side in (8100, 10000, 14000):  # over our limit, Pillow's warning, Pillow's error
        path = tmp_path / f"{side}.png"
        Image.new("1", (side, side)).save(path)
        for action in ("ignore", "error"):
            with warnings.catch_warnings():
                warnings.simplefilter(action, Image.DecompressionBombWarning)
                with pytest.raises(ImageError, match="64,000,000"):
                    load_image(path, name="image")


def test_bombs_in_text_chunks_are_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 80_000_000, zip=True)
    photograph().save(tmp_path / "image.png", pnginfo=info)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path / "image.png", name="image")


# --- masks


def ramp() -> npt.NDArray[np.uint8]:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("threshold", [1, 128, 255])
def test_values_from_the_threshold_up_count(threshold: int) -> None:
    mask = load_mask(ramp(), image_size=(16, 16), threshold=threshold, name="mask")
    np.testing.assert_array_equal(mask, ramp() >= threshold)
    assert mask.dtype == np.bool_


def test_the_default_threshold_is_128() -> None:
    np.testing.assert_array_equal(load_mask(ramp(), image_size=None, name="mask"), ramp() >= 128)


def test_a_grey_mask_with_three_channels_is_the_mask_with_one() -> None:
    for threshold in (1, 77, 128, 255):
        three = load_mask(np.stack([ramp()] * 3, axis=2), image_size=None, threshold=threshold, name="mask")
        np.testing.assert_array_equal(three, ramp() >= threshold)


def test_a_coloured_mask_counts_by_its_luminance() -> None:
    colours = np.array([[(255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 255)]], np.uint8)
    assert load_mask(colours, image_size=None, name="mask").tolist() == [[False, True, True, False]]


def test_a_mask_with_transparency_counts_by_its_alpha_and_an_opaque_one_by_its_luminance() -> None:
    black_on_nothing = np.array([[(0, 0, 0, 0), (0, 0, 0, 255)]], np.uint8)
    assert load_mask(black_on_nothing, image_size=None, name="mask").tolist() == [[False, True]]
    opaque = np.array([[(0, 0, 0, 255), (255, 255, 255, 255)]], np.uint8)
    assert load_mask(opaque, image_size=None, name="mask").tolist() == [[False, True]]


@pytest.mark.parametrize("alpha", [255, 254, 128])
def test_a_mask_whose_alpha_leaves_nothing_out_counts_by_its_luminance(alpha: int) -> None:
    """One pixel that is not quite opaque made it all of the image."""
    painted = np.array([[(0, 0, 0, 255), (255, 255, 255, alpha)]], np.uint8)
    assert load_mask(painted, image_size=None, name="mask").tolist() == [[False, True]]


def painted_mask() -> npt.NDArray[np.uint8]:
    """White on black, RGBA [20,20,4], opaque everywhere: a square of 16 of its 400 pixels."""
    mask = np.zeros((20, 20, 4), np.uint8)
    mask[8:12, 8:12, :3] = 255
    mask[..., 3] = 255
    return mask


@pytest.mark.parametrize("form", ["array", "RGBA", "LA", "palette"])
def test_a_painted_mask_of_which_one_pixel_is_transparent_is_warned_of(form: str, tmp_path: Path) -> None:
    """Its alpha counts as in any mask, and marks nearly all of the image; nobody who painted it means that."""
    mask = painted_mask()
    mask[0, 0, 3] = 0
    source: Any = mask
    if form != "array":
        image, source = Image.fromarray(mask), tmp_path / "mask.png"
        if form == "palette":
            grey = image.convert("L").point(lambda value: 2 if value else 1).convert("P")
            grey.putpalette([0, 0, 0, 0, 0, 0, 255, 255, 255])
            grey.putpixel((0, 0), 0)
            grey.save(source, transparency=0)
        else:
            image.convert(form).save(source)
    with collect_warnings() as found:
        taken = load_mask(source, image_size=None, name="man: mask")
    np.testing.assert_array_equal(taken, mask[..., 3] == 255)
    (told,) = found
    assert told.kind == "mask-by-alpha"
    said = str(told)
    assert said.startswith("man: mask")
    assert "its alpha was taken, which marks 99.75% of the image" in said
    assert "its black and white, which would mark 4.00%, were ignored" in said
    assert "Remove the alpha channel, or make it opaque everywhere" in said


@pytest.mark.parametrize(
    ("colour", "alpha"),
    [
        ("both", "opaque"),  # read by its black and white
        ("both", "nearly opaque"),
        ("white", "part"),
        ("black", "part"),
        ("dim", "part"),  # as good as black
        ("both", "as the colour"),
    ],
)
def test_a_mask_with_one_shape_only_is_not_warned_of(colour: str, alpha: str) -> None:
    mask = painted_mask()
    if colour != "both":
        mask[..., :3] = np.where(mask[..., :3], 100, 0) if colour == "dim" else 255 * (colour == "white")
    mask[..., 3] = {
        "opaque": np.full((20, 20), 255),
        "nearly opaque": np.full((20, 20), 128),
        "part": np.tri(20) * 255,
        "as the colour": mask[..., 0],
    }[alpha]
    with collect_warnings() as found:
        load_mask(mask, image_size=None, name="mask")
    assert found == []


@pytest.mark.parametrize(("threshold", "warned"), [(100, False), (101, True), (127, True), (128, False)])
def test_the_threshold_decides_what_is_transparent_and_what_is_white(threshold: int, warned: bool) -> None:
    mask = painted_mask()
    mask[..., :3] //= 2  # 127 on 0
    mask[0, 0, 3] = 100
    with collect_warnings() as found:
        load_mask(mask, image_size=None, threshold=threshold, name="mask")
    assert bool(found) is warned


def test_a_reference_with_such_a_mask_is_warned_of_by_its_name() -> None:
    mask = painted_mask()
    mask[0, 0, 3] = 0
    with pytest.warns(MagicFaceWarning, match=r"^man: mask .*its alpha was taken"):
        load_reference(Reference(photograph(20, 20), mask=mask), name="man")


def test_bool_arrays_and_one_bit_images_are_masks() -> None:
    mask = np.eye(5, dtype=np.bool_)
    np.testing.assert_array_equal(load_mask(mask, image_size=None, threshold=255, name="mask"), mask)
    np.testing.assert_array_equal(load_mask(Image.fromarray(mask), image_size=None, name="mask"), mask)


def test_an_empty_mask_is_refused_with_its_highest_value() -> None:
    with pytest.raises(MaskError, match=r"highest value is 100.*lower mask_threshold"):
        load_mask(np.full((4, 4), 100, np.uint8), image_size=None, name="mask")
    with pytest.raises(MaskError, match="bool array"):
        load_mask(np.ones((4, 4), np.uint8), image_size=None, name="mask")


def test_a_mask_of_another_size_is_stretched_with_a_warning() -> None:
    with pytest.warns(MagicFaceWarning, match="50 x 25, its image 100 x 50"):
        mask = load_mask(np.full((25, 50), 255, np.uint8), image_size=(100, 50), name="mask")
    assert mask.shape == (25, 50)


def test_a_mask_of_another_aspect_is_refused() -> None:
    with pytest.raises(MaskError, match="50 x 50, its image 100 x 50"):
        load_mask(np.full((50, 50), 255, np.uint8), image_size=(100, 50), name="mask")


@pytest.mark.parametrize(("height", "fits"), [(1010, True), (991, True), (1011, False), (990, False)])
def test_aspects_agree_within_one_percent(height: int, fits: bool) -> None:
    def load() -> None:
        load_mask(np.full((height, 1000), 255, np.uint8), image_size=(2000, 2000), name="mask")

    if fits:
        with pytest.warns(MagicFaceWarning):
            load()
    else:
        with pytest.raises(MaskError):
            load()


@pytest.mark.parametrize("threshold", [0, 256, 1.5, True, None])
def test_thresholds_out_of_range_are_refused(threshold: Any) -> None:
    with pytest.raises(OptionError, match="mask_threshold"):
        load_mask(ramp(), image_size=None, threshold=threshold, name="mask")


def test_masks_that_cannot_be_read_are_mask_errors(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for source in (tmp_path / "mask.png", tmp_path / "none.png", np.zeros((2, 2), np.float64)):
        with pytest.raises(MaskError):
            load_mask(source, image_size=None, name="mask")  # type: ignore[arg-type]


# --- references


def test_a_reference_is_read_once() -> None:
    mask = np.zeros((40, 60), np.bool_)
    mask[10:20, 10:30] = True
    loaded = load_reference(Reference(photograph(), mask=mask), name="man")
    assert loaded.image.mode == "RGB"
    assert loaded.name == "man"
    np.testing.assert_array_equal(loaded.mask_grid, mask_grid(mask))
    np.testing.assert_array_equal(loaded.pixels(16, 24), image_to_pixels(photograph(), 16, 24, "lanczos"))
    with pytest.raises(ValueError, match="read-only"):
        loaded.mask_grid[0, 0] = 1


def test_a_reference_is_resampled_as_it_says() -> None:
    loaded = load_reference(Reference(photograph(), mask=np.ones((40, 60), np.bool_), resample="nearest"), name="man")
    np.testing.assert_array_equal(loaded.pixels(16, 24), image_to_pixels(photograph(), 16, 24, "nearest"))


def test_alpha_stands_in_for_a_mask() -> None:
    image = photograph().convert("RGBA")
    alpha = Image.new("L", image.size)
    ImageDraw.Draw(alpha).rectangle((20, 10, 40, 30), fill=255)
    image.putalpha(alpha)
    loaded = load_reference(Reference(image), name="man")
    np.testing.assert_array_equal(loaded.mask_grid, mask_grid(np.asarray(alpha) >= 128))
    np.testing.assert_array_equal(np.asarray(loaded.image), np.asarray(photograph()))


@pytest.mark.parametrize("form", ["RGBA", "LA", "palette"])
def test_an_alpha_channel_that_is_opaque_everywhere_is_no_mask(form: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    if form == "palette":
        image = photograph().quantize(16)
        image.save(path, transparency=200)  # which no pixel has
    else:
        photograph().convert(form).save(path)
    for source in (path, Image.open(path)):
        with pytest.raises(MaskError, match=r"man: there is no mask.*opaque everywhere.*Give mask=.*white everywhere"):
            load_reference(Reference(source), name="man")


def test_a_mask_beside_an_alpha_channel_wins() -> None:
    mask = np.zeros((40, 60), np.bool_)
    mask[:20] = True
    loaded = load_reference(Reference(photograph().convert("RGBA"), mask=mask), name="man")
    np.testing.assert_array_equal(loaded.mask_grid, mask_grid(mask))


def test_without_mask_and_alpha_the_error_says_what_to_do() -> None:
    with pytest.raises(MaskError, match=r"man: there is no mask.*Give mask=.*transparent background"):
        load_reference(Reference(photograph()), name="man")


def test_a_mask_that_misses_the_grid_is_refused() -> None:
    mask = np.zeros((1000, 1000), np.bool_)
    mask[1, 1] = True
    with pytest.raises(MaskError, match=r"man: the mask has 1 of 1000000 pixels set.*128 x 128"):
        load_reference(Reference(Image.new("RGB", (1000, 1000)), mask=mask), name="man")


def test_warnings_are_told_to_whoever_collects_them_in_that_thread_alone() -> None:
    def other() -> None:
        with pytest.warns(MagicFaceWarning, match="elsewhere"):
            warn("kind", "elsewhere")

    with warnings.catch_warnings(), collect_warnings() as found:
        warnings.simplefilter("error")
        warn("one", "said twice")
        with attributed_to("mask"), attributed_to(""):
            warn("one", "said twice")
            warn("two", "of a part")
    with collect_warnings() as none, ThreadPoolExecutor(1) as pool:
        pool.submit(other).result(30)
    assert [(one.kind, str(one), one.field) for one in found] == [
        ("one", "said twice", None),
        ("two", "of a part", "mask"),
    ]
    assert none == []


def test_every_warning_of_this_package_can_be_collected() -> None:
    package = Path(images.__file__).parent
    others = [path for path in package.rglob("*.py") if "warnings.warn(" in path.read_text(encoding="utf-8")]
    assert [path.name for path in others] == ["soft_warnings.py"]


def test_the_warning_points_at_the_callers_line() -> None:
    with pytest.warns(MagicFaceWarning) as caught:
        load_reference(Reference(photograph(), mask=np.ones((20, 30), np.bool_)), name="man")
    assert caught[0].filename == __file__


# --- overlays


def test_an_overlay_shows_regions_and_leaves_room_for_the_legend() -> None:
    regions = np.zeros((8, 8), np.int64)
    regions[2:6, 2:6] = 1
    overlay = np.asarray(region_overlay(Image.new("RGB", (512, 512), (100, 100, 100)), regions, ["man"]))
    assert overlay.shape[1] == 512
    assert overlay.shape[0] > 512
    assert overlay[10, 10].tolist() == [75, 75, 75]
    red, green, blue = overlay[256, 256].tolist()
    assert red > green > blue  # the first colour is orange
    assert overlay[256, 128].tolist() == [255, 255, 255]  # the border


def test_overlays_of_small_pictures_are_enlarged_and_many_names_fit() -> None:
    names = [f"concept {k} with a name that is rather long" for k in range(12)] + ["日本\ud800"]
    overlay = region_overlay(Image.new("RGB", (64, 32)), np.zeros((4, 8), np.int64), names)
    assert overlay.width == 384
    assert overlay.height > 192 + 12 * 28


def test_an_overlay_without_concepts_has_no_legend() -> None:
    assert region_overlay(Image.new("RGB", (512, 256)), np.zeros((4, 8), np.int64), []).size == (512, 256)


def test_colours_of_many_concepts_differ() -> None:
    assert len({images._colour(k) for k in range(20)}) == 20
