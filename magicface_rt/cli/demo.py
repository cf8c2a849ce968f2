"""`magicface-rt demo`: the whole chain on this machine, with a small network of random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

import magicface_rt
from magicface_rt import Bundle, BundleError, CheckpointError, JobError, Session

from ._command import Command, JsonOption, check_output_folder, command, export_module
from .run import print_result, progress_bar, request_of

JOB = Path("demo") / "job.json"
VERIFY_STEPS = 4


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the picture goes; replaced if there.")] = Path(
        "demo-out"
    ),
    work: Annotated[Path, typer.Option(metavar="DIR", help="Where checkpoint and bundle are kept.")] = Path(
        ".cache/demo"
    ),
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps, instead of the job's.")] = None,
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Another job than the repository's demo/job.json.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Run the whole chain: checkpoint, export, picture, parity with PyTorch. No GPU, no download, no likeness."""
    with command(json_to) as verb:
        check_output_folder(out, overwrite=True)
        request = request_of(job or _find_job(), None, [], {"steps": steps})
        parity = export_module("parity")
        source, checkpoint = _checkpoint(verb, work / "magicface-demo-checkpoint")
        bundle = _bundle(verb, checkpoint, work / "magicface-demo-bundle")
        verb.note(f"picture: {request.prompt!r}, {len(request.concepts)} concepts, {request.options.steps} steps")
        with Session(bundle) as session, progress_bar(request.options) as progress:
            result = session.generate(request.prompt, request.concepts, options=request.options, progress=progress)
        folder = result.save(out, overwrite=True)
        verdict = parity.verify_bundle(bundle.path, source, steps=VERIFY_STEPS, report=verb.note)
        verb.outcome = {
            "out": str(folder),
            "checkpoint": str(source),
            "bundle": str(bundle.path),
            "run": result.to_dict(),
            "parity": verdict.to_json(),
        }
        for line in verdict.summary():
            verb.print(line)
        print_result(verb, result, folder)
        verb.print(f"bundle   {bundle.path}")
        verb.print(f"parity   {'passed' if verdict.passed else 'FAILED'}, the numbers are above")
        verb.print("The weights are random, so this picture is a likeness of nobody: it shows that the chain works.")
        verb.print("With a real checkpoint: magicface-rt export CHECKPOINT --out BUNDLE, then magicface-rt run.")
        if not verdict.passed:
            verb.fail()


def _find_job() -> Path:
    """The repository's job: from the current folder, or beside the package where that runs from a source tree.

    Raises:
        JobError: it is in neither place.
    """
    for place in (Path(), Path(magicface_rt.__file__).parents[1]):
        if (place / JOB).is_file():
            return place / JOB
    raise JobError(f"there is no {JOB} here. Run this from the repository's folder, or give --job FILE.")


def _checkpoint(verb: Command, folder: Path) -> tuple[Path, Any]:
    """The demo's checkpoint, opened; made again where it is not there or not whole."""
    open_checkpoint = export_module("checkpoint").Checkpoint.open
    try:
        return folder, open_checkpoint(folder)
    except CheckpointError:
        if folder.exists():
            shutil.rmtree(folder)
    verb.note("checkpoint: writing a tiny one of random weights")
    export_module("random_weights").write_checkpoint("tiny", folder, seed=0)
    return folder, open_checkpoint(folder)


def _bundle(verb: Command, checkpoint: Any, folder: Path) -> Bundle:
    """The bundle of that checkpoint; exported again where it is not there, not whole, or of another exporter."""
    try:
        bundle = Bundle.open(folder)
        same_exporter = bundle.exporter == export_module("exporter").exporter_versions()
        if same_exporter and bundle.checkpoint_hash == checkpoint.content_hash():
            verb.note(f"bundle: using {folder} again")
            return bundle
    except BundleError:
        pass
    if folder.exists():
        shutil.rmtree(folder)
    exporter = export_module("exporter")
    bundle = exporter.export_bundle(checkpoint, folder, report=verb.note)
    assert isinstance(bundle, Bundle)
    return bundle
