"""What all plots share: size, colours and marks of the contenders, subject lines, legends. Needs matplotlib to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magicface_rt.errors import BackendMissingError
from magicface_rt.process.interrupts import reraise_if_interrupt

from .table import device, was_quiet

Json = Mapping[str, Any]

WIDTH, HEIGHT = 7.0, 4.2
"""Inches, to be read at the width of a page."""
COLOURS = {
    "authors": "#b2182b",
    "strong": "#ef8a62",
    "compiled": "#8073ac",
    "plain": "#666666",
    "bare": "#67a9cf",
    "kept": "#2166ac",
}
MARKERS = {"authors": "o", "strong": "s", "compiled": "D", "plain": "x", "bare": "^", "kept": "v"}


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up for files.

    Raises:
        BackendMissingError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        reraise_if_interrupt(error)
        raise BackendMissingError(
            "plots need matplotlib, which is not installed. Install it: pip install 'magicface_rt[bench]'"
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "magicface", "figure.dpi": 150})
    import matplotlib.pyplot as plt

    return plt


def comparable(report: Json, key: str = "concepts") -> list[Json]:
    """Cases that differ from the first one with concepts in that key only; another width means another bundle."""
    cases = report["cases"]
    first = next((c for c in cases if c["concepts"]), cases[0]) if cases else None
    others = [one for one in ("bundle", "concepts", "mask_share", "images", "steps") if one != key]
    if key == "width":
        others = ["dtype", *others[1:]]
    return [
        c for c in cases if all(c[one] == first[one] or (one == "mask_share" and not c["concepts"]) for one in others)
    ]


def subject(report: Json, case: Json, concepts: bool = False, size: bool = True) -> str:
    """Describe what was measured, and where, in one line."""
    measured = [o for o in case["outcomes"] if o["status"] == "measured"]
    where = " and ".join(dict.fromkeys(device(report["machine"], o) for o in measured)) or "nothing measured"
    count = f"N = {case['concepts']}, " if concepts else ""
    images = "" if case["images"] == 1 else f", {case['images']} images"
    load = "" if was_quiet(report, case) else "; machine not quiet"
    share = report["settings"]["mask_shares"][0] if not case["concepts"] else case["mask_share"]
    pixels = f"{case['width']} x {case['height']} px, " if size else ""
    return f"{pixels}{case['dtype']}, {count}masks {share:.0%}{images}, {where}{load}"


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, also between the powers of ten if it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Any, axes: Any) -> None:
    """Put the legend below the plot, where it hides nothing."""
    figure.set_layout_engine("constrained")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
