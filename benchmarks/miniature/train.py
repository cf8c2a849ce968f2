"""Train the miniature and write it as a diffusers folder.

    python -m benchmarks.miniature.train --size small --out RUN                               # all stages
    python -m benchmarks.miniature.train --size small --out RUN --export-only --export DIR    # writes what there is

A run that was stopped (Ctrl-C, SIGTERM, --minutes, or killed) is continued by the same command.
The run's folder holds, for each stage, `state/` (to continue from), `log.jsonl` and `sheets/`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .architecture import SIZES, write_checkpoint
from .crew import Crew, crew_of
from .training import AutoencoderStage, DenoiserStage, Plan, Stage

AUTOENCODER = {
    "test": Plan(pictures=64, batch=8, rate=1e-3, warm_up=16),
    "small": Plan(pictures=32_000, batch=8, rate=5e-4, warm_up=800, plateau=20_000, landing=0.4, average=2_000),
    "full": Plan(pictures=400_000, batch=32, rate=1e-3, warm_up=3_000, landing=0.4, average=10_000),
}
DENOISER = {
    "test": Plan(pictures=64, batch=8, rate=1e-3, warm_up=16),
    "small": Plan(pictures=110_000, batch=32, rate=1e-3, warm_up=4_000, grounding=0.02),
    "full": Plan(
        pictures=2_400_000, batch=256, rate=1.5e-3, warm_up=40_000, plateau=400_000, average=100_000, grounding=0.02
    ),
}
SAVE_SECONDS = 600.0
LINE_SECONDS = 30.0
LOG_EVERY = 25  # steps


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if trained to the end (or exported), 3 if stopped before the end; then the same command continues."""
    options = _parser().parse_args(arguments)
    if options.processes > 1 and options.device != "cpu":
        raise SystemExit("--processes is for training on a CPU, where each takes its part of a batch")
    with crew_of(options.processes, train, options) as crew:
        return train(crew, options)


def train(crew: Crew, options: argparse.Namespace) -> int:
    """Do what `main` does, in one process of a crew; all but the first only take training steps."""
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // crew.size))
    device = torch.device(options.device)
    size, out = SIZES[options.size], options.out
    bf16 = options.precision == "bf16"
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    console = Console()
    stop = _Stop(options.minutes) if crew.rank == 0 else None

    plan = _changed(AUTOENCODER[options.size], pictures=options.autoencoder_pictures)
    autoencoder = AutoencoderStage(size, plan, seed=options.seed, device=device, bf16=bf16)
    autoencoder.load(out / autoencoder.name / "state")
    if not options.export_only and not run(autoencoder, out, crew, stop, console, options.sheet_every):
        return 3
    if options.stage == "autoencoder":
        return 0
    if not autoencoder.done and not options.export_only:
        return 3
    plan = _changed(
        DENOISER[options.size],
        pictures=options.pictures,
        batch=options.batch,
        rate=options.rate,
        grounding=options.grounding,
    )
    denoiser = DenoiserStage(
        size, plan, autoencoder.finished(), seed=options.seed, device=device, bf16=bf16, compiled=options.compile
    )
    denoiser.load(out / denoiser.name / "state")
    finished = options.export_only or run(denoiser, out, crew, stop, console, options.sheet_every)
    if options.export and crew.rank == 0:
        with denoiser.averaged():
            provenance: dict[str, object] = {
                "size": options.size,
                "seed": options.seed,
                "autoencoder": {"pictures": autoencoder.seen, "plan": asdict(autoencoder.plan)},
                "denoiser": {"pictures": denoiser.seen, "plan": asdict(denoiser.plan)},
                "processes": crew.size,
                "precision": options.precision,
                "torch": torch.__version__,
            }
            size_bytes = write_checkpoint(denoiser.model(), options.export, provenance=provenance)
        console.print(f"wrote {options.export}: {size_bytes / 1e6:.1f} MB, from {denoiser.seen} pictures")
    return 0 if finished else 3


