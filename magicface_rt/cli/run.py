"""`magicface-rt run`: from a job to pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from magicface_rt import OptionError, Options, Progress, Request, Result, Session
from magicface_rt.jobs import Job, load_job, parse_concept_option
from magicface_rt.session import ProgressCallback

from ._backend_options import BackendOption, BuildMissingOption, DeviceOption, StoreOption, TargetOption, ThreadsOption
from ._command import Command, JsonOption, check_output_folder, command
from ._kept_options import (
    BudgetOption,
    KeepOption,
    KeptOption,
    MemoryOption,
    StorageOption,
    load_kept,
    replace_concepts,
)

STAGES = {
    "prepare": "preparing the references",
    "rsa": "stage 1, all references (RSA)",
    "rba": "stage 2, by region (RBA)",
}


def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write the pictures into.")],
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The request as JSON or YAML; paths in it count from it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to make a picture of.")] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="word=man,image=man.jpg,mask=m.png,prompt=a man,weight=2.5. May be given several times.",
        ),
    ] = None,
    kept: KeptOption = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to show.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps; 50 by default.")] = None,
    guidance: Annotated[float | None, typer.Option(metavar="X", help="Strength of the prompt; 7.5.")] = None,
    alpha: Annotated[float | None, typer.Option(metavar="X", help="Share of the first stage, 0 to 1; 0.4.")] = None,
    ca_scale: Annotated[
        float | None, typer.Option(metavar="X", help="Other words' weight for regions; 0.9 for one concept, else 0.6.")
    ] = None,
    weight_mode: Annotated[str | None, typer.Option(metavar="bias|scale", help="How weights enter; bias.")] = None,
    semantic_guidance: Annotated[
        bool | None,
        typer.Option("--semantic-guidance/--no-semantic-guidance", help="Balance the guidance between regions."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Noise of the pictures; 0.")] = None,
    images: Annotated[int | None, typer.Option(metavar="N", help="Pictures to make; 1.")] = None,
    reference_seed: Annotated[int | None, typer.Option(metavar="N", help="Noise of the references; 0.")] = None,
    keep: KeepOption = None,
    storage: StorageOption = "exact",
    memory: MemoryOption = "auto",
    budget: BudgetOption = None,
    backend: BackendOption = "auto",
    store: StoreOption = None,
    device: DeviceOption = 0,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    threads: ThreadsOption = 0,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Let pictures say how they were made.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the folder.")] = False,
    json_to: JsonOption = None,
) -> None:
    """Make pictures from a job file, or from a prompt and concepts. What is given here overrides the job.

    Prepared concepts (--kept) bring their number of steps and reference seed with them, where neither the job nor an
    option gives these.
    """
    with command(json_to) as verb:
        check_output_folder(out, overwrite=overwrite)
        settings = {
            "negative_prompt": negative_prompt,
            "steps": steps,
            "guidance": guidance,
            "alpha": alpha,
            "ca_scale": ca_scale,
            "weight_mode": weight_mode,
            "semantic_guidance": semantic_guidance,
            "seed": seed,
            "images": images,
            "reference_seed": reference_seed,
        }
        request = build_request(job, prompt, concept or [], settings, kept or [])
        with (
            Session(
                bundle,
                backend=backend,
                threads=threads,
                provenance=provenance,
                device=device,
                store=store,
                target=target,
                build_missing=build_missing,
                keep=keep,
                memory=memory,
                budget=budget,
                storage=storage,
            ) as session,
            progress_bar(request.options) as progress,
        ):
            result = session.generate(request.prompt, request.concepts, options=request.options, progress=progress)
        folder = result.save(out, overwrite=overwrite)
        verb.outcome = {"out": str(folder), "run": result.to_dict()}
        print_result(verb, result, folder)


def build_request(
    job: Path | None, prompt: str | None, concepts: list[str], settings: dict[str, Any], kept: Sequence[str] = ()
) -> Request:
    """Build the request from a job, overridden by what the command line gives; settings that are None were not given.

    `concepts` take the place of the job's, and are read as the job says, where they do not say it themselves.
    If neither gives `steps` or `reference_seed`, they are those of the first kept concept.

    Raises:
        InputError: neither job nor prompt was given; or a value or file cannot be used.
    """
    if job is None and prompt is None:
        raise OptionError("neither --job nor --prompt was given, expected one of them.")
    base = load_job(job) if job is not None else Job("", (), Options())
    bare = [parse_concept_option(text, job=base) for text in concepts] or base.concepts
    prepared = load_kept(kept)
    brought: dict[str, int] = {}
    if prepared:
        of_the_job, file = _keys_of(job), prepared[0].file
        brought = {name: getattr(file, name) for name in ("steps", "reference_seed") if name not in of_the_job}
    given = {name: value for name, value in settings.items() if value is not None}
    return Request(
        base.prompt if prompt is None else prompt,
        replace_concepts(bare, prepared),
        Options(**{**base.options.to_dict(), **brought, **given}),
    )


def _keys_of(job: Path | None) -> set[str]:
    """Return the keys in a job that `load_job` has read: its options do not show which of them are defaults."""
    if job is None:
        return set()
    text = job.read_text(encoding="utf-8-sig")
    try:
        return set(json.loads(text))
    except ValueError:
        return set(yaml.safe_load(text))


@contextmanager
def progress_bar(options: Options) -> Iterator[ProgressCallback | None]:
    """Show a progress bar on stderr, if that is a terminal, and yield the callback that moves it; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("step {task.fields[step]} of {task.fields[steps]}"), BarColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=options.steps, step=0, steps=options.steps)

        def moved(progress: Progress) -> None:
            batch = f", batch {progress.batch + 1} of {progress.batches}" if progress.batches > 1 else ""
            bar.update(
                task,
                total=progress.steps * progress.batches,
                completed=progress.batch * progress.steps + progress.step,
                step=progress.step,
                steps=progress.steps,
                description=STAGES[progress.stage] + batch,
            )

        yield moved


def print_result(verb: Command, result: Result, folder: Path) -> None:
    for index in range(len(result.images)):
        verb.print(f"picture  {folder / f'image-{index}.png'}")
        verb.print(f"regions  {folder / f'regions-{index}.png'}")
    verb.print(f"settings {folder / 'run.json'}")
    timings = result.timings
    step = sum(timings.steps) / max(1, len(timings.steps))
    verb.print(f"{timings.total:.1f} s on {result.backend}, {step:.3f} s a step")
