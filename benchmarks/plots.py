"""Plot a report from its JSON, as PNG and SVG. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .roofline import roofline
from .style import COLOURS, HEIGHT, MARKERS, WIDTH, comparable, legend_below, plain_numbers, pyplot, subject
from .table import name

Json = Mapping[str, Any]

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
    """Draw every plot that the report has the numbers for; return the files.

    Raises:
        BackendMissingError: matplotlib is not installed.
    """
    plt = pyplot()
    made: list[Path] = []
    for plot in (latency, latency_by_mask, latency_by_batch, latency_by_size, memory, stages, roofline):
        figure = plot(report)
        if figure is None:
            continue
        for kind in ("png", "svg"):
            file = folder / f"{plot.__name__}.{kind}"
            figure.savefig(file, bbox_inches="tight")
            made.append(file)
        plt.close(figure)
    return made


@dataclass(frozen=True)
class Axis:
    """What cases differ in: their key, its label, and the factor by which a value is multiplied to be shown."""

    key: str
    label: str
    scale: float = 1.0


CONCEPTS = Axis("concepts", "concepts N, one reference each")
MASK_SHARE = Axis("mask_share", "part of each reference inside its mask, %", 100.0)
IMAGES = Axis("images", "images of a request, made together")
SIZE = Axis("width", "width of the picture, pixels")


def latency(report: Json) -> Any:
    """Seconds of an RBA step against the number of concepts."""
    return _against(report, CONCEPTS, _step_seconds, "seconds for one RBA step", whiskers=True)


def latency_by_mask(report: Json) -> Any:
    """Seconds of an RBA step against the mask's share, where it was varied."""
    return _against(report, MASK_SHARE, _step_seconds, "seconds for one RBA step", whiskers=True, several=True)


def latency_by_batch(report: Json) -> Any:
    """Seconds of an RBA step per image against the batch size, where it was varied."""

    def for_each_image(case: Json, outcome: Json) -> tuple[float, float, float] | None:
        found = _step_seconds(case, outcome)
        return None if found is None else tuple(value / case["images"] for value in found)  # type: ignore[return-value]

    label = "seconds for one RBA step, an image"
    return _against(report, IMAGES, for_each_image, label, whiskers=True, several=True)


def latency_by_size(report: Json) -> Any:
    """Seconds of an RBA step against the picture's width, where there are bundles of several widths."""
    return _against(report, SIZE, _step_seconds, "seconds for one RBA step", whiskers=True, several=True)


def memory(report: Json) -> Any:
    """Peak memory against the number of concepts: the device's, where there is one."""
    measured = [o for case in report["cases"] for o in case["outcomes"] if o["status"] == "measured"]
    on_device = any(o["device_peak_bytes"] for o in measured)
    key = "device_peak_bytes" if on_device else "host_peak_bytes"

    def value(case: Json, outcome: Json) -> tuple[float, float, float] | None:
        found = outcome[key]
        return None if found is None else (found / 1e9,) * 3

    where = "device" if on_device else "host"
    return _against(report, CONCEPTS, value, f"peak {where} memory of the process, GB")


def _step_seconds(case: Json, outcome: Json) -> tuple[float, float, float] | None:
    """Median, fastest and slowest seconds of an RBA step."""
    found = outcome["steps"].get("rba")
    return None if found is None else (found["median"], found["fastest"], found["slowest"])


def _against(
    report: Json,
    axis: Axis,
    value: Callable[[Json, Json], tuple[float, float, float] | None],
    label: str,
    *,
    whiskers: bool = False,
    several: bool = False,
) -> Any:
    """Plot a line for each contender.

    whiskers: the values are times, drawn on a logarithmic axis with fastest and slowest; several: return None if the
    cases do not differ along the axis.
    """
    cases = comparable(report, axis.key)
    ticks = sorted({case[axis.key] * axis.scale for case in cases})
    if several and len(ticks) < 2:
        return None
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    kinds: dict[str, str] = {}
    for case in cases:
        for outcome in case["outcomes"]:
            found = value(case, outcome) if outcome["status"] == "measured" else None
            if found is not None:
                kinds[name(outcome)] = outcome["kind"]
                lines.setdefault(name(outcome), []).append((case[axis.key] * axis.scale, *found))
    if not lines:
        return None
    room = 0.5 * min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    figure, axes = pyplot().subplots(figsize=(WIDTH, HEIGHT))
    for number, (title, points) in enumerate(lines.items()):
        x, y, low, high = zip(*sorted(points), strict=True)
        shift = (number - (len(lines) - 1) / 2) * 0.06 * room  # so whiskers do not hide each other
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
    axes.set_xlabel(axis.label)
    axes.set_ylabel(label)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(ticks[0] - room, ticks[-1] + room)
    if whiskers:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    varies = axis is not CONCEPTS
    axes.set_title(
        subject(report, cases[0], concepts=varies, size=axis is not SIZE)
        + ("; whiskers: fastest to slowest" if whiskers else ""),
        fontsize=8,
    )
    legend_below(figure, axes)
    return figure


def stages(report: Json) -> Any:
    """Where a request's seconds go, in the case with the most concepts; or a step's, if no requests were made."""
    case = max(comparable(report), key=lambda case: case["concepts"], default=None)
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
            if outcome["kind"] == "plain":  # both stages are the same to it
                bars[name(outcome)] = {"steps": found["rsa"] + found["rba"]}
                continue
            apart = found.get("reference_pass", 0.0)
            bars[name(outcome)] = {
                "reference_pass": 2 * apart,
                "rsa_steps": found["rsa"] - apart,
                "rba_steps": found["rba"] - apart,
            }
    if not bars:
        return None
    figure, axes = pyplot().subplots(figsize=(WIDTH, 1.6 + 0.42 * len(bars)))
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
    axes.set_title(subject(report, case, concepts=True), fontsize=8)
    legend_below(figure, axes)
    return figure
