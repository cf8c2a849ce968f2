"""The benchmark of kept concepts runs to its end and tells what it says it tells."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from benchmarks import kept_concepts
from benchmarks.baselines.authors import Authors
from magicface_rt import Bundle


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
    assert f"\n{tiny_bundle.name}, 256 x 256, float32, 2 steps\n" in told
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


def test_a_checkpoint_that_the_bundle_was_not_made_from_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from magicface_rt.export.random_weights import write_checkpoint

    write_checkpoint("tiny", tmp_path / "other", seed=1)
    monkeypatch.setattr(kept_concepts, "Contender", None)  # nothing may be started
    with pytest.raises(SystemExit) as ended:
        run(capsys, monkeypatch, str(tiny_bundle), "--checkpoint", str(tmp_path / "other"))
    assert ended.value.code == 2
    assert "was exported from a checkpoint with hash" in capsys.readouterr().err


def test_pytorch_computes_at_the_bundles_size_and_layers(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of the export, not of the checkpoint."""
    import torch

    opened = Bundle.open(tiny_bundle, check_hashes=False)
    layers = tuple(layer for layer in opened.injection_layers if layer.index >= 13)
    other = replace(opened, height=128, width=192, injection_layers=layers)
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: other)
    made: list[Any] = []
    real = Authors.__init__

    def noted(self: Authors, *arguments: Any, **settings: Any) -> None:
        real(self, *arguments, **settings)
        made.append(self)

    monkeypatch.setattr(Authors, "__init__", noted)
    sizes: set[tuple[int, ...]] = set()
    forward = UNet2DConditionModel.forward

    def seen(self: Any, sample: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        sizes.add(tuple(sample.shape[1:]))
        return forward(self, sample, *arguments, **settings)

    monkeypatch.setattr(UNet2DConditionModel, "forward", seen)
    paths = (str(tiny_checkpoint), str(tiny_bundle))
    pipe = Asked(("authors", 1))
    kept_concepts.authors(pipe, *paths, 1, 0.3)  # type: ignore[arg-type]
    kept_concepts.diffusers(Asked(("diffusers", 1)), *paths, 1)  # type: ignore[arg-type]
    assert sizes == {(4, 16, 24)}
    assert [one.injection_layers for one in made] == [tuple(layer.index for layer in layers)]
    assert len(pipe.sent) == 2


class Asked:
    """A contender's end of its pipe, by which these requests came."""

    def __init__(self, *requests: tuple[str, int]) -> None:
        self.requests = [*requests, None]
        self.sent: list[Any] = []

    def send(self, what: Any) -> None:
        self.sent.append(what)

    def recv(self) -> tuple[str, int] | None:
        return self.requests.pop(0)


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
