"""Summarise scores: means with intervals, paired differences, verdicts on claims, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fidelity import FAR, ConceptScore, Score
from .requests import CONCEPTS
from .variants import DEFAULT, PLAIN, RSA

RESAMPLES, CONFIDENCE = 4000, 0.95
AGAIN, AUTOENCODED, OTHERWISE = "drawn-again", "drawn-again-autoencoded", "drawn-otherwise"

Values = NDArray[np.float64]
"""One value per request; NaN if a request has none."""


@dataclass(frozen=True)
class Measure:
    """A figure of a picture. better: 1 if more is better, -1 if less is."""

    key: str
    heading: str
    better: int
    of: Callable[[Score], float | None]
    digits: int = 3


def _of_concepts(field: str) -> Callable[[Score], float | None]:
    def mean(score: Score) -> float | None:
        found = [value for one in score.concepts if (value := getattr(one, field)) is not None]
        return float(np.mean(found)) if found else None

    return mean


MEASURES = (
    Measure("fidelity", "fidelity", 1, _of_concepts("fidelity")),
    Measure("palette", "palette distance", -1, _of_concepts("palette"), 1),
    Measure("colour", "colour distance", -1, _of_concepts("colour"), 1),
    Measure("pattern", "pattern", 1, _of_concepts("pattern")),
    Measure("patterned", "pattern, if not plain", 1, _of_concepts("patterned")),
    Measure("own", "own look nearest", 1, _of_concepts("own")),
    Measure("spill", "spill", -1, _of_concepts("spill")),
    Measure("iou", "region IoU", 1, _of_concepts("iou")),
    Measure("found", "part there", 1, _of_concepts("found")),
    Measure("caption", "caption F1", 1, lambda score: score.caption),
)
_BY_KEY = {one.key: one for one in MEASURES}

LEGEND = f"""- **fidelity**: 1 - palette distance / {FAR:g}, not below 0, and 0 where the part is not in the picture;
  mean over a request's concepts.
- **palette distance**: between the colours of the part in the reference and in the picture, sliced Wasserstein in
  CIELAB; **colour distance**: between their means. Only where the part was found.
- **pattern**: hats and shirts in which the reference's pattern was recognised; **if not plain**: of the patterned ones.
- **own look nearest**: with two or three concepts, how often a part is nearer to its own reference than to the
  others'.
- **spill**: 1 - palette distance / {FAR:g} of the parts that are no concept from a concept's look, not below 0. Looks
  that are unlike have some by chance; see the plain model and what is drawn in other looks.
- **region IoU**: the method's region after the last step against the part that the segmenter finds, on the regions'
  grid.
- **part there**: concepts whose part is in the picture. **caption F1**: parts in the picture against parts that the
  caption names.
"""


@dataclass(frozen=True)
class Interval:
    """A mean over n requests and its bootstrap interval (percentiles)."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def values(scores: Sequence[Score], measure: Measure) -> Values:
    """A measure's values, in the order of the scores."""
    found = [measure.of(score) for score in scores]
    return np.array([np.nan if value is None else value for value in found], np.float64)


def interval(samples: Values, seed: int = 0) -> Interval | None:
    """The interval of the samples that are not NaN; None if there are none."""
    there = samples[~np.isnan(samples)]
    if not len(there):
        return None
    drawn = np.random.default_rng(seed).integers(0, len(there), (RESAMPLES, len(there)))
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(there[drawn].mean(1), [tail, 100 - tail])
    return Interval(float(there.mean()), float(low), float(high), len(there))


def difference(mine: Sequence[Score], others: Sequence[Score], measure: Measure) -> Interval | None:
    """The interval of the paired differences, over the requests in which both have a value.

    Raises ValueError if the two are not of the same requests.
    """
    if [score.number for score in mine] != [score.number for score in others]:
        raise ValueError("the scores are of different requests")
    return interval(values(mine, measure) - values(others, measure))


def summary(scores: Mapping[str, Sequence[Score]]) -> dict[str, dict[str, Any]]:
    """By row and measure, the interval and those of the differences to the plain model and to the default."""
    found: dict[str, dict[str, Any]] = {}
    for name, mine in scores.items():
        found[name] = {}
        for measure in MEASURES:
            entry: dict[str, Any] = {"of": _json(interval(values(mine, measure)))}
            for other in (PLAIN, DEFAULT):
                if other in scores and other != name:
                    entry[f"minus {other}"] = _json(difference(mine, scores[other], measure))
            found[name][measure.key] = entry
    return found


