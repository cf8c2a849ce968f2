"""The formats that are one file: a small sample of each, and who reads it."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from corruptions import packed, unpacked
from PIL import Image
from target_files import OWN

from magicface_rt import KeptConcept
from magicface_rt.export.tokenizer import END, START, build_tokenizer_json
from magicface_rt.images import MAX_PIXELS, load_image, load_mask
from magicface_rt.jobs import load_job
from magicface_rt.kept import KeptReference, Origin
from magicface_rt.kept.reference import empty_tensors
from magicface_rt.provenance import png_info, read_provenance
from magicface_rt.schedule import Schedule
from magicface_rt.tokenizer import Tokenizer

STEPS = 3
LAYERS = ((10, 2, 12), (13, 1, 8))
JOB: dict[str, Any] = {
    "prompt": "a man with a hat",
    "seed": 3,
    "steps": 20,
    "alpha": 0.25,
    "concepts": [
        {"word": "man", "image": "man.jpg", "mask": "mask.png", "weight": 2.5, "token_index": 2},
        {"word": "hat", "references": [{"image": "front.png"}, {"image": "side.png", "mask": None, "prompt": "a"}]},
    ],
}


@dataclass(frozen=True)
class Format:
    """A format that is one file. `read` gives what it accepts to a first use of it, so that damage shows."""

    name: str
    suffix: str
    sample: Callable[[], bytes]
    read: Callable[[Path], object]
    memory: int = 256 << 20
    content: Callable[[Any], object] | None = None
    """Of a format with hashes: what an edit that is accepted has left as it was."""
    whole: Callable[[bytes], bool] = lambda content: True
    """Of a format with lengths: whether there are as many bytes as they say. An edit that is accepted is whole."""
    spare: int | None = 0
    """Bytes at the end without which the file is read as well; None for a text, of which a part may be sound too."""
    harmless: frozenset[str] = frozenset()
    """Of the DAMAGES those that are accepted. Every other one is refused."""

    def __str__(self) -> str:
        return self.name


def origin(dtype: str = "float32") -> Origin:
    schedule = Schedule()
    timesteps = tuple(int(t) for t in schedule.timesteps(STEPS))
    return Origin("b" * 64, "sd15", dtype, 64, 64, LAYERS, schedule.to_config(), timesteps, 5)


def kept_concept(storage: Any = "exact", dtype: str = "float32", references: int = 2) -> KeptConcept:
    rng, of = np.random.default_rng(1), origin(dtype)
    made = []
    for number in range(references):
        tensors = empty_tensors(of, {1: 5, 2: 3}, storage)
        for name, (factor, width) in of.widths.items():
            for step in range(STEPS):
                tensors[name].put(step, rng.standard_normal((5 if factor == 1 else 3, width)).astype(dtype))
        made.append(KeptReference(f"key {number}", f"view {number}", storage, {1: 5, 2: 3}, tensors))
    return KeptConcept("red hat", made, of, weight=2.5, token_index=[3, 4], name="cap")


def _kept_sample(storage: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return kept_concept(storage).save(Path(folder) / "cap.concept").read_bytes()


def numbers_of(kept: KeptConcept) -> dict[str, bytes]:
    """All keys and values of a concept, as they are computed with."""
    return {
        f"{number}.{name}": b"".join(stored.step(step).tobytes() for step in range(kept.steps))
        for number, reference in enumerate(kept.references)
        for name, stored in reference.tensors.items()
    }


def _read_kept(path: Path) -> KeptConcept:
    kept = KeptConcept.load(path)
    for reference in kept.references:
        for stored in reference.tensors.values():
            assert np.isfinite(stored.step(kept.steps - 1)).all()
    assert kept.renamed(weight=1.0).to_dict()["origin"] == kept.origin.to_dict()
    return kept


def picture() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def read_picture(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = load_image(path, name="man: image")
    assert image.mode in ("RGB", "RGBA")
    assert 0 < image.width * image.height <= MAX_PIXELS
    return image


def read_mask(path: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = load_mask(path, image_size=(48, 40), name="man: mask")
    assert mask.dtype == np.bool_
    assert mask.any()
    return mask


@cache
def small_tokenizer() -> str:
    """A tokenizer.json of few words, which is read in no time."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ha", "hat</w>", START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return build_tokenizer_json(vocabulary, [("h", "a"), ("ha", "t</w>")])


def _read_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path, pad_token_id=3)
    try:
        assert tokenizer.encode("a man with a hat").shape == (77,)
        tokenizer.find_word("a man with a hat", "hat")
    except Exception as error:
        # The tokenizer's own errors are about a prompt; here they have to name what is at fault.
        raise type(error)(f"{path}: {error}") from error
    return tokenizer


