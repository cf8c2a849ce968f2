"""Read JSON, and refuse duplicate keys.

Of two equal keys one reader takes the first and another the last, so a file could mean one thing to the code that
checks it and another to the code that uses it.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["DoubledKeyError", "read_json"]


class DoubledKeyError(ValueError):
    """A key occurs twice in one object of otherwise valid JSON, as far as it was read."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:100]!r} stands twice in one object")
        self.key = key


def read_json(text: str | bytes | bytearray, *, constants: bool = True) -> Any:
    """Parse JSON. With `constants`, NaN and infinities are let through as Python floats, for the caller to refuse.

    Raises:
        DoubledKeyError: a key occurs twice in one object.
        ValueError: the text is not JSON, has a constant although `constants` is off, or is nested too deeply to be
            read.
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
