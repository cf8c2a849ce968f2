"""The benchmark of kept concepts runs to its end and tells what it says it tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import kept_concepts


def rows_of(text: str, head: str) -> list[list[str]]:
    """The Markdown table under a head, cell by cell."""
    lines = text.split(head, 1)[1].splitlines()[2:]
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["kept_concepts", *arguments])
    kept_concepts.main()
    return capsys.readouterr().out


def test_every_form_is_measured_and_compared(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(capsys, monkeypatch, str(tiny_bundle), "--steps", "2", "--rounds", "3", "--concepts", "2")
    rows = rows_of(told, "| N | | seconds a step")
    assert [row[1] for row in rows] == list(kept_concepts.OURS)
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", row[2]) for row in rows)
    assert re.search(r"bytes kept for a concept [\d,]+", rows[1][5])
    assert re.search(r"error of the keys \S+, of the latents \S+", rows[4][5])
    errors = {row[1]: row[6] for row in rows}
    assert errors["plain"] == "not compared"
    assert all(0 <= float(errors[what]) <= 1e-4 for what in ("first", "second", "beside"))
    assert float(errors["8-bit"]) > 0
    ratios = {row[1]: row[2] for row in rows_of(told, "| N | ratio")}
    assert set(ratios) == {"first / second", "second / plain", "beside / second"}
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", ratio) for ratio in ratios.values())


def test_only_what_took_turns_is_paired() -> None:
    """A machine that slows down alike for both: of pairs the ratio stays, and no one may say so of two runs apart."""
    lower = [kept_concepts.Told(seconds) for seconds in (1.0, 3.0, 2.0)]
    upper = [kept_concepts.Told(4 * one.seconds) for one in lower]
    assert kept_concepts._ratio(upper, lower, "diffusers") == "4.00 (4.00 to 4.00)"
    assert kept_concepts._ratio(upper, lower, "authors") == "4.00 (1.33 to 12.00), not in turn"


def test_what_was_compared_with_nothing_says_so() -> None:
    assert kept_concepts._parity([kept_concepts.Told(1.0)]) == "not compared"
    assert kept_concepts._parity([kept_concepts.Told(1.0, error=0.0), kept_concepts.Told(1.0, error=2e-5)]) == "2.0e-05"


@pytest.mark.slow
def test_pytorch_stands_beside_it(
    tiny_bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run(
        capsys, monkeypatch, str(tiny_bundle), "--checkpoint", str(tiny_checkpoint),
        "--steps", "2", "--rounds", "1", "--concepts", "1", "--authors-rounds", "1",
    )  # fmt: skip
    ratios = {row[1] for row in rows_of(told, "| N | ratio")}
    assert {"diffusers / second", "authors / second"} <= ratios
    errors = {row[1]: row[6] for row in rows_of(told, "| N | | seconds a step")}
    assert errors["diffusers"] == errors["authors"] == "not compared"
