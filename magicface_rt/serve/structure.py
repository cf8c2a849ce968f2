"""How much there is in a JSON body, seen before it is parsed: parsing holds up every thread of the process."""

from __future__ import annotations

from .problems import refused

__all__ = ["MOST_VALUES", "check_structure"]

MOST_VALUES = 100_000
"""Values in one body, and commas and brackets in its texts. The largest order that a schema allows, with texts in plain
words, has fewer; parsing so many takes some hundredths of a second.
"""

_CHUNK = 2**20  # other threads get a turn between


def check_structure(body: bytes) -> None:
    """Raises AnswerError, 422, for a body of more values than anything here takes. Run it in a thread."""
    left = MOST_VALUES
    for start in range(0, len(body), _CHUNK):
        chunk = body[start : start + _CHUNK]
        left -= len(chunk) - len(chunk.translate(None, b",[{"))
        if left < 0:
            raise refused(422, "body", f"the body has more than {MOST_VALUES:,} values.")
