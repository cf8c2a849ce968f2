"""The harness: what it counts, what it refuses to report, and what it writes."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench, machine, output, peaks, schema, style, table
from benchmarks.bootstrap import MIN_SAMPLES, figures, ratio_of_medians
from benchmarks.contender import Run, Task
from benchmarks.counting import graph_cost, graph_rows, rows_of_theory
from benchmarks.judging import END_TO_END, NEAR_TIE, SAME_REQUEST, Verdicts
from benchmarks.machine import DevicePeak
from benchmarks.ours import Ours, prepare
from benchmarks.outcomes import Entrant, left_out, ratios_of
from benchmarks.resuming import Earlier
from benchmarks.settings import Case, Contender, Settings
from benchmarks.workload import PROMPT, Workload, mask_of_share, sizes_of
from magicface_rt import Bundle, Session
from magicface_rt.backends import Binding
from magicface_rt.cli import main
from magicface_rt.errors import BackendError, InputError, OptionError, OutputError
from tests.killed import fill, killed, temporary
from tests.locations import ROOT

OURS = "onnxruntime-cpu"
RESULTS = ROOT / "benchmarks" / "results"


def task(kind: str, bundle: Path, checkpoint: Path, folder: Path, case: Case) -> Task:
    ours = kind in ("bare", "kept")
    settings = Settings(bundles=(str(bundle),), checkpoint=str(checkpoint), request_rounds=0, parity_steps=2, threads=1)
    return Task(Contender(kind, OURS if ours else ""), str(bundle), case, settings, str(folder))


def load(one: Task) -> Any:
    from benchmarks.contender import load

    return load(one)


@pytest.mark.parametrize(
    ("concepts", "images", "kinds"),
    [
        (1, 1, ("authors", "plain", "bare", "kept")),
        (1, 2, ("bare", "kept")),
        pytest.param(3, 1, ("authors", "plain", "bare", "kept"), marks=pytest.mark.slow),
        pytest.param(0, 1, ("authors", "plain", "kept"), marks=pytest.mark.slow),
    ],
)
def test_every_contender_runs_the_rows_of_theory_and_makes_one_picture(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, concepts: int, images: int, kinds: tuple[str, ...]
) -> None:
    """Counted while they run: 2(1+N), 2+N, 2, 2 and N reference rows, 2 rows a step."""
    from benchmarks.pytorch import Judge

    case = Case(concepts=concepts, mask_share=0.3, images=images, steps=4)
    judge = Judge(task("strong", tiny_bundle, tiny_checkpoint, tmp_path, case))
    oracle = judge.run()
    judge.become_plain()
    verdicts = Verdicts("strong", "strong", 2, oracle, judge.run(), (0.0, 0.0), concepts)
    seen = {"strong": dict(oracle.rows)}
    for kind in kinds:
        one = task(kind, tiny_bundle, tiny_checkpoint, tmp_path, case)
        if kind == "kept" and concepts:
            prepare(one)
        runner = load(one)
        run = runner.run()
        runner.close()
        parity = verdicts.of(kind, run)
        assert parity.passed, f"{kind}: {parity}"
        seen[kind] = dict(run.rows)
    n, b = concepts, images
    theory = {"authors": 2 * (1 + n) * b, "strong": (2 + n) * b, "plain": 2 * b, "bare": 2 * b + n, "kept": 2 * b}
    assert seen == {kind: {"rsa": theory[kind], "rba": theory[kind]} for kind in ("strong", *kinds)}
    for kind, rows in theory.items():
        assert rows_of_theory(kind, n, images=b, steps=50) == 50 * rows


@pytest.mark.parametrize(("kind", "concepts"), [("bare", 2), ("kept", 2), ("kept", 0)])
def test_a_session_runs_the_rows_that_its_steps_are_counted_for(
    tiny_bundle: Path, kind: str, concepts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes are counted while `generate` runs, and a pass's rows are those of the graph's first convolution."""
    bundle, steps = Bundle.open(tiny_bundle, check_hashes=False), 3
    work = Workload.of(bundle, Case(concepts=concepts, mask_share=0.3, images=1, steps=steps), 0)
    sizes, passes, run = sizes_of(bundle, work), Counter[str](), Binding.run

    def counted(self: Binding) -> None:
        passes[self.contract.name] += 1
        run(self)

    with Session(bundle, backend=OURS, threads=1) as session:
        given = list(work.concepts())
        if kind == "kept":
            given = [session.prepare(concept, steps=steps) for concept in given]
        monkeypatch.setattr(Binding, "run", counted)
        session.generate(PROMPT, given, options=work.options(0.4))
    rows = sum(passes[graph] * graph_rows(bundle, graph, sizes) for graph in ("denoise_step", "reference_kv"))
    assert rows == rows_of_theory(kind, concepts, steps=steps)


def test_a_request_for_other_pictures_has_no_speed(tiny_bundle: Path) -> None:
    settings = Settings(bundles=(str(tiny_bundle),), kinds=("bare", "kept"), concepts=(1,))
    (case,) = settings.cases()
    one = bench._Bench(settings, str(tiny_bundle), Bundle.open(tiny_bundle), case, "unused", lambda _: None)
    first, second = one.entrants
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    for entrant in (first, second):
        entrant.found = Run(latents, np.zeros((1, 4, 4), np.int64))
    first.latents, second.latents = latents, latents * np.float32(1 + 0.5 * SAME_REQUEST)
    one._compare_requests(first)
    one._compare_requests(second)
    assert (first.status, second.status) == ("measured", "measured")
    second.latents = latents * np.float32(1 + 2 * SAME_REQUEST)
    one._compare_requests(second)
    assert second.status == "wrong picture"
    assert "a request's latents are 1.0e-01 from those of" in second.reason


