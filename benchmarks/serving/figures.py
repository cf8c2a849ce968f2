"""Format the load run's report as a table and as plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..style import HEIGHT, WIDTH, legend_below, pyplot

Json = Mapping[str, Any]

COLOURS = ("#2166ac", "#92c5de", "#b2182b", "#f4a582", "#1b7837", "#a6dba0", "#542788", "#b2abd2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""For as many forms of service as one plot can tell apart."""
KINDS = {"warm": "concepts kept and warm", "cold": "each request puts a new concept first"}


def markdown(report: Json) -> str:
    """Format tables for each form of service."""
    machine, settings, bundle = report["machine"], report["settings"], report["bundle"]
    quiet = "quiet" if machine["quiet"] else "NOT quiet"
    lines = [
        "# A service under load",
        "",
        f"{machine['started']}, {machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}; load "
        f"average {machine['load_average'][0]}, {quiet}. Commit {machine['commit'] or 'unknown'}. "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ".",
        "",
        f"{bundle['width']} x {bundle['height']} px, {bundle['dtype']}, {settings['steps']} steps, one concept with a "
        f"mask of {settings['mask_share']:.0%}; {settings['seconds']:g} s a load, Poisson arrivals, queue of "
        f"{settings['queue']}. One process without batching makes {report['capacity']:.2f} pictures a second with warm "
        "concepts. The client runs on the same cores.",
    ]
    for form in report["forms"]:
        for kind, title in KINDS.items():
            lines += ["", f"## {form['name']}: {title}", ""]
            lines += ["| offered /s | made /s | p50 s | p95 s | p99 s | pictures | refused | failed | mean batch |"]
            lines += ["|" + "---|" * 9]
            lines += [_row(point) for point in form[kind]]
        if form["memory"]:
            lines += ["", _memory(form["memory"])]
    return "\n".join(lines) + "\n"


def draw(report: Json, folder: Path) -> list[Path]:
    """Draw latency, throughput and memory as PNG and SVG; return the files.

    Raises:
        BackendMissingError: matplotlib is not installed.
    """
    plt = pyplot()
    made = []
    for plot in (latency, throughput, memory):
        figure = plot(report, plt)
        if figure is None:
            continue
        for kind in ("png", "svg"):
            made.append(folder / f"{plot.__name__}.{kind}")
            figure.savefig(made[-1], bbox_inches="tight")
        plt.close(figure)
    return made


def latency(report: Json, plt: Any) -> Any:
    """p50 and p99 against the offered load, warm and cold side by side."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT), sharey=True, layout="constrained")
    for axes, (kind, title) in zip(both, KINDS.items(), strict=True):
        for form, colour, marker in zip(report["forms"], COLOURS, MARKERS, strict=False):
            points = [p for p in form[kind] if p["p50"] is not None]
            x = [p["offered"] for p in points]
            axes.plot(
                x, [p["p50"] for p in points], color=colour, marker=marker, markersize=4, label=f"{form['name']}, p50"
            )
            axes.plot(x, [p["p99"] for p in points], color=colour, linestyle=":", label=f"{form['name']}, p99")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("requests offered a second")
        axes.set_yscale("log")
        axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    both[0].set_ylabel("seconds from the arrival to the picture")
    legend_below(figure, both[0])
    return figure


def throughput(report: Json, plt: Any) -> Any:
    """Pictures a second against requests offered a second."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT), sharey=True, layout="constrained")
    for axes, (kind, title) in zip(both, KINDS.items(), strict=True):
        highest = 0.0
        for form, colour, marker in zip(report["forms"], COLOURS, MARKERS, strict=False):
            x = [p["offered"] for p in form[kind]]
            axes.plot(
                x, [p["made_rate"] for p in form[kind]], color=colour, marker=marker, markersize=4, label=form["name"]
            )
            highest = max([highest, *x])
        axes.plot(
            [0, highest], [0, highest], color="#999999", linewidth=0.8, linestyle="--", label="all that is offered"
        )
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("requests offered a second")
        axes.grid(True, linewidth=0.4, alpha=0.6)
    both[0].set_ylabel("pictures made a second")
    legend_below(figure, both[0])
    return figure


def memory(report: Json, plt: Any) -> Any:
    """Memory of the service's processes against the requests made."""
    forms = [form for form in report["forms"] if form["memory"]]
    if not forms:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    for form, colour in zip(forms, COLOURS, strict=False):
        made, sizes = zip(*form["memory"]["samples"], strict=True)
        axes.plot(made, [size / 1e6 for size in sizes], color=colour, linewidth=1.2, label=form["name"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests made")
    axes.set_ylabel("memory of all processes of the service, MB")
    axes.grid(True, linewidth=0.4, alpha=0.6)
    legend_below(figure, axes)
    return figure


def _row(point: Json) -> str:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    failed = ", ".join(f"{count} {kind}" for kind, count in point["failed"].items()) or "0"
    batch = "" if point["mean_batch"] is None else f"{point['mean_batch']:.2f}"
    return (
        f"| {point['offered']:.2f} | {point['made_rate']:.2f} | {seconds(point['p50'])} | {seconds(point['p95'])} | "
        f"{seconds(point['p99'])} | {point['made']} | {point['refused']} | {failed} | {batch} |"
    )


def _memory(found: Json) -> str:
    slope, low, high = (found[key] / 1024 for key in ("bytes_per_request", "low", "high"))
    verdict = "flat" if found["flat"] else "GROWING"
    endings = ", ".join(f"{count} {ending}" for ending, count in found["endings"].items())
    return (
        f"Memory over {found['requests']} requests ({endings}): {found['typical_bytes'] / 1e6:.0f} MB, {slope:+.2f} "
        f"KiB a request ({low:+.2f} to {high:+.2f}): {verdict}."
    )
