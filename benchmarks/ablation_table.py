"""Summarise an ablation's rows over its seeds, by mean and standard deviation, as CSV cells and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from .encoders import COLUMNS
from .sweeping import Row, Variant, ranges
from .watching import DISTANCE_LAYERS

FIGURES = ("coverage", "last_coverage", "mass", "mass_everywhere", "distance", "steps_without_region", *COLUMNS)
SETTINGS = ("changed", "alpha", "weight", "weight_mode", "semantic_guidance", "layers", "concept")


@dataclass(frozen=True)
class Spread:
    """The spread of one figure over the seeds.

    mean: None if no picture had the figure; deviation: of the sample, None for fewer than two; count: pictures that had
    it, those in which the concept had a region.
    """

    mean: float | None
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        found = [value for value in values if value is not None]
        return cls(mean(found) if found else None, stdev(found) if len(found) > 1 else None, len(found))


@dataclass(frozen=True)
class Summary:
    """One concept under one setting, over all seeds.

    first: the first seed's row, for what all rows have in common; by_reference: attention mass on each of the concept's
    references.
    """

    first: Row
    seeds: int
    figures: dict[str, Spread]
    by_reference: tuple[Spread, ...]

    def cells(self) -> dict[str, Any]:
        """The CSV cells. A figure's mean has its name; with `_sd` that is its deviation, with `_n` its count."""
        settings = self.first.cells()
        cells: dict[str, Any] = {name: settings[name] for name in SETTINGS}
        cells |= {"seeds": self.seeds, "steps": self.first.steps, "mass_layers": settings["mass_layers"]}
        cells["distance_layers"] = settings["distance_layers"]
        cells["mass_by_reference"] = " ".join(_plain(one.mean) for one in self.by_reference)
        cells["mass_by_reference_sd"] = " ".join(_plain(one.deviation) for one in self.by_reference)
        for name, one in self.figures.items():
            cells |= {name: one.mean, f"{name}_sd": one.deviation, f"{name}_n": one.count}
        return cells


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Make a summary for each setting and concept, in the order of their first rows."""
    groups: dict[tuple[Variant, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((replace(row.variant, seed=0), row.concept), []).append(row)
    return [
        Summary(
            group[0],
            len(group),
            {name: Spread.of(row.cells()[name] for row in group) for name in FIGURES},
            tuple(map(Spread.of, zip(*(row.mass_by_reference for row in group), strict=True))),
        )
        for group in groups.values()
    ]


def text(rows: Sequence[Row], missing: Sequence[str]) -> str:
    """Format a Markdown table, with the layers that figures are of, the missing columns, and what would fill them."""
    head = ["changed", "concept", "coverage", "last coverage", "mass layers", "mass", "on each reference"]
    head += ["mass everywhere", "distance", "steps without region", *(name for name in COLUMNS if name not in missing)]
    found = summaries(rows)
    seeds = sorted({row.variant.seed for row in rows})
    lines = [
        "# Ablation",
        "",
        f"One setting changed at a time, with {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))} each; {rows[0].steps} steps. Mean ± standard deviation over the seeds. "
        "(3 of 4): in the others the concept had no region to measure in; a dash: in none, or there was no RBA step.",
        "",
        "Attention mass is that of the tokens in the region (everywhere: of all tokens), averaged over the steps and "
        "over the layers that inject, which the column before it names; it does not compare between sets of injection "
        f"layers. Distance is that in layers {ranges(DISTANCE_LAYERS)} whichever inject, so it does.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for one in found:
        figures = {name: _shown(spread, one.seeds) for name, spread in one.figures.items()}
        cells = [
            one.first.variant.changed,
            one.first.concept,
            figures["coverage"],
            figures["last_coverage"],
            ranges(one.first.variant.layers),
            figures["mass"],
            "; ".join(_shown(spread, one.seeds) for spread in one.by_reference),
            *(figures[name] for name in ("mass_everywhere", "distance", "steps_without_region")),
            *(figures[name] for name in COLUMNS if name not in missing),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "face" not in missing:
        lines += ["", "Faces are neither detected nor aligned: the boxes around region and mask are compared."]
    if missing:
        options = sorted({f"--{COLUMNS[column]} DIR" for column in missing})
        lines += ["", f"Missing columns: {', '.join(missing)}. They need encoders: {', '.join(options)}."]
    return "\n".join(lines) + "\n"


def _shown(one: Spread, seeds: int) -> str:
    if one.mean is None:
        return "-"
    said = f"{one.mean:.3g}" + ("" if one.deviation is None else f" ± {one.deviation:.2g}")
    return said if one.count == seeds else f"{said} ({one.count} of {seeds})"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
