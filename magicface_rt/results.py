"""The result of a request, and how it is saved."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .concept import NamedConcept
from .errors import OptionError, OutputError
from .files import atomic_files
from .files.plain_file import read_plain
from .files.strict_json import read_json
from .images import region_overlay
from .options import Options
from .process.interrupts import reraise_if_interrupt
from .provenance import SOFTWARE, ProvenancePicture, software

__all__ = ["Result", "Timings", "encode_png"]

_OCCUPIED = {errno.EEXIST, errno.ENOTEMPTY}
_RUN, _REGIONS = "run.json", "regions.npz"
_OWN_FILES = re.compile(r"(image|regions)-\d+\.png|regions\.npz|run\.json")
_MOST_RUN_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of wall clock, by stage; 0 for a stage that was not needed.

    loading            reading images and masks
    text_encoding      prompts through the text encoder
    image_encoding     references through the VAE encoder
    reference_pass     references through the U-Net, for their keys and values
    denoising          the target's steps
    decoding           latents through the VAE decoder
    total              the whole request, including what lies between the stages
    steps              each denoising step, including its reference pass if that is run step by step
    """

    loading: float = 0.0
    text_encoding: float = 0.0
    image_encoding: float = 0.0
    reference_pass: float = 0.0
    denoising: float = 0.0
    decoding: float = 0.0
    total: float = 0.0
    steps: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the stages by name, as JSON can hold them."""
        return {**asdict(self), "steps": list(self.steps)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """The pictures of a request and everything that made them.

    images         tuple of B PIL images, RGB. With `provenance` their own `save` writes it into PNG, JPEG, WebP, AVIF
    regions        int64 [B,h/2,w/2]: 0 where no concept is, k where `concept_names[k - 1]` is
    latents        float32 [B,4,h,w], as they enter the VAE decoder
    regions_per_step    uint8 [T,B,h/2,w/2]: the regions after each of the T steps, the last of which are `regions`;
                        None where they were not asked for, see `record_regions` of `Session.generate`
    prompt, concepts, options    what was asked for
    token_indices  for each concept its token positions in the prompt
    timings        seconds by stage
    bundle_hash    identifies the exported model
    backend        what ran it, such as `onnxruntime-cpu`
    provenance     whether the pictures record how they were made
    details        anything else worth writing into run.json; a mapping that JSON can hold
    references     each concept's references as run.json describes them, as of when they were read. None: as of now

    Raises `OptionError` if the arrays do not fit one another.
    """

    images: Sequence[Image.Image]
    regions: npt.NDArray[np.int64]
    latents: npt.NDArray[np.float32]
    prompt: str
    concepts: Sequence[NamedConcept]
    options: Options
    token_indices: Sequence[Sequence[int]] = ()
    timings: Timings = field(default_factory=Timings)
    bundle_hash: str = ""
    backend: str = ""
    provenance: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)
    regions_per_step: npt.NDArray[np.uint8] | None = None
    references: Sequence[Sequence[Mapping[str, Any]]] | None = None

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.regions.ndim != 3 or self.latents.ndim != 4 or not count == len(self.regions) == len(self.latents):
            raise OptionError(
                f"a result of {count} images needs regions [{count},h/2,w/2] and latents [{count},4,h,w]; "
                f"found {list(self.regions.shape)} and {list(self.latents.shape)}."
            )
        steps = self.regions_per_step
        if steps is not None and (steps.ndim != 4 or steps.shape[1:] != self.regions.shape):
            raise OptionError(
                f"regions_per_step has shape {list(steps.shape)}, expected a number of steps and then the shape of "
                f"regions, {list(self.regions.shape)}."
            )
        if self.regions.size and not 0 <= self.regions.min() <= self.regions.max() <= len(self.concepts):
            raise OptionError(f"regions hold values outside 0..{len(self.concepts)}, the number of concepts.")
        if self.token_indices and len(self.token_indices) != len(self.concepts):
            raise OptionError(f"token_indices has {len(self.token_indices)} entries for {len(self.concepts)} concepts.")
        described = self.references
        if described is None:
            described = [[reference.describe() for reference in concept.references] for concept in self.concepts]
        if [len(row) for row in described] != [len(concept.references) for concept in self.concepts]:
            raise OptionError("references does not have as many entries as the concepts have references.")
        object.__setattr__(self, "references", tuple(tuple(map(dict, row)) for row in described))
        object.__setattr__(self, "concepts", tuple(self.concepts))
        object.__setattr__(self, "token_indices", tuple(tuple(map(int, row)) for row in self.token_indices))
        images = tuple(self.images)
        if self.provenance:
            images = tuple(ProvenancePicture.of(image, self._picture_provenance(k)) for k, image in enumerate(images))
        object.__setattr__(self, "images", images)

    @property
    def concept_names(self) -> tuple[str, ...]:
        """The concepts' names; region value k belongs to entry k - 1."""
        return tuple(concept.name for concept in self.concepts)

    def overlay(self, index: int = 0) -> Image.Image:
        """Return picture `index` with its regions drawn over it and a legend."""
        drawn = region_overlay(self.images[index], self.regions[index], self.concept_names)
        return ProvenancePicture.of(drawn, self._picture_provenance(index)) if self.provenance else drawn

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a folder with the pictures and every setting, and return its path.

            image-0.png     the pictures, with their provenance
            regions-0.png   the same with regions and legend
            regions.npz     `regions` int64 [B,h/2,w/2] and `concept_names`; `regions_per_step` where it was recorded
            run.json        prompt, concepts, options, timings, bundle and software

        The folder appears complete or not at all: it is written beside its place, flushed to disk and renamed.
        `overwrite` replaces an earlier result, which stays whole until then, or an empty folder. Folder and files take
        over the permissions of their namesakes, and a file that had none is as private as the most private of the
        earlier files. A folder that holds anything else is never replaced: a result is recognised by its run.json, and
        has only the regular files that this accounts for.

        Raises `OutputError` for a folder that exists (without `overwrite`) or cannot be written.
        """
        target = Path(folder)
        try:
            target = atomic_files.resolve_target(folder)
            check_replaceable(target, overwrite)
            atomic_files.make_folder(target.parent)
            with atomic_files.temporary_sibling(target, folder=True) as part:
                for name, content in self._files():
                    (part / name).write_bytes(content)
                atomic_files.replace_into_place(
                    part, target, overwrite=overwrite, look=lambda earlier: _check_own(earlier, target)
                )
        except OSError as error:
            reraise_if_interrupt(error)
            if error.errno in _OCCUPIED:  # somebody put a folder there meanwhile
                check_replaceable(target, overwrite)
            raise OutputError(
                f"output folder {str(target)!r} cannot be written: {atomic_files.explain_os_error(error)}"
            ) from error
        return target

    def to_dict(self) -> dict[str, Any]:
        """Return every setting of the run, as JSON can hold it: the content of `run.json`."""
        return {
            **self._settings(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "concepts": [
                {**settings, "references": [dict(reference) for reference in references]}
                for settings, references in zip(self._concept_settings(), self.references or (), strict=True)
            ],
            "timings": self.timings.to_dict(),
            "images": _pictures("image", len(self.images)),
            "size": [self.images[0].height, self.images[0].width] if self.images else None,
            "details": dict(self.details),
        }

    def _settings(self) -> dict[str, Any]:
        ca_scale = self.options.effective_ca_scale(len(self.concepts))
        return {
            "software": software(),
            "bundle_hash": self.bundle_hash,
            "backend": self.backend,
            "prompt": self.prompt,
            "options": {**self.options.to_dict(), "effective_ca_scale": ca_scale},
        }

    def _concept_settings(self) -> list[dict[str, Any]]:
        found = self.token_indices or [concept.token_index or () for concept in self.concepts]
        return [
            {"name": concept.name, "word": concept.word, "weight": concept.weight, "tokens": list(tokens)}
            for concept, tokens in zip(self.concepts, found, strict=True)
        ]

    def _picture_provenance(self, index: int) -> dict[str, Any]:
        concepts = [
            {**settings, "reference_prompts": [reference.prompt for reference in concept.references], **_storage(rows)}
            for settings, concept, rows in zip(
                self._concept_settings(), self.concepts, self.references or (), strict=True
            )
        ]
        return {**self._settings(), "concepts": concepts, "image_index": index}

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the files' names and contents, encoded in memory: not every encoder says so when the disk is full."""
        count = len(self.images)
        names = zip(_pictures("image", count), _pictures("regions", count), strict=True)
        for index, (picture, overlay) in enumerate(names):
            yield picture, encode_png(self.images[index])
            yield overlay, encode_png(self.overlay(index))
        concept_names = np.array(self.concept_names, dtype=np.str_)
        arrays: dict[str, Any] = {"regions": self.regions, "concept_names": concept_names}
        if self.regions_per_step is not None:
            arrays["regions_per_step"] = self.regions_per_step
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        yield _REGIONS, packed.getvalue()
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        # a name that is not valid Unicode (from a file system, say) becomes a JSON escape
        yield _RUN, f"{text}\n".encode(errors="backslashreplace")


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raise `OutputError` if `Result.save` would refuse this folder; to be called before anything is computed."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"output folder {str(target)!r} exists and is not a folder. Choose another name.")
    if not overwrite:
        raise OutputError(
            f"output folder {str(target)!r} exists. Choose another, or allow overwriting "
            "(overwrite=True, or --overwrite)."
        )
    _check_own(target, target)
    if os.path.samefile(target, os.curdir):
        raise OutputError(
            f"output folder {str(target)!r} is the working directory, which is not replaced: this process would "
            "have none then. Choose another folder, or work in another."
        )


