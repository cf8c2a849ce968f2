"""`magicface-rt prepare`: compute the keys of a job's concepts once, and keep them in files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from magicface_rt import Concept, KeptConcept, KeptConceptError, OptionError, OutputError, Progress, Session
from magicface_rt.files.stamps import Stamp
from magicface_rt.kept.concept import check_note
from magicface_rt.kept.files import check_writable, difference, remove_abandoned
from magicface_rt.kept.keeper import checked_storage
from magicface_rt.kept.origin import Origin
from magicface_rt.preparing import load_alone
from magicface_rt.session import ProgressCallback

from ._backend_options import BackendOption, BuildMissingOption, DeviceOption, StoreOption, TargetOption, ThreadsOption
from ._bundle_view import size
from ._command import JsonOption, command
from ._kept_options import StorageOption, bare_concepts
from .run import build_request

SUFFIX = ".concept"


def prepare(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the files, one for each concept.")],
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A job; its concepts, steps and reference_seed are taken.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help="word=man,image=man.jpg,mask=m.png,prompt=a man. Several times for several."),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps it will serve; 50.")] = None,
    reference_seed: Annotated[int | None, typer.Option(metavar="N", help="Noise of the references; 0.")] = None,
    storage: StorageOption = "exact",
    with_image: Annotated[
        bool, typer.Option("--with-image", help="Store the reference images and masks in the file as well.")
    ] = False,
    note: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Kept in the files for people to read, such as who agreed to what."),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for a pass of the network, such as 2GiB.")
    ] = None,
    backend: BackendOption = "auto",
    store: StoreOption = None,
    device: DeviceOption = 0,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    threads: ThreadsOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    json_to: JsonOption = None,
) -> None:
    """Prepare concepts: compute their references' keys once, so that no later picture does.

    A file that is there already, whole, with the very concept that would be written, is left as it is.
    """
    with command(json_to) as verb:
        prompt = None if job is not None else ""
        request = build_request(job, prompt, concept or [], {"steps": steps, "reference_seed": reference_seed})
        concepts = bare_concepts(request.concepts)
        if not concepts:
            raise OptionError("there is no concept to prepare; give --concept, or a --job that has some.")
        paths = _paths(concepts, out)
        existing = _existing(paths, overwrite=overwrite)
        check_note(note, concepts[0].word)
        files = []
        with Session(
            bundle,
            backend=backend,
            threads=threads,
            device=device,
            store=store,
            target=target,
            build_missing=build_missing,
            storage=storage,
        ) as session:
            origin = Origin.of(session.bundle, request.options.steps, request.options.reference_seed)
            form = checked_storage(storage)
            first = next((path for path in paths if path not in existing), None)
            for one, path in zip(concepts, paths, strict=True):  # check all before the first one takes its minutes
                if path == first:
                    continue  # it is checked as it is prepared, before anything is computed
                references = load_alone(one, origin, session.bundle, session.tokenizer)
                if path in existing:
                    keys = [reference.key(origin, form) for reference in references]
                    different = difference(existing[path], one, origin, keys, form, note, with_image=with_image)
                    if different:
                        raise _other(path, f"holds another kept concept than would be written: {different}")
            for one, path in zip(concepts, paths, strict=True):
                kept = existing.get(path)
                if kept is None:
                    with preparation_bar(one.name) as progress:
                        kept = session.prepare(
                            one,
                            steps=request.options.steps,
                            reference_seed=request.options.reference_seed,
                            workspace=workspace,
                            progress=progress,
                        )
                    kept.noted(note).save(path, with_image=with_image, overwrite=overwrite)
                else:
                    _check_still_there(path, kept)
                    remove_abandoned(path)
                files.append(
                    {
                        "concept": one.name,
                        "path": str(path),
                        "bytes": kept.nbytes,
                        "error": kept.error,
                        "existed": path in existing,
                    }
                )
                cost = f", 8 bits cost a relative error of {kept.error:.1e}" if kept.error else ""
                found = (
                    "; it was there already, with these settings and content keys, and is left as it is"
                    if path in existing
                    else ""
                )
                verb.print(f"{one.name}: {path} ({size(kept.nbytes)}{cost}){found}")
        verb.outcome = {"steps": request.options.steps, "files": files}


@contextmanager
def preparation_bar(name: str) -> Iterator[ProgressCallback | None]:
    """Show a progress bar on stderr, if that is a terminal, and yield the callback that moves it; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    with ProgressBar(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(f"preparing {name}", total=None)

        def moved(progress: Progress) -> None:
            bar.update(task, total=progress.steps, completed=progress.step)

        yield moved


def _paths(concepts: list[Concept], out: Path) -> list[Path]:
    """Return a file for each concept, named after it.

    Raises:
        OutputError: two concepts would have the same file, or `out` is not a folder.
    """
    names = [re.sub(r"[^\w.-]+", "-", concept.name).strip("-.") or "concept" for concept in concepts]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise OutputError(f"two concepts would have the file {double[0]}{SUFFIX}; give one of them another name.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"output folder {str(out)!r} is not a folder. Choose another name.")
    return [out / f"{name}{SUFFIX}" for name in names]


def _existing(paths: list[Path], *, overwrite: bool) -> dict[Path, KeptConcept]:
    """Return the kept concepts that are there already and are not to be replaced, each read whole and checked.

    Raises:
        OutputError: something else is there, such as a damaged file; or a file cannot be written.
    """
    existing: dict[Path, KeptConcept] = {}
    for path in paths:
        if overwrite or not os.path.isfile(path):
            check_writable(path, overwrite=overwrite)
            continue
        try:
            existing[path] = KeptConcept.load(path, check_hashes=True)
        except KeptConceptError as error:
            raise _other(path, f"is no whole kept concept ({str(error).rstrip('.')})") from error
    return existing


def _check_still_there(path: Path, kept: KeptConcept) -> None:
    """Check that a file that is left as it is was not replaced, written to or removed while others were prepared."""
    try:
        found = Stamp.of(os.stat(path))
    except FileNotFoundError as error:
        raise OutputError(f"file {str(path)!r} was removed while other concepts were prepared; start again.") from error
    if any(one.file is not None and one.file.stamp != found for one in kept.references):
        raise _other(path, "was written to or replaced while other concepts were prepared")


def _other(path: Path, found: str) -> OutputError:
    """Return the error for a file that is there already and is not the one that would be written."""
    return OutputError(
        f"file {str(path)!r} exists already and {found}. Give another folder (--out), or allow overwriting "
        "(--overwrite)."
    )
