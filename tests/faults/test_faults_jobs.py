"""Jobs and the `--concept` option: what is deep, long, doubled, or only looks like a number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from corruptions import as_bytes, trees_of
from hypothesis import strategies as st
from outcomes import inputs, judged, loop
from single_files import JOB

from magicface_rt.errors import JobError
from magicface_rt.jobs import MAX_JOB_BYTES, MAX_YAML_BYTES, Job, load_job, parse_concept_option

ROOM = MAX_JOB_BYTES - 100
YAML_ROOM = MAX_YAML_BYTES - 100


def load(path: Path) -> Job | None:
    return judged("job, edited", lambda: load_job(path), names=path)


@inputs
@pytest.mark.parametrize("style", ["json", "yaml"])
def test_any_other_value(inputs: int, style: str, tmp_path: Path) -> None:
    path = tmp_path / f"job.{style}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        load(path)

    texts = trees_of(JOB).map(as_bytes)
    if style == "yaml":  # JSON with deep lists is YAML too
        texts |= trees_of(JOB).map(lambda tree: yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))
    loop(inputs, texts, check)


LONG = {
    "json lists": ("json", "[" * ROOM),
    "json keys": ("json", "{" + ",".join(f'"k{k}":1' for k in range(ROOM // 11)) + "}"),
    "json text": ("json", json.dumps({"prompt": "a" * (ROOM - 50)})),
    "json blanks": ("json", " " * ROOM),
    "json unknown key": ("json", json.dumps({"x" * (ROOM - 50): 1})),
    "json tokens": (
        "json",
        json.dumps({"prompt": "a", "concepts": [{"word": "a", "image": "a", "token_index": [0] * (ROOM // 4)}]}),
    ),
    "json concepts": ("json", json.dumps({"prompt": "a", "concepts": [{"word": "a", "image": "b"}] * (ROOM // 30)})),
    "json word": (
        "json",
        json.dumps({"prompt": "a", "concepts": [{"word": "a" * (ROOM - 100), "image": "b", "weight": 200}]}),
    ),
    "yaml lists": ("yaml", "[" * YAML_ROOM),
    "yaml empty lists": ("yaml", "[" + "[]," * (YAML_ROOM // 3) + "]"),
    "yaml block lists": ("yaml", "- " * (YAML_ROOM // 2)),
    "yaml keys": ("yaml", "".join(f"k{k}: 1\n" for k in range(YAML_ROOM // 11))),
    "yaml question marks": ("yaml", "? " * (YAML_ROOM // 2)),
    "yaml numbers of base 60": ("yaml", "seed: 1" + ":1" * (YAML_ROOM // 2 - 10)),
    "yaml fractions of base 60": ("yaml", "seed: 1" + ":1" * (YAML_ROOM // 2 - 10) + ".5"),
    "yaml digits": ("yaml", "seed: " + "1" * (YAML_ROOM - 10)),
    "yaml anchors": ("yaml", "[" + "&a a," * (YAML_ROOM // 5) + "]"),
    "yaml tags": ("yaml", "!!str " * (YAML_ROOM // 6)),
    "yaml quotes": ("yaml", '"' + "\\n" * (YAML_ROOM // 2) + '"'),
    "yaml plain text": ("yaml", "a " * (YAML_ROOM // 2)),
    "yaml lines": ("yaml", "a\n" * (YAML_ROOM // 2)),
    "yaml documents": ("yaml", "---\n" * (YAML_ROOM // 4)),
    "yaml merges": ("yaml", "{<<: " * (YAML_ROOM // 5)),
    "yaml comments": ("yaml", "#\n" * (YAML_ROOM // 2)),
    "yaml simple keys": ("yaml", "[" * 500 + "a," * (YAML_ROOM // 2 - 500)),
}


@pytest.mark.parametrize("case", LONG)
def test_a_job_as_long_as_it_may_be(case: str, tmp_path: Path) -> None:
    suffix, text = LONG[case]
    path = tmp_path / f"job.{suffix}"
    path.write_text(text)
    load(path)


def test_a_number_of_base_60_is_refused(tmp_path: Path) -> None:
    """200,000 digits of one took YAML minutes; nobody means 90 by 1:30."""
    path = tmp_path / "job.yaml"
    for text in ("prompt: a\nseed: 1:30\n", "prompt: a\nalpha: 0:30.5\n"):
        path.write_text(text)
        with pytest.raises(JobError, match=r"line 2: found '.*:30.*', .* expected one in decimal digits"):
            load_job(path)
    path.write_text("prompt: '1:30'\nseed: 16\n")
    assert (load_job(path).prompt, load_job(path).options.seed) == ("1:30", 16)


def test_yaml_of_more_than_it_is_read_of(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("prompt: a\n" + "#" * MAX_YAML_BYTES)
    with pytest.raises(JobError, match=r"job\.yaml.*more than 200,000 characters"):
        load_job(path)


def test_a_name_too_long_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="File name too long"):
        load_job(tmp_path / ("x" * 300))


@inputs
def test_any_option(inputs: int) -> None:
    keys = st.sampled_from(["word", "image", "mask", "prompt", "weight", "token_index", "name", "resample", "colour"])
    values = st.text(max_size=8) | st.sampled_from(
        ['"a, b"', "a\\,b", '"', "\\", "1e999", "nan", "9" * 5000, "5 6", "\0"]
    )
    pairs = st.lists(st.tuples(keys, values), max_size=5).map(lambda found: ",".join(f"{k}={v}" for k, v in found))
    loop(
        inputs,
        pairs | pairs.map("word=man,image=man.png,".__add__) | st.text('word=,image\\" 19', max_size=60),
        lambda text: judged("concept option", lambda: parse_concept_option(text), names="concept option"),
    )


@pytest.mark.parametrize("text", ["word=a," * 150_000, "=" * 1_000_000, "word=" + "a\\," * 300_000, "a," * 500_000])
def test_an_option_of_a_megabyte(text: str) -> None:
    judged("concept option", lambda: parse_concept_option(text), names="concept option")
