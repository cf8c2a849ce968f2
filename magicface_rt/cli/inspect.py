"""`magicface-rt inspect`: what a bundle or a kept concept is, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from magicface_rt import KeptConcept
from magicface_rt.bundle import Bundle

from ._bundle_view import bundle_outcome, grid, parities, size
from ._command import JsonOption, command


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder, or the file of a prepared concept.")],
    json_to: JsonOption = None,
) -> None:
    """Show what a bundle or a prepared concept is, takes and holds, and check every hash."""
    with command(json_to) as verb:
        if bundle.is_file():
            kept = KeptConcept.load(bundle)
            verb.outcome = {
                "path": str(bundle),
                "bytes": kept.nbytes,
                "pictures": sorted(kept.pictures),
                "intact": True,
            }
            verb.outcome |= kept.to_dict()
            for table in (_kept_summary(bundle, kept), _kept_references(kept)):
                verb.print(table)
                verb.print()
            verb.print("intact: every tensor has the size and the SHA-256 that the manifest says")
            return
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


def _kept_summary(path: Path, kept: KeptConcept) -> Table:
    table = grid(f"kept concept {path}", "", "")
    table.show_header = False
    origin = kept.origin
    rows = {
        "word": kept.word,
        "name": kept.name,
        "weight": f"{kept.weight:g}",
        "good for": f"{kept.steps} steps, reference_seed {kept.reference_seed}",
        "of the bundle": f"{origin.bundle_hash} ({origin.architecture}, {origin.height} x {origin.width} px)",
        "keys": f"{size(kept.nbytes)}, {origin.dtype}",
        "images": ", ".join(sorted(kept.pictures)) or "none stored",
        "note": kept.note or "none",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _kept_references(kept: KeptConcept) -> Table:
    table = grid("references", "reference>", "prompt", "tokens kept", "storage", "error>", "size>")
    for number, reference in enumerate(kept.references, 1):
        tokens = ", ".join(f"{count} at factor {factor}" for factor, count in sorted(reference.tokens.items()))
        error = f"{reference.error:.1e}" if reference.error else "0"
        table.add_row(str(number), reference.prompt, tokens, reference.storage, error, size(reference.nbytes))
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
    for row in parities(bundle):
        table.add_row(*row)
    return table
