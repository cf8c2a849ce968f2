"""Images and masks in, pictures and overlays out.

The path of a reference: file, PIL image or array -> `load_image` -> `image_to_pixels` (the VAE encoder's input);
its mask -> `load_mask` -> `mask_grid` (128 x 128) -> `layer_mask` (the grid of one layer).
`load_reference` does every part of it that does not depend on a bundle, once.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .decoding import MAX_PIXELS, MAX_SIDE, Decoded, ImageSource, decode
from .errors import ImageError, MaskError, NonFiniteError, OptionError
from .soft_warnings import warn
from .values.plain_words import one_of
from .values.shown import shown

if TYPE_CHECKING:
    from .concept import Reference

__all__ = [
    "MASK_GRID",
    "MAX_PIXELS",
    "MAX_SIDE",
    "ImageSource",
    "LoadedReference",
    "Resample",
    "check_mask_threshold",
    "check_resample",
    "image_to_pixels",
    "layer_mask",
    "load_alpha_mask",
    "load_image",
    "load_mask",
    "load_reference",
    "mask_grid",
    "pixels_to_images",
    "region_overlay",
]

_Scalar = TypeVar("_Scalar", bound=np.generic)

Resample = Literal["lanczos", "nearest"]
RESAMPLE = ("lanczos", "nearest")

MASK_GRID = 128  # every mask goes through this grid, whatever the bundle's size

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


@dataclass(frozen=True, eq=False)
class LoadedReference:
    """A reference read once: its picture and its mask.

    image      PIL image, RGB, of the size it came in
    mask_grid  uint8 [128,128], 0 or 1, read-only, at least one 1
    name       what messages call it, such as `man, reference 1`
    resample   how `pixels` resizes it
    """

    image: Image.Image
    mask_grid: npt.NDArray[np.uint8]
    name: str
    resample: Resample = "lanczos"

    def pixels(self, height: int, width: int) -> npt.NDArray[np.float32]:
        """The VAE encoder's input, float32 [1,3,height,width] in -1..1."""
        return image_to_pixels(self.image, height, width, self.resample)


def load_reference(reference: Reference, *, name: str) -> LoadedReference:
    """Read the image and the mask of a reference. Without a mask of its own, the image's alpha channel is the mask.

    Raises `ImageError` for an image that cannot be used; `MaskError` for a mask that cannot be used, is empty, has no
    point on the 128 x 128 grid, or is missing. Warns `MagicFaceWarning` where the mask is stretched over the image,
    where its alpha was taken while it is black and white as well, and where one of them was turned upright by its EXIF
    orientation and their sizes do not tell whether the other fits.
    """
    image = decode(reference.image, f"{name}: image", ImageError)
    mask = _own_mask(reference, image, name)
    grid = mask_grid(mask)
    if not grid.any():
        raise MaskError(
            f"{name}: the mask has {int(mask.sum())} of {mask.size} pixels set, none of which meets a point of the "
            f"{MASK_GRID} x {MASK_GRID} grid. Use a larger mask, or crop the image closer to the concept."
        )
    grid.setflags(write=False)
    return LoadedReference(image.convert("RGB"), grid, name, reference.resample)


def load_image(source: ImageSource, *, name: str) -> Image.Image:
    """Load an image from a path, a PIL image, or a uint8 array [h,w], [h,w,1], [h,w,3] or [h,w,4].

    Returns a PIL image of mode RGBA if the source has transparency, else RGB, turned upright by its EXIF orientation;
    colour profiles are not applied. Raises `ImageError` for an image that cannot be read, is damaged or cut short, is
    empty, or has more than `MAX_PIXELS` pixels or a side of more than `MAX_SIDE`; the message starts with `name`.
    """
    image = decode(source, name, ImageError)
    return image.convert("RGBA" if image.has_alpha else "RGB")


