"""The roofline: how fast a step is, compared with what the machine can do at its FLOP per byte."""

from __future__ import annotations

from typing import Any

from .style import COLOURS, HEIGHT, MARKERS, WIDTH, Json, comparable, legend_below, plain_numbers, pyplot, subject
from .table import name


def roofline(report: Json) -> Any:
    """An RBA step's FLOP/s against its FLOP per byte, each under the measured peaks of where it ran."""
    case = max(comparable(report), key=lambda case: case["concepts"], default=None)
    points: dict[str, list[tuple[Json, float, float]]] = {}
    for outcome in case["outcomes"] if case else ():
        counts, found = outcome["counts"], outcome["steps"].get("rba")
        if found and counts["flops"].get("rba") and counts["bytes"].get("rba"):
            flops, moved = counts["flops"]["rba"], counts["bytes"]["rba"]
            where = f"cuda {case['dtype']}" if outcome.get("on_device") else "cpu"
            points.setdefault(where, []).append((outcome, flops / moved, flops / found["median"] / 1e9))
    if case is None or not points:
        return None
    roofs = {where: report["peaks"].get(where) for where in points}
    ridges = [peak["flops"] / peak["bytes_per_second"] for peak in roofs.values() if peak]
    low = min([*ridges, *(x for found in points.values() for _, x, _ in found)]) / 3
    high = max([*ridges, *(x for found in points.values() for _, x, _ in found)]) * 3
    figure, axes = pyplot().subplots(figsize=(WIDTH, HEIGHT))
    for peak, style in zip(roofs.values(), ("-", "--"), strict=False):
        if peak:
            flops, bandwidth = peak["flops"] / 1e9, peak["bytes_per_second"] / 1e9
            roof = f"measured limit: {flops:.3g} GFLOP/s, {bandwidth:.3g} GB/s\n({peak['where']})"
            corners = [low * bandwidth, flops, flops]
            axes.plot(
                [low, flops / bandwidth, high], corners, color="black", linestyle=style, linewidth=1.4, label=roof
            )
    for outcome, x, y in (point for found in points.values() for point in found):
        colour, marker = COLOURS[outcome["kind"]], MARKERS[outcome["kind"]]
        axes.plot([x], [y], marker=marker, color=colour, linestyle="none", markersize=7, label=name(outcome))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xlim(low, high)
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.set_xlabel("FLOP per byte; bytes: what every operator reads and writes, caches not counted")
    axes.set_ylabel("GFLOP/s in one RBA step")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.set_title(subject(report, case, concepts=True), fontsize=8)
    legend_below(figure, axes)
    return figure
