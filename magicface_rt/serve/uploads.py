"""Decodes uploaded images on the server; their size is checked before anything is decoded, and nothing is written."""

from __future__ import annotations

import base64
import binascii

from PIL import Image

from ..encoded_images import ExcessError, open_bytes, reduce_exif
from ..errors import ImageError, MaskError
from ..process.interrupts import reraise_if_interrupt

__all__ = ["FORMATS", "from_base64", "open_image"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""The formats that are decoded. They are few, since each decoder that strangers can reach is a risk."""


def open_image(data: bytes, *, pixels: int, name: str, error: type[ImageError] | type[MaskError]) -> Image.Image:
    """Decode an image of at most so many pixels, unchanged from its file; `Reference` processes it further.

    Raises `error` for another format, a damaged or cut short file, and, before decoding, too many pixels or what would
    take far more memory or time than they do.
    """
    if not data:
        raise error(f"{name} is empty, expected the bytes of a {' or '.join(FORMATS)} file.")
    try:
        image = open_bytes(data, FORMATS, pixels=pixels)
        width, height = image.size
        if width * height > pixels:
            raise error(
                f"{name} is {width} x {height}, {width * height:,} pixels; at most {pixels:,} are taken. Scale it down."
            )
        return _without_file(image)
    except (ImageError, MaskError):
        raise
    except ExcessError as cause:
        raise error(f"{name} {cause}") from cause
    except Image.DecompressionBombError as cause:
        raise error(f"{name} has more than the {pixels:,} pixels that are taken. Scale it down.") from cause
    except Exception as cause:  # decoders raise anything on damaged files
        reraise_if_interrupt(cause)
        raise error(
            f"{name} cannot be read: it is damaged, cut short, or no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file "
            f"({type(cause).__name__})."
        ) from cause


def _without_file(image: Image.Image) -> Image.Image:
    """Copy an image with its pixels and what determines how they are shown. Pillow's images go on holding their file,
    which may be much larger.
    """
    bare = image.copy()
    reduce_exif(bare)
    bare.info = {name: value for name, value in bare.info.items() if name in ("transparency", "exif")}
    return bare


def from_base64(text: str, *, name: str, error: type[ImageError] | type[MaskError]) -> bytes:
    """Decode base64 text, or a data URL of it.

    Raises `error` for what is not base64.
    """
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise error(f"{name} is a data URL, but not of base64; expected data:image/png;base64,....")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise error(f"{name} is not base64 ({cause}); expected the file's bytes in standard base64.") from cause