def _check_own(folder: Path, target: Path) -> None:
    """Raise `OutputError` if `folder`, which is or just was `target`, holds anything but a result."""
    found = {entry.name: stat.S_ISREG(entry.lstat().st_mode) for entry in folder.iterdir()}
    why_not = _why_no_result(folder, found) if found else ""
    if why_not:
        raise OutputError(
            f"output folder {str(target)!r} is not replaced: {why_not}. Choose another folder, or move what is there."
        )


def _why_no_result(folder: Path, plain: Mapping[str, bool]) -> str:
    """Say why a folder is not just a result; "" if it is. `plain`: whether each of its files is a regular one."""
    if foreign := [name for name in plain if not _OWN_FILES.fullmatch(name)]:
        return f"it holds {_first(foreign)}, which no result writes"
    if linked := [name for name, is_plain in plain.items() if not is_plain]:
        return f"it holds {_first(linked)}, which is no plain file, as what a result writes is"
    if _RUN not in plain:
        return f"it holds {_first(plain)}, but no {_RUN}, by which a result is known"
    try:
        run = read_json(read_plain(folder / _RUN, _MOST_RUN_BYTES))
    except (OSError, ValueError) as error:
        return f"its {_RUN}, by which a result is known, cannot be read ({error})"
    by, images = (run.get("software"), run.get("images")) if isinstance(run, dict) else (None, None)
    if not isinstance(by, str) or not by.startswith(f"{SOFTWARE} ") or not isinstance(images, list):
        return f"its {_RUN} is no result's"
    count = len(images)
    if images != _pictures("image", count):
        return f"its {_RUN} names other images than a result has"
    if more := set(plain) - {*images, *_pictures("regions", count), _REGIONS, _RUN}:
        return f"it holds {_first(more)}, which is none of the {count} images that its {_RUN} names"
    return ""


def _first(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return f"{first!r} and {len(more)} more" if more else repr(first)


def _storage(references: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a picture says of how the keys of a concept's references were stored; nothing where they are exact."""
    found = {row.get("storage", "exact") for row in references} - {"exact"}
    return {"storage": found.pop()} if found else {}


def _pictures(kind: str, count: int) -> list[str]:
    """Return the names of a result's files of a kind, "image" or "regions"."""
    return [f"{kind}-{k}.png" for k in range(count)]


def encode_png(image: Image.Image) -> bytes:
    """Return an image as a PNG file, with the text that it carries."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()