def markdown(
    scores: Mapping[str, Sequence[Score]],
    labels: Mapping[str, str],
    *,
    about: Sequence[str],
    not_run: Mapping[str, str],
    more: Sequence[str] = (),
) -> str:
    """Format the tables. scores and labels: by the row's name, in the order of the rows."""
    lines = ["# Quality of the miniature", "", *about, "", "Means over requests with bootstrap 95 % intervals.", ""]
    lines += [LEGEND, "## All variants", ""]
    lines += _table(scores, labels, lambda mine, m: interval(values(mine, m)))
    for other in (PLAIN, DEFAULT):
        rows = {name: mine for name, mine in scores.items() if name != other and name not in (AGAIN, OTHERWISE)}
        if other in scores and rows:
            lines += ["", f"## Paired differences to {labels[other]}", ""]
            lines += _table(rows, labels, lambda mine, m, o=other: difference(mine, scores[o], m), signed=True)
    lines += ["", "## Fidelity by number of concepts and by part", "", *_by_kind(scores, labels)]
    if claims := verdicts(scores):
        lines += ["", "## The method's claims", "", *(f"- {claim}" for claim in claims)]
    if not_run:
        lines += ["", "## Not run", "", *(f"- {labels.get(name, name)}: {why}" for name, why in not_run.items())]
    return "\n".join([*lines, *more]) + "\n"


def verdicts(scores: Mapping[str, Sequence[Score]]) -> list[str]:
    """What the intervals say about each claim: it holds, it does not hold, or it is open."""
    fidelity, caption = _BY_KEY["fidelity"], _BY_KEY["caption"]
    found = []
    for better, worse, text in (
        (RSA, PLAIN, "References pull the look: RSA only above the plain model"),
        (DEFAULT, RSA, "Regions help: two-stage above RSA only"),
        (DEFAULT, PLAIN, "Two-stage above the plain model"),
    ):
        if better in scores and worse in scores:
            gap = difference(scores[better], scores[worse], fidelity)
            found.append(f"{text}: {_verdict(gap)}, fidelity {_shown(gap, fidelity, signed=True)}.")
    if DEFAULT in scores and PLAIN in scores:
        gap = difference(scores[DEFAULT], scores[PLAIN], caption)
        found.append(f"At what cost in the caption: F1 {_shown(gap, caption, signed=True)}.")
    for what, names in (
        ("Alpha 0.4", ("rba", "alpha-0.2", "alpha-0.6", "alpha-0.8", RSA)),
        ("Weight 3", ("weight-1", "weight-2", "weight-4")),
        ("Weights as a bias", ("scale", "scale-1.5")),
        ("Semantic guidance", ("unguided",)),
    ):
        gaps = {name: difference(scores[DEFAULT], scores[name], fidelity) for name in names if name in scores}
        if DEFAULT in scores and gaps:
            each = "; ".join(
                f"over {name}: {_verdict(gap)}, {_shown(gap, fidelity, signed=True)}" for name, gap in gaps.items()
            )
            found.append(f"{what} is best by fidelity: {each}.")
    return found


def _verdict(gap: Interval | None) -> str:
    if gap is None:
        return "not measured"
    return "holds" if gap.low > 0 else "does not hold" if gap.high < 0 else "open"


def _by_kind(scores: Mapping[str, Sequence[Score]], labels: Mapping[str, str]) -> list[str]:
    head = ["", "one concept", "two or three", *CONCEPTS]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    measure = _BY_KEY["fidelity"]
    for name, mine in scores.items():
        cells = [
            _shown(interval(values([s for s in mine if (len(s.concepts) == 1) == single], measure)), measure)
            for single in (True, False)
        ]
        for part in CONCEPTS:
            of_part: list[ConceptScore] = [one for s in mine for one in s.concepts if one.part == part]
            cells.append(_shown(interval(np.array([one.fidelity for one in of_part])), measure))
        lines.append(f"| {' | '.join([labels[name], *cells])} |")
    return lines


def _table(
    scores: Mapping[str, Sequence[Score]],
    labels: Mapping[str, str],
    of: Callable[[Sequence[Score], Measure], Interval | None],
    *,
    signed: bool = False,
) -> list[str]:
    head = ["", *(measure.heading for measure in MEASURES)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, mine in scores.items():
        cells = [_shown(of(mine, measure), measure, signed=signed) for measure in MEASURES]
        lines.append(f"| {' | '.join([labels[name], *cells])} |")
    return lines


def _shown(found: Interval | None, measure: Measure, *, signed: bool = False) -> str:
    if found is None:
        return "-"
    form = f"{'+' if signed else ''}.{measure.digits}f"
    return f"{found.mean:{form}} ({found.low:{form}} .. {found.high:{form}})"


def _json(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else found.to_json()