def test_a_contender_with_another_weight_has_no_speed(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(concepts=2, mask_share=0.3, images=1, steps=4)
    right = Ours(task("bare", tiny_bundle, tiny_checkpoint, tmp_path, case))
    verdicts = Verdicts("ours", "bare", 2, right.run(), None, (0.0, 0.0), 2)
    assert verdicts.of("bare", right.run()).passed
    monkeypatch.setattr("benchmarks.workload.WEIGHT", 2.375)  # 5 % off
    wrong = Ours(task("bare", tiny_bundle, tiny_checkpoint, tmp_path, case))
    parity = verdicts.of("bare", wrong.run())
    assert not parity.passed

    settings = Settings(bundles=(str(tiny_bundle),), request_rounds=0, kinds=("bare",), concepts=(2,))
    one = bench._Bench(settings, str(tiny_bundle), Bundle.open(tiny_bundle), case, str(tmp_path), lambda _: None)
    (entrant,) = one.entrants
    monkeypatch.setattr(bench, "Worker", lambda _: _Stub(wrong))
    one._start(entrant, verdicts)
    one._rounds([entrant])
    outcome = one.outcome(entrant)
    assert (outcome.status, outcome.steps, outcome.requests) == ("wrong picture", {}, None)
    assert "error" in outcome.reason


class _Stub:
    """A worker in this process."""

    started = 0.0

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def call(self, what: str, *arguments: Any) -> Any:
        return getattr(self.runner, what)(*arguments)

    def close(self) -> None:
        pass


def test_near_ties_are_forgiven_and_more_is_not() -> None:
    latents = np.ones((1, 4, 8, 8), np.float32)
    regions = np.zeros((1, 16, 16), np.int64)
    verdicts = Verdicts("it", "reference", 2, Run(latents, regions), None, (0.0, 0.0), 1)
    off = latents * np.float32(1 + 5 * END_TO_END)
    one, many = regions.copy(), regions.copy()
    one[0, 0, 0], many[0, :4] = 1, 1
    assert not verdicts.of("strong", Run(off, regions)).passed
    assert verdicts.of("strong", Run(off, one)).passed
    assert not verdicts.of("strong", Run(off, many)).passed
    assert not verdicts.of("strong", Run(off * np.nan, one)).passed
    rounded = replace(verdicts, floors=(4 * END_TO_END, 0.0))
    assert rounded.of("strong", Run(off, regions, sixteen_bit=True)).passed
    assert not rounded.of("strong", Run(off, regions)).passed  # in float32, as PyTorch runs on a CPU
    # Where the oracle knows how far each cell is from another region, that decides, and not how many differ.
    margin = np.ones((1, 16, 16), np.float32)
    margin[0, :4] = 0.5 * NEAR_TIE
    knowing = replace(verdicts, run=Run(latents, regions, margin=margin))
    clear = regions.copy()
    clear[0, 15, 15] = 1
    assert knowing.of("strong", Run(off, many)).passed
    assert not knowing.of("strong", Run(off, clear)).passed
    assert "the oracle itself" in knowing.of("reference", Run(latents, regions)).note
    assert knowing.empty == (1,)


def test_operations_are_counted_from_the_graphs_shapes(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Without concepts ours does what (b) does in eager PyTorch, whose operations are counted as they run."""
    case = Case(concepts=0, mask_share=0.3, images=1, steps=4)
    counted = load(task("strong", tiny_bundle, tiny_checkpoint, tmp_path, case)).run()
    bundle = Bundle.open(tiny_bundle)
    sizes = sizes_of(bundle, Workload.of(bundle, case, 0))
    step = graph_cost(bundle, "denoise_step", sizes)
    layers = bundle.injection_layers
    # Ours has RegionAttention's code channels besides; of the unconditional row it follows 2 columns of 77 to the
    # foreground, in the 5 + 5 + 1 layers that are segmented.
    tokens = {layer.index: int(np.prod(bundle.grid(layer.factor))) for layer in layers}
    code = sum(2 * 8 * x.num_heads * tokens[x.index] * (tokens[x.index] + 1) for x in layers)
    segmented = [n for factor, count in ((2, 5), (4, 5), (8, 1)) for n in [int(np.prod(bundle.grid(factor)))] * count]
    spared = sum(2 * 2 * n * n * 75 for n in segmented)
    assert step.flops - code + spared == pytest.approx(counted.flops["rba"], rel=0.02)
    # One image more: twice the work, but for nothing that is shared.
    assert graph_cost(bundle, "denoise_step", sizes | {"B": 2}).flops == pytest.approx(2 * step.flops, rel=0.01)
    # 100 kept tokens more on one grid: two products of each query with each, over widened and plain channels.
    more = graph_cost(bundle, "denoise_step", sizes | {"M1": 101}).flops - step.flops
    expected = sum(2 * tokens[x.index] * 100 * (2 * x.width + 8 * x.num_heads) for x in layers if x.factor == 1)
    assert more == expected


def test_one_thing_is_varied_at_a_time() -> None:
    settings = Settings(
        bundles=("b",),
        kinds=("kept",),
        concepts=(3, 0, 1),
        mask_shares=(0.3, 1.0),
        images=(1, 8),
        steps=(20, 50),
        one_at_a_time=True,
    )
    found = [(c.concepts, c.mask_share, c.images, c.steps) for c in settings.cases()]
    base = (3, 0.3, 1, 20)
    assert found[0] == base
    assert sorted(found[1:]) == sorted(
        [(0, 0.3, 1, 20), (1, 0.3, 1, 20), (3, 1.0, 1, 20), (3, 0.3, 8, 20), (3, 0.3, 1, 50)]
    )
    assert len(replace(settings, one_at_a_time=False).cases()) == (2 * 2 + 1) * 4
    two = replace(settings, bundles=("b", "larger"))
    assert (two.cases_of("b"), two.cases_of("larger")) == (two.cases(), two.cases()[:1])
    each = replace(two, one_at_a_time=False)
    assert each.cases_of("larger") == each.cases_of("b") == each.cases()


def test_figures_and_ratios() -> None:
    found = figures([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.fastest, found.slowest) == (3.0, 1.0, 100.0)
    assert found.p95 > 4.0
    assert found.spread == pytest.approx(2 / 3)
    # A machine that slows down alike for both: the rounds' ratio stays, which only pairing sees.
    slow = np.array([1.0, 3.0, 9.0, 2.0, 6.0])
    ratio, low, high = ratio_of_medians(4 * slow, slow, paired=True, confidence=0.95, seed=0)
    assert (ratio, low, high) == (4.0, 4.0, 4.0)
    assert ratio_of_medians(4 * slow, slow, paired=False, confidence=0.95, seed=0) == (4.0, 4 / 9, 36.0)
    assert ratio_of_medians([2.0], [1.0], paired=True, confidence=0.95, seed=0) == (2.0, None, None)
    # From six rounds on it is a bootstrap, which stays inside of what was seen.
    more = np.array([*slow, 4.0, 5.0])
    assert ratio_of_medians(4 * more, more, paired=True, confidence=0.95, seed=0) == (4.0, 4.0, 4.0)
    _, low, high = ratio_of_medians(4 * more, more, paired=False, confidence=0.95, seed=0)
    assert low is not None
    assert high is not None
    assert 4 / 9 < low < 3.0 < 5.0 < high < 36.0


def test_the_interval_of_a_ratio_covers_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of medians of six paired rounds, the fewest that get one: at least 93 of 100 intervals of 95 % hold the true
    ratio. Its docstring says how many do."""
    monkeypatch.setattr("benchmarks.bootstrap.RESAMPLES", 400)  # of each; there are 2,000
    rng = np.random.default_rng(0)
    held, n = 0, MIN_SAMPLES
    for draw in range(2000):
        rounds = rng.lognormal(0, 0.2, n)
        a, b = 2 * rounds * rng.lognormal(0, 0.05, n), rounds * rng.lognormal(0, 0.05, n)
        _, low, high = ratio_of_medians(a.tolist(), b.tolist(), paired=True, confidence=0.95, seed=draw)
        assert low is not None
        assert high is not None
        held += low <= 2 <= high
    assert held >= 0.93 * 2000


class _Turns:
    """A worker that only says that it was called."""

    def __init__(self, name: str, seen: list[tuple[str, str]]) -> None:
        self.name, self.seen = name, seen

    def call(self, what: str, *arguments: str) -> dict[str, Any]:
        if what != "state":
            self.seen.append((arguments[0] if arguments else what, self.name))
        return {"total": 1.0} if what == "request" else {}


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_contenders_take_turns_in_another_order_each_round(names: str) -> None:
    def turns(seed: int) -> dict[str, list[str]]:
        seen: list[tuple[str, str]] = []
        one = object.__new__(bench._Bench)
        one.settings = Settings(bundles=("b",), kinds=("kept",), step_rounds=6, request_rounds=6, seed=seed)
        one.say = lambda _: None
        entrants = [Entrant(Contender(name), None, alone=False, worker=_Turns(name, seen)) for name in names]  # type: ignore[arg-type]
        one._rounds(entrants)
        found = {}
        for what, untimed in (("rsa", 1), ("rba", 1), ("request", 0)):
            order = "".join(name for thing, name in seen if thing == what)[untimed * len(names) :]
            found[what] = [order[i : i + len(names)] for i in range(0, len(order), len(names))]
        return found

    found = turns(seed=0)
    for what, rounds in found.items():
        assert [sorted(order) for order in rounds] == [sorted(names)] * 6, what
        assert all(before != after for before, after in itertools.pairwise(rounds)), what
    assert turns(seed=0) == found
    assert any(turns(seed=seed) != found for seed in range(1, 5))


def measured(name: str, on_device: bool, *rba: float, alone: bool = False) -> Entrant:
    kind, _, backend = name.partition("@")
    entrant = Entrant(Contender(kind, backend), None, alone)  # type: ignore[arg-type]
    entrant.steps = {"rba": list(rba)}
    entrant.state = {"on_device": on_device}
    return entrant


def test_there_is_no_ratio_between_devices() -> None:
    settings = Settings(bundles=("b",), kinds=("kept",))
    entrants = [
        measured("strong", True, 1.0, 2.0, 3.0),
        measured(f"kept@{OURS}", False, 4.0, 5.0, 6.0),
        measured("kept@tensorrt", True, 0.1, 0.2, 0.3),
    ]
    assert [(r.baseline, r.candidate) for r in ratios_of(entrants, settings)] == [("strong", "kept@tensorrt")]
    (note,) = left_out(entrants)
    assert "(b) strong eager on a GPU, SDK, kept keys and values on a processor" in note
    entrants[0].state = {}
    assert [(r.baseline, r.candidate) for r in ratios_of(entrants, settings)] == [("strong", f"kept@{OURS}")]
    (note,) = left_out(entrants)
    assert "(b) strong eager on a processor, SDK, kept keys and values, tensorrt on a GPU" in note
    assert left_out(entrants[:2]) == ()


def test_a_ratio_can_be_computed_again_from_its_samples(report: dict[str, Any]) -> None:
    """Beside a contender that ran alone ours was timed once more, which its own steps do not show."""
    theirs = measured("authors", False, 30.0, 20.0, 40.0, alone=True)
    ours = measured(f"kept@{OURS}", False, 1.0, 1.0, 1.0)
    theirs.beside = {f"kept@{OURS}": {"rba": [3.0, 2.0, 5.0]}}
    (ratio,) = ratios_of([theirs, ours], Settings(bundles=("b",), kinds=("kept",)))
    assert (ratio.ratio, ratio.candidate_samples) == (10.0, (3.0, 2.0, 5.0))
    content = json.loads(json.dumps(report["content"]))
    content["cases"][0]["ratios"] = [json.loads(json.dumps(asdict(ratio)))]
    assert schema.problems(content) == []
    assert "10.00 (range 8.00 to 10.00, 3 rounds), 30 over 3 |" in table.markdown(content)
    for one in report["content"]["cases"][0]["ratios"]:
        expected = np.median(one["baseline_samples"]) / np.median(one["candidate_samples"])
        assert one["ratio"] == pytest.approx(expected)


def test_a_report_of_the_first_format_is_still_read(report: dict[str, Any], tmp_path: Path) -> None:
    content = json.loads(json.dumps(report["content"]))
    content["format"] = 1
    assert any("baseline_samples is not known" in problem for problem in schema.problems(content))
    for ratio in content["cases"][0]["ratios"]:
        del ratio["baseline_samples"], ratio["candidate_samples"]
    assert schema.problems(content) == []
    assert "rounds) |" in table.markdown(content)
    # New figures cannot stand beside them.
    (tmp_path / "bench.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="format is 1, expected 2 as now"):
        Earlier(tmp_path / "bench.json", Settings(bundles=("b",), kinds=("kept",)))
    content["format"] = 2
    assert any("baseline_samples is missing" in problem for problem in schema.problems(content))


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/bench.json")), ids=lambda path: path.parent.name)
def test_reports_that_are_kept_are_still_read(file: Path) -> None:
    content = json.loads(file.read_text())
    assert schema.problems(content) == []
    assert table.markdown(content).startswith("# Benchmark")


def test_the_table_and_the_plots_say_where_each_one_ran(report: dict[str, Any]) -> None:
    content = json.loads(json.dumps(report["content"]))
    content["machine"].update(gpu="NVIDIA H200, 555.1, 143771 MiB", cores=2)
    (case,) = content["cases"]
    # That there is a GPU does not matter.
    assert "All of them ran on 2 CPU cores." in table.markdown(content)
    assert "2 CPU cores" in style.subject(content, case)
    assert "H200" not in style.subject(content, case)
    case["outcomes"][0]["on_device"] = True
    written = table.markdown(content)
    assert "All of them ran on" not in written
    assert "| SDK, reference pass each step | NVIDIA H200 |" in written
    assert "| SDK, kept keys and values | 2 CPU cores |" in written
    assert "NVIDIA H200 and 2 CPU cores" in style.subject(content, case)
    case["outcomes"][0].update(status="failed", reason="no memory")
    assert "All of them ran on 2 CPU cores." in table.markdown(content)


@pytest.mark.parametrize(
    ("quiet", "share", "says"),
    [
        (True, 0.01, "load average 1.81 at the start, quiet; others took up to 1.0% of"),
        (False, 0.01, "load average 1.81 at the start, NOT quiet; others took up to 1.0% of"),
        (False, 0.3, "others took up to 30.0% of the processors' time while it measured, NOT quiet: other work ran"),
        (False, None, "load average 1.81 at the start, NOT quiet: other work ran, so absolute times are too long."),
        (True, None, "load average 1.81 at the start, quiet."),
    ],
)
def test_the_table_says_how_busy_the_machine_was(
    report: dict[str, Any], quiet: bool, share: float | None, says: str
) -> None:
    content = json.loads(json.dumps(report["content"]))
    content["machine"].update(quiet=quiet, load_average=[1.81, 1.0, 1.0])
    content["cases"][0]["foreign_load"] = share
    assert says in table.markdown(content)


@pytest.mark.parametrize(("limit", "free"), [(1 << 20, 1 << 20), (1 << 60, None), (None, None)])
def test_memory_is_free_only_as_far_as_a_limit_of_the_process_leaves_it(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, free: int | None
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda *, to_another: limit if to_another else 0)
    found, total = machine.memory()
    assert found is not None
    assert total is not None
    assert found == free if free else 1 << 20 < found < total


def ended(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_the_peaks_that_is_ended_is_an_error_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peaks_of", ended)
    with pytest.raises(BackendError, match="measures the machine's peaks was ended; was there not enough memory"):
        bench._peaks(Settings(bundles=("b",), kinds=("bare",), threads=1), set())


def test_ctrl_c_finds_no_semaphores_to_leak_as_the_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would report them after the command line's own last word."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a semaphore is made")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    monkeypatch.setattr(bench, "peaks_of", peaks_at_once)
    assert bench._peaks(Settings(bundles=("b",), kinds=("bare",), threads=1), set())["cpu"]["where"] == "cpu"


def peaks_at_once(name: str, threads: int) -> peaks.Peaks:
    return peaks.Peaks(1.0, 1.0, name)


def test_an_error_in_a_process_of_the_peaks_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peaks_of", peaks_that_fail)
    with pytest.raises(MemoryError, match="for cpu") as raised:
        bench._peaks(Settings(bundles=("b",), kinds=("bare",), threads=1), set())
    assert "peaks_that_fail" in str(raised.value.__cause__), "where it was raised"


def peaks_that_fail(name: str, threads: int) -> None:
    raise MemoryError(f"for {name}")


def test_an_error_that_cannot_be_sent_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peaks_of", peaks_that_fail_with_a_lock)
    with pytest.raises(RuntimeError, match=r"OSError: .*lock"):
        bench._peaks(Settings(bundles=("b",), kinds=("bare",), threads=1), set())


def peaks_that_fail_with_a_lock(name: str, threads: int) -> None:
    raise OSError(threading.Lock())


def test_peaks_are_measured_with_the_threads_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    copying: set[int] = set()
    together, copyto = threading.Barrier(3), np.copyto

    def watched(target: Any, source: Any) -> None:
        copying.add(threading.get_ident())
        together.wait(30)  # all three copy at once, or this fails
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", watched)
    before = torch.get_num_threads()
    found = peaks.measure_peaks(size=64, megabytes=1, threads=3)
    monkeypatch.undo()
    try:
        assert torch.get_num_threads() == 3
        assert len(copying) == 3
        assert found.where.startswith("cpu, float32 (")
        assert found.where.endswith("), 3 threads")
        assert found.bytes_per_second > 0
    finally:
        torch.set_num_threads(before)
    with bench._numpy_limited_to(3):
        assert os.environ["OPENBLAS_NUM_THREADS"] == "3"
    assert os.environ.get("OPENBLAS_NUM_THREADS") != "3"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
def test_masks_have_the_share_that_was_asked_for(share: float) -> None:
    assert mask_of_share(share).mean() == pytest.approx(share, abs=1 / 128)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kinds": ("authors",), "checkpoint": None}, "needs the checkpoint"),
        ({"kinds": ("fastest",)}, "fastest"),
        ({"concepts": (7,)}, "concepts"),
        ({"mask_shares": (0.0,)}, "mask_shares"),
        ({"images": ()}, "images"),
        ({"bundles": ()}, "bundle"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Settings(**{"bundles": ("b",), "checkpoint": "c", **changes})


def test_cases_and_contenders() -> None:
    settings = Settings(bundles=("b",), checkpoint="c", concepts=(0, 3), mask_shares=(0.1, 1.0))
    assert [(c.concepts, c.mask_share) for c in settings.cases()] == [(0, 0.1), (3, 0.1), (3, 1.0)]
    none, three = settings.cases()[:2]
    assert [str(c) for c in settings.contenders(three)][-2:] == [f"bare@{OURS}", f"kept@{OURS}"]
    assert [str(c) for c in settings.contenders(none)][-1:] == [f"kept@{OURS}"]
    assert "bare" not in [c.kind for c in settings.contenders(none)]


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of the SDK's own kinds through the command line, its files, and what the screen's JSON says."""
    out = tmp_path_factory.mktemp("bench") / "out"
    arguments = ["bench", str(tiny_bundle), "--out", str(out), "--concepts", "1", "--steps", "2", "--rounds", "3"]
    arguments += ["--requests", "1", "--parity-steps", "2", "--threads", "1", "--json", str(out.parent / "r.json")]
    assert main(arguments) == 0
    content = json.loads((out / "bench.json").read_text())
    assert content == json.loads((out.parent / "r.json").read_text())
    return {"content": content, "out": out}


def test_a_run_measures_every_contender_in_its_own_process(report: dict[str, Any]) -> None:
    (one,) = report["content"]["cases"]
    assert [o["kind"] for o in one["outcomes"]] == ["bare", "kept"]
    for outcome in one["outcomes"]:
        assert outcome["status"] == "measured", outcome
        assert outcome["parity"]["passed"]
        assert len(outcome["steps"]["rba"]["samples"]) == 3
        assert outcome["requests"]["cold_start"] > outcome["requests"]["first"] > 0
        assert {"text", "rsa_steps", "decode"} <= outcome["requests"]["stages"].keys()
        assert outcome["host_peak_bytes"] > 30e6
    bare, kept = one["outcomes"]
    assert bare["steps"]["rba"]["median"] > bare["steps"]["reference_pass"]["median"] > 0
    assert (bare["counts"]["request_rows"], kept["counts"]["request_rows"]) == (2 * 3, 2 * 2)
    assert bare["counts"]["request_flops"] > kept["counts"]["request_flops"] > 0
    assert "vae_encode" not in kept["requests"]["stages"]
    assert {(r["baseline"], r["candidate"]) for r in one["ratios"]} == {(f"bare@{OURS}", f"kept@{OURS}")}


def test_a_run_that_is_cut_short_leaves_the_cases_before(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command's modules: those of the package, which are others than `benchmarks` of the repository.
    installed = importlib.import_module("magicface_rt.benchmarks.bench")

    def measured(one: Any) -> Any:
        if one.case.concepts == 2:
            raise KeyboardInterrupt
        return installed.CaseResult(
            bundle="b", height=64, width=64, dtype="float32", case=one.case, outcomes=(), ratios=()
        )

    monkeypatch.setattr(installed._Bench, "run", measured)
    assert main(["bench", str(tiny_bundle), "--out", str(tmp_path / "out"), "--concepts", "1,2"]) == 130
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [case["concepts"] for case in content["cases"]] == [1]


def outcome_that_failed(outcome: dict[str, Any]) -> dict[str, Any]:
    return {**outcome, "status": "failed", "reason": "its process ended with exit code -9"}


def test_a_run_goes_on_with_a_report(report: dict[str, Any], tiny_bundle: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "bench.json").write_text(json.dumps(report["content"]))
    arguments = ["bench", str(tiny_bundle), "--out", str(out), "--concepts", "1,0", "--steps", "2", "--rounds", "3"]
    arguments += ["--requests", "1", "--parity-steps", "2", "--no-plots", "--resume"]
    # With another number of threads its figures could not stand beside new ones.
    assert main([*arguments, "--threads", "2"]) == 2
    assert "settings.threads is 1, expected 2 as now" in capsys.readouterr().err
    assert main([*arguments, "--threads", "1"]) == 0
    content = json.loads((out / "bench.json").read_text())
    (old,) = report["content"]["cases"]
    assert content["cases"][0] == old
    assert [case["concepts"] for case in content["cases"]] == [1, 0]
    assert content["cases"][1]["outcomes"][0]["status"] == "measured"
    assert f"measured in a run that began {old['started']}" in (out / "bench.md").read_text()
    # A case with a contender that failed, for lack of memory perhaps, is measured anew.
    content["cases"][0]["outcomes"] = [outcome_that_failed(content["cases"][0]["outcomes"][0])]
    (out / "bench.json").write_text(json.dumps(content))
    assert main([*arguments, "--threads", "1"]) == 0
    content = json.loads((out / "bench.json").read_text())
    assert sorted(case["concepts"] for case in content["cases"]) == [0, 1]
    assert {case["outcomes"][0]["status"] for case in content["cases"]} == {"measured"}
    (out / "bench.json").write_text("{}")
    assert main([*arguments, "--threads", "1"]) == 2


def test_a_report_is_as_the_schema_says(report: dict[str, Any]) -> None:
    content = report["content"]
    assert schema.problems(content) == []
    try:
        import jsonschema
    except ImportError:
        pass
    else:
        jsonschema.validate(content, schema.load_schema())


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda c: c["cases"][0].pop("ratios"), "ratios is missing"),
        (lambda c: c["cases"][0]["outcomes"][0].update(status="fine"), "status"),
        (lambda c: c["cases"][0]["outcomes"][0]["steps"]["rsa"].update(median=-1.0), "median"),
        (lambda c: c["cases"][0]["outcomes"][0]["counts"]["rows"].update(rsa=2.5), "rsa"),
        (lambda c: c["machine"].update(quiet=1), "quiet"),
        (lambda c: c["cases"][0]["outcomes"][0].update(speed=3), "speed is not known"),
        (lambda c: c["peaks"]["cpu"].update(flops=float("nan")), "flops"),
        (lambda c: c["cases"][0]["outcomes"][0]["requests"]["next"].pop("samples"), "next.samples is missing"),
    ],
)
def test_another_form_is_noticed(report: dict[str, Any], break_it: Any, says: str) -> None:
    content = json.loads(json.dumps(report["content"]))
    break_it(content)
    assert any(says in problem for problem in schema.problems(content))


def test_the_table_shows_what_was_measured_and_why_not(report: dict[str, Any]) -> None:
    content = json.loads(json.dumps(report["content"]))
    written = (report["out"] / "bench.md").read_text()
    assert written.startswith(table.markdown(content))
    ratio = content["cases"][0]["ratios"][0]
    assert f"{ratio['ratio']:.2f} (range {ratio['low']:.2f} to {ratio['high']:.2f}, 3 rounds)" in written
    outcome = content["cases"][0]["outcomes"][0]
    rba = outcome["steps"]["rba"]
    assert f" {rba['median']:.3g} ({rba['fastest']:.3g} to {rba['slowest']:.3g}) |" in written
    assert ", p95 " not in written
    many = json.loads(json.dumps(content))
    many["cases"][0]["outcomes"][0]["steps"]["rba"] = asdict(figures([float(i) for i in range(1, 42)]))
    assert "| 21 (1 to 41, p95 39) |" in table.markdown(many)
    outcome.update(status="skipped", reason="needs 40 GB", steps={}, requests=None)
    assert "skipped: needs 40 GB" in table.markdown(content)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_earlier_report_stays_where_the_next_cannot_be_written(
    error: BaseException, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --resume it holds hours of measuring."""
    output.write(report["content"], tmp_path, plots=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"bench.json", "bench.md"}

    def half_written(self: Path, content: bytes) -> None:
        with self.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        output.write(report["content"], tmp_path, plots=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_plots_are_written_in_both_forms(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    names = {path.name for path in output.write(report["content"], tmp_path)}
    drawn = {"latency", "memory", "stages", "roofline"}
    assert names == {"bench.json", "bench.md"} | {f"{plot}.{kind}" for plot in drawn for kind in ("png", "svg")}
    for plot in drawn:
        image = np.asarray(Image.open(tmp_path / f"{plot}.png").convert("L"))
        assert image.std() > 10
        assert "<svg" in (tmp_path / f"{plot}.svg").read_text()


def test_the_plots_axes_name_their_units(report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    units = {plots.latency: "seconds", plots.memory: "GB", plots.stages: "seconds", plots.roofline: "GFLOP/s"}
    for plot, unit in units.items():
        figure = plot(report["content"])
        (axes,) = figure.axes
        assert unit in axes.get_xlabel() + axes.get_ylabel()
        assert axes.get_xlabel()
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in (axes.xaxis.label, axes.title, *figure.legends[0].get_texts())]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), plot


def test_what_was_varied_is_drawn(report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    content = json.loads(json.dumps(report["content"]))
    assert plots.latency_by_mask(content) is None
    (one,) = content["cases"]
    content["cases"] += [{**one, "mask_share": 1.0}, {**one, "images": 8}, {**one, "concepts": 3}]
    for plot, ticks in ((plots.latency_by_mask, [30, 100]), (plots.latency_by_batch, [1, 8]), (plots.latency, [1, 3])):
        figure = plot(content)
        assert figure.axes[0].get_xticks().tolist() == ticks
        assert len(figure.legends[0].get_texts()) == 2
    # Eight images in the time of one: each takes an eighth.
    heights = plots.latency_by_batch(content).axes[0].containers[0].lines[0].get_ydata()
    assert heights[0] == pytest.approx(8 * heights[1])


def test_a_step_on_a_gpu_stands_under_the_gpus_roof(report: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    content = json.loads(json.dumps(report["content"]))
    content["peaks"]["cuda float32"] = {**content["peaks"]["cpu"], "where": "a GPU"}
    content["cases"][0]["outcomes"][0]["on_device"] = True
    labels = [text.get_text() for text in plots.roofline(content).legends[0].get_texts()]
    assert sum("a GPU" in label for label in labels) == 1
    assert sum("cpu" in label for label in labels) == 1


def test_memory_is_asked_for_before_a_contender_starts(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bench.memory_needed("authors", bundle, 3) > bench.memory_needed("authors", bundle, 0) > 0
    assert bench.memory_needed("kept", bundle, 3) == 0
    case = Case(3, 0.3, 1, 4)
    settings = Settings(bundles=("b",), checkpoint="c", kinds=("authors",), request_rounds=0)
    one = bench._Bench(settings, "b", bundle, case, str(tmp_path), lambda _: None)
    monkeypatch.setattr(bench, "memory", lambda: (1000, 2000))
    monkeypatch.setattr(bench, "Worker", None)  # it must not be started
    one._start(one.entrants[0], None)  # type: ignore[arg-type]
    outcome = one.outcome(one.entrants[0])
    assert outcome.status == "skipped"
    assert "GB" in outcome.reason


def test_device_memory_is_what_the_driver_says_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    peak = DevicePeak(on_device=True)
    for lines in (f"{os.getpid()}, 500", f"1, 9000\n{os.getpid()}, 700\n{os.getpid()}, 100", f"{os.getpid()}, 600"):
        driver.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines.splitlines()))
        driver.chmod(0o755)
        peak.look()
    assert peak.bytes == 800 << 20
    driver.write_text("#!/bin/sh\nexit 9\n")
    unknown = DevicePeak(on_device=True)
    unknown.look()
    assert unknown.bytes is None
    on_host = DevicePeak(on_device=False)
    on_host.look()
    assert on_host.bytes is None


@pytest.mark.parametrize(("free", "together"), [(30, True), (23, False)])
def test_ours_is_beside_a_contender_with_much_memory_only_where_both_fit(
    free: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gigabyte, running, seen = 1 << 30, [], []

    class Process:
        def __init__(self, task: Any) -> None:
            self.name = task
            running.append(task)

        def call(self, what: str, *arguments: Any) -> dict[str, Any]:
            if what == "state":
                return {"host": 20 * gigabyte}
            seen.append((self.name, tuple(running)))
            return {arguments[0]: 1.0}

        def close(self) -> None:
            running.remove(self.name)

    def entrant(name: str) -> Any:
        found = Entrant(Contender(name), name, alone=name == "authors")
        found.state = {"host": 5 * gigabyte}
        return found

    theirs, ours = entrant("authors"), entrant("kept")
    monkeypatch.setattr(bench, "Worker", Process)
    monkeypatch.setattr(bench, "memory", lambda: (15 * gigabyte, None))  # while the other one idles
    one = object.__new__(bench._Bench)
    one.settings, one.say = Settings(bundles=("b",), kinds=("kept",), alone_rounds=2, request_rounds=0), lambda _: None
    theirs.worker = Process("authors")
    one._alone(theirs, [ours], free * gigabyte)
    assert {len(processes) for name, processes in seen if name == "authors"} == {2 if together else 1}
    assert {name: len(values) for name, values in ours_beside(theirs).items()} == {"rsa": 2, "rba": 2}
    assert running == ["authors"]


def ours_beside(theirs: Any) -> dict[str, list[float]]:
    (samples,) = theirs.beside.values()
    return dict(samples)


@pytest.mark.slow
def test_a_whole_comparison_with_pytorch(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["bench", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--out", str(out), "--concepts", "1"]
    arguments += ["--steps", "4", "--rounds", "2", "--requests", "2", "--parity-steps", "2", "--threads", "1"]
    arguments += ["--contenders", "authors,strong,plain,kept", "--alone", "authors", "--alone-rounds", "2"]
    assert main([*arguments, "--no-plots"]) == 0
    (case,) = json.loads((out / "bench.json").read_text())["cases"]
    assert {o["kind"]: o["status"] for o in case["outcomes"]} == dict.fromkeys(
        ("authors", "strong", "plain", "kept"), "measured"
    )
    assert all(o["requests"]["next"]["median"] > 0 for o in case["outcomes"])
    ratios = {(r["baseline"], r["of"]): r for r in case["ratios"]}
    for kind in ("authors", "strong", "plain"):
        assert ratios[kind, "rba step"]["ratio"] > 0
        assert ratios[kind, "rba step"]["interval"] == "range"
        assert ratios[kind, "rba step"]["interleaved"]
    # A request of ours was not made in turn with one of (a)'s, which ran when ours had ended.
    assert not ratios["authors", "request"]["interleaved"]
    assert ratios["plain", "request"]["interleaved"]


@pytest.mark.slow
def test_the_compiled_baseline_runs_the_rows_of_theory_in_one_graph(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured by the compiler, and run by PyTorch's own kernels: what takes minutes is the generated code."""
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: compile_it(module, **how, backend="eager"))
    torch._dynamo.reset()
    case = Case(concepts=2, mask_share=0.3, images=1, steps=4)
    strong = load(task("strong", tiny_bundle, tiny_checkpoint, tmp_path, case)).run()
    compiled = load(task("compiled", tiny_bundle, tiny_checkpoint, tmp_path, case))
    run = compiled.run()
    assert run.rows == strong.rows == {"rsa": 4, "rba": 4}
    np.testing.assert_allclose(run.latents, strong.latents, atol=1e-3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled.step("rba")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 1


def test_an_interrupted_run_leaves_no_process_and_no_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    arguments = ["bench", str(tiny_bundle), "--out", str(tmp_path / "out"), "--concepts", "1", "--rounds", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "magicface_rt.cli", *arguments, "--steps", "2", "--requests", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        # A shell that starts tests in the background lets them ignore the signal, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "round 2 of" in line)
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        assert process.wait(60) == 130, said
        for _ in range(200):  # multiprocessing's own helper sees a moment later that nobody is left
            if not _alive(process.pid):
                break
            time.sleep(0.05)
        assert not _alive(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert list(temporary.glob("magicface*")) == []


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_contender_whose_process_dies_is_reported(tiny_bundle: Path, tmp_path: Path) -> None:
    from benchmarks.worker import ContenderError, Worker

    case = Case(0, 0.3, 1, 2)
    settings = Settings(bundles=(str(tiny_bundle),), kinds=("bare",), request_rounds=0)
    with Worker(Task(Contender("bare", OURS), str(tiny_bundle), case, settings, str(tmp_path))) as worker:
        with pytest.raises(ContenderError, match="KeyError"):
            worker.call("fly")
        worker._process.kill()
        with pytest.raises(ContenderError, match="exit code -9; was there not enough memory"):
            worker.call("step", "rba")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and flock")
def test_what_a_killed_benchmark_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = SimpleNamespace(dtype="float32", width=64, height=64)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench, "Bundle", SimpleNamespace(open=lambda *_, **__: opened))
    monkeypatch.setattr(bench, "_peaks", lambda *_: {})
    measured: list[Path] = []

    def stub(then: Any) -> Any:
        return lambda settings, path, bundle, case, folder, say: SimpleNamespace(run=lambda: then(Path(folder)))

    def measure(folder: Path) -> None:
        measured.append(folder)
        raise BackendError("enough was seen")

    settings = Settings(bundles=("bundle",), kinds=("bare",))
    monkeypatch.setattr(bench, "_Bench", stub(fill))
    killed(lambda: bench.run(settings))
    (left,) = temporary(tmp_path, "magicface-bench")
    assert (left / "weights.bin").exists()
    monkeypatch.setattr(bench, "_Bench", stub(measure))
    with pytest.raises(BackendError, match="enough"):
        bench.run(settings)
    assert measured[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == []
