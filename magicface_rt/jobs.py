"""Job files: a request written down as JSON or YAML, and the `--concept` option of the command line.

    {
      "prompt": "a man with a hat",                     required
      "concepts": [                                     may be empty
        {"word": "man", "image": "man.jpg", "mask": "man-mask.png", "prompt": "a man", "weight": 2.5},
        {"word": "hat", "name": "red hat", "token_index": 5, "weight": 2.0,
         "references": [{"image": "front.jpg", "mask": "front-mask.png", "prompt": "a hat"}, {"image": "side.png"}]}
      ],
      "negative_prompt": "", "seed": 0, "steps": 50, "guidance_scale": 7.5, "alpha": 0.4, "ca_scale": null,
      "weight_mode": "bias", "semantic_guidance": true, "reference_seed": 0, "images": 1,
      "null_reference_prompts": false,                  true: references are read without their prompts
      "mask_threshold": 128, "resample": "lanczos"      for every reference; a concept or a reference may have its own
    }

Paths in a job are relative to its file, whatever the working directory is when they are read. Numbers are decimal, even
in YAML, whose readers disagree on what 0123 or 1_0 is. Unknown keys are refused, so a misspelt one is not silently
ignored.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .concept import Concept, Reference
from .errors import InputError, JobError
from .files.plain_file import read_plain
from .files.strict_json import DoubledKeyError, read_json
from .options import Options
from .process.interrupts import reraise_if_interrupt
from .values.plain_numbers import is_number, is_whole
from .values.shown import shown

__all__ = ["MAX_JOB_BYTES", "Job", "load_job", "parse_concept_option", "parse_job"]

MAX_JOB_BYTES = 1_000_000
MAX_YAML_BYTES = 200_000
"""The limit for YAML, which takes a hundred times as long to read as JSON."""

_T = TypeVar("_T")

# name in the job file -> (name in Options, what it must be)
_OPTIONS = {
    "negative_prompt": ("negative_prompt", "text"),
    "seed": ("seed", "whole number"),
    "steps": ("steps", "whole number"),
    "guidance_scale": ("guidance", "number"),
    "alpha": ("alpha", "number"),
    "ca_scale": ("ca_scale", "number or null"),
    "weight_mode": ("weight_mode", "text"),
    "semantic_guidance": ("semantic_guidance", "true or false"),
    "reference_seed": ("reference_seed", "whole number"),
    "images": ("images", "whole number"),
}
_READING = {"mask_threshold": "whole number", "resample": "text"}
_REFERENCE = {"image": "text", "mask": "text or null", "prompt": "text", **_READING}
_CONCEPT = {
    "name": "text or null",
    "word": "text",
    "weight": "number",
    "token_index": "whole number, list or null",
    "references": "list",
    **_REFERENCE,
}
_JOB = {
    "prompt": "text",
    "concepts": "list",
    "null_reference_prompts": "true or false",
    **_READING,
    **{key: kind for key, (_, kind) in _OPTIONS.items()},
}


@dataclass(frozen=True, eq=False)
class Job:
    """A request: `session.generate(job.prompt, job.concepts, ...)` with `job.options`. Paths are absolute.

    reading  the job's own `mask_threshold` and `resample`, as far as it gives them. Its concepts are made with them,
             and so is one that `parse_concept_option` makes to stand beside the job
    """

    prompt: str
    concepts: tuple[Concept, ...]
    options: Options
    reading: Mapping[str, Any] = field(default_factory=dict)


def load_job(path: str | os.PathLike[str]) -> Job:
    """Read a job file: JSON if its name ends in .json, YAML if in .yaml or .yml, else whichever it looks like.

    Raises `JobError` for a file that cannot be read, is larger than `MAX_JOB_BYTES`, or does not have a job's form;
    `ConceptError`, `OptionError` and the like for values out of range. Each message starts with the file's name and
    says where in it: `concepts[1].weight`.
    """
    path = Path(path)
    name = repr(os.fspath(path))
    try:
        folder = path.absolute().parent
        raw = read_plain(path, MAX_JOB_BYTES)
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise JobError(f"job {name} cannot be read: {error}. Is it another file?") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobError(f"job {name} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    suffix = path.suffix.lower()
    is_json = suffix == ".json" or (suffix not in (".yaml", ".yml") and text.lstrip().startswith("{"))
    return _with_location(
        f"job {name}", lambda: parse_job(_read_json(text) if is_json else _read_yaml(text), base=folder)
    )


def parse_job(data: object, *, base: str | os.PathLike[str] = ".") -> Job:
    """Make a job from parsed JSON or YAML. Relative paths in it count from `base`. Raises as `load_job`."""
    job = _checked(data, _JOB, "")
    if "prompt" not in job:
        raise JobError("prompt is missing; expected the text to make a picture of.")
    reading = {key: job[key] for key in _READING if key in job}
    without_prompts = job.get("null_reference_prompts", False)
    concepts = [
        _concept(item, f"concepts[{position}]", Path(base), reading, without_prompts=without_prompts)
        for position, item in enumerate(job.get("concepts", []))
    ]
    settings = {name: job[key] for key, (name, _) in _OPTIONS.items() if key in job}
    return Job(job["prompt"], tuple(concepts), Options(**settings), reading)


def parse_concept_option(text: str, *, base: str | os.PathLike[str] = ".", job: Job | None = None) -> Concept:
    r"""Parse a concept such as `word=man,image=man.jpg,mask=man-mask.png,prompt=a man,weight=2.5`.

    Keys: word, name, weight, token_index (several: `token_index="5,6"`), image, mask, prompt, mask_threshold, resample.
    Another `image` starts another reference, and the keys of a reference after it belong to it:
    `word=man,image=a.png,image=b.jpg,mask=b-mask.png`.

    A value with a comma is put in double quotes, `prompt="a man, smiling"`, or has the comma escaped,
    `prompt=a man\, smiling`.
    `\,`, `\"` and `\\` stand for the second character; any other backslash stands for itself. Blanks around keys and
    around values without quotes are dropped.

    Beside a `job` its references are read as those in the job: with its `mask_threshold` and `resample` where the text
    does not give them.

    Raises `JobError` for text that cannot be parsed, and whatever `Concept` and `Reference` raise.
    """
    reading = job.reading if job is not None else {}
    return _with_location(
        f"concept option {shown(text)}",
        lambda: _concept(_option_data(text), "", Path(base), reading, without_prompts=False),
    )


def _option_data(text: str) -> dict[str, Any]:
    concept: dict[str, Any] = {}
    references: list[dict[str, Any]] = [{}]
    for key, value in split_option(text):
        if key not in _CONCEPT or key == "references":
            raise _unknown_key(key, "", [name for name in _CONCEPT if name != "references"])
        if key == "image" and "image" in references[-1]:
            references.append({})
        into = references[-1] if key in _REFERENCE else concept
        if key in into:
            raise JobError(f"{key} stands twice. Give it once, or put image= before it for another reference.")
        into[key] = option_value(key, value)
    return {**concept, **references[0]} if len(references) == 1 else {**concept, "references": references}


def option_value(key: str, value: str) -> Any:
    if key == "token_index":
        return [_whole(key, part) for part in value.replace(",", " ").split()]
    if key == "weight":
        if not is_number(value):
            raise JobError(f"{key} is {shown(value)}, expected a number in digits, such as 2.5.")
        return float(value)
    if key == "mask_threshold":
        return _whole(key, value)
    return value


def _whole(key: str, text: str) -> int:
    try:
        if is_whole(text):
            return int(text)
    except ValueError:  # Python limits the number of digits that it reads
        pass
    raise JobError(f"{key} is {shown(text)}, expected a whole number in digits, such as 5.")


def split_option(text: str) -> list[tuple[str, str]]:
    """Split an option at commas that are neither quoted nor escaped: [(key, value), ...]."""
    if not isinstance(text, str):
        raise JobError(f"found {type(text).__name__}, expected text such as 'word=man,image=man.jpg'.")
    pairs = []
    position = 0
    while position < len(text):
        equals = text.find("=", position)
        key = text[position : len(text) if equals < 0 else equals]
        if equals < 0 or "," in key:
            raise JobError(f"found {shown(key.split(',')[0])}, expected key=value. Quote a value that holds a comma.")
        value, position = _read_value(text, position + len(key) + 1)
        pairs.append((key.strip(), value))
    if not pairs:
        raise JobError("it is empty, expected key=value pairs such as 'word=man,image=man.jpg'.")
    return pairs


def _read_value(text: str, position: int) -> tuple[str, int]:
    """Return the value that starts at `position`, and the position where the next key starts."""
    start = position
    while text[position : position + 1].isspace():
        position += 1
    quoted = text[position : position + 1] == '"'
    position += quoted
    value = ""
    while position < len(text):
        character = text[position]
        if character == "\\" and text[position + 1 : position + 2] in (",", '"', "\\"):
            value += text[position + 1]
            position += 2
            continue
        if character == ('"' if quoted else ","):
            break
        value += character
        position += 1
    if not quoted:
        return value.strip(), position + 1
    rest = text[position + 1 :].lstrip()
    if position == len(text) or (rest and not rest.startswith(",")):
        raise JobError(f"{shown(text[start:])}: expected a closing quote and then a comma or the end.")
    return value, len(text) - len(rest) + 1


def _concept(item: object, where: str, base: Path, reading: Mapping[str, Any], *, without_prompts: bool) -> Concept:
    concept = _checked(item, _CONCEPT, where)
    prefix = f"{where}." if where else ""
    if "word" not in concept:
        raise JobError(f"{prefix}word is missing; expected a word of the prompt.")
    reading = {**reading, **{key: concept[key] for key in _READING if key in concept}}
    if "references" in concept:
        doubled = [key for key in ("image", "mask", "prompt") if key in concept]
        if doubled:
            raise JobError(
                f"{prefix}{doubled[0]} stands beside references, expected only one of both. Put it into one of the "
                "references."
            )
        items = [(f"{prefix}references[{k}]", item) for k, item in enumerate(concept["references"])]
    else:
        items = [(where, {key: concept[key] for key in ("image", "mask", "prompt") if key in concept})]
    references = [_reference(item, place, base, reading, without_prompts) for place, item in items]
    settings = {key: concept[key] for key in ("weight", "token_index", "name") if key in concept}
    return _with_location(where, lambda: Concept(concept["word"], *references, **settings))


def _reference(item: object, where: str, base: Path, reading: Mapping[str, Any], without_prompts: bool) -> Reference:
    reference = _checked(item, _REFERENCE, where)
    if "image" not in reference:
        raise JobError(f"{where}.image is missing".lstrip(".") + "; expected the path of an image.")
    settings = {**reading, **{key: reference[key] for key in ("prompt", *_READING) if key in reference}}
    if without_prompts:
        settings["prompt"] = ""

    def make() -> Reference:
        mask = None if reference.get("mask") is None else _absolute(base / reference["mask"])
        return Reference(_absolute(base / reference["image"]), mask=mask, **settings)

    return _with_location(where, make)


def _absolute(path: Path) -> Path:
    """Make a path absolute now, because it is read later, when the working directory may be another."""
    try:
        return path.absolute()
    except OSError as error:
        raise JobError(f"{os.fspath(path)!r} counts from the working folder, and that is gone: {error}.") from error


def _checked(data: object, kinds: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return `data` after checking that it is an object with known keys only, each of the right kind."""
    if not isinstance(data, dict):
        raise JobError(
            f"{where or 'the job'} is {_named(data)}, expected an object with keys such as {next(iter(kinds))!r}."
        )
    for key, value in data.items():
        if not isinstance(key, str) or key not in kinds:
            raise _unknown_key(key, where, list(kinds))
        if not _is_kind(value, kinds[key]):
            path = f"{where}.{key}" if where else key
            quote = " Put it in quotes." if "text" in kinds[key] and not isinstance(value, (list, dict)) else ""
            raise JobError(f"{path} is {_named(value)}, expected {kinds[key]}.{quote}")
    return data


