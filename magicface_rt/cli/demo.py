"""`magicface-rt demo`: the whole chain on this machine, with the miniature that comes with the repository."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import magicface_rt
from magicface_rt import (
    Bundle,
    BundleError,
    CheckpointError,
    Concept,
    ImageError,
    JobError,
    OutputError,
    Session,
)
from magicface_rt.bundle import MANIFEST, MAX_MANIFEST_BYTES
from magicface_rt.files import atomic_files
from magicface_rt.files.plain_file import read_plain
from magicface_rt.files.strict_json import read_json
from magicface_rt.provenance import read_provenance

from ._command import Command, JsonOption, check_output_folder, command, export_module
from ._demo_sheet import TILES, contact_sheet
from .run import build_request, print_result, progress_bar

JOB = Path("demo") / "portrait" / "job.json"
WEIGHTS = Path("benchmarks") / "miniature" / "weights"
PORTRAIT, SHEET = "portrait", "sheet.png"
VERIFY_STEPS = 4


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where portrait/ and sheet.png go; an earlier demo's are replaced.")
    ] = Path("demo-out"),
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the bundle is kept; one of another checkpoint is replaced.")
    ] = Path(".cache/demo"),
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps, instead of the job's.")] = None,
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another job than the repository's demo/portrait/job.json.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Another checkpoint than the miniature's weights.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Run the whole chain: checkpoint, export, pictures, parity with PyTorch. No GPU, no download."""
    with command(json_to) as verb:
        portrait, sheet = out / PORTRAIT, out / SHEET
        check_output_folder(portrait, overwrite=True)
        _check_sheet(sheet)
        request = build_request(job or _find(JOB, JobError, "--job FILE"), None, [], {"steps": steps})
        options, concepts = request.options, [one for one in request.concepts if isinstance(one, Concept)]
        parity = export_module("parity")
        source = checkpoint or _find(WEIGHTS, CheckpointError, "--checkpoint DIR")
        bundle = _bundle(verb, export_module("checkpoint").Checkpoint.open(source), work / "magicface-demo-bundle")
        verb.note(f"pictures: {request.prompt!r}, without and with {len(concepts)} concepts, {options.steps} steps")
        with Session(bundle) as session:
            plain = session.generate(request.prompt, options=replace(options, semantic_guidance=False))
            with progress_bar(options) as progress:
                result = session.generate(request.prompt, concepts, options=options, progress=progress)
        folder = result.save(portrait, overwrite=True)
        try:
            with atomic_files.temporary_sibling(sheet) as part:
                contact_sheet(concepts, plain, result).save(part, "PNG")
                _check_sheet(sheet)
                atomic_files.replace_into_place(part, sheet)
        except OSError as error:
            raise OutputError(
                f"file {str(sheet)!r} cannot be written: {atomic_files.explain_os_error(error)}"
            ) from error
        verdict = parity.verify_bundle(bundle.path, source, steps=VERIFY_STEPS, report=verb.note)
        verb.outcome = {
            "out": str(out),
            "sheet": str(sheet),
            "checkpoint": str(source),
            "bundle": str(bundle.path),
            "run": result.to_dict(),
            "parity": verdict.to_json(),
        }
        for line in verdict.summary():
            verb.print(line)
        print_result(verb, result, folder)
        verb.print(f"sheet    {sheet}: references, the picture without and with them, regions")
        verb.print(f"bundle   {bundle.path}")
        verb.print(f"parity   {'passed' if verdict.passed else 'FAILED'}, the numbers are above")
        verb.print("The miniature draws portraits of 64 pixels and nothing else: docs/miniature.md.")
        verb.print("With a real checkpoint: magicface-rt export CHECKPOINT --out BUNDLE, then magicface-rt run.")
        if not verdict.passed:
            verb.fail()


def _find(what: Path, missing: type[JobError] | type[CheckpointError], option: str) -> Path:
    """Return where the repository's file or folder is: in the current folder, or beside the package if that runs from a
    source tree.

    Raises:
        missing: it is in neither place.
    """
    for place in (Path(), Path(magicface_rt.__file__).parents[1]):
        if (place / what).exists():
            return place / what
    raise missing(f"there is no {what} here. Run this from the repository's folder, or give {option}.")


def _bundle(verb: Command, checkpoint: Any, folder: Path) -> Bundle:
    """Return the bundle of this checkpoint. It is exported again if it is missing, not intact, or from another
    checkpoint or exporter.
    """
    try:
        bundle = Bundle.open(folder)
        same_exporter = bundle.exporter == export_module("exporter").exporter_versions()
        if same_exporter and export_module("made_from").why_not_made_from(bundle, checkpoint) is None:
            verb.note(f"bundle: using {folder} again")
            return bundle
    except BundleError:
        pass
    _remove_earlier(folder)
    exporter = export_module("exporter")
    bundle = exporter.export_bundle(checkpoint, folder, report=verb.note)
    assert isinstance(bundle, Bundle)
    return bundle


def _check_sheet(sheet: Path) -> None:
    """Raise OutputError if something that no demo made is in the sheet's place."""
    if not os.path.lexists(sheet):
        return
    try:
        of_a_demo = TILES in (read_provenance(sheet) or {})
    except ImageError:
        of_a_demo = False
    if not of_a_demo:
        raise OutputError(
            f"file {str(sheet)!r} is not replaced: it is not marked as the sheet of a demo. Move it away, or give "
            "another folder (--out)."
        )


def _remove_earlier(folder: Path) -> None:
    """Remove the bundle of an earlier demo, complete or not.

    Raises:
        OutputError: something else is there, or beside its files; or it cannot be removed.
    """
    if not os.path.lexists(folder):
        return
    if why_not := _why_no_bundle(folder):
        raise OutputError(
            f"{str(folder)!r} is not replaced by the demo's bundle: {why_not}. Expected an earlier bundle or nothing. "
            "Move it away, or give another folder (--work)."
        )
    try:
        atomic_files.remove(folder)
    except OSError as error:
        raise OutputError(
            f"folder {str(folder)!r} cannot be removed: {atomic_files.explain_os_error(error)}"
        ) from error


def _why_no_bundle(folder: Path) -> str:
    """Return why the folder is not just a bundle, or "" if it holds only what its manifest names."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is a link" if folder.is_symlink() else "it is not a folder"
    try:
        named = {MANIFEST, *read_json(read_plain(folder / MANIFEST, MAX_MANIFEST_BYTES))["files"]}
        foreign = {entry.name for entry in folder.iterdir()} - named
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return f"it holds {min(foreign)!r}, which its {MANIFEST} does not name" if foreign else ""
