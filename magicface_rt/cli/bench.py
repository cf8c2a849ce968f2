"""`magicface-rt bench`: measures time and memory, against what one would otherwise run."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from magicface_rt import Bundle
from magicface_rt.errors import BackendMissingError, InputError, OptionError, OutputError
from magicface_rt.process.interrupts import reraise_if_interrupt

from ._backend_options import StoreOption
from ._command import JsonOption, command, export_module

DEFAULT_KINDS = "authors,strong,plain,bare,kept"
DEFAULT_OURS = "bare,kept"


def bench(
    bundle: Annotated[list[Path], typer.Argument(help="Bundles; one for each size that shall be measured.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What they were exported from. Without it there is no PyTorch beside them."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = Path("bench-out"),
    contenders: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Of authors, strong, compiled, plain, bare, kept. {DEFAULT_KINDS}; {DEFAULT_OURS} without PyTorch.",
        ),
    ] = None,
    backends: Annotated[
        str, typer.Option(metavar="LIST", help="Of those that `magicface-rt doctor` finds working; or all.")
    ] = "onnxruntime-cpu",
    concepts: Annotated[str, typer.Option(metavar="LIST", help="Numbers of concepts.")] = "0,1,2,3,4",
    mask_share: Annotated[str, typer.Option(metavar="LIST", help="Percent of a reference inside its mask.")] = "30",
    images: Annotated[str, typer.Option(metavar="LIST", help="Pictures of a request.")] = "1",
    steps: Annotated[str, typer.Option(metavar="LIST", help="Denoising steps of a request.")] = "50",
    one_at_a_time: Annotated[
        bool,
        typer.Option("--one-at-a-time", help="Vary each list alone, with the first value of the others; else all."),
    ] = False,
    rounds: Annotated[int, typer.Option(metavar="N", help="Single steps of each stage, by each in turn.")] = 5,
    requests: Annotated[
        int, typer.Option(metavar="N", help="Whole requests after the first, by each in turn; 0 for none.")
    ] = 2,
    parity_steps: Annotated[int, typer.Option(metavar="N", help="Steps of the run that is compared first.")] = 3,
    oracle: Annotated[str, typer.Option(metavar="auto|reference|strong|bare", help="Whom parity is judged by.")] = (
        "auto"
    ),
    alone: Annotated[
        str, typer.Option(metavar="LIST", help="Contenders that run when the others have ended, for their memory.")
    ] = "",
    alone_rounds: Annotated[int, typer.Option(metavar="N", help="Rounds for those.")] = 1,
    alpha: Annotated[float, typer.Option(metavar="X", help="Share of the first stage.")] = 0.4,
    threads: Annotated[int, typer.Option(metavar="N", help="Of each contender on the CPU; 0 for its own choice.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the sound cases that OUT/bench.json has; measure what it lacks.")
    ] = False,
    limit: Annotated[
        float, typer.Option(metavar="S", help="Seconds for one step, request or compared run; then it has failed.")
    ] = 3600.0,
    torch_device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="PyTorch's; ratios are of the same device only.")
    ] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Of drawn inputs.")] = 0,
    store: StoreOption = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG and SVG; needs the extra bench.")] = True,
    json_to: JsonOption = None,
) -> None:
    """Time the SDK beside PyTorch. Parity is checked first, and nothing that makes another picture is timed."""
    with command(json_to) as verb:
        settings_module = benchmark_module("settings")
        default = DEFAULT_KINDS if checkpoint is not None else DEFAULT_OURS
        settings = settings_module.Settings(
            bundles=tuple(map(str, bundle)),
            checkpoint=None if checkpoint is None else str(checkpoint),
            kinds=_words(contenders or default),
            backends=_backends(backends, store is not None, verb.note),
            concepts=_numbers("concepts", concepts),
            mask_shares=tuple(percent / 100 for percent in _numbers("mask-share", mask_share)),
            images=_numbers("images", images),
            steps=_numbers("steps", steps),
            step_rounds=rounds,
            request_rounds=requests,
            parity_steps=parity_steps,
            oracle=oracle,
            alone=_words(alone),
            alone_rounds=alone_rounds,
            alpha=alpha,
            threads=threads,
            limit=limit,
            torch_device=torch_device,
            store=None if store is None else str(store),
            seed=seed,
            one_at_a_time=one_at_a_time,
        )
        write = benchmark_module("output").write
        bundles = _check_before_hours(out, bundle, checkpoint)
        earlier = benchmark_module("resuming").Earlier(out / "bench.json", settings, bundles) if resume else None
        run = benchmark_module("bench").run
        report = run(settings, verb.note, lambda so_far: write(so_far, out, plots=False), earlier)
        made = write(report, out, plots=plots)
        verb.outcome = report.to_json()
        verb.print((out / "bench.md").read_text(encoding="utf-8"))
        for file in made:
            verb.note(f"wrote {file}")
        statuses = [outcome.status for case in report.cases for outcome in case.outcomes]
        if "wrong picture" in statuses or "failed" in statuses:
            verb.note("error: a contender failed or made another picture; the table says which.")
            verb.fail()


def _check_before_hours(out: Path, bundles: list[Path], checkpoint: Path | None) -> dict[str, Bundle]:
    """Check what would otherwise only be noticed once the first case has been measured; return the bundles by path.

    Raises:
        BundleError: a folder is no bundle.
        InputError: the checkpoint is not what a bundle was made from.
        OutputError: nothing can be written to the output folder.
    """
    opened = {str(path): Bundle.open(path, check_hashes=False) for path in bundles}
    if checkpoint is not None:
        source = export_module("checkpoint").Checkpoint.open(checkpoint)
        found = source.content_hash()
        for bundle in opened.values():
            if reason := export_module("made_from").why_not_made_from(bundle, source, found):
                raise InputError(f"{reason}: their pictures differ. Name the one that it was made from.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OutputError(f"nothing can be written into {out}: {error}. Name another folder with --out.") from error
    return opened


def benchmark_module(name: str) -> Any:
    """Import a module of `magicface_rt.benchmarks`.

    Raises:
        BackendMissingError: something that it needs is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return importlib.import_module(f"magicface_rt.benchmarks.{name}")
    except ImportError as error:
        reraise_if_interrupt(error)
        raise BackendMissingError(
            f"benchmarks need the extras export and bench, which are not installed or not whole ({error}). "
            "Install them: pip install 'magicface_rt[cpu,export,bench]'"
        ) from error


