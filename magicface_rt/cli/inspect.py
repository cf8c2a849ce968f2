"""`magicface-rt inspect`: what a bundle is, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from magicface_rt.bundle import Bundle

from ._bundle_view import bundle_outcome, grid, size, worst_error
from ._command import JsonOption, command


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    json_to: JsonOption = None,
) -> None:
    """Show what a bundle is, takes and holds, and check every file's hash."""
    with command(json_to) as verb:
        opened = Bundle.open(bundle)
        verb.outcome = {**bundle_outcome(opened), "intact": True}
        for table in (_summary(opened), _layers(opened), _graphs(opened), _files(opened), _parity(opened)):
            verb.print(table)
            verb.print()
        verb.print("intact: every file has the size and the SHA-256 that the manifest says")


def _summary(bundle: Bundle) -> Table:
    table = grid(f"bundle {bundle.path}", "", "")
    table.show_header = False
    limits = bundle.limits
    kept = ", ".join(f"{count} on grid {bundle.grid(factor)}" for factor, count in sorted(limits.kept_tokens.items()))
    rows = {
        "architecture": bundle.architecture,
        "size": f"{bundle.height} x {bundle.width} px (height x width), latents {bundle.rows} x {bundle.columns}",
        "dtype": bundle.dtype,
        "bundle hash": bundle.hash,
        "checkpoint hash": bundle.checkpoint_hash or "none: made from a U-Net alone",
        "limits": f"{limits.concepts} concepts, {limits.references} references, {limits.images} images together",
        "reference tokens": f"at most {kept}",
        "expected mask share": f"{bundle.expected_mask_share:g}",
        "exported with": ", ".join(f"{name} {version}" for name, version in bundle.exporter.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layers(bundle: Bundle) -> Table:
    table = grid("injection layers", "layer>", "grid>", "heads>", "width>")
    for layer in bundle.injection_layers:
        rows, columns = bundle.grid(layer.factor)
        table.add_row(str(layer.index), f"{rows} x {columns}", str(layer.num_heads), str(layer.width))
    return table


def _graphs(bundle: Bundle) -> Table:
    table = grid("graphs", "graph", "", "tensor")
    for name, graph in bundle.graphs.items():
        for direction, tensors in (("in", graph.inputs), ("out", graph.outputs)):
            for number, tensor in enumerate(tensors):
                first = direction == "in" and number == 0
                table.add_row(name if first else "", "" if number else direction, str(tensor))
    return table


def _files(bundle: Bundle) -> Table:
    table = grid("files", "file", "size>", "SHA-256")
    for name, entry in bundle.files.items():
        table.add_row(name, size(int(entry["bytes"])), f"{str(entry['sha256'])[:16]}...")
    table.add_row("all", size(sum(int(entry["bytes"]) for entry in bundle.files.values())), "")
    return table


def _parity(bundle: Bundle) -> Table:
    table = grid("difference from PyTorch, measured at export", "graph", "worst output", "error>", "tolerance>")
    for name, parity in bundle.parity.items():
        worst, error, tolerance = worst_error(parity)
        table.add_row(name, worst, f"{error:.1e}", f"{tolerance:.0e}")
    return table
