"""The form that each entry of a bundle's manifest must have, as specified in docs/bundle-format.md.

The manifest is read before anything else of the bundle is used, and some of its numbers become sizes of arrays. So a
number that no exporter writes is refused here, where the message can name it, and not later, where memory is allocated
for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .values.shown import shown

__all__ = ["TOKENS", "check_form"]

DTYPES = ("float32", "float16", "bfloat16")
TENSOR_DTYPES = (*DTYPES, "int64", "int32", "bool")
TOKENS = 77
"""The number of tokens of an encoded prompt, CLIP's maximum, which every graph takes."""
MOST_PIXELS_A_SIDE = 4096
MOST_FILE_BYTES = 2**63 - 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_form(manifest: Mapping[str, Any]) -> None:
    """Check the type and range of every entry that a reader uses; unknown entries are ignored.

    Raises:
        ValueError: an entry is invalid; the message names it, what was found and what was expected.
        LookupError: an entry is missing.
    """
    for name in ("architecture", "checkpoint_hash"):
        _text(manifest[name], name)
    _one_of(manifest["dtype"], "dtype", DTYPES)
    factor = _whole(manifest["vae_factor"], "vae_factor", 1, 64)
    cells = [_side(manifest[name], name) // factor for name in ("height", "width")]
    if any(side % factor for side in (manifest["height"], manifest["width"])):
        raise ValueError(f"vae_factor is {factor}, expected one that divides height and width")
    _number(manifest["vae_scaling_factor"], "vae_scaling_factor", 1e6)
    _number(manifest["expected_mask_share"], "expected_mask_share", 1)
    _whole(manifest["latent_channels"], "latent_channels", 4, 4)
    _whole(manifest["text_width"], "text_width", 1, 2**16)
    factors = _check_layers(manifest["injection_layers"], cells)
    _check_limits(_object(manifest["limits"], "limits"), factors)
    _check_tokenizer(_object(manifest["tokenizer"], "tokenizer"))
    for name, graph in _object(manifest["graphs"], "graphs").items():
        _check_graph(name, graph)
    for name, entry in _object(manifest["files"], "files").items():
        place = f"files[{name[:100]!r}]"
        _whole(_object(entry, place)["bytes"], f"{place}.bytes", 0, MOST_FILE_BYTES)
        if not _SHA256.fullmatch(_text(entry["sha256"], f"{place}.sha256")):
            raise ValueError(f"{place}.sha256 is {shown(entry['sha256'])}, expected 64 hexadecimal digits")
    for name in ("scheduler", "exporter", "parity"):
        _object(manifest[name], name)


def _check_layers(layers: object, cells: list[int]) -> set[int]:
    """Check each injection layer, and return the set of their factors."""
    last, factors = -1, set()
    for position, layer in enumerate(_list(layers, "injection_layers")):
        place = f"injection_layers[{position}]"
        last = _whole(_object(layer, place)["index"], f"{place}.index", last + 1, 15)
        factor = _whole(layer["factor"], f"{place}.factor", 1, min(cells))
        if any(side % factor for side in cells):
            raise ValueError(f"{place}.factor is {factor}, expected one that divides the latents' {cells}")
        factors.add(factor)
        for name in ("num_heads", "width"):
            _whole(layer[name], f"{place}.{name}", 1, 2**16)
    return factors


def _check_limits(limits: Mapping[str, Any], factors: set[int]) -> None:
    for name, most in (("concepts", 6), ("references", 64), ("images", 64)):
        _whole(limits[name], f"limits.{name}", 1, most)
    kept = _object(limits["kept_tokens"], "limits.kept_tokens")
    if set(kept) != {str(factor) for factor in factors}:
        raise ValueError(f"limits.kept_tokens is for {sorted(kept)[:20]!s:.100}, expected one for each of {factors}")
    for name, tokens in kept.items():
        _whole(tokens, f"limits.kept_tokens[{name!r}]", 1, 64 * MOST_PIXELS_A_SIDE**2)


def _check_tokenizer(tokenizer: Mapping[str, Any]) -> None:
    if tokenizer:  # a bundle of a U-Net alone has none
        _text(tokenizer["file"], "tokenizer.file")
        _whole(tokenizer["pad_token_id"], "tokenizer.pad_token_id", 0, 2**31)
        _whole(tokenizer["max_length"], "tokenizer.max_length", TOKENS, TOKENS)


def _check_graph(name: str, graph: Any) -> None:
    place = f"graphs[{name[:100]!r}]"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{place} has a name that is no plain one")
    for side in ("inputs", "outputs"):
        for position, tensor in enumerate(_list(_object(graph, place)[side], f"{place}.{side}")):
            where = f"{place}.{side}[{position}]"
            _text(_object(tensor, where)["name"], f"{where}.name")
            _one_of(tensor["dtype"], f"{where}.dtype", TENSOR_DTYPES)
            if not isinstance(tensor["shape"], list):
                raise ValueError(f"{where}.shape is {shown(tensor['shape'])}, expected a list")
            for size in tensor["shape"]:
                if not isinstance(size, str):
                    _whole(size, f"{where}.shape", 0, 2**40)
    for runtime, file in _object(graph["files"], f"{place}.files").items():
        _text(file, f"{place}.files[{runtime[:100]!r}]")


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, expected an object")
    return value


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {shown(value)}, expected a list of at least one")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ValueError(f"{name} is {shown(value)}, expected a text of at most 200 characters")
    return value


def _one_of(value: object, name: str, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {shown(value)}, expected one of {', '.join(known)}")


def _whole(value: object, name: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, expected a whole number from {low} to {high}")
    return value


def _side(value: object, name: str) -> int:
    if _whole(value, name, 64, MOST_PIXELS_A_SIDE) % 64:
        raise ValueError(f"{name} is {value}, expected a multiple of 64")
    assert isinstance(value, int)
    return value


def _number(value: object, name: str, most: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{name} is {shown(value)}, expected a number above 0, at most {most:g}")
