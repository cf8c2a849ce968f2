"""Kept concepts as files: safetensors, with a manifest in the header. Their form: docs/kept-concepts.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..backends.host import BFLOAT16, host_dtype
from ..errors import InputError, KeptConceptError, OutputError
from ..images import MASK_GRID, load_reference
from .concept import KeptConcept
from .origin import Origin
from .reference import STORAGES, EightBit, Exact, KeptReference, Stored

FORMAT = 1
METADATA = "magicface_rt.kept_concept"
MAX_HEADER_BYTES = 1 << 22
ALIGNMENT = 64

_NAMES = {"float32": "F32", "float16": "F16", BFLOAT16: "BF16", "uint8": "U8"}


def save(concept: KeptConcept, path: Path, *, with_image: bool, overwrite: bool) -> Path:
    """See `KeptConcept.save`."""
    target = path.absolute()
    if os.path.lexists(target) and (not overwrite or not target.is_file()):
        raise OutputError(f"file {str(path)!r} exists already. Give a new path, or allow overwriting (overwrite=True).")
    arrays = _arrays(concept)
    if with_image:
        arrays |= {name: (array, "uint8") for name, array in _pictures(concept).items()}
    header = _header(concept, arrays)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as stream:
            stream.write(header)
            for array, _ in arrays.values():
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    except OSError as error:
        raise OutputError(f"file {str(path)!r} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return target


def load(path: Path, *, check_hashes: bool) -> KeptConcept:
    """See `KeptConcept.load`."""
    data, header, start = _open(path)
    manifest = _manifest(path, header)
    views = _views(path, data, header, start, manifest)
    if check_hashes:
        for name, view in views.items():
            found = hashlib.sha256(view.data).hexdigest()
            if found != manifest["sha256"].get(name):
                _damaged(path, f"the SHA-256 of {name} is {found[:16]}..., expected {manifest['sha256'][name][:16]}...")
    try:
        return _concept(header, manifest, views)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        _damaged(path, f"its manifest does not have the expected form ({type(error).__name__}: {error})", error)


# ------------------------------------------------------------------------------------------------------------- writing

_Arrays = dict[str, tuple[NDArray[Any], str]]


def _arrays(concept: KeptConcept) -> _Arrays:
    """Every stored array with its dtype, by name: the number of the reference, the tensor, what of it."""
    arrays: _Arrays = {}
    for number, reference in enumerate(concept.references):
        for name, stored in reference.tensors.items():
            for suffix, array in stored.arrays.items():
                arrays[f"{number}.{name}{suffix}"] = (array, concept.origin.dtype if not suffix else str(array.dtype))
    return arrays


def _pictures(concept: KeptConcept) -> Mapping[str, NDArray[np.uint8]]:
    if concept.pictures:
        return concept.pictures
    if concept.source is None:
        raise KeptConceptError(
            f"kept concept {concept.name!r} came from a file without images, so they cannot be stored. Prepare it "
            "again from its images, or save it without them."
        )
    pictures: dict[str, NDArray[np.uint8]] = {}
    for number, reference in enumerate(concept.source.references):
        loaded = load_reference(reference, name=f"concept {concept.name!r}")
        pictures[f"image_{number}"] = np.asarray(loaded.image, np.uint8)
        pictures[f"mask_{number}"] = loaded.mask_grid
    return pictures


def _header(concept: KeptConcept, arrays: _Arrays) -> bytes:
    hashes = {
        name: hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
        for name, (array, _) in arrays.items()
    }
    manifest = json.dumps(
        {"format": FORMAT, **concept.to_dict(), "sha256": hashes}, sort_keys=True, ensure_ascii=True, allow_nan=False
    )
    entries: dict[str, Any] = {
        "__metadata__": {METADATA: manifest, "manifest_sha256": hashlib.sha256(manifest.encode()).hexdigest()}
    }
    end = 0
    for name, (array, dtype) in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, ensure_ascii=True).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# ------------------------------------------------------------------------------------------------------------- reading


def _damaged(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise KeptConceptError(
        f"kept concept {str(path)!r} is damaged: {what}. Copy the file again, or prepare the concept again."
    ) from cause


def _open(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any], int]:
    """The mapped file, its header, and where the data begin."""
    try:
        if not path.is_file():
            raise KeptConceptError(f"kept concept {str(path)!r} does not exist or is not a file.")
        size = path.stat().st_size
        if size < 8:
            _damaged(path, f"it has {size} bytes")
        data = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise KeptConceptError(f"kept concept {str(path)!r} cannot be read: {error}.") from error
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
        _damaged(path, f"its header would have {length} bytes of the file's {size}")
    try:
        header = json.loads(data[8 : 8 + length].tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        _damaged(path, "its header is no JSON", error)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        _damaged(path, "its header has no metadata")
    return data, header, 8 + length


def _manifest(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    metadata = header["__metadata__"]
    text = metadata.get(METADATA)
    if not isinstance(text, str):
        raise KeptConceptError(
            f"{str(path)!r} is a safetensors file, but holds no kept concept; `magicface-rt prepare` makes one."
        )
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != metadata.get("manifest_sha256"):
        _damaged(path, "its manifest was changed")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        _damaged(path, "its manifest is no JSON", error)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        _damaged(path, "its manifest does not have the expected form")
    if manifest.get("format") != FORMAT:
        raise KeptConceptError(
            f"kept concept {str(path)!r} has format version {manifest.get('format')!r}, and this version of "
            f"magicface_rt reads {FORMAT}. Prepare the concept again."
        )
    return manifest


def _views(
    path: Path, data: NDArray[np.uint8], header: Mapping[str, Any], start: int, manifest: Mapping[str, Any]
) -> dict[str, NDArray[np.uint8]]:
    """The bytes of every tensor. They must lie end to end and fill the file."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if set(entries) != set(manifest["sha256"]):
        _damaged(path, "its header and its manifest name different tensors")
    views, end = {}, 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = (int(x) for x in entry["data_offsets"])
            if first != end or last < first:
                _damaged(path, f"{name} lies at bytes {first} to {last}, expected from {end}")
            views[name] = data[start + first : start + last]
            end = last
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        _damaged(path, "its header does not have the expected form", error)
    if start + end != len(data):
        _damaged(path, f"it has {len(data)} bytes, expected {start + end}")
    return views


