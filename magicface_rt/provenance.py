"""How a picture records its own making: PNG text, and an XMP packet that marks it as made by a trained algorithm.

Two things are written into every picture unless that is switched off:

- XMP with `Iptc4xmpExt:DigitalSourceType` = trainedAlgorithmicMedia (IPTC's vocabulary for pictures from generative
  models), into PNG, JPEG, WebP and AVIF;
- PNG text chunks `Software` and `magicface_rt`, the latter a JSON object of the settings. No file paths are in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any
from xml.sax.saxutils import quoteattr

from PIL import Image, PngImagePlugin

from .errors import ImageError
from .images import MAX_PIXELS
from .process.interrupts import reraise_if_interrupt

__all__ = ["DIGITAL_SOURCE_TYPE", "ProvenancePicture", "png_info", "read_provenance", "software", "xmp_packet"]

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SOFTWARE = "magicface_rt"
TEXT_KEY = "magicface_rt"
_XMP_KEY = "XML:com.adobe.xmp"


class ProvenancePicture(Image.Image):
    """A PIL image whose `save` writes its provenance, even after it was pickled. Its `copy` and other methods return a
    plain image without provenance.
    """

    provenance: dict[str, Any]

    @classmethod
    def of(cls, image: Image.Image, provenance: Mapping[str, Any]) -> ProvenancePicture:
        """Return a copy of `image` that carries `provenance`, a mapping that JSON can hold."""
        picture = cls()
        picture.__setstate__([*Image.Image.__getstate__(image), dict(provenance)])
        return picture

    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), self.provenance]

    def __setstate__(self, state: list[Any]) -> None:
        *image, self.provenance = state
        super().__setstate__(image)

    def save(
        self,
        fp: str | bytes | os.PathLike[str] | os.PathLike[bytes] | IO[bytes],
        format: str | None = None,
        **params: Any,
    ) -> None:
        """Save as PIL does, with the provenance. A caller's `xmp` replaces ours; a caller's `pnginfo` is extended."""
        kind = (format or _format_of(fp)).upper()
        if kind == "PNG":
            params["pnginfo"] = png_info(self.provenance, base=params.get("pnginfo"))
        elif kind in ("JPEG", "WEBP", "AVIF"):
            params.setdefault("xmp", xmp_packet())
        super().save(fp, format, **params)


def png_info(provenance: Mapping[str, Any], *, base: PngImagePlugin.PngInfo | None = None) -> PngImagePlugin.PngInfo:
    """Return the provenance chunks of a PNG file, after those of `base`."""
    info = PngImagePlugin.PngInfo()
    if base is not None:
        info.chunks.extend(base.chunks)
    info.add_text("Software", software())
    info.add_text(TEXT_KEY, json.dumps(provenance, ensure_ascii=True, allow_nan=False))
    info.add_itxt(_XMP_KEY, xmp_packet().decode("utf-8"))
    return info


def xmp_packet() -> bytes:
    """Return an XMP packet that declares: made by a trained algorithm, with this software."""
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"
    xmp:CreatorTool={quoteattr(software())}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>""".encode()


def read_provenance(file: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any] | None:
    """Read the settings written into a PNG, given by its path or as an open file; None if it has none.

    Raises `ImageError` for a file that is not a PNG, that has more than `MAX_PIXELS` pixels, or whose settings are not
    the JSON object they should be.
    """
    name = repr(os.fspath(file)) if isinstance(file, (str, os.PathLike)) else "the open file"
    try:
        if isinstance(file, (str, os.PathLike)) and not Path(file).is_file():  # opening a pipe would wait for ever
            raise ValueError("it does not exist or is not a file")
        with Image.open(file, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"it is {image.width} x {image.height}, more than the {MAX_PIXELS:,} pixels that are read"
                )
            image.load()  # text may stand after the pixels
            text = getattr(image, "text", {}).get(TEXT_KEY)
            found = None if text is None else json.loads(text)
    except Exception as error:  # decoders raise anything on damaged files
        reraise_if_interrupt(error)
        raise ImageError(f"{name}: no provenance can be read from it ({error}); expected a PNG.") from error
    if found is not None and not isinstance(found, dict):
        raise ImageError(f"{name}: its {TEXT_KEY} text is {type(found).__name__}, expected an object.")
    return found


@cache
def software() -> str:
    """Name and version of this package, such as `magicface_rt 0.1.0`."""
    try:
        return f"{SOFTWARE} {metadata.version('magicface_rt')}"
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return f"{SOFTWARE} (not installed)"


def _format_of(fp: object) -> str:
    """Return the format that Pillow will choose for a file name; an empty text for an open file without a name."""
    name = fp if isinstance(fp, (str, bytes, os.PathLike)) else getattr(fp, "name", "")
    if not isinstance(name, (str, bytes, os.PathLike)):
        return ""
    Image.init()
    return Image.EXTENSION.get(os.path.splitext(os.fsdecode(name))[1].lower(), "")
