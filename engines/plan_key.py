"""A plan's key, what it was made from and for: every field by which it can be stale, and the digest of its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from magicface_rt.errors import PlanError
from magicface_rt.store_folders import FLAVOURS
from magicface_rt.values.shown import shown

SCHEMA = 2
"""Incremented when plans of an earlier release of this package must not be used even if every other field agrees."""

Shape = tuple[int, ...]
ShapeRange = tuple[Shape, Shape, Shape]

_BOUNDS = ("min", "opt", "max")
_PATTERNS = {
    "graph": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"),
    "graph_hash": re.compile(r"[0-9a-f]{64}"),
    "flavour": re.compile("|".join(FLAVOURS)),  # becomes a folder name, by which the store finds its plans
    "flavour_version": re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}"),
    "precision": re.compile(r"[a-z0-9][a-z0-9_+-]{0,31}"),
}
_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_REASONS = {
    "graph": "another graph",
    "graph_hash": "the bundle changed",
    "flavour": "another flavour",
    "flavour_version": "another version of the flavour",
    "precision": "another precision",
    "compute_capabilities": "made for other GPUs",
    "profile": "another range of shapes",
    "builder_options": "another builder option",
    "schema": "made by a release of this package that keeps plans differently",
}


def graph_hash(graph_file: str, weights_file: str) -> str:
    """The hash of a graph with its weights, from the SHA-256 (hex) of the two files."""
    return hashlib.sha256(f"{graph_file}\n{weights_file}\n".encode()).hexdigest()


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, ASCII.

    Raises:
        TypeError, ValueError: JSON cannot hold the value (NaN and infinity included).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True)
class FieldDifference:
    """A field in which two keys differ. A value of None means that the key lacks the field."""

    field: str
    found: object
    expected: object

    @property
    def reason(self) -> str:
        """What the difference means, in words."""
        return _REASONS[self.field.partition(".")[0]]

    def __str__(self) -> str:
        return f"{self.field} ({self.reason}): found {_shown(self.found)}, expected {_shown(self.expected)}"


@dataclass(frozen=True, eq=False)
class PlanKey:
    """The key that names a plan. Two keys are equal when their digests are.

    graph                 name in the bundle
    graph_hash            of the graph file and the weights file, see `graph_hash`
    flavour               `tensorrt` or `tensorrt-rtx`
    flavour_version       of the flavour's library
    precision             such as `float16`
    compute_capabilities  GPUs that the plan runs on, such as ("8.6", "8.9"); order and repeats do not count
    profile               the smallest, best and largest shape of each dynamic input
    builder_options       plain JSON values by name
    schema                the `SCHEMA` of the release that made it

    Raises:
        PlanError: a field does not have the form above.
    """

    graph: str
    graph_hash: str
    flavour: str
    flavour_version: str
    precision: str
    compute_capabilities: tuple[str, ...]
    profile: Mapping[str, ShapeRange]
    builder_options: Mapping[str, Any]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name, pattern in _PATTERNS.items():
            value = getattr(self, name)
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise PlanError(f"plan key: {name} is {shown(value)}, expected text of the form {pattern.pattern}.")
        if type(self.schema) is not int:
            raise PlanError(f"plan key: schema is {shown(self.schema)}, expected an integer.")
        object.__setattr__(self, "compute_capabilities", _capabilities(self.compute_capabilities))
        object.__setattr__(self, "profile", {str(name): _range(name, shapes) for name, shapes in self.profile.items()})
        object.__setattr__(self, "builder_options", _plain("builder_options", self.builder_options))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the key's canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, PlanKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dict(self) -> dict[str, Any]:
        """The key as values that JSON can hold; `from_dict` reads them back."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "compute_capabilities": list(self.compute_capabilities),
            "profile": {
                name: {bound: list(shape) for bound, shape in zip(_BOUNDS, shapes, strict=True)}
                for name, shapes in self.profile.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanKey:
        """Make a key from what `to_dict` returned.

        Raises:
            PlanError: a field is missing, unknown or of another form.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != known:
            found = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise PlanError(f"plan key: the fields are {shown(found)}, expected {sorted(known)}.")
        try:
            profile = {name: tuple(shapes[bound] for bound in _BOUNDS) for name, shapes in values["profile"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise PlanError(f"plan key: profile does not have the expected form ({shown(error)}).") from error
        return cls(**{**values, "profile": profile})

    def differences(self, expected: PlanKey) -> list[FieldDifference]:
        """List every field in which this key (found) differs from another (expected).

        Nested fields have dotted names such as `profile.k_ref_13.max` or `builder_options.tf32`. The list is empty
        exactly when the keys are equal.
        """
        mine, other = dict(_leaves(self.to_dict())), dict(_leaves(expected.to_dict()))
        return [
            FieldDifference(".".join(path), mine.get(path), other.get(path))
            for path in {**mine, **other}
            if path not in mine or path not in other or canonical_json(mine[path]) != canonical_json(other[path])
        ]


def _capabilities(values: object) -> tuple[str, ...]:
    valid = isinstance(values, list | tuple) and all(isinstance(v, str) and _CAPABILITY.fullmatch(v) for v in values)
    if not valid or not values:
        raise PlanError(f"plan key: compute_capabilities is {shown(values)}, expected at least one such as '8.6'.")
    assert isinstance(values, list | tuple)
    return tuple(sorted(set(values), key=lambda value: [int(part) for part in value.split(".")]))


def _range(name: str, shapes: object) -> ShapeRange:
    try:
        minimum, best, maximum = (tuple(shape) for shape in shapes)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        minimum = best = maximum = (None,)
    sizes = minimum + best + maximum
    if not len(minimum) == len(best) == len(maximum) or not all(type(size) is int and size >= 0 for size in sizes):
        raise PlanError(
            f"plan key: profile of {name[:100]} is {shown(shapes)}, expected three shapes of the same rank."
        )
    return minimum, best, maximum


def _plain(name: str, values: object) -> dict[str, Any]:
    """Copy the values through JSON, so a key read from disk has the same values."""
    try:
        plain = json.loads(canonical_json(dict(values)))  # type: ignore[call-overload]
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"plan key: {name} is {shown(values)}, expected plain JSON values ({error}).") from error
    assert isinstance(plain, dict)
    return plain


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the innermost values with their paths. An empty mapping is a value, to tell `{"a": {}}` from `{}`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else canonical_json(value).decode()
    return f"{text[:12]}..." if len(text) == 64 else text if len(text) <= 200 else f"{text[:200]}..."
