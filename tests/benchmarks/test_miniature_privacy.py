"""The measure of what a kept concept gives away, on keys whose content is known."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from PIL import Image  # noqa: E402

from benchmarks.miniature import privacy  # noqa: E402
from benchmarks.miniature.privacy import Attack, Row, Taken, cut, judged, table  # noqa: E402

GRID, PATCH, STEPS = 8, 2, 3


def people(number: int, seed: int, *, telling: bool) -> tuple[list[Taken], torch.Tensor]:
    """Pictures of one colour each, kept whole; keys that hold the patch and its place, or nothing but noise."""
    draw = torch.Generator().manual_seed(seed)
    taken, pictures = [], []
    for _ in range(number):
        colour = torch.rand(3, 1, 1, generator=draw) * 1.6 - 0.8
        image = (colour + 0.1 * torch.randn(3, GRID * PATCH, GRID * PATCH, generator=draw)).clamp(-1, 1)
        cells = torch.arange(GRID * GRID)
        patches = cut(image, PATCH)
        inside = torch.cat([patches.flatten(1), cells[:, None] // GRID / GRID, cells[:, None] % GRID / GRID], 1)
        keys = torch.stack([inside if telling else torch.randn(inside.shape, generator=draw)] * STEPS)
        taken.append(Taken(keys.half(), cells, patches))
        pictures.append(patches)
    return taken, torch.stack(pictures)


def attacked(*, telling: bool) -> tuple[float, float, float]:
    """PSNR, share of own photographs, and how far places are off."""
    torch.manual_seed(0)
    own, _ = people(60, 1, telling=telling)
    victims, photographs = people(10, 2, telling=telling)
    attack = Attack([0, 2], own[0].keys.shape[2], GRID, PATCH)
    attack.train_on(own)
    found = [attack.recover(one) for one in victims]
    row = judged("attack", [patches for patches, _ in found], victims, photographs)
    return row.psnr, row.named, float(torch.stack([off.mean() for _, off in found]).mean())


def test_keys_that_hold_the_picture_give_it_back() -> None:
    psnr, named, off = attacked(telling=True)
    assert psnr > 20
    assert named == 1.0
    assert off < 1.0


def test_keys_that_hold_nothing_give_nothing_back() -> None:
    psnr, named, off = attacked(telling=False)
    assert psnr < 16
    assert named < 0.5
    assert off > 2.0


def test_the_table_leaves_what_was_not_asked_empty() -> None:
    victims, photographs = people(3, 3, telling=True)
    row = judged("the truth", [one.patches * 0.99 for one in victims], victims, photographs)
    assert row.named == 1.0
    assert table([row]).splitlines()[-1].endswith("| 100% |  |")


def test_the_report_says_where_when_and_of_what_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = SimpleNamespace(width=64, height=64, dtype="fp32", hash="1" * 64, checkpoint_hash="2" * 64)
    monkeypatch.setattr(privacy, "open_model", lambda *_: SimpleNamespace(bundle=bundle))
    monkeypatch.setattr(privacy, "Session", lambda opened, **_: nullcontext(opened))
    monkeypatch.setattr(privacy, "attacks", lambda *_, **__: ([Row("an attack", 20.0, 1.0, 0.5)], {}, [], None))
    monkeypatch.setattr(privacy, "sheet", lambda *_: Image.new("RGB", (1, 1)))
    monkeypatch.setenv("MAGICFACE_RT_COMMIT", "3" * 40)

    assert privacy.main(["--out", str(tmp_path / "out"), "--examples", "7", "--victims", "5"]) == 0
    report = json.loads((tmp_path / "out" / "privacy.json").read_text(encoding="utf-8"))
    assert report["bundle"] == {
        "width": 64,
        "height": 64,
        "dtype": "fp32",
        "hash": "1" * 64,
        "checkpoint": "2" * 64,
    }
    machine = report["machine"]
    assert machine["commit"] == "3" * 40
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", machine["started"])
    assert machine["processor"]
    assert machine["cores"] >= 1
    assert machine["versions"]["torch"] == torch.__version__
    assert report["settings"] == {"examples": 7, "victims": 5, "steps": privacy.STEPS}
    assert [row["name"] for row in report["rows"]] == ["an attack"]