def _concept(
    header: Mapping[str, Any], manifest: Mapping[str, Any], views: Mapping[str, NDArray[np.uint8]]
) -> KeptConcept:
    origin = Origin.from_dict(manifest["origin"])

    def array(name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        entry = header[name]
        if entry["dtype"] != _NAMES[dtype] or tuple(entry["shape"]) != shape:
            raise ValueError(f"{name} is {entry['dtype']}{entry['shape']}, expected {_NAMES[dtype]}{list(shape)}")
        if views[name].nbytes != math.prod(shape) * host_dtype(dtype).itemsize:
            raise ValueError(f"{name} has {views[name].nbytes} bytes")
        return views[name].view(host_dtype(dtype)).reshape(shape)

    references = []
    for number, entry in enumerate(manifest["references"]):
        tokens = {int(factor): int(count) for factor, count in entry["tokens"].items()}
        if set(tokens) != set(origin.factors) or min(tokens.values()) < 0 or entry["storage"] not in STORAGES:
            raise ValueError(f"reference {number} has tokens {tokens}, storage {entry['storage']!r}")
        tensors: dict[str, Stored] = {}
        for name, (factor, width) in origin.widths.items():
            full, channels = (origin.steps, tokens[factor], width), (origin.steps, width)
            if entry["storage"] == "8-bit":
                tensors[name] = EightBit(
                    array(f"{number}.{name}.levels", "uint8", full),
                    array(f"{number}.{name}.scale", "float32", channels),
                    array(f"{number}.{name}.low", "float32", channels),
                    origin.dtype,
                )
            else:
                tensors[name] = Exact(array(f"{number}.{name}", origin.dtype, full))
        references.append(
            KeptReference(
                str(entry["key"]),
                str(entry["prompt"]),
                entry["storage"],
                tokens,
                tensors,
                float(entry["error"]),
                mapped=True,
            )
        )
    pictures = {}
    for name in (n for n in header if n.startswith(("image_", "mask_"))):
        height, width = (int(d) for d in header[name]["shape"][:2])
        pictures[name] = array(
            name, "uint8", (height, width, 3) if name.startswith("image_") else (MASK_GRID, MASK_GRID)
        )
    return KeptConcept(
        manifest["word"],
        references,
        origin,
        weight=manifest["weight"],
        token_index=manifest["token_index"],
        name=manifest["name"],
        pictures=pictures,
    )
