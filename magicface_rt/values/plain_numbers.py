"""Numbers as people give them: as text that every reader understands alike, or as numpy scalars."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["as_float", "is_number", "is_whole"]

_DIGITS = r"(?:0|[1-9][0-9]*)"
_WHOLE = re.compile(rf"[-+]?{_DIGITS}")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def as_float(value: float | np.integer | np.floating) -> float:
    """Convert a number to a Python float. A numpy float of fewer bits becomes the number it is printed as: float32's
    0.9 becomes 0.9, and not 0.8999999761581421, which lies on the other side of a limit of 0.9.
    """
    if isinstance(value, np.floating) and value.dtype.itemsize < 8:
        return float(np.format_float_scientific(value))
    return float(value)


def is_whole(text: str) -> bool:
    """Whether a text is a whole number in decimal digits: no `1_0`, no `0123`, no digits of another script."""
    return _WHOLE.fullmatch(text) is not None


def is_number(text: str) -> bool:
    """Whether a text is a finite number in decimal digits, as `is_whole`, with a fraction or exponent if need be."""
    return _NUMBER.fullmatch(text) is not None
