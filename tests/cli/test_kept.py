"""`prepare`, `plan`, `run --kept` and `inspect` of a prepared concept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import KeptConcept
from magicface_rt.cli import main


@pytest.fixture
def job(tmp_path: Path) -> Path:
    for name, value in (("man", 90), ("hat", 200)):
        pixels = np.random.default_rng(value).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8:40] = 255
        Image.fromarray(np.dstack([pixels, mask])).save(tmp_path / f"{name}.png")
    concepts = [{"word": n, "image": f"{n}.png", "prompt": f"a {n}", "weight": 2.5} for n in ("man", "hat")]
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"prompt": "a man with a hat", "concepts": concepts, "steps": 2, "seed": 3}))
    return path


def outcome(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    target = tmp_path / "outcome.json"
    assert main([*map(str, arguments), "--json", str(target)]) == 0
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def test_a_prepared_concept_makes_the_picture_of_the_bare_one(
    tiny_bundle: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = outcome(tmp_path, "prepare", tiny_bundle, "--job", job, "--out", tmp_path / "kept")
    assert [Path(f["path"]).name for f in made["files"]] == ["man.concept", "hat.concept"]
    assert made["steps"] == KeptConcept.load(tmp_path / "kept" / "man.concept").steps == 2
    kept = ["--kept", tmp_path / "kept" / "man.concept", "--kept", tmp_path / "kept" / "hat.concept"]

    outcome(tmp_path, "run", tiny_bundle, "--job", job, "--out", tmp_path / "bare")
    run = outcome(tmp_path, "run", tiny_bundle, "--job", job, *kept, "--out", tmp_path / "made")["run"]
    assert run["timings"]["reference_pass"] == 0
    for name in ("image-0.png", "regions-0.png"):
        with Image.open(tmp_path / "bare" / name) as one, Image.open(tmp_path / "made" / name) as other:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))

    prompt = ["--prompt", "an old person", "--kept", f"file={tmp_path / 'kept' / 'man.concept'},word=person,weight=1"]
    run = outcome(tmp_path, "run", tiny_bundle, *prompt, "--out", tmp_path / "person")["run"]
    assert (run["concepts"][0]["word"], run["concepts"][0]["weight"], run["options"]["steps"]) == ("person", 1.0, 2)

    plan = outcome(tmp_path, "plan", tiny_bundle, "--job", job, *kept)
    assert plan["mode"] == "keep"
    assert plan["bytes_kept"] == sum(f["bytes"] for f in made["files"])
    assert outcome(tmp_path, "plan", tiny_bundle, "--job", job)["mode"] == "recompute"
    assert outcome(tmp_path, "plan", tiny_bundle, "--job", job, "--keep", "1GiB")["mode"] == "keep"

    capsys.readouterr()
    shown = outcome(tmp_path, "inspect", tmp_path / "kept" / "man.concept")
    assert shown["word"] == "man"
    assert shown["pictures"] == []
    said = capsys.readouterr().out
    assert "none stored" in said
    assert "intact" in said
    assert "a man" in said

    assert main(["run", str(tiny_bundle), "--job", str(job), *map(str, kept), "--steps", "3", "--out", "x"]) == 2
    assert "is for 2 steps" in capsys.readouterr().err
    assert main(["plan", str(tiny_bundle), "--job", str(job), "--budget", "1kB"]) == 2
    assert "budget" in capsys.readouterr().err
    assert main(["prepare", str(tiny_bundle), "--job", str(job), "--out", str(tmp_path / "kept")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_bad_options_say_what_is_wrong(tmp_path: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.concept").write_bytes(b"nothing")
    cases = {
        "has 7 bytes": ["run", "nowhere", "--prompt", "a", "--kept", tmp_path / "bad.concept", "--out", tmp_path / "o"],
        "is not expected": [
            "run",
            "nowhere",
            "--prompt",
            "a",
            "--kept",
            "file=x,size=2",
            "--out",
            tmp_path / "o",
        ],
        "there is no concept": ["prepare", "nowhere", "--out", tmp_path / "o"],
        "storage is '4-bit'": ["prepare", "nowhere", "--job", job, "--storage", "4-bit", "--out", tmp_path / "o"],
    }
    for reason, arguments in cases.items():
        assert main([str(a) for a in arguments]) == 2
        said = capsys.readouterr().err
        assert reason in said
    assert main(["inspect", str(tmp_path / "bad.concept")]) == 2
    assert "damaged" in capsys.readouterr().err
