"""Decode images from untrusted files, PIL images and arrays, within limits of size, memory and time."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps

from .encoded_images import ExcessError, check_exif, open_stream, reduce_exif
from .errors import ImageError, MaskError
from .process.interrupts import reraise_if_interrupt
from .soft_warnings import MagicFaceWarning, warn

__all__ = ["MAX_FILE_BYTES", "MAX_PIXELS", "MAX_SIDE", "Decoded", "ImageSource", "as_seen", "decode"]

ImageSource = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | npt.NDArray[np.bool_]
_Error = type[ImageError] | type[MaskError]

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # resampling takes memory for each pixel of a side; no camera makes longer ones, and JPEG holds none
MAX_FILE_BYTES = 1 << 30  # four times what MAX_PIXELS take at four bytes each; some decoders read whole files

# Formats that Pillow decodes in its own process; EPS, for one, would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")

_DIM = 1 << 14
"""A 16-bit grey image whose values all stay below this most likely holds only 12 or 14 bits."""

_loading = threading.Lock()
"""Held while a PIL image loads its pixels: it does so on first use, and two threads doing so would share one file."""


def _renew_lock() -> None:
    """Replace the lock in a forked process: a thread that held it does not exist there and would never release it."""
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True, eq=False)
class Decoded:
    """A decoded image, turned upright.

    image        PIL image of mode 1, L, LA, P, PA, RGB, RGBA, CMYK, ...; 16-bit greys are reduced to 8 bits
    orientation  the EXIF orientation by which it was turned upright; 1 if it was not turned
    name         what messages call it
    error        the error that is raised if it cannot be used
    """

    image: Image.Image
    orientation: int
    name: str
    error: _Error

    @property
    def has_alpha(self) -> bool:
        return self.image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in self.image.info

    def convert(self, mode: str) -> Image.Image:
        """Return the image in another mode. Raises `error` if Pillow cannot convert it, as from La and LAB."""
        try:
            return self.image.convert(mode)
        except Exception as cause:
            reraise_if_interrupt(cause)
            raise self.error(
                f"{self.name} is of mode {self.image.mode}, which cannot be converted ({type(cause).__name__}: "
                f"{cause}). Save it as RGB or RGBA."
            ) from cause


def decode(source: ImageSource, name: str, error: _Error) -> Decoded:
    """Read an image from a path, a PIL image, or a uint8 or bool array [h,w], uint8 [h,w,1], [h,w,3] or [h,w,4].

    Raises `error` for what cannot be read, is damaged or cut short, is empty, or has more than `MAX_PIXELS` pixels or a
    side of more than `MAX_SIDE`. Warns `MagicFaceWarning` if 16-bit greys are nearly black, and if Pillow was told to
    accept truncated images.
    """
    if isinstance(source, np.ndarray):
        return Decoded(_from_array(source, name, error), 1, name, error)
    if isinstance(source, Image.Image):
        name = f"{name} ({type(source).__name__})"
        _check_pixels(source.size, name, error)
        with _loading:
            return _settled(source, name, error)
    if not isinstance(source, (str, os.PathLike)):
        raise error(f"{name}: found {type(source).__name__}, expected a path, a PIL image, or a uint8 array.")
    if not isinstance(found := os.fspath(source), str):
        raise error(f"{name}: the path is {found!r}, expected text. Decode it, by os.fsdecode.")
    return _from_file(Path(found), f"{name} {found!r}", error)


def as_seen(image: Image.Image) -> Image.Image:
    """Return the image itself if its values alone determine how it looks. Otherwise return it turned upright by its
    EXIF orientation, and as RGBA if its values stand for a palette's colours or its metadata define transparency.

    Raises ImageError for EXIF that would take far more memory than the image has.
    """
    try:
        check_exif(image)
    except ValueError as cause:
        raise ImageError(f"the image {cause}") from cause
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    named = image.mode in ("P", "PA") or (image.mode in ("1", "L", "RGB") and "transparency" in image.info)
    return image.convert("RGBA") if named else image


def _from_file(path: Path, name: str, error: _Error) -> Decoded:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist or is not a file"
            raise error(f"{name} {what}; expected an image file. A relative path counts from {os.getcwd()!r}.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise error(f"{name} is larger than {MAX_FILE_BYTES:,} bytes, which no image is that is read.")
        with path.open("rb") as stream, open_stream(stream, _known_formats(), pixels=MAX_PIXELS) as image:
            _check_pixels(image.size, name, error)
            image.load()
            reduce_exif(image)
            return _settled(image, name, error)
    except (ImageError, MaskError):
        raise
    except ExcessError as cause:
        raise error(f"{name} {cause}") from cause
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as cause:
        raise error(f"{name} has more than the {MAX_PIXELS:,} pixels that are read. Scale it down.") from cause
    except MagicFaceWarning:  # where warnings are errors
        raise
    except Exception as cause:
        reraise_if_interrupt(cause)
        raise _unreadable(name, cause, error) from cause


def _settled(image: Image.Image, name: str, error: _Error) -> Decoded:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        warn(
            "images-cut-short",
            f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, by which an image that is cut short is taken for "
            "whole, grey where it ends. Set it to False.",
        )
    try:
        image.load()
        check_exif(image)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        upright = ImageOps.exif_transpose(image)
    except ExcessError as cause:
        raise error(f"{name} {cause}") from cause
    except Exception as cause:  # decoders raise anything on damaged files
        reraise_if_interrupt(cause)
        raise _unreadable(name, cause, error) from cause
    if upright.mode == "F":
        raise error(f"{name} holds floating-point values; expected 8 bits a channel. Convert it first.")
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        # In the file's own width: eight bytes a pixel would be half a gigabyte for the largest images that are read.
        values = np.asarray(upright)
        _check_greys(int(values.min()), int(values.max()), f"{name} holds whole numbers (mode {upright.mode})", error)
        upright = Image.fromarray((values >> 8).astype(np.uint8))
    return Decoded(upright, orientation if orientation in range(2, 9) else 1, name, error)


def _check_greys(lowest: int, highest: int, found: str, error: _Error) -> None:
    """Check the values of an image that is read as 16-bit greys: an 8-bit range (0..255) would come out all black, and
    values beyond 16 bits would be cut.
    """
    if lowest < 0 or highest > 65535 or 0 < highest <= 255:
        raise error(
            f"{found} from {lowest} to {highest}, expected values up to 65535, as greys of 16 bits have them. Save it "
            "with 8 bits a channel, or scale it to 0..65535."
        )
    if 0 < highest < _DIM:
        warn(
            "nearly-black",
            f"{found} from {lowest} to {highest} of 65535, and is nearly black. If it holds fewer than 16 bits, scale "
            "it to 0..65535.",
        )


def _from_array(array: npt.NDArray[np.generic], name: str, error: _Error) -> Image.Image:
    found = f"{name}: found an array of {array.dtype} {list(array.shape)}"
    if isinstance(array, np.ma.MaskedArray):
        raise error(f"{found} with masked values, expected an array without. Fill it, by array.filled(0).")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.bool_:
        if array.ndim != 2:
            raise error(f"{found}, expected bool [h,w]. Say which pixels are meant, as by array.any(axis=2).")
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype != np.uint8:
        raise error(f"{found}, expected uint8 with values 0..255. Scale and convert it.")
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise error(f"{found}, expected [h,w], [h,w,3] or [h,w,4].")
    _check_pixels((array.shape[1], array.shape[0]), name, error)
    return Image.fromarray(np.ascontiguousarray(array))


def _check_pixels(size: tuple[int, int], name: str, error: _Error) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise error(f"{name} is {width} x {height}; expected at least one pixel.")
    if width * height > MAX_PIXELS:
        raise error(f"{name} is {width} x {height}, more than the {MAX_PIXELS:,} pixels that are read. Scale it down.")
    if max(size) > MAX_SIDE:
        raise error(f"{name} is {width} x {height}; expected sides of at most {MAX_SIDE:,} pixels. Scale it down.")


def _unreadable(name: str, cause: Exception, error: _Error) -> ImageError | MaskError:
    reason = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    return error(f"{name} cannot be read: it is damaged, cut short, or not a supported image ({reason}).")


def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
