"""Kept concepts as files: safetensors, with a manifest in the header. For the format see docs/kept-concepts.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..backends.host import BFLOAT16, host_dtype, non_finite
from ..concept import Concept
from ..errors import InputError, KeptConceptError, OutputError
from ..files import atomic_files
from ..files.stamps import Stamp
from ..files.strict_json import read_json
from ..images import MASK_GRID, LoadedReference, load_reference
from ..process.interrupts import reraise_if_interrupt
from ..values.shown import shown
from .concept import KeptConcept
from .origin import Origin, content_key, finite_number, text_entry, whole_numbers
from .reference import STORAGES, EightBit, Exact, KeptReference, MappedFile, Stored

FORMAT = 1
METADATA = "magicface_rt.kept_concept"
MAX_HEADER_BYTES = 1 << 22
ALIGNMENT = 64
MAX_REFERENCES = 64
"""The most that any bundle takes; a header could name so many that reading them would take hours."""

_AT_ONCE = 1 << 24
"""How many bytes are checked together."""

_NAMES = {"float32": "F32", "float16": "F16", BFLOAT16: "BF16", "uint8": "U8"}


def save(concept: KeptConcept, path: Path, *, with_image: bool, overwrite: bool, follow: bool = True) -> Path:
    """Write a file; see `KeptConcept.save`. Without `follow`, a link is replaced, and not the file that it leads to."""
    target = _free(path, overwrite, follow)
    concept.check_not_modified()
    arrays = _arrays(concept)
    if with_image:
        arrays |= {name: (array, "uint8") for name, array in _pictures(concept).items()}
    header = _header(concept, arrays)
    try:
        atomic_files.make_folder(target.parent)
        with atomic_files.temporary_sibling(target) as part:
            with part.open("wb") as stream:
                stream.write(header)
                for array, _ in arrays.values():
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            concept.check_not_modified()
            try:
                atomic_files.replace_into_place(part, target, overwrite=overwrite)
            except FileExistsError as error:  # it appeared after this began, and is left alone
                raise _exists(path) from error
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"file {str(path)!r} cannot be written: {atomic_files.explain_os_error(error)}") from error
    return target


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Check, before minutes of work, that `save` can put a file there, as `atomic_files.check_writable` does.

    Raises:
        OutputError: as `save`.
    """
    target = _free(path, overwrite)
    try:
        atomic_files.check_writable(target)
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"file {str(path)!r} cannot be written: {atomic_files.explain_os_error(error)}") from error


