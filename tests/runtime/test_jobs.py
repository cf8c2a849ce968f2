from __future__ import annotations

import contextlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from magicface_rt import Concept, Reference, jobs
from magicface_rt.errors import ConceptError, InputError, JobError, OptionError
from magicface_rt.jobs import MAX_JOB_BYTES, load_job, parse_concept_option, parse_job
from magicface_rt.options import Options
from tests.locations import CASES, ROOT

MAN: dict[str, Any] = {
    "word": "man",
    "image": "image/man.jpg",
    "mask": "mask/man.jpg",
    "prompt": "a man",
    "weight": 2.5,
}
JOB: dict[str, Any] = {
    "prompt": "a man with a hat",
    "negative_prompt": "lowres",
    "seed": 349585,
    "steps": 20,
    "guidance_scale": 5.0,
    "alpha": 0.25,
    "ca_scale": 0.5,
    "null_reference_prompts": False,
    "weight_mode": "scale",
    "semantic_guidance": False,
    "reference_seed": 3,
    "images": 2,
    "concepts": [
        {**MAN, "name": "the man", "token_index": 2},
        {
            "word": "hat",
            "references": [{"image": "front.png"}, {"image": "/abs/side.png", "mask": None, "prompt": "a hat"}],
        },
    ],
}


def job_file(folder: Path, content: object, name: str = "job.json") -> Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def with_concept(**changes: Any) -> dict[str, Any]:
    return {**JOB, "concepts": [MAN, {**MAN, **changes}]}


@pytest.mark.parametrize("name", ["job.json", "job.yaml", "job.yml", "job.txt", "job"])
@pytest.mark.parametrize("style", ["json", "yaml"])
def test_a_job_is_read_whole(tmp_path: Path, name: str, style: str) -> None:
    if style == "yaml" and name == "job.json":
        pytest.skip("a .json file is JSON")
    text = json.dumps(JOB) if style == "json" else yaml.safe_dump(JOB)
    job = load_job(job_file(tmp_path, text, name))
    assert job.prompt == "a man with a hat"
    assert job.options == Options(
        negative_prompt="lowres",
        seed=349585,
        steps=20,
        guidance=5.0,
        alpha=0.25,
        ca_scale=0.5,
        weight_mode="scale",
        semantic_guidance=False,
        reference_seed=3,
        images=2,
    )
    man, hat = job.concepts
    assert (man.word, man.name, man.weight, man.token_index) == ("man", "the man", 2.5, (2,))
    assert man.references[0].image == tmp_path / "image/man.jpg"
    assert man.references[0].mask == tmp_path / "mask/man.jpg"
    assert man.references[0].prompt == "a man"
    assert (hat.weight, hat.token_index, hat.name) == (3.0, None, "hat")
    assert [reference.image for reference in hat.references] == [tmp_path / "front.png", Path("/abs/side.png")]
    assert [reference.prompt for reference in hat.references] == ["", "a hat"]


def test_what_is_left_out_has_its_default() -> None:
    job = parse_job({"prompt": "a man"})
    assert job.concepts == ()
    assert job.options == Options()


def test_null_reference_prompts_empties_them() -> None:
    job = parse_job({**JOB, "null_reference_prompts": True})
    assert [r.prompt for concept in job.concepts for r in concept.references] == ["", "", ""]


