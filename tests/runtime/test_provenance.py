from __future__ import annotations

import copy
import io
import pickle
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from magicface_rt.errors import ImageError
from magicface_rt.provenance import (
    DIGITAL_SOURCE_TYPE,
    ProvenancePicture,
    png_info,
    read_provenance,
    software,
    xmp_packet,
)

SETTINGS = {"prompt": 'ein Mann, "日本" \0 \U0001f3a9', "options": {"seed": 2**64 - 1}}


def picture() -> ProvenancePicture:
    return ProvenancePicture.of(Image.new("RGB", (8, 6), (10, 20, 30)), SETTINGS)


def source_type(packet: bytes | str) -> str | None:
    text = packet.decode("utf-8") if isinstance(packet, bytes) else packet
    root = ElementTree.fromstring(text[text.index("<x:xmpmeta") : text.index("<?xpacket end")])
    (description,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")


def test_the_packet_names_the_source_type() -> None:
    assert DIGITAL_SOURCE_TYPE.endswith("/trainedAlgorithmicMedia")
    assert source_type(xmp_packet()) == DIGITAL_SOURCE_TYPE
    assert xmp_packet().startswith(b"<?xpacket begin=")


def test_a_saved_png_says_how_it_was_made(tmp_path: Path) -> None:
    picture().save(tmp_path / "out.png")
    assert read_provenance(tmp_path / "out.png") == SETTINGS
    with Image.open(tmp_path / "out.png") as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.text["Software"] == software()
        assert source_type(image.text["XML:com.adobe.xmp"]) == DIGITAL_SOURCE_TYPE
        assert image.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_carry_the_packet(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out.{suffix}"
    picture().save(path)
    assert xmp_packet() in path.read_bytes()


def test_formats_without_a_place_for_it_are_saved_all_the_same(tmp_path: Path) -> None:
    picture().save(tmp_path / "out.bmp")
    assert Image.open(tmp_path / "out.bmp").size == (8, 6)


def test_open_files_and_formats_by_name_work(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture().save(stream, format="png")
    stream.seek(0)
    assert read_provenance(stream) == SETTINGS
    with (tmp_path / "out.png").open("wb") as file:
        picture().save(file)
    assert read_provenance(tmp_path / "out.png") == SETTINGS


def test_text_of_the_caller_stays(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "someone")
    picture().save(tmp_path / "out.png", pnginfo=info)
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["Author"] == "someone"
    assert read_provenance(tmp_path / "out.png") == SETTINGS
    assert len(info.chunks) == 1


def test_an_edited_picture_is_a_plain_image(tmp_path: Path) -> None:
    edited = picture().resize((4, 4))
    assert not isinstance(edited, ProvenancePicture)
    edited.save(tmp_path / "out.png")
    assert read_provenance(tmp_path / "out.png") is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_picture_from_another_process_says_how_it_was_made(
    tmp_path: Path, copied: Callable[[ProvenancePicture], ProvenancePicture]
) -> None:
    copied(picture()).save(tmp_path / "out.png")
    assert read_provenance(tmp_path / "out.png") == SETTINGS
    again = ProvenancePicture.of(copied(picture()), {"options": {}})
    again.save(tmp_path / "again.png")
    assert read_provenance(tmp_path / "again.png") == {"options": {}}
    with Image.open(tmp_path / "again.png") as image:
        assert image.getpixel((0, 0)) == (10, 20, 30)


def test_settings_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        png_info({"weight": float("nan")})


def test_what_is_no_png_or_has_other_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="expected a PNG"):
        read_provenance(tmp_path / "out.png")
    with pytest.raises(ImageError):
        read_provenance(tmp_path / "none.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("magicface_rt", "[1]")
    Image.new("RGB", (2, 2)).save(tmp_path / "list.png", pnginfo=info)
    with pytest.raises(ImageError, match="is list, expected an object"):
        read_provenance(tmp_path / "list.png")