def difference(
    found: KeptConcept,
    concept: Concept,
    origin: Origin,
    keys: Sequence[str],
    storage: str,
    note: str | None,
    *,
    with_image: bool,
) -> str:
    """Say in what a file differs from the one that preparing a concept and saving it would write; "" if in nothing.

    All that a user can choose must agree: bundle, schedule, steps and reference seed (the origin), storage, word, name,
    weight, token index and note, each reference's prompt and content key, and whether images are stored, and which.
    Not compared are the bytes of the keys: another backend, number of threads or workspace rounds them otherwise, and
    a Session takes keys of the same content key for the same as well.

    found        the file's concept, loaded with its hashes checked
    concept      what would be prepared for `origin`, in the form `storage`
    keys         the content keys of its references, see `content_key`
    note         what would be saved with it
    with_image   whether its images would be saved

    Raises:
        ImageError, MaskError: with `with_image`, an image or mask cannot be read.
    """
    settings = {
        "bundle": (found.origin.bundle_hash, origin.bundle_hash),
        "number of steps": (found.origin.steps, origin.steps),
        "reference_seed": (found.origin.reference_seed, origin.reference_seed),
        "schedule": (found.origin.to_dict(), origin.to_dict()),
        "word": (found.word, concept.word),
        "name": (found.name, concept.name),
        "weight": (found.weight, concept.weight),
        "token_index": (found.token_index, concept.token_index),
        "note": (found.note, note),
        "number of references": (len(found.references), len(concept.references)),
    }
    for name, (is_there, wanted) in settings.items():
        if is_there != wanted:
            return f"its {name} is {shown(is_there)}, expected {shown(wanted)}"
    for position, (kept, bare, key) in enumerate(zip(found.references, concept.references, keys, strict=True), 1):
        if kept.storage != storage:
            return f"its storage is {shown(kept.storage)}, expected {shown(storage)}"
        if kept.prompt != bare.prompt:
            return f"the prompt of its reference {position} is {shown(kept.prompt)}, expected {shown(bare.prompt)}"
        if kept.key != key:
            return f"its reference {position} was made from another image or mask"
    if not with_image:
        return "it holds its images, and none are to be stored" if found.pictures else ""
    if not found.pictures:
        return "it holds no images, and they are to be stored"
    pictures = _as_stored([load_reference(one, name=f"concept {concept.name!r}") for one in concept.references])
    if set(pictures) != set(found.pictures) or not all(
        np.array_equal(array, found.pictures[name]) for name, array in pictures.items()
    ):
        return "the images in it are others"
    return ""


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes left of a file that stands, as writing it anew would. Nothing is raised."""
    with contextlib.suppress(OSError):
        atomic_files.remove_abandoned_of(atomic_files.resolve_target(path))


def load(path: Path, *, check_hashes: bool) -> KeptConcept:
    """Open a file; see `KeptConcept.load`."""
    file, data, header, start = _open(path)
    manifest = _manifest(path, header)
    views = _views(path, data, header, start, manifest)
    try:
        concept = _concept(file, manifest, _TensorReader(header, views))
    except _MALFORMED as error:
        what = str(error).rstrip(".") if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        _damaged(path, f"its manifest does not have the expected form ({what[:500]})", error)
    if check_hashes:
        _check_content(path, concept, manifest, views)
    return concept


# ------------------------------------------------------------------------------------------------------------- writing


def _free(path: Path, overwrite: bool, follow: bool = True) -> Path:
    """Return the absolute path, after checking that a file may be put or replaced there."""
    try:
        target = atomic_files.resolve_target(path) if follow else path.absolute()
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"file {str(path)!r} cannot be written: {atomic_files.explain_os_error(error)}") from error
    if not os.path.lexists(target):
        return target
    if not target.is_file():
        raise OutputError(f"{str(path)!r} exists already, and is not a file. Give another path.")
    if not overwrite:
        raise _exists(path)
    return target


def _exists(path: Path) -> OutputError:
    return OutputError(
        f"file {str(path)!r} exists already. Give another path, or allow overwriting (overwrite=True, or --overwrite)."
    )


_Arrays = dict[str, tuple[NDArray[Any], str]]


def _arrays(concept: KeptConcept) -> _Arrays:
    """Return every stored array with its dtype, by name: the reference's number, the tensor, the array's suffix."""
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
    loaded = [load_reference(one, name=f"concept {concept.name!r}") for one in concept.source.references]
    for position, (one, kept) in enumerate(zip(loaded, concept.references, strict=True), 1):
        if content_key(concept.origin, one, kept.prompt, kept.storage) != kept.key:
            raise KeptConceptError(
                f"kept concept {concept.name!r}: the image or mask of reference {position} is not what its keys were "
                "made from; it has changed since. Prepare it again, or save it without images."
            )
    return _as_stored(loaded)


def _as_stored(loaded: Sequence[LoadedReference]) -> dict[str, NDArray[np.uint8]]:
    """Return the images and masks of references as a file holds them, by their names there."""
    pictures: dict[str, NDArray[np.uint8]] = {}
    for number, one in enumerate(loaded):
        pictures[f"image_{number}"] = np.asarray(one.image, np.uint8)
        pictures[f"mask_{number}"] = one.mask_grid
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

_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""The exceptions that reading JSON of an unexpected form may raise."""


