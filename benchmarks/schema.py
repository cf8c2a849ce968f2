"""The report's form, `schema.json`, and a check against it that needs no package.

The check understands the part of JSON Schema that the file uses: type, enum, const, required, properties,
additionalProperties, items, minimum, $ref into $defs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from magicface_rt.errors import InputError
from magicface_rt.files.plain_file import read_plain
from magicface_rt.files.strict_json import read_json
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.values.shown import shown

MOST_BYTES = 64 << 20
"""Largest size of a report that is read; one of 25 cases has 1 MB."""
SCHEMA = Path(__file__).with_name("schema.json")
SINCE_THE_SECOND = ("baseline_samples", "candidate_samples")
"""Fields of a ratio that reports of the first format lack."""

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list, tuple),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def load_schema() -> dict[str, Any]:
    found = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def read_report(file: Path) -> Any:
    """Read a report's JSON, whatever is in it. Raises InputError if it cannot be read."""
    try:
        return read_json(read_plain(file, MOST_BYTES))
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise InputError(
            f"report {file}: it cannot be read: {error}. Expected what `magicface-rt bench` wrote."
        ) from error


def problems(content: Any, schema: Mapping[str, Any] | None = None) -> list[str]:
    """List what in a report's JSON does not fit the schema, each with its place; the list is empty if all fits.

    A report of the first format is compared with the schema of that format.
    """
    root = load_schema() if schema is None else schema
    if schema is None and isinstance(content, dict) and content.get("format") == 1:
        root = _first_format(root)
    found: list[str] = []
    _check(content, root, root, "report", found)
    return found


def _first_format(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the first format, in which a ratio did not hold its samples."""
    older = deepcopy(dict(schema))
    older["properties"]["format"] = {"const": 1}
    ratio = older["$defs"]["ratio"]
    for name in SINCE_THE_SECOND:
        del ratio["properties"][name]
        ratio["required"].remove(name)
    return older


def _check(value: Any, rule: Mapping[str, Any], root: Mapping[str, Any], where: str, found: list[str]) -> None:
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].removeprefix("#/$defs/")]
    if "type" in rule:
        kinds = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
        if not any(_is(value, kind) for kind in kinds):
            found.append(f"{where} is {shown(value)}, expected {' or '.join(kinds)}")
            return
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{where} is {shown(value)}, expected one of {rule['enum']}")
    if "const" in rule and value != rule["const"]:
        found.append(f"{where} is {shown(value)}, expected {rule['const']!r}")
    if "minimum" in rule and isinstance(value, (int, float)) and not value >= rule["minimum"]:
        found.append(f"{where} is {shown(value)}, expected at least {rule['minimum']}")
    if isinstance(value, dict):
        known = rule.get("properties", {})
        found.extend(f"{where}.{name} is missing" for name in rule.get("required", ()) if name not in value)
        others = rule.get("additionalProperties", True)
        for name, entry in value.items():
            if name in known:
                _check(entry, known[name], root, f"{where}.{name}", found)
            elif others is False:
                found.append(f"{where}.{name[:100]} is not known")
            elif isinstance(others, dict):
                _check(entry, others, root, f"{where}.{name[:100]}", found)
    if isinstance(value, (list, tuple)) and "items" in rule:
        for i, entry in enumerate(value):
            _check(entry, rule["items"], root, f"{where}[{i}]", found)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False  # JSON has no such number
    return isinstance(value, _TYPES[kind])
