"""Numbers as people give them: in a text, where they have one meaning to every reader, or as numpy's."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["as_float", "is_number", "is_whole"]

_DIGITS = r"(?:0|[1-9][0-9]*)"
_WHOLE = re.compile(rf"[-+]?{_DIGITS}")
_NUMBER = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def as_float(value: float | np.integer | np.floating) -> float:
    """A number as Python's. One of numpy's with fewer bits becomes what it is written as: float32's 0.9 is 0.9, and not
    the 0.8999999761581421 beside it, which lies on the other side of a limit of 0.9.
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
