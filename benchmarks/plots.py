"""A report as pictures, PNG and SVG, from its JSON. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from magicface_rt.errors import BackendMissingError

from .table import name

Json = Mapping[str, Any]

WIDTH, HEIGHT = 7.0, 4.2
"""Inches: read at the width of a page."""
COLOURS = {
    "authors": "#b2182b",
    "strong": "#ef8a62",
    "compiled": "#8073ac",
    "plain": "#666666",
    "bare": "#67a9cf",
    "kept": "#2166ac",
}
MARKERS = {"authors": "o", "strong": "s", "compiled": "D", "plain": "x", "bare": "^", "kept": "v"}
STAGE_TITLES = {
    "loading": "read images",
    "text": "text encoder",
    "vae_encode": "VAE encoder",
    "reference_pass": "reference pass",
    "rsa_steps": "RSA steps",
    "rba_steps": "RBA steps",
    "steps": "steps (no stages)",
    "decode": "VAE decoder",
}
STAGE_COLOURS = ("#bdbdbd", "#fdae61", "#fee090", "#92c5de", "#4575b4", "#313695", "#888888", "#7fbc41")


def draw(report: Json, folder: Path) -> list[Path]:
    """Every plot that the report has the numbers for; returns the files.

    Raises:
        BackendMissingError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BackendMissingError(
            "plots need matplotlib, which is not installed. Install it: pip install 'magicface_rt[bench]'"
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "magicface", "figure.dpi": 150})
    made: list[Path] = []
    for plot in (latency, memory, stages, roofline):
        figure = plot(report)
        if figure is None:
            continue
        for kind in ("png", "svg"):
            file = folder / f"{plot.__name__}.{kind}"
            figure.savefig(file, bbox_inches="tight")
            made.append(file)
        _pyplot().close(figure)
    return made


def latency(report: Json) -> Any:
    """Seconds of an RBA step against the number of concepts."""

    def value(outcome: Json) -> tuple[float, float, float] | None:
        found = outcome["steps"].get("rba")
        return None if found is None else (found["median"], found["fastest"], found["slowest"])

    return _against_concepts(report, value, "seconds for one RBA step", logarithmic=True, whiskers="fastest to slowest")


def memory(report: Json) -> Any:
    """Peak memory against the number of concepts: the device's, where there is one."""
    measured = [o for case in report["cases"] for o in case["outcomes"] if o["status"] == "measured"]
    on_device = any(o["device_peak_bytes"] for o in measured)
    key = "device_peak_bytes" if on_device else "host_peak_bytes"

    def value(outcome: Json) -> tuple[float, float, float] | None:
        found = outcome[key]
        return None if found is None else (found / 1e9,) * 3

    where = "device" if on_device else "host"
    return _against_concepts(report, value, f"peak {where} memory of the process, GB", logarithmic=False)


