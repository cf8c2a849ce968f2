"""Values given by a caller or found in a file, in a form that fits into a message."""

from __future__ import annotations

__all__ = ["one_line", "shown"]

MOST = 200


def shown(value: object) -> str:
    """Return a value as a short text, whatever it is: for objects and long or nested lists, the kind and length; for
    huge integers, which Python refuses to write, the number of bits; for other long values, the beginning.
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    plain = isinstance(value, list) and len(value) <= 20 and not any(isinstance(x, (dict, list)) for x in value)
    if isinstance(value, (dict, list)) and not plain:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= MOST else f"{text[:MOST]}..."


def one_line(text: str) -> str:
    """Put a text on one line, and escape characters that would control a terminal."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii", "replace") for c in text)
