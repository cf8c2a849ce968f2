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
    ratios = {row[1]: row[2] for row in rows_of(told, "| N | ratio")}
    assert set(ratios) == {"first / second", "second / plain", "beside / second"}
    assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", ratio) for ratio in ratios.values())


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
