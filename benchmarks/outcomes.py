"""A contender on its way through a case, and the report's entry on it in the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicface_rt import Bundle
from magicface_rt.process.interrupts import reraise_if_interrupt

from .bootstrap import MIN_SAMPLES, figures, ratio_of_medians
from .contender import Run, Task
from .counting import Cost, graph_cost
from .results import Counts, Figures, Outcome, Parity, Ratio, Requests
from .settings import TORCH_KINDS, Contender, Settings
from .worker import Worker
from .workload import STAGES, Workload, sizes_of


@dataclass(eq=False)
class Entrant:
    """A contender on its way through a case."""

    contender: Contender
    task: Task
    alone: bool
    worker: Worker | None = None
    status: str = "measured"
    reason: str = ""
    found: Run | None = None
    parity: Parity | None = None
    latents: NDArray[np.float32] | None = None
    ready: float = 0.0
    cold_start: float = 0.0
    steps: dict[str, list[float]] = field(default_factory=dict)
    # Steps of the SDK's forms that took turns with it after all others had ended, by name.
    beside: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    requests: list[dict[str, float]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def stop(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.close()

    @property
    def on_device(self) -> bool:
        """Whether it computed on a GPU, as its process reported in the end."""
        return bool(self.state.get("on_device"))

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def outcome_of(entrant: Entrant, bundle: Bundle, workload: Workload, alpha: float) -> Outcome:
    """The report's entry on an entrant."""
    if entrant.status != "measured":
        return Outcome(entrant.contender, entrant.status, entrant.reason, not entrant.alone, entrant.parity)
    return Outcome(
        contender=entrant.contender,
        status="measured",
        interleaved=not entrant.alone,
        parity=entrant.parity,
        steps={name: figures(samples) for name, samples in entrant.steps.items()},
        requests=_requests(entrant),
        counts=_counts(entrant, bundle, workload, alpha),
        on_device=entrant.on_device,
        threads=entrant.state.get("threads"),
        host_peak_bytes=entrant.state.get("host"),
        device_peak_bytes=entrant.state.get("device"),
        notes=(*entrant.notes, *entrant.state.get("notes", ())),
    )


def _requests(entrant: Entrant) -> Requests | None:
    if not entrant.requests:
        return None
    first, *others = entrant.requests
    stages: dict[str, Figures] = {}
    for name in [] if not others else others[0]:
        if name != "total" and any(one[name] for one in others):
            stages[name] = figures([one[name] for one in others])
    total = figures([one["total"] for one in others]) if others else None
    return Requests(entrant.ready, entrant.cold_start, first["total"], total, stages)


def _counts(entrant: Entrant, bundle: Bundle, workload: Workload, alpha: float) -> Counts:
    assert entrant.found is not None
    kind, found, references = entrant.contender.kind, entrant.found, 0
    flops, moved, note = dict(found.flops), dict(found.bytes), ""
    if entrant.contender.ours:
        references = workload.case.concepts if kind == "bare" else 0
        try:
            cost = _graphs_cost(kind, bundle, workload)
            flops, moved = dict.fromkeys(STAGES, cost.flops), dict.fromkeys(STAGES, cost.bytes)
        except ImportError as error:
            reraise_if_interrupt(error)
            note = "operations not counted: the package onnx is not installed"
        except ValueError as error:
            reraise_if_interrupt(error)
            note = f"operations not counted: {error}"
    elif not flops:
        note = "operations not counted: compiled code is not seen by the counter"
    stages = workload.stages(alpha)
    return Counts(
        rows=dict(found.rows),
        flops=flops,
        bytes=moved,
        reference_rows=references,
        kept_bytes=int(entrant.state.get("kept", 0)),
        request_rows=sum(found.rows[stage] for stage in stages),
        request_flops=sum(flops[stage] for stage in stages) if flops else None,
        note=note,
    )


def _graphs_cost(kind: str, bundle: Bundle, workload: Workload) -> Cost:
    sizes = sizes_of(bundle, workload)
    cost = graph_cost(bundle, "denoise_step", sizes)
    if kind == "bare" and workload.case.concepts:
        more = graph_cost(bundle, "reference_kv", sizes)
        cost = Cost(cost.flops + more.flops, cost.bytes + more.bytes)
    return cost


def ratios_of(entrants: Sequence[Entrant], settings: Settings) -> list[Ratio]:
    """The ratios of every PyTorch baseline to every form of ours, and of ours without kept keys to ours with them.

    There is none between a GPU and a processor: it would compare the devices and not what runs on them.
    """
    return [
        ratio
        for baseline, candidate in _pairs(entrants)
        if baseline.on_device == candidate.on_device
        for ratio in _ratios_between(baseline, candidate, settings)
    ]


def left_out(entrants: Sequence[Entrant]) -> tuple[str, ...]:
    """Notes for the report on baselines and forms of ours without a ratio, because they ran on different devices."""
    notes = []
    for on_device, where, elsewhere in ((True, "a GPU", "a processor"), (False, "a processor", "a GPU")):
        apart = [(b, c) for b, c in _pairs(entrants) if (b.on_device, c.on_device) == (on_device, not on_device)]
        if apart:
            theirs, ours = (
                " and ".join(dict.fromkeys(e.contender.title for e in side)) for side in zip(*apart, strict=True)
            )
            notes.append(f"no ratio, for they ran on different devices: {theirs} on {where}, {ours} on {elsewhere}")
    return tuple(notes)


def _pairs(entrants: Sequence[Entrant]) -> Iterator[tuple[Entrant, Entrant]]:
    measured = [e for e in entrants if e.status == "measured"]
    for candidate in (e for e in measured if e.contender.ours):
        for baseline in measured:
            same = baseline.contender.backend == candidate.contender.backend
            gain = same and (baseline.contender.kind, candidate.contender.kind) == ("bare", "kept")
            if baseline.contender.kind in TORCH_KINDS or gain:
                yield baseline, candidate


def _ratios_between(baseline: Entrant, candidate: Entrant, settings: Settings) -> list[Ratio]:
    ours = baseline.beside.get(str(candidate.contender), candidate.steps)
    pairs = [(f"{stage} step", baseline.steps.get(stage), ours.get(stage)) for stage in STAGES]
    pairs.append(("request", *([r["total"] for r in e.requests[1:]] for e in (baseline, candidate))))  # type: ignore[arg-type]
    together = not (baseline.alone or candidate.alone)
    made = []
    for name, a, b in pairs:
        if not a or not b:
            continue
        interleaved = together or (name != "request" and ours is not candidate.steps)
        ratio, low, high = ratio_of_medians(
            a, b, paired=interleaved, confidence=settings.confidence, seed=settings.seed
        )
        names = str(baseline.contender), str(candidate.contender)
        rounds = min(len(a), len(b))
        interval = "bootstrap" if rounds >= MIN_SAMPLES else "none" if low is None else "range"
        made.append(Ratio(*names, name, ratio, low, high, interval, rounds, interleaved, tuple(a), tuple(b)))
    return made