def _damaged(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise KeptConceptError(
        f"kept concept {str(path)!r} is damaged: {what}. Copy the file again, or prepare the concept again."
    ) from cause


def _open(path: Path) -> tuple[MappedFile, NDArray[np.uint8], dict[str, Any], int]:
    """Map a file; return it, its bytes, its header, and the position where the data begin."""
    try:
        if not path.is_file():
            raise KeptConceptError(f"kept concept {str(path)!r} does not exist or is not a file.")
        found = os.path.realpath(path)
        with open(found, "rb") as stream:
            file = MappedFile(found, Stamp.of(os.fstat(stream.fileno())))
            size = file.stamp.size
            if size < 8:
                _damaged(path, f"it has {size} bytes")
            data = np.memmap(stream, np.uint8, "r")
    except OSError as error:
        reraise_if_interrupt(error)
        raise KeptConceptError(f"kept concept {str(path)!r} cannot be read: {error}.") from error
    length = int.from_bytes(data[:8].tobytes(), "little")
    if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
        _damaged(path, f"its header would have {length} bytes of the file's {size}")
    try:
        header = read_json(data[8 : 8 + length].tobytes().decode("utf-8"))
    except ValueError as error:
        _damaged(path, f"its header is no JSON ({error})", error)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        _damaged(path, "its header has no metadata")
    return file, data, header, 8 + length


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
        manifest = read_json(text)
    except ValueError as error:
        _damaged(path, f"its manifest is no JSON ({error})", error)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        _damaged(path, "its manifest does not have the expected form (sha256 is no object of texts)")
    if type(manifest.get("format")) is not int or manifest["format"] != FORMAT:
        raise KeptConceptError(
            f"kept concept {str(path)!r} has format version {shown(manifest.get('format'))}, expected {FORMAT}, "
            "which this version of magicface_rt reads. Prepare the concept again."
        )
    return dict(manifest)


def _views(
    path: Path, data: NDArray[np.uint8], header: Mapping[str, Any], start: int, manifest: Mapping[str, Any]
) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of every tensor, after checking that they lie end to end and fill the file."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if set(entries) != set(manifest["sha256"]):
        _damaged(path, "its header and its manifest name different tensors")
    views, end = {}, 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = whole_numbers(entry["data_offsets"], "data_offsets")
            if first != end or last < first:
                _damaged(path, f"{name[:100]} lies at bytes {first} to {last}, expected from {end}")
            views[name] = data[start + first : start + last]
            end = last
    except KeptConceptError:
        raise
    except _MALFORMED as error:
        what = f"{type(error).__name__}: {error}"[:500]
        _damaged(path, f"its header does not have the expected form ({what})", error)
    if start + end != len(data):
        _damaged(path, f"it has {len(data)} bytes, expected {start + end}")
    return views


def _check_content(
    path: Path, concept: KeptConcept, manifest: Mapping[str, Any], views: Mapping[str, NDArray[np.uint8]]
) -> None:
    """Read every byte, and check that it is as in the manifest and that no key or value is NaN or infinite."""
    for name, view in views.items():
        found, expected = hashlib.sha256(view.data).hexdigest(), manifest["sha256"][name]
        if found != expected:
            _damaged(path, f"the SHA-256 of {name} is {found[:16]}..., expected {expected[:16]}...")
    for position, reference in enumerate(concept.references):
        for name, stored in reference.tensors.items():
            # One NaN among the keys makes every cell that looks at them NaN.
            if bad := _non_finite(stored, concept.origin):
                _damaged(path, f"{position}.{name} holds {bad} values that are NaN or infinite")
        reference.with_identity(_content(reference, position, manifest["sha256"]))


def _non_finite(stored: Stored, origin: Origin) -> int:
    """Count the values that are NaN or infinite, many steps at once if they are small, or else one at a time."""
    at_once = max(1, _AT_ONCE * origin.steps // max(stored.nbytes, 1))
    parts = (slice(first, first + at_once) for first in range(0, origin.steps, at_once))
    return sum(non_finite(stored.finite_witness(part), origin.dtype) for part in parts)


def _content(reference: KeptReference, position: int, hashes: Mapping[str, str]) -> tuple[str, str]:
    """Return the key that the file claims and a digest of what it was found to hold; one alone does not identify it."""
    names = sorted(f"{name}{suffix}" for name, stored in reference.tensors.items() for suffix in stored.arrays)
    found = [[name, hashes[f"{position}.{name}"]] for name in names]
    described = [reference.storage, sorted(reference.tokens.items()), found]
    return reference.key, hashlib.sha256(json.dumps(described).encode()).hexdigest()


class _TensorReader:
    """Reads the tensors of a file, and notes which it has not been asked for. `views`: their bytes, by name."""

    def __init__(self, header: Mapping[str, Any], views: Mapping[str, NDArray[np.uint8]]) -> None:
        self._header = header
        self._views = views
        self._unread = set(views)

    def array(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a tensor, which stays mapped.

        Raises:
            ValueError: it has another dtype, shape or size.
            one of `_MALFORMED`: it is missing, or its entry does not have the expected form.
        """
        found, sides = text_entry(self._header[name], "dtype"), self.sides(name)
        if found != _NAMES[dtype] or sides != list(shape):
            raise ValueError(f"{name} is {found[:10]}{sides[:10]}, expected {_NAMES[dtype]}{list(shape)}")
        view = self._views[name]
        if view.nbytes != math.prod(shape) * host_dtype(dtype).itemsize:
            raise ValueError(f"{name} has {view.nbytes} bytes")
        self._unread.discard(name)
        return view.view(host_dtype(dtype)).reshape(shape)

    def sides(self, name: str) -> list[int]:
        """Return a tensor's shape, as the header has it."""
        return whole_numbers(self._header[name]["shape"], "shape")

    def unread(self) -> set[str]:
        """Return the names of the tensors that have not been read."""
        return set(self._unread)


def _concept(file: MappedFile, manifest: Mapping[str, Any], reader: _TensorReader) -> KeptConcept:
    """Make the concept that a manifest describes.

    Raises:
        ValueError: the file holds a tensor that is none of a kept concept's.
        InputError, one of `_MALFORMED`: the manifest or the header does not have the expected form.
    """
    origin = Origin.from_dict(manifest["origin"])
    entries = manifest["references"]
    if len(entries) > MAX_REFERENCES:
        raise ValueError(f"there are {len(entries)} references, expected at most {MAX_REFERENCES}")
    references = [_reference(reader, position, entry, origin, file) for position, entry in enumerate(entries)]
    concept = KeptConcept(
        text_entry(manifest, "word"),
        references,
        origin,
        weight=manifest["weight"],
        token_index=manifest["token_index"],
        name=text_entry(manifest, "name"),
        pictures=_stored_pictures(reader, len(references)),
        note=None if manifest.get("note") is None else text_entry(manifest, "note"),
    )
    if unread := reader.unread():
        raise ValueError(f"tensor {min(unread)[:100]!r} is none of a kept concept's")
    return concept


def _reference(
    reader: _TensorReader, position: int, entry: Mapping[str, Any], origin: Origin, file: MappedFile
) -> KeptReference:
    """Return the reference at a position, from 0, with its tensors in the file. `entry`: what the manifest says of it.

    Raises as `_concept`.
    """
    counts, storage = entry["tokens"], entry["storage"]
    factors = [str(factor) for factor in origin.factors]
    if set(counts) != set(factors) or storage not in STORAGES:
        raise ValueError(f"reference {position} has tokens {shown(counts)}, storage {shown(storage)}")
    found = whole_numbers([counts[factor] for factor in factors], "tokens")
    tokens = {int(factor): count for factor, count in zip(factors, found, strict=True)}
    tensors: dict[str, Stored] = {}
    for name, (factor, width) in origin.widths.items():
        full, channels = (origin.steps, tokens[factor], width), (origin.steps, width)
        if storage == "8-bit":
            tensors[name] = EightBit(
                reader.array(f"{position}.{name}.levels", "uint8", full),
                reader.array(f"{position}.{name}.scale", "float32", channels),
                reader.array(f"{position}.{name}.low", "float32", channels),
                origin.dtype,
            )
        else:
            tensors[name] = Exact(reader.array(f"{position}.{name}", origin.dtype, full))
    return KeptReference(
        text_entry(entry, "key"),
        text_entry(entry, "prompt"),
        storage,
        tokens,
        tensors,
        finite_number(entry["error"], "error"),
        file,
    )


def _stored_pictures(reader: _TensorReader, references: int) -> dict[str, NDArray[np.uint8]]:
    """Return the images, uint8 [h, w, 3], and masks, uint8 [128, 128], that the file holds of so many references."""
    pictures = {}
    there = reader.unread()
    for k in range(references):
        if (name := f"image_{k}") in there:
            height, width, _ = reader.sides(name)
            pictures[name] = reader.array(name, "uint8", (height, width, 3))
        if (name := f"mask_{k}") in there:
            pictures[name] = reader.array(name, "uint8", (MASK_GRID, MASK_GRID))
    return pictures