def _is_kind(value: object, kind: str) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is None:
        return kind.endswith("or null")
    if kind.startswith("text"):
        return isinstance(value, str)
    if kind.startswith("whole number, list"):
        return whole or (isinstance(value, list) and all(type(entry) is int for entry in value))
    if kind == "list":
        return isinstance(value, list)
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "whole number":
        return whole
    return whole or isinstance(value, float)


def _unknown_key(key: object, where: str, known: Sequence[str]) -> JobError:
    near = difflib.get_close_matches(str(key)[:100], known, n=1, cutoff=0.5) if isinstance(key, str) else []
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return JobError(f"unknown key {shown(key)}{f' in {where}' if where else ''}. {hint}Known keys: {', '.join(known)}.")


def _with_location(where: str, make: Callable[[], _T]) -> _T:
    """Return what `make` returns; add to the input errors that it raises where they come from."""
    try:
        return make()
    except InputError as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}") from error


def _named(value: object) -> str:
    kinds = {dict: "an object", list: "a list", type(None): "null"}
    return kinds.get(type(value)) or shown(value)


def _doubled(key: str) -> JobError:
    return JobError(f"key {shown(key)} stands twice in one object. Leave one out.")


def _read_json(text: str) -> object:
    try:
        return read_json(text, constants=False)
    except DoubledKeyError as error:
        raise _doubled(error.key) from error
    except ValueError as error:
        raise JobError(f"it is not JSON: {error}.") from error


