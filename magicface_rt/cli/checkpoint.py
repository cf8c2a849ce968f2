"""`magicface-rt checkpoint`: a checkpoint of random weights, for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._command import JsonOption, check_new_path, command, export_module


def checkpoint(
    architecture: Annotated[str, typer.Argument(metavar="tiny|sd15|sd21-base", help="The network's shape.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same weights.")] = 0,
    dtype: Annotated[str, typer.Option(metavar="float32|float16", help="What the weights are stored as.")] = "float32",
    json_to: JsonOption = None,
) -> None:
    """Write a checkpoint of random weights in diffusers' layout. It makes no likeness; it is for tests."""
    with command(json_to) as verb:
        check_new_path(out, "checkpoint folder")
        write_checkpoint = export_module("random_weights").write_checkpoint
        if architecture in export_module("architectures").ARCHITECTURES:
            verb.note(f"writing a random checkpoint of the shape {architecture}")
        path = Path(write_checkpoint(architecture, out, seed=seed, dtype=dtype))
        verb.outcome = {"checkpoint": str(path), "architecture": architecture, "seed": seed, "dtype": dtype}
        verb.print(f"checkpoint {path} (random weights: it makes no likeness)")
        verb.print(f"next: magicface-rt export {path} --out BUNDLE")
