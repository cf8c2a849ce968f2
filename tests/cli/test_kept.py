"""`prepare`, `plan`, `run --kept` and `inspect` of a prepared concept."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import Concept, KeptConcept, Options, Progress, Session
from magicface_rt.cli import main
from magicface_rt.cli.run import build_request, progress_bar
from magicface_rt.errors import HostMemoryError
from magicface_rt.kept.keeper import KeepSettings
from tests.cli.jobs import write_images, write_job


@pytest.fixture
def kept(tiny_bundle: Path, job: Path, tmp_path: Path) -> Path:
    """A folder with man.concept and hat.concept, for two steps."""
    outcome(tmp_path, "prepare", tiny_bundle, "--job", job, "--out", tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture(scope="module")
def kept_once(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with man.concept and hat.concept, for two steps; not to be written to."""
    folder = tmp_path_factory.mktemp("kept-once")
    write_images(folder)
    outcome(folder, "prepare", tiny_bundle, "--job", write_job(folder), "--out", folder / "kept")
    return folder / "kept"


def outcome(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    target = tmp_path / "outcome.json"
    assert main([*map(str, arguments), "--json", str(target)]) == 0
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def same_pictures(one: Path, other: Path) -> None:
    for name in ("image-0.png", "regions-0.png"):
        with Image.open(one / name) as first, Image.open(other / name) as second:
            np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("wrong", ["a note", "the second image"])
def test_what_can_be_refused_is_refused_before_anything_is_prepared(
    wrong: str,
    tiny_bundle: Path,
    job: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prepared(*_: object, **__: object) -> None:
        raise AssertionError("something was prepared")

    monkeypatch.setattr(Session, "prepare", prepared)
    arguments = ["prepare", tiny_bundle, "--job", job, "--out", tmp_path / "kept"]
    if wrong == "a note":
        assert "has a note of 2001 characters, expected" in refusal(capsys, *arguments, "--note", "n" * 2001)
        assert "has a note of 0 characters, expected" in refusal(capsys, *arguments, "--note", "")
    else:
        second = Path(json.loads(job.read_text())["concepts"][1]["image"])
        (job.parent / second).write_bytes(b"no image")
        assert second.name in refusal(capsys, *arguments)
    assert not (tmp_path / "kept").exists()


def test_where_memory_ends_the_concepts_that_were_done_remain(
    tiny_bundle: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, prepared = Session.prepare, []

    def prepare(session: Session, concept: Concept, **named: Any) -> KeptConcept:
        prepared.append(concept.name)
        if len(prepared) == 2:
            raise HostMemoryError("there is too little memory.")
        return real(session, concept, **named)

    monkeypatch.setattr(Session, "prepare", prepare)
    assert main(["prepare", str(tiny_bundle), "--job", str(job), "--out", str(tmp_path / "kept")]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: there is too little memory."
    assert prepared == ["man", "hat"]
    assert os.listdir(tmp_path / "kept") == ["man.concept"]
    assert KeptConcept.load(tmp_path / "kept" / "man.concept", check_hashes=True).name == "man"


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
    same_pictures(tmp_path / "bare", tmp_path / "made")

    prompt = ["--prompt", "an old person", "--kept", f"file={tmp_path / 'kept' / 'man.concept'},word=person,weight=1"]
    run = outcome(tmp_path, "run", tiny_bundle, *prompt, "--out", tmp_path / "person")["run"]
    assert (run["concepts"][0]["word"], run["concepts"][0]["weight"], run["options"]["steps"]) == ("person", 1.0, 2)

    plan = outcome(tmp_path, "plan", tiny_bundle, "--job", job, *kept)
    assert plan["mode"] in ("keep", "stream")
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

    assert "is for 2 steps" in refusal(
        capsys, "run", tiny_bundle, "--job", job, *kept, "--steps", 3, "--out", tmp_path / "x"
    )
    assert "budget" in refusal(capsys, "plan", tiny_bundle, "--job", job, "--budget", "1kB")


def test_a_job_says_how_its_kept_concepts_are_used(tiny_bundle: Path, kept: Path, tmp_path: Path) -> None:
    """Weight, word and token_index as they were changed in the job after `prepare`, not as the file has them."""
    changed = write_job(
        tmp_path,
        "changed.json",
        prompt="an old hat on an old man",
        concepts=[
            {"word": "old", "name": "man", "token_index": 6, "image": "man.png", "prompt": "a man", "weight": -1.0},
            {"word": "hat", "image": "hat.png", "prompt": "a hat"},
        ],
    )
    files = ["--kept", kept / "man.concept", "--kept", kept / "hat.concept"]
    bare = outcome(tmp_path, "run", tiny_bundle, "--job", changed, "--out", tmp_path / "bare")["run"]
    made = outcome(tmp_path, "run", tiny_bundle, "--job", changed, *files, "--out", tmp_path / "made")["run"]
    same_pictures(tmp_path / "bare", tmp_path / "made")
    for found, expected in zip(made["concepts"], bare["concepts"], strict=True):
        assert {**found, "references": []} == {**expected, "references": []}
    assert [c["weight"] for c in made["concepts"]] == [-1.0, 3.0]
    assert made["concepts"][0]["tokens"] == [6]

    files[1] = f"file={kept / 'man.concept'},weight=1"
    made = outcome(tmp_path, "run", tiny_bundle, "--job", changed, *files, "--out", tmp_path / "light")["run"]
    assert (made["concepts"][0]["weight"], made["concepts"][0]["tokens"]) == (1.0, [6])
    files[1] = f"file={kept / 'man.concept'},name=man,word=man"
    made = outcome(tmp_path, "run", tiny_bundle, "--job", changed, *files, "--out", tmp_path / "word")["run"]
    assert (made["concepts"][0]["name"], made["concepts"][0]["weight"]) == ("man", -1.0)
    assert made["concepts"][0]["tokens"] == [7], "the job's token was that of its own word"


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_steps_and_reference_seed_are_the_files_where_nobody_gives_them(
    verb: str, tiny_bundle: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ["--kept", kept / "man.concept"]

    def line(name: str, *more: object, **changes: Any) -> list[object]:
        job = write_job(tmp_path, f"{name}.json", **changes)
        out = ["--out", tmp_path / name] if verb == "run" else []
        return [verb, tiny_bundle, "--job", job, *file, *more, *out]

    def steps_of(found: dict[str, Any]) -> int:
        return int(found["run"]["options"]["steps"] if verb == "run" else found["steps"])

    assert steps_of(outcome(tmp_path, *line("open", steps=None))) == 2
    assert steps_of(outcome(tmp_path, *line("same"))) == 2
    assert "is for 2 steps, and the request has 50" in refusal(capsys, *line("fifty", steps=50))
    assert "is for 2 steps, and the request has 3" in refusal(capsys, *line("option", "--steps", 3))
    yaml = tmp_path / "job.yaml"
    yaml.write_text("# by hand\nprompt: a man\nsteps: 50\n")
    out = ["--out", tmp_path / "yaml"] if verb == "run" else []
    assert "the request has 50" in refusal(capsys, verb, tiny_bundle, "--job", yaml, *file, *out)
    if verb == "run":
        assert "reference_seed 0, and the request asks for 4" in refusal(capsys, *line("seed", reference_seed=4))
        assert "reference_seed 0, and the request asks for 5" in refusal(capsys, *line("r", "--reference-seed", 5))


def test_a_file_for_other_noise_brings_its_reference_seed(
    tiny_bundle: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", tiny_bundle, "--job", job, "--reference-seed", 9, "--out", tmp_path / "kept"]
    outcome(tmp_path, *arguments)
    prompt = ["--prompt", "a man", "--kept", tmp_path / "kept" / "man.concept"]
    made = outcome(tmp_path, "run", tiny_bundle, *prompt, "--out", tmp_path / "made")["run"]
    assert (made["options"]["reference_seed"], made["options"]["steps"]) == (9, 2)


def test_run_takes_what_plan_advises(
    tiny_bundle: Path, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[KeepSettings] = []

    class Seen(Session):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            seen.append(self._keeper.settings)

    monkeypatch.setattr("magicface_rt.cli.run.Session", Seen)
    monkeypatch.setattr("magicface_rt.cli.plan.Session", Seen)
    options = ["--job", job, "--keep", "1GiB", "--memory", "stream", "--budget", "2GiB", "--storage", "8-bit"]
    assert outcome(tmp_path, "plan", tiny_bundle, *options)["mode"] == "stream"
    outcome(tmp_path, "run", tiny_bundle, *options, "--out", tmp_path / "out")
    assert seen == [KeepSettings(keep=2**30, memory="stream", budget=2**31, storage="8-bit")] * 2
    assert "budget" in refusal(capsys, "run", tiny_bundle, "--job", job, "--budget", "1kB", "--out", tmp_path / "small")


def test_prepare_stores_as_it_is_told(tiny_bundle: Path, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    made = outcome(tmp_path, "prepare", tiny_bundle, "--job", job, "--storage", "8-bit", "--with-image", "--out", out)
    loaded = KeptConcept.load(out / "man.concept")
    assert {reference.storage for reference in loaded.references} == {"8-bit"}
    assert sorted(loaded.pictures) == ["image_0", "mask_0"]
    assert made["files"][0]["error"] == loaded.error > 0


def test_prepare_goes_on_where_some_files_are_there_already(
    tiny_bundle: Path,
    job: Path,
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is whole and the very same is kept and named; nothing of it is computed again."""
    man, hat = kept / "man.concept", kept / "hat.concept"
    before = man.read_bytes(), man.stat().st_ino
    hat.unlink()
    abandoned = kept / f".man.concept.{'0' * 32}.part"  # of a process killed as it put man.concept there
    os.link(man, abandoned)
    prepared: list[str] = []
    real = Session.prepare

    def prepare(session: Session, concept: Concept, **more: Any) -> KeptConcept:
        prepared.append(concept.name)
        return real(session, concept, **more)

    monkeypatch.setattr(Session, "prepare", prepare)
    capsys.readouterr()
    made = outcome(tmp_path, "prepare", tiny_bundle, "--job", job, "--out", kept)
    said = capsys.readouterr().out
    assert [(f["concept"], f["existed"]) for f in made["files"]] == [("man", True), ("hat", False)]
    assert said.count("was there already") == 1
    assert prepared == ["hat"]
    assert (man.read_bytes(), man.stat().st_ino) == before
    assert sorted(os.listdir(kept)) == ["hat.concept", "man.concept"]
    assert KeptConcept.load(hat).word == "hat"
    assert [f["existed"] for f in outcome(tmp_path, "prepare", tiny_bundle, "--job", job, "--out", kept)["files"]] == [
        True,
        True,
    ]
    assert prepared == ["hat"]
    again = outcome(tmp_path, "prepare", tiny_bundle, "--job", job, "--out", kept, "--overwrite")
    assert [f["existed"] for f in again["files"]] == [False, False]
    assert prepared == ["hat", "man", "hat"]


OTHERS: dict[str, tuple[dict[str, Any], list[object], str]] = {
    "steps": ({}, ["--steps", 3], "its number of steps is 2, expected 3"),
    "seed": ({}, ["--reference-seed", 9], "its reference_seed is 0, expected 9"),
    "storage": ({}, ["--storage", "8-bit"], "its storage is 'exact', expected '8-bit'"),
    "note": ({}, ["--note", "hers"], "its note is None, expected 'hers'"),
    "images": ({}, ["--with-image"], "it holds no images"),
    "weight": ({"weight": 1.5}, [], "its weight is 2.5, expected 1.5"),
    "word": ({"word": "hat", "name": "man"}, [], "its word is 'man', expected 'hat'"),
    "token": ({"token_index": 2}, [], "its token_index is None, expected (2,)"),
    "prompt": ({"prompt": "an old man"}, [], "the prompt of its reference 1 is 'a man', expected 'an old man'"),
    "image": ({"image": "hat.png"}, [], "its reference 1 was made from another image or mask"),
    "count": (
        {
            "image": None,
            "prompt": None,
            "references": [{"image": n, "prompt": "a man"} for n in ("man.png", "hat.png")],
        },
        [],
        "its number of references is 1, expected 2",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_prepare_refuses_a_file_that_differs_before_anything_is_computed(
    other: str,
    tiny_bundle: Path,
    kept_once: Path,
    job: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stands second, so the first one would have been computed before it."""
    changes, more, difference = OTHERS[other]
    man = {"word": "man", "image": "man.png", "prompt": "a man", "weight": 2.5, **changes}
    concepts = [
        {"word": "hat", "name": "first", "image": "hat.png", "prompt": "a hat"},
        {key: value for key, value in man.items() if value is not None},
    ]
    changed = write_job(tmp_path, "changed.json", concepts=concepts)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(kept_once / "man.concept", out)
    monkeypatch.setattr(Session, "prepare", lambda *_, **__: pytest.fail("something was prepared"))
    said = refusal(capsys, "prepare", tiny_bundle, "--job", changed, "--out", out, *more)
    assert f"{str(out / 'man.concept')!r} exists already" in said
    assert difference in said
    assert "--overwrite" in said
    assert (out / "man.concept").read_bytes() == (kept_once / "man.concept").read_bytes()


@pytest.mark.parametrize("meanwhile", ["removed", "replaced", "written to"])
def test_prepare_looks_again_at_a_file_before_it_says_that_it_is_there(
    meanwhile: str,
    tiny_bundle: Path,
    job: Path,
    kept: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others are computed for minutes after it was read."""
    man, hat = kept / "man.concept", kept / "hat.concept"
    man.unlink()
    real = Session.prepare

    def prepare(session: Session, concept: Concept, **more: Any) -> KeptConcept:
        if meanwhile == "removed":
            hat.unlink()
        elif meanwhile == "replaced":
            shutil.copy(hat, kept / "copy")
            (kept / "copy").replace(hat)
        else:
            os.utime(hat)
        return real(session, concept, **more)

    monkeypatch.setattr(Session, "prepare", prepare)
    said = refusal(capsys, "prepare", tiny_bundle, "--job", job, "--out", kept)
    assert ("was removed" if meanwhile == "removed" else "was written to or replaced") in said
    assert KeptConcept.load(man).word == "man", "what was done stays"


def test_prepare_refuses_a_damaged_file_and_one_with_other_images(
    tiny_bundle: Path, kept_once: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    content = (kept_once / "man.concept").read_bytes()
    (out / "man.concept").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = refusal(capsys, "prepare", "nowhere", "--job", job, "--out", out)
    assert "exists already and is no whole kept concept" in said
    assert "SHA-256" in said
    (out / "man.concept").unlink()
    with_image = ["prepare", tiny_bundle, "--job", job, "--out", out, "--with-image"]
    outcome(tmp_path, *with_image)
    assert [f["existed"] for f in outcome(tmp_path, *with_image)["files"]] == [True, True]
    assert "it holds its images, and none are to be stored" in refusal(capsys, *with_image[:-1])
    KeptConcept.load(out / "man.concept")._like(pictures={"image_0": np.zeros((1, 1, 3), np.uint8)}).save(
        out / "man.concept", with_image=True, overwrite=True
    )
    assert "the images in it are others" in refusal(capsys, *with_image)


def test_prepare_sees_first_whether_it_can_write(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no such bundle, so what is said of the files was seen before it was looked for."""
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "man.concept").mkdir(parents=True)
    long = write_job(tmp_path, "long.json", concepts=[{"word": "man", "name": "m" * 250, "image": "man.png"}])
    before = sorted(os.listdir(tmp_path))
    cases = [
        ("cannot be written", job, tmp_path / "file" / "below", []),
        ("is not a folder", job, tmp_path / "file", []),
        ("is not a file", job, tmp_path / "full", ["--overwrite"]),
        ("cannot be written", long, tmp_path / "new", []),
    ]
    for reason, of, out, more in cases:
        assert reason in refusal(capsys, "prepare", "nowhere", "--job", of, "--out", out, *more)
    assert f"bundle {Path('nowhere').resolve()}: no such" in refusal(
        capsys, "prepare", "nowhere", "--job", job, "--out", tmp_path / "a" / "b"
    )
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "full") == ["man.concept"]


def test_kept_options_are_quoted_as_concepts_are(tiny_bundle: Path, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "red, old").mkdir()
    odd = (kept / "man.concept").rename(tmp_path / "red, old" / "man.concept")
    text = f'word=person, file="{odd}", name=the man\\, again, token_index="2,3"'
    made = outcome(
        tmp_path, "run", tiny_bundle, "--prompt", "an old person", "--kept", text, "--out", tmp_path / "made"
    )
    concept = made["run"]["concepts"][0]
    assert (concept["word"], concept["name"], concept["tokens"]) == ("person", "the man, again", [2, 3])
    plan = outcome(tmp_path, "plan", tiny_bundle, "--kept", odd)
    assert plan["steps"] == 2, "without a key it is a path, comma and all"


def test_bad_options_say_what_is_wrong(tmp_path: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.concept").write_bytes(b"nothing")
    run = ["run", "nowhere", "--prompt", "a", "--out", tmp_path / "o", "--kept"]
    cases = {
        "has 7 bytes": [*run, tmp_path / "bad.concept"],
        "size=2 is not expected": [*run, "file=x,size=2"],
        "word=b is not expected": [*run, "file=x,word=a,word=b"],
        "file= is missing": [*run, "word=x"],
        "weight is 'much', expected a number": [*run, "file=x,weight=much"],
        "token_index is '1.5', expected a whole number": [*run, "file=x,token_index=1.5"],
        "expected a closing quote": [*run, 'file="x,word=a'],
        "there is no concept": ["prepare", "nowhere", "--out", tmp_path / "o"],
        "storage is '4-bit'": ["prepare", "nowhere", "--job", job, "--storage", "4-bit", "--out", tmp_path / "o"],
        "memory is 'ram'": ["run", "nowhere", "--prompt", "a", "--memory", "ram", "--out", tmp_path / "o"],
    }
    for reason, arguments in cases.items():
        assert reason in refusal(capsys, *arguments)
    assert "damaged" in refusal(capsys, "inspect", tmp_path / "bad.concept")


def test_one_concept_is_given_once(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--kept", kept / "man.concept", "--kept", f"file={kept / 'hat.concept'},word=man"]
    assert "given twice for the concept 'man'" in refusal(capsys, "plan", "nowhere", *twice)


def test_a_file_that_two_concepts_could_give_way_to_is_refused(
    tiny_bundle: Path, job: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of two of one name is meant nobody can know, and to replace one of them silently leaves the other bare."""
    men = [{"word": "man", "token_index": 2, "image": "man.png"}, {"word": "man", "token_index": 5, "image": "hat.png"}]
    twice = write_job(tmp_path, "twice.json", prompt="a man with a man", concepts=men)
    for verb in (["run", "nowhere", "--out", tmp_path / "o"], ["plan", "nowhere"]):
        said = refusal(capsys, *verb, "--job", twice, "--kept", kept / "man.concept")
        assert "2 concepts have that name" in said
        assert "Give each of them a name of its own" in said
    plan = outcome(tmp_path, "plan", tiny_bundle, "--job", twice, "--kept", kept / "hat.concept")
    assert plan["steps"] == 2, "a file that is for neither of them stands behind"
    named = [{**men[0], "name": "the other"}, men[1]]
    twice = write_job(tmp_path, "named.json", prompt="a man with a man", concepts=named)
    request = build_request(twice, None, [], {}, [str(kept / "man.concept")])
    assert [type(concept) for concept in request.concepts] == [Concept, KeptConcept]


def test_the_bar_counts_the_steps_of_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(Options(steps=20)) as moved:
        assert moved is not None
        moved(Progress(37, 40, "prepare", 0, 1))
    assert "step 37 of 40" in sys.stderr.getvalue()  # type: ignore[attr-defined]
