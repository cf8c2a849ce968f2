"""JSON bodies of clients: how much there is in one, seen before it is parsed, and what it holds."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..strict_json import DoubledKeyError, read_json
from .problems import refused

__all__ = ["MOST_VALUES", "read_body"]

MOST_VALUES = 100_000
"""Values in one body, and commas and brackets in its texts. The largest order that a schema allows, with texts in plain
words, has fewer; parsing so many takes some hundredths of a second.
"""

_CHUNK = 2**20  # other threads get a turn between


def read_body(body: bytes) -> Any:
    """What a body holds. Parsing holds up every thread of the process, so nothing that is too much is parsed. Run it in
    a thread.

    Raises:
        AnswerError: 400, no JSON; 422, more values than anything here takes, or a key twice in one object.
    """
    _check_structure(body)
    try:
        return read_json(body)
    except DoubledKeyError as error:  # a key may be long, and anything: it is the client's own
        raise refused(422, "body", f"the key {error.key[:80]!a} stands twice in one object. Leave one out.") from None
    except ValueError as error:
        raise refused(400, "json", _why_not(error)) from None


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
            raise refused(422, "body", f"the body has more than {MOST_VALUES:,} values.")
