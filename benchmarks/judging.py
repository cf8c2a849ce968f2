"""Parity before speed: compare a contender's run with the oracle's. docs/parity.md, "Benchmarks", has tolerances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .contender import Run, Task
from .results import Parity
from .settings import Contender
from .worker import JUDGE, Worker

END_TO_END = 1e-4
"""Relative 2-norm of the latents after a free run in float32 in which no cell changed its region."""
AFTER_A_FLIP = 2e-2
"""The same if cells did, because near-ties flipped: that moves the latents far more than what flipped them."""
NEAR_TIE = 1e-3
"""A cell may flip if the oracle's margin is under this."""
LARGEST_FLIP = 0.02
"""Part of the cells that may flip if the oracle has no margins, or in 16 bits, which move them far."""
SAME_REQUEST = 0.05
"""Relative 2-norm between the latents of two contenders' whole requests, in which near-ties flip in many steps one
after another. It is there to notice another request, not for arithmetic, which the compared run has judged."""
SAME_REQUEST_IN_16_BITS = 0.5


@dataclass(frozen=True)
class Verdicts:
    """The oracle's runs, with which contenders are compared.

    plain: the run for plain Stable Diffusion, if that takes part. floors: what rounding every layer's output to the
    bundle's 16 bits costs in `run` and in `plain`, as a relative error of the latents; 0 in float32.
    """

    oracle: str
    kind: str
    steps: int
    run: Run
    plain: Run | None
    floors: tuple[float, float]
    concepts: int

    def of(self, kind: str, run: Run) -> Parity:
        mine, floor = (self.plain, self.floors[1]) if kind == "plain" else (self.run, self.floors[0])
        assert mine is not None
        differs = mine.regions != run.regions
        other = 0 if kind == "plain" else int(differs.sum())
        if mine.margin is None or run.sixteen_bit:
            near = other <= LARGEST_FLIP * run.regions.size
        else:
            near = bool((mine.margin[differs] < NEAR_TIE).all())
        tolerance, notes = (AFTER_A_FLIP if other and near else END_TO_END), []
        if floor and run.sixteen_bit:
            tolerance = max(tolerance, 2 * floor)
            notes.append(f"16 bits: twice what rounding every layer costs here, {floor:.1e}, is allowed")
        if kind == self.kind:
            notes.append("is the oracle itself, so compared with nothing here")
        error = relative_error(run.latents, mine.latents)
        return Parity(self.oracle, self.steps, error, tolerance, other, "; ".join(notes))

    @property
    def empty(self) -> tuple[int, ...]:
        """Concepts, from 1, without a region when the oracle's run ends; the run says nothing about their RBA."""
        return tuple(k for k in range(1, self.concepts + 1) if not (self.run.regions == k).any())


def judge(task: Task, *, with_plain: bool) -> Verdicts:
    """Run the oracle, in a process that ends before anything is timed.

    Raises:
        ContenderError: it could not run.
    """
    settings = task.settings
    kind = settings.judge
    contender = Contender(kind, settings.backends[0] if kind == "bare" else "")
    own = Task(contender, task.bundle, task.case, settings, task.folder)
    with Worker(own, JUDGE) as worker:
        run, plain, floors = worker.call("run"), None, [0.0, 0.0]
        rounds = kind != "bare" and task.open()[0].dtype != "float32"
        if rounds:
            floors[0] = relative_error(worker.call("rounded").latents, run.latents)
        if with_plain:
            worker.call("become_plain")
            plain = worker.call("run")
            if rounds:
                floors[1] = relative_error(worker.call("rounded").latents, plain.latents)
    names = {"reference": "the PyTorch reference", "strong": "strong eager PyTorch", "bare": "the SDK itself"}
    return Verdicts(names[kind], kind, settings.parity_steps, run, plain, (floors[0], floors[1]), task.case.concepts)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """2-norm of the difference over that of what was expected, in float64."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