def run(stage: Stage, out: Path, crew: Crew, stop: _Stop | None, console: Console, sheet_every: int) -> bool:
    """Train a stage to its end, or until `stop` says so: then save and return False."""
    if stop is None:  # another process decides, and writes
        while not stage.done and crew.agree():
            stage.step(crew)
        return stage.done
    folder = out / stage.name
    log = folder / "log.jsonl"
    _forget_after(log, stage.seen)
    folder.mkdir(parents=True, exist_ok=True)
    steps, saved = 0, time.monotonic()
    totals: dict[str, torch.Tensor] = {}
    with _Display(stage, console) as show, log.open("a", encoding="utf-8") as lines:

        def write(entry: dict[str, object]) -> None:
            lines.write(json.dumps({"pictures": stage.seen, **entry}) + "\n")
            lines.flush()

        if not stage.done:
            write({"plan": asdict(stage.plan)})
        while not stage.done and crew.agree(not stop.now()):
            for name, value in stage.step(crew).items():
                totals[name] = totals.get(name, 0.0) + value
            steps += 1
            if steps % LOG_EVERY == 0 or stage.done:
                count = steps % LOG_EVERY or LOG_EVERY
                means = {name: round(float(value) / count, 5) for name, value in totals.items()}
                write({**means, "rate": stage.plan.learning_rate(stage.seen), "speed": round(show.speed(), 2)})
                totals = {}
                show.update(means)
            if stage.seen // sheet_every != (stage.seen - stage.plan.batch) // sheet_every or stage.done:
                write({"sheet": stage.sheet(folder / "sheets" / f"{stage.seen:08d}.png")})
            if time.monotonic() - saved > SAVE_SECONDS:
                stage.save(folder / "state")
                saved = time.monotonic()
        if steps:
            stage.save(folder / "state")
    return stage.done


class _Stop:
    """Knows whether to stop: because the minutes are over, or SIGINT or SIGTERM came."""

    def __init__(self, minutes: float | None) -> None:
        self._until = None if minutes is None else time.monotonic() + 60 * minutes
        self._told = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._tell)

    def _tell(self, *_: object) -> None:
        self._told = True

    def now(self) -> bool:
        return self._told or (self._until is not None and time.monotonic() > self._until)


class _Display:
    """A bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, stage: Stage, console: Console) -> None:
        self._stage, self._console = stage, console
        self._first, self._begun, self._spoke = stage.seen, time.monotonic(), 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(stage.name, total=stage.plan.pictures, completed=stage.seen, figures="")

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def speed(self) -> float:
        """Pictures a second since this call began."""
        return (self._stage.seen - self._first) / max(1e-9, time.monotonic() - self._begun)

    def update(self, means: dict[str, float]) -> None:
        figures = " ".join(f"{name} {value:.4f}" for name, value in means.items()) + f" {self.speed():.1f}/s"
        self._progress.update(self._task, completed=self._stage.seen, figures=figures)
        if not self._console.is_terminal and time.monotonic() - self._spoke > LINE_SECONDS:
            self._spoke = time.monotonic()
            left = (self._stage.plan.pictures - self._stage.seen) / self.speed() / 60
            print(
                f"{self._stage.name} {self._stage.seen}/{self._stage.plan.pictures} {figures}, {left:.0f} min left",
                flush=True,
            )


def _forget_after(log: Path, seen: int) -> None:
    """Drop the lines of steps that the loaded state has not made."""
    if log.is_file():
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["pictures"] <= seen]
        log.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _changed(plan: Plan, **values: float | None) -> Plan:
    return replace(plan, **{name: value for name, value in values.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Callable[..., object] = parser.add_argument
    add("--size", choices=sorted(SIZES), default="small")
    add("--out", type=Path, required=True, help="the run's folder")
    add("--stage", choices=("all", "autoencoder"), default="all", help="where to end")
    add("--pictures", type=int, help="length of the U-Net's training; raise it to go on with a finished run")
    add("--autoencoder-pictures", type=int, help="length of the autoencoder's training")
    add("--minutes", type=float, help="stop, saved, after so many minutes; the same command goes on")
    add("--batch", type=int)
    add("--rate", type=float, help="learning rate of the U-Net and text encoder")
    add("--grounding", type=float, help="weight of the loss that draws a word's attention to the part it names")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--compile", action="store_true", help="torch.compile for the U-Net")
    add("--processes", type=int, default=1, help="on a CPU: each takes its part of every batch")
    add("--threads", type=int, default=0, help="of each process; 0 shares out the cores")
    add("--sheet-every", type=int, default=20_000, help="pictures between two sample sheets")
    add("--export", type=Path, help="write the averaged weights as a diffusers folder in fp16")
    add("--export-only", action="store_true", help="do not train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
