"""The load run: what it counts, and that it drives a service as it says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

pytest.importorskip("httpx")

from benchmarks import serve_load
from benchmarks.serving.flatness import flatness
from benchmarks.serving.offering import MOST_REQUESTS, Sample, arrivals, offer, repeat, saturate, summary
from magicface_rt.errors import AnswerError, QueueFullError


def test_arrivals_are_a_poisson_process_of_that_rate_and_the_same_each_time() -> None:
    due = arrivals(20, 60, seed=1)
    assert due == arrivals(20, 60, seed=1) != arrivals(20, 60, seed=2)
    assert due == sorted(due)
    assert due[0] >= 0
    assert due[-1] < 60
    assert abs(len(due) - 1200) < 5 * 1200**0.5
    gaps = np.diff(due)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15)  # of an even beat it would be 0


def test_a_rate_that_needs_too_many_requests_is_refused() -> None:
    with pytest.raises(ValueError, match=f"more than {MOST_REQUESTS}"):
        arrivals(MOST_REQUESTS, 1.1, seed=0)


def test_an_open_loop_counts_the_waiting_that_a_slow_service_causes() -> None:
    """One request at a time, 0.05 s each, offered twice as fast: the last waits for about half of all."""
    one = asyncio.Lock()

    async def send(k: int) -> int:
        async with one:
            await asyncio.sleep(0.05)
        return 1

    async def offered() -> object:
        return await offer(send, 40, 1.0, seed=0)

    point = asyncio.run(offered())
    made = point.made
    assert made == len(arrivals(40, 1.0, seed=0))
    assert point.made_rate < 21
    assert point.p50 < point.p95 <= point.p99
    assert point.p99 > 0.05 * made - 1.2  # a closed loop would say 0.05


def test_requests_that_are_refused_or_fail_are_counted_apart_from_latencies() -> None:
    async def send(k: int) -> int:
        if k % 3 == 1:
            raise QueueFullError("full", retry_after=1.0)
        if k % 3 == 2:
            raise AnswerError("broken", status=500, kind="internal")
        return 2

    async def offered() -> object:
        return await offer(send, 100, 0.3, seed=0)

    point = asyncio.run(offered())
    count = len(arrivals(100, 0.3, seed=0))
    assert (point.made, point.refused, point.failed) == (-(-count // 3), (count + 1) // 3, {"internal": count // 3})
    assert point.mean_batch == 2


def test_percentiles_are_of_the_pictures_made() -> None:
    samples = [Sample(0.0, k / 100, "made", 1) for k in range(1, 101)] + [Sample(0.0, 50.0, "refused")]
    point = summary(1.0, samples)
    assert (point.p50, point.p95, point.p99) == pytest.approx((0.505, 0.9505, 0.9901))
    nothing = summary(1.0, [Sample(0.0, 1.0, "refused")])
    assert (nothing.made_rate, nothing.p50, nothing.refused) == (0.0, None, 1)


def test_closed_loops_are_bounded_in_time_and_in_requests() -> None:
    sent = []

    async def send(k: int) -> int:
        sent.append(k)
        await asyncio.sleep(0.01)
        return 1

    start = monotonic()
    rate = asyncio.run(saturate(send, 4, 0.2))
    # every picture counts, of all four clients; the loop took at least its 0.2 s and at most what is seen from here
    assert len(sent) / (monotonic() - start) <= rate <= len(sent) / 0.2
    assert len(sent) > 4
    sent.clear()
    told: list[int] = []
    assert asyncio.run(repeat(send, 30, 4, told.append)) == {"made": 30}
    assert sorted(sent) == list(range(30))
    assert told == list(range(1, 31))


def noisy(slope: float) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    filling = [(made, 50_000_000 + 400_000 * made) for made in range(0, 200, 10)]
    return filling + [(m, int(130_000_000 + slope * m + rng.normal(0, 200_000))) for m in range(200, 1001, 10)]


def test_memory_that_does_not_grow_is_flat_whatever_it_did_at_first() -> None:
    found = flatness(noisy(0))
    assert found.low < 0 < found.high
    assert found.flat


def test_memory_that_grows_is_not_flat_and_its_slope_lies_in_the_interval() -> None:
    found = flatness(noisy(4096))
    assert found.low < 4096 < found.high
    assert found.low > 3000
    assert not found.flat


def test_too_few_samples_give_no_slope() -> None:
    with pytest.raises(ValueError, match="too few"):
        flatness([(k, 100) for k in range(5)])


@pytest.mark.parametrize(
    "arguments",
    [["--seconds", "0"], ["--loads", "5"], ["--batches", "-1"], ["--loads", "x"], ["--memory-requests", "9"]],
)
def test_settings_out_of_range_are_refused_before_anything_runs(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        serve_load.main(["bundle", "--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_load.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_run_over_the_real_service(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "load"
    arguments = ["--batches", "2", "--loads", "2", "--seconds", "2", "--steps", "2", "--memory-requests", "100"]
    assert serve_load.main([str(tiny_bundle), "--out", str(out), *arguments]) == 0
    report = json.loads((out / "serve_load.json").read_text())
    assert report["capacity"] > 0
    assert [form["name"] for form in report["forms"]] == [
        "one process, batches of 2",
        "one process, 2 workers, batches of 2",
    ]
    for form in report["forms"]:
        for kind in ("warm", "cold"):
            point = form[kind][0]
            assert point["offered"] == 2 * report["capacity"]
            assert point["made"] + point["refused"] == len(arrivals(point["offered"], 2.0, seed=0))
            assert point["failed"] == {}
        assert form["memory"]["endings"] == {"made": 100}
        assert form["memory"]["typical_bytes"] > 20e6
    table = (out / "serve_load.md").read_text()
    assert "one process, batches of 2: concepts kept and warm" in table
    for plot in ("latency", "throughput", "memory"):
        assert (out / f"{plot}.png").stat().st_size > 5000
        assert (out / f"{plot}.svg").exists()