def test_reading_settings_go_from_the_outside_in() -> None:
    references = [{"image": "a.png"}, {"image": "b.png", "mask_threshold": 1}]
    job = parse_job(
        {
            "prompt": "a man",
            "mask_threshold": 255,
            "resample": "nearest",
            "concepts": [MAN, {"word": "hat", "mask_threshold": 7, "references": references}],
        }
    )
    found = [(r.mask_threshold, r.resample) for concept in job.concepts for r in concept.references]
    assert found == [(255, "nearest"), (7, "nearest"), (1, "nearest")]


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not beside this tree")
def test_the_shared_cases_are_jobs() -> None:
    for path in sorted(CASES.glob("*/case.json")):
        job = load_job(path)
        assert all(Path(str(r.image)).is_file() for concept in job.concepts for r in concept.references)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the job is a list"),
        ("text", "the job is 'text'"),
        (None, "the job is null"),
        ({}, "prompt is missing"),
        ({"prompt": 3}, "prompt is 3, expected text. Put it in quotes"),
        ({**JOB, "stepps": 3}, "unknown key 'stepps'. Did you mean 'steps'"),
        ({**JOB, "guidance": 3}, "unknown key 'guidance'. Did you mean 'guidance_scale'"),
        ({**JOB, "zzz": 3}, "unknown key 'zzz'. Known keys: prompt"),
        ({3: 3}, "unknown key 3"),
        ({**JOB, "steps": 2.0}, "steps is 2.0, expected whole number"),
        ({**JOB, "steps": True}, "steps is True, expected whole number"),
        ({**JOB, "alpha": "0.4"}, "alpha is '0.4', expected number"),
        ({**JOB, "semantic_guidance": 1}, "semantic_guidance is 1, expected true or false"),
        ({**JOB, "concepts": {}}, "concepts is an object, expected list"),
        ({**JOB, "concepts": ["man"]}, r"concepts\[0\] is 'man', expected an object"),
        (with_concept(weight="3"), r"concepts\[1\]\.weight is '3', expected number"),
        (with_concept(weigth=3), r"unknown key 'weigth' in concepts\[1\]. Did you mean 'weight'"),
        (with_concept(word=False), r"concepts\[1\]\.word is False, expected text. Put it in quotes"),
        (
            with_concept(token_index=[1, 2.0]),
            r"concepts\[1\]\.token_index is a list, expected whole number, list or null",
        ),
        (with_concept(token_index=True), r"concepts\[1\]\.token_index is True"),
        (with_concept(references=[]), r"concepts\[1\]\.image stands beside references"),
        ({"prompt": "a", "concepts": [{"word": "hat"}]}, r"concepts\[0\]\.image is missing"),
        ({"prompt": "a", "concepts": [{"image": "a.png"}]}, r"concepts\[0\]\.word is missing"),
        (
            {"prompt": "a", "concepts": [{"word": "hat", "references": [{"image": "a"}, {"mask": "b"}]}]},
            r"concepts\[0\]\.references\[1\]\.image is missing",
        ),
        (
            {"prompt": "a", "concepts": [{"word": "hat", "references": [{"image": 3}]}]},
            r"concepts\[0\]\.references\[0\]\.image is 3, expected text",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(data: Any, said: str) -> None:
    with pytest.raises(JobError, match=said):
        parse_job(data)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (with_concept(weight=1000), ConceptError, r"concepts\[1\]: concept 'man': weight is 1000"),
        (with_concept(token_index=0), ConceptError, r"concepts\[1\]: concept 'man': token_index is 0"),
        (with_concept(mask_threshold=0), OptionError, r"concepts\[1\]: mask_threshold is 0"),
        (
            {"prompt": "a", "concepts": [{"word": "hat", "references": []}]},
            ConceptError,
            r"concepts\[0\]: .*no reference",
        ),
        ({**JOB, "alpha": 2}, OptionError, "alpha is 2"),
        ({**JOB, "steps": 0}, OptionError, "steps is 0"),
    ],
)
def test_values_out_of_range_keep_their_error_and_get_a_place(data: Any, error: type[InputError], said: str) -> None:
    with pytest.raises(error, match=said):
        parse_job(data)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("job.json", '{"prompt": "a", "prompt": "b"}', "key 'prompt' stands twice .*Leave one out"),
        (
            "job.json",
            '{"prompt": "a", "concepts": [{"word": "a", "word": "b"}]}',
            "key 'word' stands twice .*Leave one out",
        ),
        ("job.yaml", "prompt: a\nprompt: b\n", "key 'prompt' stands twice .*Leave one out"),
        ("job.yaml", "prompt: a\nconcepts: [{word: a, word: b}]\n", "key 'word' stands twice .*Leave one out"),
        ("job.json", '{"prompt": "a", "alpha": NaN}', "NaN"),
        ("job.json", '{"prompt": "a", "alpha": 1e999}', "alpha is inf"),
        ("job.json", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "seed|not JSON"),
        ("job.json", '{"prompt": ', "not JSON"),
        ("job.json", "[" * 100_000, "nested too deeply|not JSON"),
        ("job.yaml", "[" * 20_000, "nested too deeply|not YAML"),
        ("job.yaml", "prompt: [", "not YAML"),
        ("job.yaml", "prompt: 2020-99-99", "not YAML"),
        ("job.yaml", "prompt: a\nseed: 0123\n", r"line 2: found '0123', .* expected one in decimal digits"),
        ("job.yaml", "prompt: a\nsteps: 1_0\n", "line 2: found '1_0'"),
        ("job.yaml", "prompt: a\nguidance_scale: 7_5.0\n", "line 2: found '7_5.0'"),
        ("job.yaml", "prompt: a\nseed: 0x10\n", "line 2: found '0x10'"),
        ("job.yaml", "prompt: a\nseed: 0b11\n", "line 2: found '0b11'"),
        ("job.yaml", "prompt: a\nalpha: .inf\n", r"line 2: found '\.inf'"),
        ("job.yaml", "prompt: 0123\n", "found '0123', .* Put it in quotes where it is a text"),
        ("job.yaml", "{[a]: b}", "not YAML"),
        ("job.yaml", "prompt: !!python/object/apply:os.system [true]", "not YAML"),
        ("job.yaml", "prompt: a\n---\nprompt: b\n", "not YAML"),
        ("job.yaml", "a: &x [1]\nprompt: *x\n", "YAML alias"),
        ("job.yaml", "prompt: a\nconcepts: [{word: no, image: a.png}]\n", r"concepts\[0\]\.word is False"),
        ("job.yaml", "", "the job is null"),
        ("job", "", "the job is null"),
    ],
)
def test_files_that_are_no_jobs_are_refused_by_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = job_file(tmp_path, text, name)
    with pytest.raises(InputError, match=said) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"job '{path}': ")


