"""Every option of `run`, given alone: what reaches the Session is that, and nothing else changes.

The tables are held against the command and the dataclasses, so that a new option without a row fails.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
from PIL import Image

from magicface_rt import Concept, KeptConcept, Options, Reference, Request, Session
from magicface_rt.backends import Backend
from magicface_rt.cli import main, run
from magicface_rt.concept import NamedConcept
from tests.runtime.drawn_backend import Drawn

OF_OPTIONS: dict[str, tuple[list[str], object]] = {
    "negative_prompt": (["--negative-prompt", "rain"], "rain"),
    "steps": (["--steps", "5"], 5),
    "guidance": (["--guidance", "5.5"], 5.5),
    "alpha": (["--alpha", "0.7"], 0.7),
    "ca_scale": (["--ca-scale", "0.95"], 0.95),
    "weight_mode": (["--weight-mode", "scale"], "scale"),
    "semantic_guidance": (["--no-semantic-guidance"], False),
    "seed": (["--seed", "18446744073709551615"], 2**64 - 1),
    "images": (["--images", "2"], 2),
    "reference_seed": (["--reference-seed", "3"], 3),
}
OF_SESSION: dict[str, tuple[list[str], object]] = {
    "bundle": ([], Path("bundle")),
    "backend": (["--backend", "tensorrt"], "tensorrt"),
    "threads": (["--threads", "3"], 3),
    "provenance": (["--no-provenance"], False),
    "device": (["--device", "2"], 2),
    "store": (["--store", "plans"], Path("plans")),
    "target": (["--target", "l4"], "l4"),
    "build_missing": (["--build-missing"], True),
    "keep": (["--keep", "2GiB"], "2GiB"),
    "memory": (["--memory", "stream"], "stream"),
    "budget": (["--budget", "1GiB"], "1GiB"),
    "storage": (["--storage", "8-bit"], "8-bit"),
}
ELSEWHERE = {"prompt", "concept", "kept", "job", "out", "overwrite", "json_to"}
"""What they do is looked at below, and in test_main.py and test_kept.py."""


class Reached(Exception):  # noqa: N818 - it is what the test waits for
    """The Session was asked for a picture."""


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Gives all that a Session is opened with and asked for, by name, as the command line says it."""
    found: dict[str, Any] = {}

    class Asked:
        def __init__(self, bundle: Path, **settings: Any) -> None:
            found.update({"bundle": bundle, **settings})

        def __enter__(self) -> Asked:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def generate(
            self, prompt: str, concepts: Sequence[NamedConcept], *, options: Options, progress: object
        ) -> None:
            found.update({"prompt": prompt, "concepts": concepts, **options.to_dict()})
            raise Reached

    monkeypatch.setattr("magicface_rt.cli.run.Session", Asked)
    monkeypatch.chdir(tmp_path)

    def ask(arguments: Sequence[str]) -> dict[str, Any]:
        found.clear()
        prompt = [] if "--prompt" in arguments or "--job" in arguments else ["--prompt", "a man"]
        assert main(["run", "bundle", *prompt, "--out", "out", *arguments]) == 1, "it was not asked"
        return dict(found)

    return ask


def test_the_tables_have_every_option() -> None:
    assert OF_OPTIONS.keys() == {field.name for field in fields(Options)}
    assert OF_OPTIONS.keys() | OF_SESSION.keys() | ELSEWHERE == inspect.signature(run.run).parameters.keys()


@pytest.mark.parametrize("name", [*OF_OPTIONS, *OF_SESSION])
def test_an_option_changes_what_it_names_alone(reach: Callable[[Sequence[str]], dict[str, Any]], name: str) -> None:
    arguments, value = (OF_OPTIONS | OF_SESSION)[name]
    before, after = reach([]), reach(arguments)
    assert {**before, name: value} == after
    if arguments:
        assert before[name] != value
        TRIED.add(name)
    figures.tell("numbers", "options of `run`, given alone", f"{len(TRIED)} reach the Session, each alone")


