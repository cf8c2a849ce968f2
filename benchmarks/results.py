"""What a benchmark found. `Report.to_json` gives the JSON file, whose form is `schema.json` in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .settings import Case, Contender

FORMAT = 2
"""Since format 2 a ratio holds the samples that it was made of."""


@dataclass(frozen=True)
class Figures:
    """Statistics of samples in seconds. spread: from the first to the third quartile, over the median."""

    median: float
    p95: float
    fastest: float
    slowest: float
    spread: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Parity:
    """How far a contender's run was from the oracle's.

    error: relative 2-norm of the latents; other_cells: cells that end in another region; note: explains the tolerance.
    """

    oracle: str
    steps: int
    error: float
    tolerance: float
    other_cells: int
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN never passes


@dataclass(frozen=True)
class Counts:
    """Work that is counted, not timed: by stage ("rsa", "rba"), for one step of all images.

    rows: of the U-Net; flops: 2 for each multiply-add; bytes: what all operators read and write, as if nothing stayed
    in a cache; reference_rows: how many of those rows are references in `reference_kv`, which ends early; kept_bytes:
    of keys and values that a step reads. What could not be counted is absent, and `note` says why.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    reference_rows: int = 0
    kept_bytes: int = 0
    request_rows: int | None = None
    request_flops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Requests:
    """Seconds of whole requests.

    ready: from the start of the process until everything is loaded; cold_start: until its first picture; first: that
    request alone; next: the later ones; stages: of the later ones, by name. Files were read before, by the oracle at
    least, so the system had them in memory.
    """

    ready: float
    cold_start: float
    first: float
    next: Figures | None
    stages: Mapping[str, Figures]


@dataclass(frozen=True)
class Outcome:
    """One contender in one case.

    status: measured, or skipped, failed or wrong picture, for which `reason` says why and no time is given. steps: by
    stage, and "reference_pass" if that is a part of its own (included in the stages); on_device: on a GPU; threads: on
    the CPU; interleaved: whether it took turns with all others.
    """

    contender: Contender
    status: str
    reason: str = ""
    interleaved: bool = True
    parity: Parity | None = None
    steps: Mapping[str, Figures] = field(default_factory=dict)
    requests: Requests | None = None
    counts: Counts = field(default_factory=Counts)
    on_device: bool = False
    threads: int | None = None
    host_peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content |= {"contender": str(self.contender), "kind": self.contender.kind, "backend": self.contender.backend}
        if self.parity is not None:
            content["parity"]["passed"] = self.parity.passed
        return content


@dataclass(frozen=True)
class Ratio:
    """How many times longer the baseline takes than the candidate, by medians.

    low, high: a bootstrap interval of the rounds, or the range that they span if they are too few for one (`interval`:
    "bootstrap", "range", "none"). interleaved: whether the two took turns. The samples are those that the ratio was
    made of: beside a contender that runs when the others have ended, the candidate is timed once more, and the ratio is
    of those rounds.
    """

    baseline: str
    candidate: str
    of: str
    ratio: float
    low: float | None
    high: float | None
    interval: str
    rounds: int
    interleaved: bool
    baseline_samples: tuple[float, ...]
    candidate_samples: tuple[float, ...]


@dataclass(frozen=True)
class CaseResult:
    """What was found in one case.

    foreign_load: the part of the processors' time that other processes took meanwhile; None if it is not known.
    started, commit: of the run that measured it, as a report may be made in several.
    bundle, bundle_hash: the bundle's folder, and its content.
    """

    bundle: str
    height: int
    width: int
    dtype: str
    case: Case
    outcomes: tuple[Outcome, ...]
    ratios: tuple[Ratio, ...]
    foreign_load: float | None = None
    notes: tuple[str, ...] = ()
    started: str = ""
    commit: str | None = None
    bundle_hash: str = ""

    def outcome(self, kind: str) -> Outcome | None:
        """The first measured outcome of a kind."""
        return next((o for o in self.outcomes if o.contender.kind == kind and o.status == "measured"), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "bundle_hash": self.bundle_hash,
            "height": self.height,
            "width": self.width,
            "dtype": self.dtype,
            **asdict(self.case),
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
            "ratios": [asdict(ratio) for ratio in self.ratios],
            "foreign_load": self.foreign_load,
            "notes": list(self.notes),
            "started": self.started,
            "commit": self.commit,
        }


@dataclass(frozen=True)
class Report:
    """All that a benchmark found.

    machine: what it ran on, see `machine.describe`; peaks: the machine's measured limits, see `peaks.Peaks`; earlier:
    cases of the report that this one continues, as they are there.
    """

    machine: Mapping[str, Any]
    peaks: Mapping[str, Any]
    settings: Mapping[str, Any]
    cases: tuple[CaseResult, ...]
    earlier: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "machine": dict(self.machine),
            "peaks": dict(self.peaks),
            "settings": dict(self.settings),
            "cases": [*map(dict, self.earlier), *(case.to_json() for case in self.cases)],
        }