def load_mask(
    source: ImageSource, *, image_size: tuple[int, int] | None, threshold: int = 128, name: str
) -> npt.NDArray[np.bool_]:
    """Load a mask, bool [h,w] at its own size: True where its value is at least `threshold`.

    A bool array [h,w] is taken as it is. The value of a colour mask is its luminance, which for equal channels is their
    value. A mask with an alpha channel is read by its alpha if that leaves anything out, that is, if it is below
    `threshold` somewhere; otherwise by its luminance. If what its alpha keeps is black in one place and white in
    another, a `MagicFaceWarning` says so. `threshold=255` keeps full white only.

    `image_size` is (width, height), as PIL has it. A mask of another size is stretched over the image when the aspect
    ratios agree within 1 %, with a `MagicFaceWarning`; it keeps its own size here, because the only resampling it
    undergoes is to the 128 x 128 grid. None skips the comparison.

    Raises `MaskError` for a mask that cannot be read, does not fit, or is empty.
    """
    mask = _thresholded(decode(source, name, MaskError), threshold)
    if image_size is not None:
        _check_aspect(mask.shape, image_size, name)
    return mask


def load_alpha_mask(source: ImageSource, *, threshold: int = 128, name: str) -> npt.NDArray[np.bool_]:
    """Load the mask that an image's alpha channel stands for, bool [h,w]: True where alpha is at least `threshold`.

    Raises `ImageError` for an image that cannot be read; `MaskError` if it has no alpha channel, or one that is opaque
    everywhere or leaves nothing.
    """
    return _alpha_mask(decode(source, f"{name}: image", ImageError), threshold, name)


def _own_mask(reference: Reference, image: Decoded, name: str) -> npt.NDArray[np.bool_]:
    """Load the mask of a reference, bool [h,w]."""
    if reference.mask is not None:
        mask = decode(reference.mask, f"{name}: mask", MaskError)
        values = _thresholded(mask, reference.mask_threshold)
        _check_aspect(values.shape, image.image.size, mask.name)
        _check_orientation(image, mask)
        return values
    return _alpha_mask(image, reference.mask_threshold, name)


def _alpha_mask(image: Decoded, threshold: int, name: str) -> npt.NDArray[np.bool_]:
    if not image.has_alpha:
        raise MaskError(
            f"{name}: there is no mask, and the image has no alpha channel to stand in for one. Give mask=..., an "
            "image of the same size that is white where the concept is, or an image with a transparent background."
        )
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        raise MaskError(
            f"{name}: there is no mask, and the image's alpha channel, which would stand in for one, is opaque "
            "everywhere. Give mask=..., an image of the same size that is white where the concept is; white everywhere "
            "if all of the image is meant."
        )
    return load_mask(np.asarray(alpha), image_size=None, threshold=threshold, name=f"{name}: alpha channel")