def test_decimal_numbers_of_yaml_are_read_as_they_stand(tmp_path: Path) -> None:
    text = "prompt: '0123'\nseed: +7\nguidance_scale: 7.\nalpha: .5\nca_scale: 1.0e-1\nnegative_prompt: '1:30'\n"
    job = load_job(job_file(tmp_path, text, "job.yaml"))
    assert (job.prompt, job.options.negative_prompt) == ("0123", "1:30")
    assert (job.options.seed, job.options.guidance, job.options.alpha, job.options.ca_scale) == (7, 7.0, 0.5, 0.1)


def test_a_job_is_about_the_files_beside_it_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of one name from several folders, all read before the first image is opened."""
    jobs, options = [], []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        job_file(tmp_path / name, {"prompt": "a man", "concepts": [MAN]})
        monkeypatch.chdir(tmp_path / name)
        jobs += [load_job("job.json"), parse_job({"prompt": "a man", "concepts": [MAN]}), parse_job(JOB, base="in")]
        options.append(parse_concept_option("word=man,image=man.png"))
    monkeypatch.chdir(tmp_path)
    found = [job.concepts[0].references[0] for job in jobs]
    folders = [tmp_path / name / inner for name in ("first", "second") for inner in ("", "", "in")]
    assert [one.image for one in found] == [folder / "image/man.jpg" for folder in folders]
    assert [one.mask for one in found] == [folder / "mask/man.jpg" for folder in folders]
    assert [one.references[0].image for one in options] == [tmp_path / name / "man.png" for name in ("first", "second")]


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(JobError, match=r"job 'job\.json' cannot be read"):
        load_job("job.json")
    with pytest.raises(JobError, match=r"concepts\[0\]: 'image/man\.jpg' counts from the working folder"):
        parse_job({"prompt": "a", "concepts": [{"word": "man", "image": "image/man.jpg"}]})
    job = parse_job({"prompt": "a", "concepts": [{"word": "man", "image": "man.jpg"}]}, base=tmp_path)
    assert job.concepts[0].references[0].image == tmp_path / "man.jpg"


def test_alias_bombs_are_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(JobError, match="alias"):
        load_job(job_file(tmp_path, bomb, "job.yaml"))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="does not exist"):
        load_job(tmp_path / "none.json")
    with pytest.raises(JobError, match="does not exist or is not a file"):
        load_job(tmp_path)
    with pytest.raises(JobError):
        load_job("a\0b")
    (tmp_path / "job.json").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(JobError, match="not UTF-8"):
        load_job(tmp_path / "job.json")


def test_a_file_that_may_not_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = job_file(tmp_path, JOB)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", denied)
        with pytest.raises(JobError, match=r"cannot be read: .*Permission denied"):
            load_job(path)


def test_large_files_are_refused(tmp_path: Path) -> None:
    exact = json.dumps({"prompt": "a"})
    exact += " " * (MAX_JOB_BYTES - len(exact))
    assert load_job(job_file(tmp_path, exact)).prompt == "a"
    with pytest.raises(JobError, match="larger than 1,000,000 bytes"):
        load_job(job_file(tmp_path, exact + " "))


def test_a_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    assert load_job(job_file(tmp_path, '\ufeff{"prompt": "a"}')).prompt == "a"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from([*JOB, *MAN, "references", "name", "token_index", "mask_threshold", "resample"]) | st.text(
    max_size=5
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)


@given(changes=st.dictionaries(KEYS, TREES, max_size=3), concept=st.dictionaries(KEYS, TREES, max_size=4))
def test_no_tree_raises_anything_but_input_errors(changes: dict[str, Any], concept: dict[str, Any]) -> None:
    for data in (changes, {**JOB, **changes}, {"prompt": "a", "concepts": [{**MAN, **concept}, concept]}):
        with contextlib.suppress(InputError):
            parse_job(data)


@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_no_file_raises_anything_but_input_errors(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("jobs", numbered=True)
    for name in ("job.json", "job.yaml"):
        (folder / name).write_bytes(raw)
        with contextlib.suppress(InputError):
            load_job(folder / name)


@given(data=st.data(), style=st.sampled_from(["json", "yaml"]))
def test_no_cut_or_changed_file_raises_anything_but_input_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, style: str
) -> None:
    text = json.dumps(JOB) if style == "json" else yaml.safe_dump(JOB)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    path = tmp_path_factory.mktemp("jobs", numbered=True) / f"job.{style}"
    path.write_text(
        text[:start] + data.draw(st.text("{}[]:,&*!|>'\"\\ \n-0aé", max_size=5)) + text[end:], encoding="utf-8"
    )
    with contextlib.suppress(InputError):
        load_job(path)


# --- the option of the command line


def test_the_option_of_the_documentation_is_read() -> None:
    concept = parse_concept_option("word=man,image=man.jpg,mask=man-mask.png,prompt=a man,weight=2.5")
    assert (concept.word, concept.weight, concept.token_index, concept.name) == ("man", 2.5, None, "man")
    (reference,) = concept.references
    here = Path.cwd()
    assert (reference.image, reference.mask, reference.prompt) == (here / "man.jpg", here / "man-mask.png", "a man")


def test_every_key_of_the_option_is_read() -> None:
    concept = parse_concept_option(
        'word=hat, name=red hat, token_index="5, 6", weight=-1e1, image=a.png, mask_threshold=255, resample=nearest',
        base="/jobs",
    )
    assert (concept.name, concept.token_index, concept.weight) == ("red hat", (5, 6), -10.0)
    (reference,) = concept.references
    assert (reference.image, reference.mask, reference.mask_threshold) == (Path("/jobs/a.png"), None, 255)
    assert reference.resample == "nearest"


def test_beside_a_job_an_option_is_read_as_a_concept_in_the_job() -> None:
    """How references are read is meant for all, wherever their concept is written; a prompt that is given counts."""
    around = {"mask_threshold": 255, "resample": "nearest", "null_reference_prompts": True}
    job = parse_job({"prompt": "a man", "concepts": [{**MAN, "image": "a.png", "mask": "m.png"}], **around}, base=".")
    told = parse_concept_option("word=man,image=a.png,mask=m.png,prompt=a man,mask_threshold=1", job=job)
    (inside,), (beside,) = job.concepts[0].references, told.references
    assert (inside.mask_threshold, inside.resample, inside.prompt) == (255, "nearest", "")
    assert (beside.mask_threshold, beside.resample, beside.prompt) == (1, "nearest", "a man")
    assert parse_concept_option("word=man,image=a.png", job=job).references[0].mask_threshold == 255


def test_every_image_starts_a_reference() -> None:
    concept = parse_concept_option("mask=m.png,word=man,image=a.png,image=b.jpg,mask=b-mask.png,weight=2")
    assert [(r.image, r.mask) for r in concept.references] == [
        (Path.cwd() / "a.png", Path.cwd() / "m.png"),
        (Path.cwd() / "b.jpg", Path.cwd() / "b-mask.png"),
    ]


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ('"a man, smiling"', "a man, smiling"),
        (r"a man\, smiling", "a man, smiling"),
        (r'"he said \"hi\", twice"', 'he said "hi", twice'),
        (r"C:\photos\man", r"C:\photos\man"),
        (r"a\\", "a\\"),
        ('  "  kept  "  ', "  kept  "),
        ("  dropped  ", "dropped"),
        ("a=b", "a=b"),
        ('5" tall', '5" tall'),
        ("", ""),
        ('""', ""),
    ],
)
def test_values_are_quoted_and_escaped(value: str, prompt: str) -> None:
    for text in (f"prompt={value},word=man,image=a.png", f"word=man,image=a.png,prompt={value}"):
        concept = parse_concept_option(text)
        assert concept.references[0].prompt == prompt
        assert concept.word == "man"


@given(prompt=st.text(max_size=30))
def test_any_text_can_be_given_in_quotes(prompt: str) -> None:
    quoted = prompt.replace("\\", "\\\\").replace('"', '\\"')
    concept = parse_concept_option(f'word=man,prompt="{quoted}",image=a.png')
    assert concept.references[0].prompt == prompt


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("man", "found 'man', expected key=value"),
        ("word=man,smiling,image=a.png", "found 'smiling', expected key=value"),
        ("word=man,imgae=a.png", "unknown key 'imgae'. Did you mean 'image'"),
        ("word=man,references=a.png", "unknown key 'references'"),
        ("word=man,word=hat,image=a.png", "word stands twice"),
        ("word=man,image=a.png,mask=b,mask=c", "mask stands twice"),
        ("word=man,image=a.png,weight=heavy", "weight is 'heavy', expected a number in digits"),
        ("word=man,image=a.png,weight=nan", "weight is 'nan', expected a number"),
        ("word=man,image=a.png,weight=infinity", "weight is 'infinity', expected a number"),
        ("word=man,image=a.png,weight=1_0", "weight is '1_0', expected a number"),
        ("word=man,image=a.png,weight=٣", "weight is '٣', expected a number"),
        ("word=man,image=a.png,token_index=two", "token_index is 'two', expected a whole number in digits"),
        ("word=man,image=a.png,token_index=1_0", "token_index is '1_0', expected a whole number"),
        ("word=man,image=a.png,token_index=" + "9" * 5000, "token_index is '99.*, expected a whole number"),
        ("word=man,image=a.png,mask_threshold=１２８", "mask_threshold is '１２８', expected a whole number"),
        ("word=man", "image is missing"),
        ("image=a.png", "word is missing"),
        ('word="man,image=a.png', "closing quote"),
        ('word="man"x,image=a.png', "closing quote"),
    ],
)
def test_options_that_are_wrong_are_refused(text: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        parse_concept_option(text)
    assert str(caught.value).startswith("concept option ")


@pytest.mark.parametrize("weight", ["1e999", "1e9"])
def test_weights_of_an_option_are_checked(weight: str) -> None:
    with pytest.raises(ConceptError, match="weight is"):
        parse_concept_option(f"word=man,image=a.png,weight={weight}")


@given(text=st.text(max_size=60) | st.text('word=man,image="\\ \t', max_size=60))
def test_no_option_raises_anything_but_input_errors(text: str) -> None:
    with contextlib.suppress(InputError):
        parse_concept_option(text)


def test_the_page_of_requests_has_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("`"): cells[1].strip("`")
        for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines())
        if len(cells) > 1
    }
    told = {"": None, "empty": "", "none": None, "true": True}
    defaults = {key: told.get(value, value) for key, value in rows.items()}
    for of in (Options, Reference, Concept):
        for name, parameter in inspect.signature(of).parameters.items():
            if name in ("reference", "references", "mask", "name", "token_index"):  # told in words
                assert name in page
            elif parameter.default is not parameter.empty:
                assert str(defaults[name]) == str(parameter.default), name
    for key in (*jobs._JOB, *jobs._CONCEPT):
        assert f"`{key}`" in page, key
    example = json.loads(page.split("```json")[1].split("```")[0])
    assert len(parse_job(example).concepts[1].references) == 2


def test_the_page_of_requests_has_options_that_are_read() -> None:
    page = (ROOT / "docs" / "requests.md").read_text(encoding="utf-8")
    given = [line.split("'")[1] for line in page.splitlines() if line.startswith("    --concept")]
    read = [parse_concept_option(text) for text in given]
    assert [len(concept.references) for concept in read] == [1, 2, 1, 1]
    assert read[2].references[0].prompt == "a man, smiling"
    assert read[3].token_index == (5, 6)
