"""Byte counts as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from .errors import OptionError
from .shown import shown

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-zA-Z]*)")


def parse_size(size: int | str, option: str) -> int:
    """A number of bytes, or text such as `4GiB`, `500 MB`, `1048576`, to bytes.

    Raises:
        OptionError: anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None or match.group(2).lower() not in _UNITS:
        raise OptionError(f"{option} is {shown(size)}, expected a size such as 4GiB, 500MB or a number of bytes.")
    return int(Fraction(match.group(1)) * _UNITS[match.group(2).lower()])