TRIED: set[str] = set()


def test_what_is_not_given_is_the_default(reach: Callable[[Sequence[str]], dict[str, Any]]) -> None:
    found = reach([])
    assert {name: found[name] for name in OF_OPTIONS} == Options().to_dict()
    defaults = inspect.signature(Session).parameters
    for name in OF_SESSION.keys() - {"bundle"}:
        assert found[name] == defaults[name].default, name


def test_an_option_stands_above_the_job(reach: Callable[[Sequence[str]], dict[str, Any]], tmp_path: Path) -> None:
    Path("job.json").write_text('{"prompt": "a hat", "guidance_scale": 3.0, "alpha": 0.2, "seed": 4}')
    of_the_job = reach(["--job", "job.json"])
    assert (of_the_job["prompt"], of_the_job["guidance"], of_the_job["alpha"]) == ("a hat", 3.0, 0.2)
    for name, (arguments, value) in OF_OPTIONS.items():
        assert reach(["--job", "job.json", *arguments]) == {**of_the_job, name: value}
    assert reach(["--job", "job.json", "--prompt", "a cat"]) == {**of_the_job, "prompt": "a cat"}


@pytest.mark.parametrize("verb", ["run", "prepare", "plan"])
def test_a_concept_beside_a_job_is_read_as_the_job_says_where_it_does_not_say_it_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(f"magicface_rt.cli.{verb}.Session", opened)
    monkeypatch.chdir(tmp_path)
    found: list[Reference] = []

    def built(*arguments: Any) -> Request:
        request = build_request(*arguments)
        found[:] = [one for concept in request.concepts for one in concept.references]
        return request

    build_request = run.build_request
    monkeypatch.setattr(f"magicface_rt.cli.{verb}.build_request", built)

    def read(concept: str, **job: object) -> tuple[int, str, str]:
        Path("job.json").write_text(json.dumps({"prompt": "a man", **job}))
        out = [] if verb == "plan" else ["--out", "out"]
        assert main([verb, "bundle", *out, "--job", "job.json", "--concept", concept]) == 1
        (one,) = found
        return one.mask_threshold, one.resample, one.prompt

    bare, given = "word=man,image=a.png,prompt=a man", "word=man,image=a.png,mask_threshold=7,resample=lanczos"
    assert read(bare) == (128, "lanczos", "a man")
    assert read(bare, mask_threshold=255, resample="nearest") == (255, "nearest", "a man")
    assert read(given, mask_threshold=255, resample="nearest") == (7, "lanczos", "")
    assert read(bare, null_reference_prompts=True) == (128, "lanczos", "a man")


def test_concepts_arrive_as_they_were_given(
    reach: Callable[[Sequence[str]], dict[str, Any]], tiny_bundle: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:56, 8:56] = 255
    Image.fromarray(np.dstack([pixels, mask])).save("man.png")
    (man,) = reach(["--concept", "word=man,image=man.png,prompt=a man,weight=1.5"])["concepts"]
    assert isinstance(man, Concept)
    assert (man.word, man.weight, man.references[0].prompt) == ("man", 1.5, "a man")
    backend: Backend = Drawn()
    with Session(tiny_bundle, backend=backend, check_hashes=False) as session:
        prepared = session.prepare(man, steps=4, reference_seed=9)
    prepared.save(tmp_path / "man.concept")
    found = reach(["--kept", "file=man.concept,weight=-2", "--concept", "word=hat,image=man.png,prompt=a hat"])
    hat, kept = found["concepts"]
    assert isinstance(kept, KeptConcept)
    assert (hat.word, kept.word, kept.weight) == ("hat", "man", -2.0)
    assert kept.references[0].key == prepared.references[0].key
    assert (found["steps"], found["reference_seed"]) == (4, 9)
