"""JSON bodies on the server: counts the values of a body before it is parsed, and parses it."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..files.strict_json import DoubledKeyError, read_json
from .problems import refusal

__all__ = ["MOST_VALUES", "read_body"]

MOST_VALUES = 100_000
"""The most values in one body; commas and brackets inside its texts count as well. The largest order that the schema
allows, with texts in plain words, has fewer; parsing this many takes a few hundredths of a second.
"""

_CHUNK = 2**20  # other threads get a turn between chunks


def read_body(body: bytes) -> Any:
    """Parse a JSON body. Parsing holds up every thread of the process, so a body that has too many values is not
    parsed. Run this in a thread.

    Raises:
        AnswerError: 400, not JSON; 422, more values than anything here takes, or a key given twice in one object.
    """
    _check_structure(body)
    try:
        return read_json(body)
    except DoubledKeyError as error:  # quoted in part: the key is the client's, and may be anything
        raise refusal(422, "body", f"the key {error.key[:80]!a} stands twice in one object. Leave one out.") from None
    except ValueError as error:
        raise refusal(400, "json", _why_not(error)) from None


def _why_not(error: ValueError) -> str:
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return "the body is not JSON; expected a JSON object."
    if isinstance(error.__cause__, RecursionError):
        return "the body is nested too deeply."
    return f"an integer of the body has more than {sys.get_int_max_str_digits():,} digits."


def _check_structure(body: bytes) -> None:
    left = MOST_VALUES
    for start in range(0, len(body), _CHUNK):
        chunk = body[start : start + _CHUNK]
        left -= len(chunk) - len(chunk.translate(None, b",[{"))
        if left < 0:
            raise refusal(422, "body", f"the body has more than {MOST_VALUES:,} values.")
