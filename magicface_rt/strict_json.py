"""JSON in which no key stands twice.

Of two equal keys one reader takes the first and another the last, so a file could be one thing to what checks it and
another to what uses it.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["DoubledKeyError", "read_json"]


class DoubledKeyError(ValueError):
    """A key stands twice in one object of what is JSON otherwise, as far as it was read."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:100]!r} stands twice in one object")
        self.key = key


def read_json(text: str | bytes, *, constants: bool = True) -> Any:
    """What the text holds. With `constants` NaN and infinities come as Python's json gives them, for the caller to
    refuse.

    Raises:
        DoubledKeyError: it has a key twice in one object.
        ValueError: it is no JSON, has a constant where there may be none, or is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=None if constants else _no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    distinct: dict[str, Any] = {}
    for key, value in pairs:
        if key in distinct:
            raise DoubledKeyError(key)
        distinct[key] = value
    return distinct


def _no_constant(name: str) -> float:
    raise ValueError(f"found {name}, which is no JSON number; expected a finite one")
