"""`magicface-rt export`: from a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from magicface_rt.errors import OptionError

from ._bundle_view import bundle_outcome, parity_lines
from ._command import JsonOption, check_new_path, command, export_module


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A diffusers folder or a single-file .safetensors checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="The folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(metavar="fp32|fp16|bf16", help="fp32 for a CPU, the others for GPUs.")] = "fp32",
    height: Annotated[int | None, typer.Option(metavar="PX", help="A multiple of 64; else the checkpoint's.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PX", help="A multiple of 64; else the checkpoint's.")] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Self-attentions that see references: 10-15 or 10,11,12.")
    ] = None,
    concepts: Annotated[int | None, typer.Option(metavar="N", help="Most concepts of a request.")] = None,
    references: Annotated[int | None, typer.Option(metavar="N", help="Most references of a request.")] = None,
    images: Annotated[int | None, typer.Option(metavar="N", help="Most images computed together.")] = None,
    mask_share: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Part of a reference inside its mask, for tuning.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Export a checkpoint to a bundle, and compare every graph with PyTorch."""
    with command(json_to) as verb:
        check_new_path(out, "bundle folder")
        given = {
            "height": height,
            "width": width,
            "injection_layers": None if layers is None else parse_layers(layers),
            "concepts": concepts,
            "references": references,
            "images": images,
            "expected_mask_share": mask_share,
        }
        exporter = export_module("exporter")
        options = exporter.ExportOptions(dtype=dtype, **{k: v for k, v in given.items() if v is not None})
        source = export_module("checkpoint").Checkpoint.open(checkpoint)
        start = perf_counter()
        bundle = exporter.export_bundle(source, out, options, report=verb.note)
        verb.outcome = {**bundle_outcome(bundle), "seconds": perf_counter() - start}
        for line in parity_lines(bundle):
            verb.print(line)
        verb.print(f"bundle {bundle.path}: {bundle.height} x {bundle.width} px (height x width), {bundle.dtype}")
        verb.print(f"next: magicface-rt run {bundle.path} --job FILE --out DIR")


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layers given as `10-15`, `10,11,12`, or both mixed.

    Raises:
        OptionError: anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and len(first) < 4 and (not dash or (last.isdecimal() and len(last) < 4))):
            raise OptionError(f"--layers is {text!r}, expected numbers and ranges such as 10-15 or 10,11,12.")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise OptionError(f"--layers has the range {part.strip()!r}, which runs backwards.")
        layers.extend(range(low, high + 1))
    return tuple(layers)
