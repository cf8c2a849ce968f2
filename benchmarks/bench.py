"""Run a benchmark: parity first, then contenders in turn, step by step and request by request.

python -m benchmarks.bench BUNDLE [--checkpoint DIR] ...        the same as `magicface-rt bench`
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from magicface_rt import Bundle
from magicface_rt.errors import BackendError
from magicface_rt.files import atomic_files
from magicface_rt.process.host_memory import address_hint

from .contender import Task
from .counting import rows_of_theory
from .judging import SAME_REQUEST, SAME_REQUEST_IN_16_BITS, Verdicts, judge, relative_error
from .machine import Busy, describe, memory
from .outcomes import Entrant, left_out, outcome_of, ratios_of
from .peaks import peaks_of
from .results import CaseResult, Outcome, Report
from .resuming import Earlier
from .settings import Case, Settings
from .worker import PREPARE, ContenderError, ProcessEndedError, Worker, call_in_a_process
from .workload import STAGES, Workload

Say = Callable[[str], object]

MEMORY_MARGIN = 1 << 30


def run(
    settings: Settings,
    say: Say = lambda _: None,
    so_far: Callable[[Report], object] = lambda _: None,
    earlier: Earlier | None = None,
) -> Report:
    """Measure everything that the settings name and an earlier report lacks.

    `so_far` is called with the report after every case, since a long run may be cut short.

    Raises:
        BundleError: a bundle cannot be opened.
        ContenderError: the oracle of a case could not run. A contender that fails is reported, and the rest goes on.
    """
    bundles = [(path, Bundle.open(path, check_hashes=False)) for path in settings.bundles]
    machine = describe()
    if not machine["quiet"]:
        say(f"the machine is not quiet: load average {machine['load_average'][0]} on {machine['cores']} cores")
    if earlier is None:
        say("measuring the machine's peaks")
    peaks = _peaks(settings, {bundle.dtype for _, bundle in bundles}) if earlier is None else dict(earlier.peaks)
    cases: list[CaseResult] = []

    def report() -> Report:
        now = {**machine, "load_average_at_end": describe()["load_average"]}
        return Report(now, peaks, settings.to_json(), tuple(cases), () if earlier is None else earlier.cases)

    for path, bundle in bundles:
        for case in settings.cases_of(path):
            if earlier is not None and earlier.has(str(Path(path)), case):
                continue
            say(f"{bundle.width} x {bundle.height}, {bundle.dtype}: {case}")
            with atomic_files.temporary_folder("magicface-bench") as folder:
                found = _Bench(settings, path, bundle, case, str(folder), say).run()
            cases.append(replace(found, started=machine["started"], commit=machine["commit"]))
            so_far(report())
    return report()


def _peaks(settings: Settings, dtypes: set[str]) -> dict[str, Any]:
    """Measure the peaks of the processor, and of the GPU in the precisions used; None if they cannot be measured.

    Each in a process of its own, so none of the memory that it takes stays in use.

    Raises:
        BackendError: such a process was killed.
        HostMemoryError: it had too little memory.
    """
    wanted = ["cpu"]
    if settings.torch_device != "cpu" or any(not backend.endswith("cpu") for backend in settings.backends):
        wanted += [f"cuda {dtype}" for dtype in sorted(dtypes)]
    try:
        with _numpy_limited_to(settings.threads):
            found = {name: call_in_a_process(peaks_of, name, settings.threads) for name in wanted}
    except ProcessEndedError as error:
        said = "the process that measures the machine's peaks was ended; was there not enough memory?"
        raise BackendError(f"{said} {address_hint()}".strip()) from error
    return {name: None if peak is None else asdict(peak) for name, peak in found.items() if peak or name == "cpu"}


@contextlib.contextmanager
def _numpy_limited_to(threads: int) -> Iterator[None]:
    """Limit numpy's threads in processes that start within this context; with 0 numpy chooses their number.

    Its libraries read the number when they are loaded.
    """
    before = dict(os.environ)
    if threads:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Bench:
    """The measurement of one case of one bundle."""

    def __init__(self, settings: Settings, path: str, bundle: Bundle, case: Case, folder: str, say: Say) -> None:
        self.settings, self.path, self.bundle, self.case, self.say = settings, Path(path), bundle, case, say
        self.workload = Workload.of(bundle, case, settings.seed)
        self._first_request: Entrant | None = None
        self.entrants = [
            Entrant(contender, Task(contender, path, case, settings, folder), contender.kind in settings.alone)
            for contender in settings.contenders(case)
        ]

    def run(self) -> CaseResult:
        busy = Busy.start()
        self.say(f"  oracle of parity: {self.settings.judge}")
        self._check_memory_of_the_judge()
        plain = any(entrant.contender.kind == "plain" for entrant in self.entrants)
        verdicts = judge(self.entrants[0].task, with_plain=plain)
        self._prepare()
        together = [entrant for entrant in self.entrants if not entrant.alone]
        try:
            for entrant in together:
                self._start(entrant, verdicts)
            self._rounds(together)
            for entrant in together:
                entrant.close()
            for entrant in self.entrants:
                if entrant.alone:
                    free = memory()[0]
                    self._start(entrant, verdicts)
                    self._alone(entrant, [e for e in together if e.contender.ours], free)
                    entrant.close()
        finally:
            for entrant in self.entrants:
                entrant.close()
        return CaseResult(
            bundle=str(self.path),
            bundle_hash=self.bundle.hash,
            height=self.bundle.height,
            width=self.bundle.width,
            dtype=self.bundle.dtype,
            case=self.case,
            outcomes=tuple(self.outcome(entrant) for entrant in self.entrants),
            ratios=tuple(ratios_of(self.entrants, self.settings)),
            foreign_load=busy.share(),
            notes=(
                *(f"concept {k} has no region when the compared run ends" for k in verdicts.empty),
                *left_out(self.entrants),
            ),
        )

    def _check_memory_of_the_judge(self) -> None:
        kind, free = self.settings.judge, memory()[0]
        need = memory_needed(kind, self.bundle, self.case.concepts)
        if need and free is not None and need + MEMORY_MARGIN > free and self.settings.torch_device != "cuda":
            raise ContenderError(
                f"the oracle {kind!r} needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free. "
                "Name --oracle strong, which needs less."
            )

    def _prepare(self) -> None:
        """Prepare keys and values for "kept" with the first backend that can; they are the same for all backends."""
        forms = [e for e in self.entrants if e.contender.kind == "kept" and self.case.concepts]
        seconds = None
        for kept in forms:
            self.say(f"  {kept.contender}: preparing its keys and values")
            try:
                with Worker(kept.task, PREPARE) as worker:
                    seconds = worker.call("prepare")
                break
            except ContenderError as error:
                kept.stop("failed", f"preparing: {error}")
                self.say(f"  {kept.contender}: failed, {kept.reason}")
        if seconds is None:
            return
        said = f"reference pass of one step for all references {seconds['reference_pass']:.3g} s"
        if "prepare" in seconds:
            said += f"; Session.prepare of all of them, {self.case.steps} steps, {seconds['prepare']:.3g} s"
        for entrant in forms:
            entrant.notes += (f"made before, once: {said}",)

    def _start(self, entrant: Entrant, verdicts: Verdicts) -> None:
        """Load a contender, time its first request, and compare its run with the oracle's."""
        if entrant.status != "measured":
            return
        need, (free, _) = memory_needed(entrant.contender.kind, self.bundle, self.case.concepts), memory()
        if need and free is not None and need + MEMORY_MARGIN > free and self._on_cpu(entrant):
            entrant.stop("skipped", f"needs about {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
            self.say(f"  {entrant.contender}: skipped, {entrant.reason}")
            return
        try:
            entrant.worker = Worker(entrant.task)
            if self.settings.request_rounds:
                entrant.worker.call("load")
                entrant.ready = perf_counter() - entrant.worker.started
                entrant.requests.append(entrant.worker.call("request"))
                entrant.cold_start = perf_counter() - entrant.worker.started
                entrant.latents = entrant.worker.call("latents")
            entrant.found = entrant.worker.call("run")
        except ContenderError as error:
            entrant.stop("failed", str(error))
            self.say(f"  {entrant.contender}: failed: {error}")
            return
        entrant.parity = verdicts.of(entrant.contender.kind, entrant.found)
        said = f"error {entrant.parity.error:.1e} of {entrant.parity.tolerance:.1e} allowed"
        if not entrant.parity.passed:
            entrant.stop("wrong picture", f"{said}, against {verdicts.oracle}")
        self.say(f"  {entrant.contender}: parity {'passed' if entrant.parity.passed else 'FAILED'}, {said}")
        self._compare_requests(entrant)

    def _compare_requests(self, entrant: Entrant) -> None:
        """Compare a contender's first request with that of the first contender that made one; the pictures must agree.

        Plain Stable Diffusion is left out, because it makes other pictures.
        """
        if entrant.latents is None or entrant.status != "measured" or entrant.contender.kind == "plain":
            return
        if self._first_request is None:
            self._first_request = entrant
            return
        other, found = self._first_request, entrant.found
        assert found is not None
        assert other.found is not None
        assert other.latents is not None
        error = relative_error(entrant.latents, other.latents)
        coarse = found.sixteen_bit or other.found.sixteen_bit
        if not error <= (SAME_REQUEST_IN_16_BITS if coarse else SAME_REQUEST):
            entrant.stop("wrong picture", f"a request's latents are {error:.1e} from those of {other.contender.title}")
            self.say(f"  {entrant.contender}: {entrant.reason}")
        else:
            entrant.notes += (f"a request's latents are {error:.1e} from those of {other.contender.title}",)

    def _on_cpu(self, entrant: Entrant) -> bool:
        return entrant.contender.ours or self.settings.torch_device != "cuda"

    def _rounds(self, entrants: Sequence[Entrant]) -> None:
        """Time all contenders in turn, in another order each round, so results do not depend on who follows whom."""
        for entrant in entrants:
            for stage in STAGES:
                self._one(entrant, "step", stage)  # untimed: the first step of drawn regions allocates for them
        rounds, turns = self.settings.step_rounds, self._turns(entrants, *STAGES)
        for number in range(rounds):
            for stage in STAGES:
                for entrant in next(turns[stage]):
                    self._keep(entrant.steps, self._one(entrant, "step", stage))
            self.say(f"  steps, round {number + 1} of {rounds}")
        self._requests_in_turn(entrants)

    def _alone(self, entrant: Entrant, ours: Sequence[Entrant], free: int | None) -> None:
        """Time a contender that needs much memory in turn with ours, as the ratio between them requires.

        `free`: host memory before it was started. Those of ours that do not fit beside the peak of its steps run for
        their own turns only.
        """
        beside, visiting = [], []
        peak = self._one(entrant, "state").get("host") or 0
        for other in ours if entrant.worker is not None else ():
            need = (other.state.get("host") or 0) + MEMORY_MARGIN
            if other.status != "measured" or free is None:
                continue
            if need < free - peak:
                free -= need
                beside.append(other)
                self._open(other)
            else:
                visiting.append(other)
        turns = self._turns([entrant, *beside, *visiting], *STAGES)
        for number in range(self.settings.alone_rounds):
            for stage in STAGES:
                for one in next(turns[stage]):
                    if one in visiting and not self._fits(one):
                        continue
                    if one in visiting:
                        self._open(one)
                    samples = entrant.steps if one is entrant else entrant.beside.setdefault(str(one.contender), {})
                    self._keep(samples, self._one(one, "step", stage))
                    if one in visiting:
                        one.close()
            self.say(f"  steps, round {number + 1} of {self.settings.alone_rounds}")
        for other in beside:
            other.close()
        self._requests_in_turn([entrant])

    def _open(self, entrant: Entrant) -> None:
        """Start a contender's process again; its first steps are not timed."""
        entrant.worker = Worker(entrant.task)
        for stage in STAGES:
            self._one(entrant, "step", stage)

    @staticmethod
    def _fits(entrant: Entrant) -> bool:
        free = memory()[0]
        return free is not None and (entrant.state.get("host") or 0) + MEMORY_MARGIN < free

    def _requests_in_turn(self, entrants: Sequence[Entrant]) -> None:
        (turns,) = self._turns(entrants, "request").values()
        for number in range(self.settings.request_rounds):
            for entrant in next(turns):
                if seconds := self._one(entrant, "request"):
                    entrant.requests.append(seconds)
            self.say(f"  requests, round {number + 1} of {self.settings.request_rounds}")
        for entrant in entrants:
            entrant.state = self._one(entrant, "state")

    def _turns(self, entrants: Sequence[Entrant], *things: str) -> dict[str, Iterator[list[Entrant]]]:
        """The orders of the rounds, for each thing that is timed."""
        return {thing: orders(entrants, f"{self.settings.seed} {thing}") for thing in things}

    @staticmethod
    def _keep(samples: dict[str, list[float]], seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            samples.setdefault(name, []).append(value)

    def _one(self, entrant: Entrant, what: str, *arguments: str) -> dict[str, Any]:
        """Call a contender's worker and return its answer; {} if it is not running, or fails now."""
        if entrant.worker is None:
            return {}
        try:
            return dict(entrant.worker.call(what, *arguments))
        except ContenderError as error:
            entrant.stop("failed", f"{what}: {error}")
            self.say(f"  {entrant.contender}: failed: {error}")
            return {}

    def outcome(self, entrant: Entrant) -> Outcome:
        """The report's entry on a contender."""
        return outcome_of(entrant, self.bundle, self.workload, self.settings.alpha)


def orders(entrants: Sequence[Entrant], seed: str) -> Iterator[list[Entrant]]:
    """Yield random orders without end, none the same as the one before it."""
    drawn, before = Random(seed), list[Entrant]()
    while True:
        order = drawn.sample(entrants, len(entrants))
        if order != before or len(order) < 2:
            yield order
            before = order


def memory_needed(kind: str, bundle: Bundle, concepts: int) -> int:
    """A lower estimate in bytes of what a kind holds on the host, in float32; 0 if it holds too little to matter.

    (a) and the reference write attention out: 3 times the logits of all rows of the largest layer. At full size (a) was
    seen to hold 6.7, 11.2, 14.6 and 17.7 GB for zero to three concepts; the estimates are 6.6, 9.9, 13.1 and 16.3.
    """
    if kind not in ("authors", "reference"):
        return 0
    rows = rows_of_theory("authors" if kind == "authors" else "strong", concepts)
    layer = min(bundle.injection_layers, key=lambda layer: layer.factor)
    tokens = bundle.grid(layer.factor)[0] * bundle.grid(layer.factor)[1]
    weights = sum(int(entry["bytes"]) for name, entry in bundle.files.items() if name == "weights.bin")
    weights = weights * 4 // (4 if bundle.dtype == "float32" else 2)
    return int(0.8 * weights + 3 * rows * layer.num_heads * tokens**2 * 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `magicface-rt bench`."""
    import sys

    from magicface_rt.cli import main as command_line

    return command_line(["bench", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
