"""Shows a finished picture on the page: the picture, its regions after every step, and where the time went."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ..schedule import is_region_step
from ..serve.schemas import PictureOrder
from ..serve.service import Outcome

__all__ = ["COLOURS", "NOTHING_YET", "result_html", "timings_html"]

COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00")
"""Okabe and Ito's palette, which colour-blind people can tell apart, in the order of `images.region_overlay`. The
regions carry their numbers as well.
"""

NOTHING_YET = (
    '<div class="mf-empty"><p>The picture will stand here, and beside it which of its places belonged to which '
    "concept, step by step.</p></div>"
)

_STAGES = (
    ("queued", "Waiting in the queue"),
    ("loading", "Reading photographs and masks"),
    ("text_encoding", "Text encoder"),
    ("image_encoding", "Image encoder"),
    ("reference_pass", "U-Net over the photographs"),
    ("denoising", "U-Net over the picture"),
    ("decoding", "Image decoder"),
    ("total", "In all, without waiting"),
)


def result_html(outcome: Outcome, order: PictureOrder) -> str:
    """Return the first picture with its regions. The browser draws these, so nothing is kept here for the slider."""
    picture = base64.b64encode(outcome.pngs[0]).decode("ascii")
    source = f"data:image/png;base64,{picture}"
    title = escape(f"Picture for the prompt: {order.prompt}")
    figure = (
        f'<figure><img class="mf-picture" alt="{title}" src="{source}">'
        f'<figcaption>The picture. <a class="mf-download" download="magicface-{order.seed}.png" href="#">Save it as PNG'
        "</a></figcaption></figure>"
    )
    return f'<div class="mf-result">{figure}{_regions(outcome, order)}</div>'


def timings_html(outcome: Outcome) -> str:
    """Return the seconds by stage, as a table."""
    timings = outcome.timings
    rows = [(name, f"{timings[key]:.2f} s") for key, name in _STAGES if key in timings]
    steps = [float(one) for one in timings.get("steps", ())]
    if steps:
        rows.append((f"One step, mean of {len(steps)}", f"{sum(steps) / len(steps):.3f} s"))
    if outcome.batch > 1:
        rows.append(("Pictures made together", str(outcome.batch)))
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{value}</td></tr>' for name, value in rows)
    return f'<table class="mf-timings"><caption>Where the time went</caption><tbody>{body}</tbody></table>'


def _regions(outcome: Outcome, order: PictureOrder) -> str:
    names = list(outcome.names)
    if not names:
        return '<p class="mf-note">There was no concept, so there are no regions.</p>'
    steps = outcome.regions_per_step
    labels = outcome.regions[None, 0] if steps is None else steps[:, 0]  # [T, h/2, w/2]
    count, rows, columns = labels.shape
    shown = {
        "rows": rows,
        "columns": columns,
        "labels": base64.b64encode(np.ascontiguousarray(labels, dtype=np.uint8).tobytes()).decode("ascii"),
        "stages": [_stage(step, count, order.alpha) for step in range(count)],
        "colours": list(COLOURS[: len(names)]),
        "names": names,
    }
    data = escape(json.dumps(shown), quote=True)
    return (
        f'<figure class="mf-regions" data-regions="{data}"><canvas role="img" aria-label="Regions"></canvas>'
        '<figcaption><label class="mf-step">Regions after step '
        f'<input type="range" min="1" max="{count}" value="{count}" step="1"></label>'
        f'<output class="mf-stage"></output>{_legend(names)}</figcaption></figure>'
    )


def _stage(step: int, steps: int, alpha: float) -> str:
    return "RBA" if is_region_step(step, steps, alpha) else "RSA"


def _legend(names: Sequence[Any]) -> str:
    entries = [
        f'<li><span class="mf-swatch" style="background:{COLOURS[k % len(COLOURS)]}"></span>{k + 1} '
        f'{escape(str(name))} <span class="mf-share" data-concept="{k + 1}"></span></li>'
        for k, name in enumerate(names)
    ]
    return f'<ul class="mf-legend" aria-label="Regions by concept">{"".join(entries)}</ul>'
