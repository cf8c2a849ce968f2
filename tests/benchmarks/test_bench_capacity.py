"""Capacity on paper: only what was measured on such a device counts, and what it rests on is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import capacity as command
from benchmarks import resuming
from benchmarks.bootstrap import figures
from benchmarks.fleet import Assumptions, Machines, capacity, totals
from benchmarks.machine import describe
from benchmarks.results import CaseResult, Counts, Outcome, Report, Requests
from benchmarks.schema import problems
from benchmarks.settings import Case, Contender, Settings
from magicface_rt.errors import InputError

GB = 10**9
GPU, PROCESSOR = "NVIDIA H200", "AMD EPYC"
KEPT = 10**6  # bytes of one step's keys
CASE = Case(concepts=1, mask_share=0.3, images=1, steps=40)


def outcome(kind: str = "kept", backend: str = "onnxruntime-cpu", rsa: float = 0.2, **changes: Any) -> Outcome:
    on_device = backend != "onnxruntime-cpu"
    one = Outcome(
        Contender(kind, backend),
        "measured",
        steps={"rsa": figures([rsa] * 3), "rba": figures([rsa / 2] * 3)},
        counts=Counts(rows={"rba": 2}, kept_bytes=KEPT * CASE.concepts if kind == "kept" else 0),
        on_device=on_device,
        host_peak_bytes=GB,
        device_peak_bytes=3 * GB if on_device else None,
    )
    return replace(one, **changes)


def report(*outcomes: Outcome, cases: tuple[CaseResult, ...] = (), **machine: Any) -> dict[str, Any]:
    """A report of a machine with a GPU and a processor, with one case of these outcomes."""
    described = {**describe(), "processor": PROCESSOR, "gpu": f"{GPU}, 555.1, 143771 MiB", "quiet": True, **machine}
    described["load_average_at_end"] = described["load_average"]
    begun = [replace(c, started=c.started or described["started"]) for c in cases or (case_of(CASE, *outcomes),)]
    content = Report(described, {}, {"parity_steps": 2}, tuple(begun)).to_json()
    return dict(json.loads(json.dumps(content)))


def case_of(case: Case, *outcomes: Outcome, **changes: Any) -> CaseResult:
    one = CaseResult("bundles/tiny", 64, 64, "float32", case, outcomes, (), 0.01)
    return replace(one, **changes)


@pytest.mark.parametrize(
    ("status", "changed", "again"),
    [
        ("measured", {}, False),
        ("wrong picture", {}, True),
        ("failed", {}, True),
        ("measured", {"hash": "other"}, True),
        ("measured", {"dtype": "float16"}, True),
        ("measured", {"height": 128}, True),
    ],
)
def test_what_cannot_stand_is_measured_again_by_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, changed: dict[str, Any], again: bool
) -> None:
    monkeypatch.setattr(resuming, "describe", lambda: machine)
    settings = Settings(bundles=("bundles/tiny",), kinds=("kept",))
    machine = describe()
    case = case_of(CASE, outcome(status=status), bundle_hash="mine")
    content = report(cases=(case,), **{name: machine[name] for name in resuming.SAME_MACHINE})
    content["settings"] = settings.to_json()
    assert problems(content) == []
    (tmp_path / "bench.json").write_text(json.dumps(content))
    now: Any = SimpleNamespace(**{"hash": "mine", "dtype": "float32", "height": 64, "width": 64, **changed})
    earlier = resuming.Earlier(tmp_path / "bench.json", settings, {"bundles/tiny": now})
    assert earlier.has("bundles/tiny", CASE) == (not again)
    assert len(earlier.cases) == (not again)


def requests(**stages: float) -> Requests:
    found = {name: figures([seconds]) for name, seconds in stages.items()}
    return Requests(ready=1.0, cold_start=9.0, first=8.0, next=figures([7.0]), stages=found)


def shown(content: Any, *fleet: Machines, **assumed: Any) -> str:
    assumptions = Assumptions(**assumed)
    return command.text(content, capacity(content, fleet, assumptions), fleet, assumptions)


def test_it_counts_with_what_was_measured() -> None:
    fleet = [Machines("EPYC", 4, 5 * GB)]
    assumed = Assumptions(steps=10, alpha=0.4, reserve_bytes=GB, busy=0.5)
    (one,) = capacity(report(outcome()), fleet, assumed)
    # Steps 0 to 4 are RSA: 5 x 0.2 s and 5 x 0.1 s.
    assert one.seconds_per_image == pytest.approx(1.5)
    assert one.images_per_second == pytest.approx(4 * 0.5 / 1.5)
    assert one.bytes_per_concept == 10 * KEPT
    assert one.resident is not None
    assert one.resident[0] == 300
    measured = outcome(requests=requests(text=0.1, vae_encode=0.2, rsa_steps=9.0, decode=0.7))
    (one,) = capacity(report(measured), fleet, assumed)
    assert one.seconds_per_image == pytest.approx(2.5)
    (one,) = capacity(report(cases=(case_of(replace(CASE, images=4), outcome()),)), fleet, assumed)
    assert (one.seconds_per_image, one.images_per_second) == pytest.approx((1.5 / 4, 4 * 4 * 0.5 / 1.5))


def test_a_fleet_of_gpus_gets_nothing_from_the_processor() -> None:
    cpu, gpu = outcome(rsa=9.0), outcome(backend="tensorrt", rsa=0.2)
    fleet = [Machines("h200", 1, 141 * GB), Machines("EPYC", 1, 24 * GB)]
    on_gpu, on_cpu = capacity(report(cpu, gpu), fleet, Assumptions(steps=10, reserve_bytes=0))
    assert (on_gpu.measured_on, on_cpu.measured_on) == (GPU, PROCESSOR)
    assert on_gpu.seconds_per_image == pytest.approx(1.5)
    assert on_cpu.seconds_per_image == pytest.approx(67.5)
    assert on_gpu.resident is not None
    assert on_cpu.resident is not None
    assert (on_gpu.resident[0], on_cpu.resident[0]) == (13_800, 2_300)  # of device memory, and of the host's
    with pytest.raises(InputError, match=r"nothing of the SDK was measured on 'NVIDIA H200'.*kept@"):
        capacity(report(cpu), fleet[:1], Assumptions())
    with pytest.raises(InputError, match="was measured on 'AMD EPYC'"):
        capacity(report(gpu), fleet[1:], Assumptions())


def test_it_invents_no_device() -> None:
    content = report(outcome(rsa=9.0), outcome(backend="tensorrt"))
    fleet = [Machines.parse("gpu-of-tomorrow=8:500")]
    with pytest.raises(InputError, match="was not measured"):
        capacity(content, fleet, Assumptions())
    for like, where in (("gpu", GPU), ("cpu", PROCESSOR)):
        (one,) = capacity(content, fleet, Assumptions(as_measured=like))
        assert one.measured_on == where
        assert f"**gpu-of-tomorrow is taken to be as fast as {where}" in shown(content, *fleet, as_measured=like)
    assert "is taken to be as fast" not in shown(content, Machines("h200", 1, 141 * GB), as_measured="cpu")
    with pytest.raises(InputError, match="was not measured"):
        capacity(report(outcome(), gpu=None), [Machines("h200", 1, 141 * GB)], Assumptions())
    with pytest.raises(InputError, match="Name one of the two"):
        capacity(report(outcome(), processor="NVIDIA Grace"), [Machines("nvidia", 1, 141 * GB)], Assumptions())
    with pytest.raises(InputError, match="no report"):
        capacity({"cases": []}, fleet, Assumptions())
    with pytest.raises(InputError, match="NAME=COUNT:GB"):
        Machines.parse("h200")


def test_keys_in_the_measured_peak_are_not_counted_twice() -> None:
    assumed = Assumptions(steps=10, reserve_bytes=0)
    fleet = [Machines("EPYC", 1, 2 * GB)]
    # Of the compared run's 2 steps and the single one: 3 MB of the peak; with requests those of 40 steps as well.
    (steps,) = capacity(report(outcome(host_peak_bytes=GB + 8 * KEPT)), fleet, assumed)
    assert steps.resident == (99, 99)
    (whole,) = capacity(report(outcome(host_peak_bytes=GB + 8 * KEPT, requests=requests(decode=1.0))), fleet, assumed)
    assert whole.resident == (99, 103)
    assert "| 99 to 103 |" in shown(
        report(outcome(requests=requests(), host_peak_bytes=GB + 8 * KEPT)), *fleet, steps=10, reserve_bytes=0
    )
    # On a GPU a single step's keys are there for that step alone.
    gpu = outcome(backend="tensorrt", device_peak_bytes=3 * GB + 2 * KEPT)
    (one,) = capacity(report(gpu), [Machines("h200", 1, 4 * GB)], assumed)
    assert one.resident == (99, 99)
    (one,) = capacity(report(replace(gpu, device_peak_bytes=3 * GB + KEPT)), [Machines("h200", 1, 4 * GB)], assumed)
    assert one.resident == (99, 100)


def test_what_does_not_fit_makes_no_images() -> None:
    content = report(outcome())
    fleet = [Machines("EPYC", 3, GB / 2), Machines("AMD", 1, 9 * GB)]
    small, large = capacity(content, fleet, Assumptions())
    assert (small.images_per_second, small.resident) == (0.0, (0, 0))
    (whole,) = totals([small, large], fleet)
    assert whole.images_per_second == large.images_per_second
    assert (whole.resident, whole.without) == (large.resident, ("EPYC",))
    assert "| does not fit |" in shown(content, *fleet)
    many = report(cases=(case_of(replace(CASE, concepts=4), outcome()),))
    assert "fewer concepts fit" in shown(many, Machines("EPYC", 1, GB + 30 * KEPT), reserve_bytes=0)


def test_each_row_says_what_it_lacks() -> None:
    fleet = Machines("EPYC", 1, 9 * GB)
    assert "without text encoder, decoder, not measured" in shown(report(outcome()), fleet)
    assert "without text encoder, VAE encoder, decoder, not measured" in shown(report(outcome("bare")), fleet)
    whole = report(outcome(requests=requests(text=0.1, decode=0.7)))
    assert "not measured here" not in shown(whole, fleet)
    (row,) = (line for line in shown(report(outcome()), fleet).splitlines() if line.startswith("| 1 x EPYC"))
    assert row.endswith("| [1] |")
    assert "memory not measured" in shown(report(outcome(host_peak_bytes=None)), fleet)
    assert "| not known |" in shown(report(outcome(host_peak_bytes=None)), fleet)
    assert "none kept" in shown(report(outcome("bare")), fleet)
    busy = report(cases=(case_of(CASE, outcome(), foreign_load=0.5),))
    assert "while other work ran" in shown(busy, fleet)
    assert "in a run that began yesterday" in shown(
        report(cases=(case_of(CASE, outcome(), started="yesterday"),)), fleet
    )
    assert "uploads its keys" in shown(report(outcome(notes=("a single step uploads its keys",))), fleet)


def test_rows_of_a_sweep_can_be_told_apart() -> None:
    others: list[dict[str, Any]] = [{"mask_share": 1.0}, {"images": 8}, {"steps": 20}, {"concepts": 3}]
    cases = [case_of(CASE, outcome()), *(case_of(replace(CASE, **change), outcome()) for change in others)]
    cases += [case_of(CASE, outcome(), height=768), case_of(CASE, outcome(), dtype="float16")]
    cases += [case_of(CASE, outcome(), bundle="bundles/other")]
    written = shown(report(cases=tuple(cases)), Machines("EPYC", 1, 9 * GB))
    parts = [line for line in written.splitlines() if line.startswith("| 1 x EPYC")]
    described = {tuple(cell.strip() for cell in line.split("|")[3:11]) for line in parts}
    assert len(described) == len(parts) == len(cases)
    assert ("SDK, kept keys and values", "tiny", "64 x 64", "float32", "1", "30%", "8", "40") in described
    assert len([line for line in written.splitlines() if line.startswith("| kept |")]) == len(cases)


def test_the_whole_fleet_is_summed_from_each_parts_fastest_form() -> None:
    content = report(outcome(rsa=2.0), outcome(backend="onnxruntime-cuda", rsa=0.4), outcome(backend="tensorrt"))
    fleet = [Machines("h200", 4, 4 * GB), Machines("EPYC", 2, 2 * GB)]
    assumed = Assumptions(steps=10, reserve_bytes=0, busy=1.0)
    (whole,) = totals(capacity(content, fleet, assumed), fleet)
    assert whole.images_per_second == pytest.approx(4 / 1.5 + 2 / 15)
    assert whole.resident == (4 * 100 + 2 * 100, 4 * 100 + 2 * 100)
    assert whole.without == ()
    assert f"| {whole.images_per_second:.4g} | 600 |" in shown(content, *fleet, steps=10, reserve_bytes=0, busy=1.0)
    # Where a part has no such form, the sum says so.
    lacking = report(outcome("bare", rsa=2.0), outcome("kept", "tensorrt"))
    by_kind = {one.kind: one for one in totals(capacity(lacking, fleet, assumed), fleet)}
    assert (by_kind["bare"].without, by_kind["kept"].without) == (("h200",), ("EPYC",))
    assert by_kind["bare"].resident is None


def test_the_command_prints_every_assumption(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(report(outcome())))
    options = ["--steps", "20", "--alpha", "0.3", "--reserve", "7", "--busy", "0.65"]
    assert command.main([str(file), "--fleet", "EPYC=2:24", *options]) == 0
    written = capsys.readouterr().out
    for said in (
        "20 steps",
        "0.3 of them",
        "7 GB stay free",
        "busy 65%",
        "one reference",
        "not in 8 bits",
        "made before",
    ):
        assert said in written
    for said in ("one request after the other", "peak may hold keys", "no concept is on two devices", "--fleet says"):
        assert said in written
    assert command.main([str(file), "--fleet", "h100=2:80"]) == 2
    assert "was not measured" in capsys.readouterr().out
    assert command.main([str(tmp_path / "none.json"), "--fleet", "EPYC=2:24"]) == 2
    assert command.main([str(file), "--fleet", "EPYC=2:24", "--busy", "0"]) == 2