def check_mask_threshold(threshold: object, name: str = "mask_threshold") -> None:
    """Check the value from which a mask counts; `name` is what the message calls it.

    Raises:
        OptionError: it is not a whole number from 1 to 255.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, np.integer)) or not 1 <= threshold <= 255:
        raise OptionError(f"{name} is {shown(threshold)}, expected a whole number from 1 to 255.")


def check_resample(resample: object) -> None:
    """Check the way in which an image is brought to a bundle's size.

    Raises:
        OptionError: it is neither "lanczos" nor "nearest".
    """
    if not one_of(resample, RESAMPLE):
        raise OptionError(f"resample is {shown(resample)}, expected 'lanczos' or 'nearest'.")


def _thresholded(mask: Decoded, threshold: int) -> npt.NDArray[np.bool_]:
    check_mask_threshold(threshold, f"{mask.name}: mask_threshold")
    by_alpha = False
    if mask.has_alpha:
        rgba = mask.convert("RGBA")
        alpha, luminance = np.asarray(rgba.getchannel("A")), np.asarray(rgba.convert("L"))
        by_alpha = int(alpha.min()) < threshold
        values = alpha if by_alpha else luminance
    else:
        values = luminance = np.asarray(mask.convert("L"))
    found = values >= threshold
    if not found.any():
        highest = int(values.max())
        hint = "Give 0 and 255, or a bool array." if highest == 1 else "Paint it white, or lower mask_threshold."
        raise MaskError(
            f"{mask.name}: the mask is empty: its highest value is {highest}, and only values from {threshold} up "
            f"(mask_threshold) count. {hint}"
        )
    if by_alpha:
        _check_alpha_alone(found, luminance >= threshold, mask.name)
    return np.asarray(found, dtype=np.bool_)


def _check_alpha_alone(opaque: npt.NDArray[np.bool_], white: npt.NDArray[np.bool_], name: str) -> None:
    """Warn if a mask that is read by its alpha is black and white where it is opaque: one transparent pixel in a mask
    that was painted in black and white is enough to have nearly all of the image marked.
    """
    inside = white[opaque]
    if inside.all() or not inside.any():
        return
    warn(
        "mask-by-alpha",
        f"{name} has both an alpha channel that leaves something out and black and white: its alpha was taken, which "
        f"marks {opaque.mean():.2%} of the image, and its black and white, which would mark {white.mean():.2%}, were "
        "ignored. Remove the alpha channel, or make it opaque everywhere, if black and white are meant; paint all that "
        "is opaque white if the alpha is.",
    )


def image_to_pixels(
    image: Image.Image, height: int, width: int, resample: Resample = "lanczos"
) -> npt.NDArray[np.float32]:
    """Convert an image to the colours that the VAE encoder takes: float32 [1,3,height,width], value / 127.5 - 1.

    The image is stretched to the size whatever its aspect ratio, so that a mask stretched likewise still fits it.
    "nearest" samples as the loader of the method's authors does: pixel (i, j) is taken from (floor(i h / height),
    floor(j w / width)). An alpha channel is dropped, not blended.
    """
    check_resample(resample)
    rgb = image.convert("RGB")
    if resample == "nearest":
        values = _sample(np.asarray(rgb), height, width)
    else:
        values = np.asarray(rgb.resize((width, height), Image.Resampling.LANCZOS))
    pixels = values.astype(np.float32) / np.float32(127.5) - np.float32(1)  # (H, W, 3)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def mask_grid(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Sample a mask [h,w] at (floor(i h / 128), floor(j w / 128)): uint8 [128,128], 0 or 1."""
    return np.ascontiguousarray(_sample(np.asarray(mask) != 0, MASK_GRID, MASK_GRID), dtype=np.uint8)


def layer_mask(grid: npt.NDArray[np.uint8], rows: int, cols: int) -> npt.NDArray[np.bool_]:
    """Sample a grid [128,128] at (floor(128 i / rows), floor(128 j / cols)): bool [rows,cols]."""
    return np.ascontiguousarray(_sample(np.asarray(grid) != 0, rows, cols))


