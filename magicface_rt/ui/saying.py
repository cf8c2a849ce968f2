"""What the page says while a request is in progress, and when it ends: HTML with everything escaped."""

from __future__ import annotations

from html import escape

from ..request import Progress
from ..serve.problems import Problem
from ..serve.service import Outcome
from .form import Form

__all__ = ["cancelled", "done", "note", "progressing", "refusal_text", "started", "waiting"]

STAGES = {
    "rsa": "first stage (RSA): every place may look at every photograph",
    "rba": "second stage (RBA): every place looks at its own concept only",
}

MEANT = {"mask-stretched"}
"""Kinds of warnings that are not shown: the page itself paints masks smaller than a large photograph, so they are
expected.
"""

OF_FILES = {"image-turned"}
"""Kinds of warnings that are not shown of a mask that was painted on the page, over the photograph as it is used: they
are about a mask's file, which may have been made for the photograph as it is stored.
"""


def note(text: str) -> str:
    """A line that a screen reader reads out when it appears."""
    return f'<div class="mf-status"><p role="status">{escape(text)}</p></div>'


def done(outcome: Outcome, form: Form) -> str:
    """The request succeeded; also says what was done to the photographs and masks that may not have been meant."""
    told = [one for one in outcome.warnings if one.kind not in MEANT]
    told = [one for one in told if not (one.kind in OF_FILES and form.painted(one.field))]
    message = "".join(f"<li>{escape(one.detail)}</li>" for one in told)
    text = f"Done in {outcome.timings['total']:.1f} seconds."
    if not message:
        return note(text)
    text += " Something was done that may not have been meant:"
    return f'<div class="mf-status"><div role="status"><p>{escape(text)}</p><ul>{message}</ul></div></div>'


def waiting(before: int) -> str:
    """The request has a place in the queue, behind `before` others."""
    if before == 0:
        return note("Next in the queue: nothing waits before this request.")
    what = "1 request waits" if before == 1 else f"{before} requests wait"
    return note(f"In the queue: {what} before this one.")


def started() -> str:
    """The request was sent, and has no place in the queue yet."""
    return note("Reading the photographs and masks.")


def progressing(progress: Progress) -> str:
    """A step is done. The bar has a text for screen readers, which is not read out at each step."""
    step, steps = progress.step, progress.steps
    text = f"Step {step} of {steps}"
    if progress.stage == "prepare":
        text = f"Preparing the photographs, {step} of {steps}"
    elif progress.stage in STAGES:
        text += f", {STAGES[progress.stage]}"
    return (
        f'<div class="mf-status"><p>{escape(text)}</p>'
        f'<progress value="{step}" max="{steps}" aria-label="{escape(text)}"></progress></div>'
    )


def cancelled(last: Progress | None) -> str:
    """The request was stopped by the tab."""
    return note(f"Cancelled after step {last.step} of {last.steps}." if last else "Cancelled before the first step.")


def refusal_text(error: BaseException, form: Form | None = None) -> str:
    """The error's message, after the part of the page that is at fault."""
    problem = Problem.of(error)
    place = form.field_label(problem.field) if form is not None else ""
    where = f"<strong>{escape(place)}:</strong> " if place else ""
    return f'<div class="mf-status mf-error"><p role="alert">{where}{escape(problem.detail)}</p></div>'
