"""Byte counts as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from ..errors import OptionError
from .shown import shown

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-zA-Z]*)")
_MOST = 2**63 - 1
"""The most bytes that a machine can count."""


def parse_size(size: int | str, option: str) -> int:
    """Convert a number of bytes, or a text such as `4GiB`, `500 MB` or `1048576`, to bytes.

    Raises:
        OptionError: anything else.
    """
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    elif match is not None and match.group(2).lower() in _UNITS:
        found = int(Fraction(match.group(1)) * _UNITS[match.group(2).lower()])
    else:
        found = -1
    if not 0 <= found <= _MOST:
        raise OptionError(f"{option} is {shown(size)}, expected a size such as 4GiB, 500MB or a number of bytes.")
    return found


def megabytes(nbytes: int) -> str:
    """Return a number of bytes in millions, for a message, such as `1,234.5 MB`."""
    return f"{nbytes / 1_000_000:,.1f} MB"