def _backends(text: str, with_store: bool, note: Callable[[str], object]) -> tuple[str, ...]:
    """Return the named backends, or for "all" those that work here; a backend that serves plans needs the store that
    holds them.
    """
    from magicface_rt.backends import BACKENDS, FLAVOURS, why_not

    concrete = [name for name in BACKENDS if name not in ("auto", "onnxruntime")]
    named = _words(text)
    if named == ("all",):
        found = []
        for name in concrete:
            reason = why_not(name)
            if not reason and name in FLAVOURS and not with_store:
                reason = "it serves plans out of an engine store, and --store names none"
            if reason:
                note(f"backend {name} takes no part: {reason}")
            else:
                found.append(name)
        return tuple(found)
    for name in named:
        if name not in concrete:
            raise OptionError(f"--backends: {name!r} is not known; there are {', '.join(concrete)}, or all.")
        if reason := why_not(name):
            raise BackendMissingError(f"backend {name} does not work here: {reason}. See `magicface-rt doctor`.")
    return named


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse whole numbers between commas.

    Raises:
        OptionError: there is something else, or nothing.
    """
    try:
        found = tuple(int(word) for word in _words(text))
    except ValueError:
        raise OptionError(f"--{option} is {text!r}, expected whole numbers with commas between them.") from None
    if not found:
        raise OptionError(f"--{option} is empty, expected at least one whole number.")
    return found
