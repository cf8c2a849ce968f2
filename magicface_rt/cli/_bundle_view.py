"""Shows a bundle as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from magicface_rt.bundle import CUDA_RUNTIME, Bundle
from magicface_rt.values.shown import one_line


def bundle_outcome(bundle: Bundle) -> dict[str, Any]:
    """Return everything about a bundle, as JSON can hold it."""
    return {
        "bundle": str(bundle.path),
        "hash": bundle.hash,
        "architecture": bundle.architecture,
        "checkpoint_hash": bundle.checkpoint_hash,
        "dtype": bundle.dtype,
        "height": bundle.height,
        "width": bundle.width,
        "limits": asdict(bundle.limits),
        "expected_mask_share": bundle.expected_mask_share,
        "injection_layers": [asdict(layer) for layer in bundle.injection_layers],
        "scheduler": bundle.schedule.to_config(),
        "graphs": {
            name: {
                "inputs": [str(tensor) for tensor in graph.inputs],
                "outputs": [str(tensor) for tensor in graph.outputs],
                "files": dict(graph.files),
            }
            for name, graph in bundle.graphs.items()
        },
        "files": {name: dict(entry) for name, entry in bundle.files.items()},
        "exporter": dict(bundle.exporter),
        "parity": dict(bundle.parity),
    }


def parity_lines(bundle: Bundle) -> Iterator[str]:
    """Yield a line for each comparison at export, with the error that comes nearest to its tolerance."""
    for name, worst, error, tolerance in parities(bundle):
        yield f"{name}: {worst} differs from PyTorch by {error}, tolerance {tolerance}"


def parities(bundle: Bundle) -> Iterator[tuple[str, str, str, str]]:
    """Yield for each graph, and for its form for the CUDA provider, what was measured at export: its name, the output
    whose error comes nearest to its tolerance, that error and the tolerance.
    """
    for name, parity in bundle.parity.items():
        forms = {name: parity}
        if CUDA_RUNTIME in parity:
            forms[f"{name} ({CUDA_RUNTIME})"] = parity[CUDA_RUNTIME]
        for form, measured in forms.items():
            worst, error, tolerance = _worst_error(measured)
            # Both with as many digits: an error below its tolerance must not be shown above it.
            yield form, worst, f"{error:.1e}", f"{tolerance:.1e}"


def _worst_error(parity: Any) -> tuple[str, float, float]:
    errors, tolerances = parity["errors"], parity["tolerance"]

    def share(output: str) -> float:
        error = float(errors[output])
        return error / float(tolerances[output]) if math.isfinite(error) else math.inf

    worst = max(errors, key=share)
    return worst, float(errors[worst]), float(tolerances[worst])


class Grid(Table):
    """A table that keeps each text to one line, since some texts come from untrusted files."""

    def add_row(self, *cells: Any, **settings: Any) -> None:
        super().add_row(*(one_line(cell) if isinstance(cell, str) else cell for cell in cells), **settings)


def grid(title: str, *columns: str) -> Grid:
    """Make a plain table; a column whose name ends in > is aligned to the right."""
    table = Grid(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def size(count: float) -> str:
    """Format a number of bytes for readers."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
