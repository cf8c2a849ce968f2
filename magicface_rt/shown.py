"""Values that somebody gave, or that stood in a file, as a message can hold them."""

from __future__ import annotations

__all__ = ["one_line", "shown"]

MOST = 200


def shown(value: object) -> str:
    """Short, whatever it is: of objects and of long or deep lists the kind and length; of huge integers, which Python
    refuses to write, the bits; of other long values the beginning.
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    plain = isinstance(value, list) and len(value) <= 20 and not any(isinstance(x, (dict, list)) for x in value)
    if isinstance(value, (dict, list)) and not plain:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MOST else f"{text[:MOST]}..."


def one_line(text: str) -> str:
    """On one line, and without what would steer a terminal."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii", "replace") for c in text)