def _against_concepts(
    report: Json,
    value: Callable[[Json], tuple[float, float, float] | None],
    label: str,
    *,
    logarithmic: bool,
    whiskers: str = "",
) -> Any:
    cases = _comparable(report)
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    kinds: dict[str, str] = {}
    for case in cases:
        for outcome in case["outcomes"]:
            found = value(outcome) if outcome["status"] == "measured" else None
            if found is not None:
                kinds[name(outcome)] = outcome["kind"]
                lines.setdefault(name(outcome), []).append((case["concepts"], *found))
    if not lines:
        return None
    figure, axes = _pyplot().subplots(figsize=(WIDTH, HEIGHT))
    for number, (title, points) in enumerate(lines.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        shift = (number - (len(lines) - 1) / 2) * 0.03  # so that whiskers do not hide each other
        bars = [[b - a for a, b in zip(low, y, strict=True)], [max(0.0, c - b) for b, c in zip(y, high, strict=True)]]
        axes.errorbar(
            [v + shift for v in x],
            y,
            yerr=bars if whiskers else None,
            label=title,
            color=COLOURS[kinds[title]],
            marker=MARKERS[kinds[title]],
            markersize=5,
            linewidth=1.4,
            capsize=2,
        )
    axes.set_xlabel("concepts N, one reference each")
    axes.set_ylabel(label)
    ticks = sorted({case["concepts"] for case in cases})
    axes.set_xticks(ticks)
    axes.set_xlim(ticks[0] - 0.5, ticks[-1] + 0.5)
    if logarithmic:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.set_title(_subject(report, cases[0]) + (f"; whiskers: {whiskers}" if whiskers else ""), fontsize=8)
    _legend_below(figure, axes)
    return figure


def stages(report: Json) -> Any:
    """Where a request's seconds go, for the case with most concepts; a step's, where no requests were made."""
    case = max(_comparable(report), key=lambda case: case["concepts"], default=None)
    if case is None:
        return None
    measured = [o for o in case["outcomes"] if o["status"] == "measured"]
    bars: dict[str, dict[str, float]] = {}
    for outcome in measured:
        if outcome["requests"] and outcome["requests"]["stages"]:
            bars[name(outcome)] = {k: v["median"] for k, v in outcome["requests"]["stages"].items()}
    label = f"seconds of a request of {case['steps']} steps, median of each stage"
    if not bars:
        label = "seconds of one RSA step and one RBA step, medians"
        for outcome in measured:
            found = {k: v["median"] for k, v in outcome["steps"].items()}
            apart = found.get("reference_pass", 0.0)
            bars[name(outcome)] = {
                "reference_pass": 2 * apart,
                "rsa_steps": found["rsa"] - apart,
                "rba_steps": found["rba"] - apart,
            }
    if not bars:
        return None
    figure, axes = _pyplot().subplots(figsize=(WIDTH, 1.6 + 0.42 * len(bars)))
    left = dict.fromkeys(bars, 0.0)
    for (stage, title), colour in zip(STAGE_TITLES.items(), STAGE_COLOURS, strict=True):
        values = [found.get(stage, 0.0) for found in bars.values()]
        if any(values):
            axes.barh(list(bars), values, left=list(left.values()), label=title, color=colour, height=0.6)
            left = {key: left[key] + value for key, value in zip(bars, values, strict=True)}
    longest = max(left.values())
    for row, total in enumerate(left.values()):
        axes.text(total + 0.01 * longest, row, f"{total:.3g} s", va="center", fontsize=8)
    axes.set_xlim(0, longest * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(_subject(report, case, concepts=True), fontsize=8)
    _legend_below(figure, axes)
    return figure


def roofline(report: Json) -> Any:
    """An RBA step's FLOP/s against its FLOP per byte, under the machine's measured peaks."""
    case = max(_comparable(report), key=lambda case: case["concepts"], default=None)
    points = []
    for outcome in case["outcomes"] if case else ():
        counts, found = outcome["counts"], outcome["steps"].get("rba")
        if found and counts["flops"].get("rba") and counts["bytes"].get("rba"):
            flops, moved = counts["flops"]["rba"], counts["bytes"]["rba"]
            points.append((outcome, flops / moved, flops / found["median"] / 1e9))
    if case is None or not points:
        return None
    on_gpu = report["peaks"].get("cuda") and any(not p[0]["backend"].endswith("cpu") for p in points if p[0]["backend"])
    peak = report["peaks"]["cuda" if on_gpu else "cpu"]
    flops, bandwidth = peak["flops"] / 1e9, peak["bytes_per_second"] / 1e9
    ridge = flops / bandwidth
    low = min([ridge, *(p[1] for p in points)]) / 3
    high = max([ridge, *(p[1] for p in points)]) * 3
    figure, axes = _pyplot().subplots(figsize=(WIDTH, HEIGHT))
    roof = f"measured limit: {flops:.3g} GFLOP/s, {bandwidth:.3g} GB/s\n({peak['where']})"
    axes.plot([low, ridge, high], [low * bandwidth, flops, flops], color="black", linewidth=1.4, label=roof)
    for outcome, x, y in points:
        colour, marker = COLOURS[outcome["kind"]], MARKERS[outcome["kind"]]
        axes.plot([x], [y], marker=marker, color=colour, linestyle="none", markersize=7, label=name(outcome))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("FLOP per byte; bytes: what every operator reads and writes, caches not counted")
    axes.set_ylabel("GFLOP/s in one RBA step")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    axes.set_title(_subject(report, case, concepts=True), fontsize=8)
    _legend_below(figure, axes)
    return figure


def _comparable(report: Json) -> list[Json]:
    """Cases that differ from the first in the number of concepts alone."""
    keys = ("bundle", "images", "steps")
    cases = report["cases"]
    first = next((c for c in cases if c["concepts"]), cases[0]) if cases else None
    return [
        c
        for c in cases
        if all(c[key] == first[key] for key in keys) and (c["mask_share"] == first["mask_share"] or not c["concepts"])
    ]


def _subject(report: Json, case: Json, concepts: bool = False) -> str:
    machine = report["machine"]
    where = machine["gpu"].split(",")[0] if machine["gpu"] else f"{machine['cores']} CPU cores"
    count = f"N = {case['concepts']}, " if concepts else ""
    images = "" if case["images"] == 1 else f", {case['images']} images"
    load = "" if machine["quiet"] else "; machine not quiet"
    share = report["settings"]["mask_shares"][0] if not case["concepts"] else case["mask_share"]
    return f"{case['width']} x {case['height']} px, {case['dtype']}, {count}masks {share:.0%}{images}, {where}{load}"


def _plain_numbers(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis, between the powers of ten too where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Any, axes: Any) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")


def _pyplot() -> Any:
    import matplotlib.pyplot as plt

    return plt