@cache
def tiny_layout() -> bytes:
    """A single-file checkpoint as far as its header goes: the names that are looked at, and tensors of one number."""
    names = [
        *(f"model.diffusion_model.{place}.transformer_blocks.0.attn1.to_q.weight" for place in _attentions()),
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "model.diffusion_model.time_embed.0.weight",
    ]
    shapes = {name: [1] for name in names}
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = [16, 4, 3, 3]
    shapes["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = [1, 32]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return packed(header, bytes(end))


def _attentions() -> set[str]:
    from magicface_rt.export.single_file import ATTENTION_BLOCKS

    return ATTENTION_BLOCKS


def _read_checkpoint(path: Path) -> object:
    from magicface_rt.export.architectures import ARCHITECTURES
    from magicface_rt.export.single_file import SingleFileCheckpoint

    checkpoint = SingleFileCheckpoint(path, expected=ARCHITECTURES["tiny"])
    assert len(checkpoint.content_hash()) == 64
    return checkpoint


def as_long_as_it_says(content: bytes) -> bool:
    """Whether the tensors of a safetensors file end where the file does."""
    header, body = unpacked(content)
    return len(body) == max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")


def _read_weights(path: Path) -> object:
    from magicface_rt.export.checkpoint import read_safetensors

    return read_safetensors(path)


_BYTES_AFTER = frozenset({"one byte more", "a megabyte more"})
"""A picture ends where its format says so, and nobody reads on."""
_MORE = _BYTES_AFTER | {"twice"}
_END_OF = {"png": 20, "gif": 2, "tga": 20}
"""What comes after the pixels: of a PNG checksums and the mark of its end, of a GIF the mark, of a TGA a note."""


def _picture(name: str, suffix: str, sample: Callable[[], bytes], read: Callable[[Path], object]) -> Format:
    """Changed bytes of a picture are other pixels, except in a PNG, whose checksums cover them."""
    spare = _END_OF.get(suffix, 0)
    harmless = (_BYTES_AFTER if suffix == "jp2" else _MORE) | ({"all but one byte"} if spare else set())
    return Format(name, suffix, sample, read, PICTURE_MEMORY, spare=spare, harmless=harmless)


_PICTURES = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", {}),
    "jp2": ("JPEG2000", {}),
    "avif": ("AVIF", {}),
    "tga": ("TGA", {"compression": "tga_rle"}),
}
PICTURE_MEMORY = 2 << 30
"""A header of a few bytes may ask for 64 million pixels, which is allowed: 256 MB, and copies of that."""


def _picture_formats() -> list[Format]:
    Image.init()
    return [
        _picture(f"picture {suffix}", suffix, partial(encoded, kind, **options), read_picture)
        for suffix, (kind, options) in _PICTURES.items()
        if kind in Image.SAVE
    ]


BYTE_ORDER_MARK = "a byte order mark in front"
TOKENS = f"# who may\n{'a1' * 16}\n\n{'b2' * 16}\n"


def _read_target(path: Path) -> object:
    from magicface_rt.engines.targets import load_target

    target = load_target(path)
    assert target.with_parity_outputs().scratch_limit("text_encoder") > 0
    assert 1 <= target.images.optimum <= target.images.maximum <= 1 << 20
    return target


def _read_tokens(path: Path) -> object:
    from magicface_rt.serve.auth import Tokens

    tokens = Tokens.read(path)
    assert tokens
    return tokens


FORMATS = [
    Format(
        "kept concept",
        "concept",
        cache(lambda: _kept_sample("exact")),
        _read_kept,
        content=numbers_of,
        whole=as_long_as_it_says,
    ),
    Format(
        "kept concept 8-bit",
        "concept",
        cache(lambda: _kept_sample("8-bit")),
        _read_kept,
        content=numbers_of,
        whole=as_long_as_it_says,
    ),
    # Text that somebody wrote has no checksum: another number or letter in it is what they meant.
    Format("job json", "json", lambda: json.dumps(JOB).encode(), load_job, harmless=frozenset({BYTE_ORDER_MARK})),
    Format(
        "job yaml",
        "yaml",
        cache(lambda: yaml.safe_dump(JOB).encode()),
        load_job,
        spare=None,
        harmless=frozenset({BYTE_ORDER_MARK, "all but one byte"}),
    ),
    *_picture_formats(),
    _picture("mask", "png", cache(lambda: encoded("PNG", Image.new("LA", (48, 40), (255, 255)))), read_mask),
    _picture(
        "provenance",
        "png",
        cache(lambda: encoded("PNG", pnginfo=png_info({"prompt": "a man", "seed": 3}))),
        read_provenance,
    ),
    # It begins and ends with an empty line.
    Format(
        "target",
        "toml",
        lambda: OWN.encode(),
        _read_target,
        spare=None,
        harmless=frozenset({"all but one byte", "without its first byte"}),
    ),
    # A token that was cut is another one, as long as it has 16 characters, and one that stands twice is one.
    Format(
        "tokens",
        "txt",
        lambda: TOKENS.encode(),
        _read_tokens,
        spare=None,
        harmless=frozenset({"half", "all but one byte", "twice"}),
    ),
    Format("tokenizer", "json", lambda: small_tokenizer().encode(), _read_tokenizer),
    # Checkpoints have no checksums: a weight with a changed byte is another weight.
    Format("single-file checkpoint", "safetensors", tiny_layout, _read_checkpoint, whole=as_long_as_it_says),
    Format("weights", "safetensors", tiny_layout, _read_weights, whole=as_long_as_it_says),
]
BY_NAME = {one.name: one for one in FORMATS}