def pixels_to_images(pixels: npt.NDArray[np.float32]) -> list[Image.Image]:
    """Convert the VAE decoder's output, float32 [B,3,H,W] in -1..1, to pictures; values outside are clipped.

    Raises `NonFiniteError` if a value is NaN or infinite, `ImageError` for another shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ImageError(f"pixels have shape {list(pixels.shape)}, expected [B,3,H,W].")
    if not np.isfinite(pixels).all():
        bad = int(pixels.size - np.isfinite(pixels).sum())
        raise NonFiniteError(f"pixels: {bad} of {pixels.size} values are NaN or infinite; the picture would be black.")
    values = np.rint((pixels.astype(np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in values.transpose(0, 2, 3, 1)]


def region_overlay(image: Image.Image, regions: npt.NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """Return a picture with the regions drawn over it and a legend below.

    `regions` is int [rows,cols]: 0 for no concept, k for the concept `names[k - 1]`; it is enlarged by nearest
    neighbour. Small pictures are enlarged by a whole factor, so that the legend can be read.
    """
    scale = max(1, -(-384 // image.width))
    picture = np.asarray(
        image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    )
    height, width = picture.shape[:2]
    labels = _sample(np.asarray(regions), height, width)
    colours = np.array([(0, 0, 0), *(_colour(k) for k in range(len(names)))], dtype=np.float32)
    inside = (labels > 0)[..., None]
    drawn = np.where(inside, 0.55 * picture + 0.45 * colours[labels], 0.75 * picture)
    line = max(1, round(height / 256))
    drawn[_borders(labels, line)] = 255
    return _with_legend(Image.fromarray(np.rint(drawn).astype(np.uint8)), names)


def _check_aspect(mask_shape: tuple[int, ...], image_size: tuple[int, int], name: str) -> None:
    (mask_height, mask_width), (width, height) = mask_shape, image_size
    if (mask_width, mask_height) == (width, height):
        return
    found = f"{name} is {mask_width} x {mask_height}, its image {width} x {height}"
    if not _same_aspect((mask_width, mask_height), image_size):
        raise MaskError(f"{found}: the aspect ratios differ. Give a mask of the image's size.")
    warn("mask-stretched", f"{found}: the mask is stretched over the image.")


def _check_orientation(image: Decoded, mask: Decoded) -> None:
    """Warn if image and mask were turned differently: a mask made for the stored pixels does not fit them upright."""
    if image.orientation == mask.orientation:
        return
    width, height = image.image.size
    quarter = (image.orientation >= 5) != (mask.orientation >= 5)
    if quarter and not _same_aspect((width, height), (height, width)):
        return  # otherwise the aspect ratios would have differed
    turned, other = (image, mask) if mask.orientation == 1 else (mask, image)
    warn(
        "image-turned",
        f"{turned.name} was turned upright, as its EXIF orientation {turned.orientation} says, and {other.name} was "
        f"{'not' if other.orientation == 1 else 'turned otherwise'}. If they belong together as they are stored, the "
        "mask lies wrong: save both without an orientation (PIL.ImageOps.exif_transpose turns the pixels).",
    )


def _same_aspect(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same aspect ratio, within 1 %."""
    return 1 / 1.01 <= (one[0] * other[1]) / (one[1] * other[0]) <= 1.01


def _sample(array: npt.NDArray[_Scalar], rows: int, cols: int) -> npt.NDArray[_Scalar]:
    """Sample by nearest neighbour, rounding indices down: [h,w,...] -> [rows,cols,...]."""
    height, width = array.shape[:2]
    i = np.arange(rows, dtype=np.int64) * height // rows
    j = np.arange(cols, dtype=np.int64) * width // cols
    sampled: npt.NDArray[_Scalar] = array[i[:, None], j]
    return sampled


def _colour(index: int) -> tuple[int, int, int]:
    if index < len(_COLOURS):
        return _COLOURS[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def _borders(labels: npt.NDArray[np.generic], line: int) -> npt.NDArray[np.bool_]:
    """Where a region ends: True on `line` pixels beside every change of label."""
    border = np.zeros(labels.shape, dtype=np.bool_)
    for shift in range(1, line + 1):
        border[:, shift:] |= labels[:, shift:] != labels[:, :-shift]
        border[shift:] |= labels[shift:] != labels[:-shift]
    return border


def _with_legend(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    size = max(14, picture.width // 32)
    font = ImageFont.load_default(size)
    pad, swatch, row = size // 2, size, size * 2
    room = picture.width - 2 * pad
    entries: list[tuple[str, tuple[int, int, int], int, int]] = []
    x = y = 0
    for index, name in enumerate(names):
        text = _fitting(f"{index + 1} {name}", font, room - swatch - pad)
        width = swatch + pad + round(font.getlength(text)) + 2 * pad
        if x and x + width > room:
            x, y = 0, y + row
        entries.append((text, _colour(index), x, y))
        x += width
    if not entries:
        return picture
    sheet = Image.new("RGB", (picture.width, picture.height + y + row), (24, 24, 24))
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for text, colour, x, y in entries:
        left, middle = pad + x, picture.height + y + row // 2
        draw.rectangle((left, middle - swatch // 2, left + swatch, middle + swatch // 2), fill=colour)
        draw.text((left + swatch + pad, middle), text, fill=(240, 240, 240), font=font, anchor="lm")
    return sheet


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    text = " ".join(text.split())[:200]
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."
