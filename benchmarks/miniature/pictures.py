"""Make and keep the pictures of the quality figures: one file for each variant and request.

A run that was stopped continues where it was. What is measured is read from these files, so another segmenter or
measure needs no new pictures.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magicface_rt import Bundle, Concept, KeptConcept, Options, Reference, Request, Result, Session
from magicface_rt.errors import BackendError, EngineError, OutputError
from magicface_rt.process.host_memory import shortage
from magicface_rt.process.interrupts import reraise_if_interrupt

from .requests import Case
from .variants import Variant

Say = Callable[[str], object]


class PictureFolder:
    """Pictures uint8 [h,w,3] and regions int8 [h/2,w/2] by variant and request.

    settings: everything besides variant and request that a picture depends on. A folder with other settings is refused.
    A mapping among them may get further entries: those of variants that the folder has no pictures of yet.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        file = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                there = json.loads(file.read_text(encoding="utf-8"))
                settings = {name: _joined(there.get(name), value) for name, value in settings.items()}
                other = sorted(name for name in {*there, *settings} if not _agree(there.get(name), settings.get(name)))
                if other:
                    raise OutputError(
                        f"output folder {folder}: its pictures were made with another "
                        + ", ".join(f"{name} ({there.get(name)!r}, not {settings.get(name)!r})" for name in other)
                        + ". Choose another folder."
                    )
            _write(file, json.dumps(settings, indent=1).encode())
        except (OSError, json.JSONDecodeError) as error:
            reraise_if_interrupt(error)
            raise OutputError(f"output folder {folder}: {error}. Choose another folder.") from error

    def has(self, variant: str, number: int) -> bool:
        return self._file(variant, number).is_file()

    def put(self, variant: str, number: int, result: Result) -> None:
        """Store the first picture of a result; its file appears whole or not at all."""
        file = self._file(variant, number)
        part = file.with_suffix(".part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                np.savez_compressed(
                    stream, image=np.asarray(result.images[0]), regions=result.regions[0].astype(np.int8)
                )
            part.replace(file)
        except OSError as error:
            reraise_if_interrupt(error)
            raise OutputError(f"picture {file} cannot be written: {error}.") from error

    def image(self, variant: str, number: int) -> Tensor:
        """float32 [3,h,w] in -1..1."""
        return torch.from_numpy(self._read(variant, number, "image")).permute(2, 0, 1).float() / 127.5 - 1

    def regions(self, variant: str, number: int) -> Tensor:
        """int64 [h/2,w/2]: 0, or k + 1 where concept k is."""
        return torch.from_numpy(self._read(variant, number, "regions")).long()

    def _file(self, variant: str, number: int) -> Path:
        return self.folder / variant / f"{number:03d}.npz"

    def _read(self, variant: str, number: int, name: str) -> NDArray[Any]:
        file = self._file(variant, number)
        try:
            with np.load(file) as stored:
                return np.asarray(stored[name])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            reraise_if_interrupt(error)
            raise OutputError(f"picture {file} cannot be read ({error}); remove it, and it is made anew.") from error


def make(
    bundle: Bundle,
    backend: str,
    variants: Sequence[Variant],
    cases: Sequence[Case],
    folder: PictureFolder,
    *,
    steps: int,
    guidance: float,
    threads: int,
    say: Say,
    session_settings: dict[str, Any] | None = None,
) -> str | None:
    """Make every picture of these variants that the folder lacks, all with one bundle and backend.

    Returns why none could be made, if the backend is missing or cannot serve the bundle; None otherwise.
    """
    missing = [(case, [v for v in variants if not folder.has(v.name, case.number)]) for case in cases]
    missing = [(case, lacking) for case, lacking in missing if lacking]
    if not missing:
        return None
    try:
        session = Session(bundle, backend=backend, threads=threads, provenance=False, **(session_settings or {}))
    except (BackendError, EngineError) as error:
        if (short := shortage(error)) is not None:  # which says nothing of the backend
            raise short from (None if short is error else error)
        return str(error)
    with session:
        for done, (case, lacking) in enumerate(missing):
            kept = prepared(session, case, steps) if any(v.concepts for v in lacking) else []
            requests = [_request(case, variant, kept, steps, guidance) for variant in lacking]
            for variant, result in zip(lacking, session.generate_batch(requests), strict=True):
                folder.put(variant.name, case.number, result)
            if done % 10 == 9 or done + 1 == len(missing):
                say(f"{bundle.dtype}, {backend}: {done + 1} of {len(missing)} requests")
    return None


def concepts(case: Case) -> list[Concept]:
    """The concepts of a request, with their drawn references."""
    made = []
    for k, (part, word) in enumerate(zip(case.parts, case.words, strict=True)):
        image, mask, prompt = case.reference(k)
        made.append(Concept(word, Reference(image, mask=mask, prompt=prompt), name=part))
    return made


def prepared(session: Session, case: Case, steps: int) -> list[KeptConcept]:
    """The concepts of a request, prepared: with their keys and values for all steps."""
    return [session.prepare(concept, steps=steps) for concept in concepts(case)]


def _request(case: Case, variant: Variant, kept: Sequence[KeptConcept], steps: int, guidance: float) -> Request:
    settings = {"steps": steps, "guidance": guidance, "seed": case.number, **variant.options}
    given = [one.renamed(weight=variant.weight) for one in kept] if variant.concepts else []
    return Request(case.caption, given, Options(**settings))


def _joined(there: Any, given: Any) -> Any:
    """A setting as it is given; a mapping with the entries as well that only the folder has."""
    return {**there, **given} if isinstance(there, dict) and isinstance(given, dict) else given


def _agree(there: Any, given: Any) -> bool:
    """Whether a setting is the folder's; of a mapping, whether each entry is that the folder has."""
    if isinstance(there, dict) and isinstance(given, dict):
        return all(given.get(name) == value for name, value in there.items())
    return bool(there == given)


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    os.replace(part, file)