class _Loader(yaml.SafeLoader):
    """Reads YAML with decimal numbers; refuses duplicate keys, and aliases, which can make a small file a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise JobError("found a YAML alias (*name), expected the value itself. Write it out.")
        return super().compose_node(parent, index)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Read a number, which must be decimal: whether 0123 is 83 or 1:30 is 90 depends on the version of YAML, and a
        long base-60 number takes minutes.
        """
        if not is_number(node.value):
            raise JobError(
                f"line {node.start_mark.line + 1}: found {shown(node.value)}, which YAML takes for a number, expected "
                "one in decimal digits, such as 83 or 7.5. Put it in quotes where it is a text."
            )
        plain = super().construct_yaml_int if node.tag.endswith(":int") else super().construct_yaml_float
        return plain(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise _doubled(key)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)


def _read_yaml(text: str) -> object:
    if len(text) > MAX_YAML_BYTES:
        raise JobError(f"it is YAML of more than {MAX_YAML_BYTES:,} characters. Write it as JSON, or shorten it.")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: makes plain values only
    except RecursionError as error:
        raise JobError("it is nested too deeply for a job.") from error
    except JobError:
        raise
    except Exception as error:  # scalars that only look like dates or numbers raise whatever their parsers raise
        reraise_if_interrupt(error)
        raise JobError(f"it is not YAML: {error}.") from error
