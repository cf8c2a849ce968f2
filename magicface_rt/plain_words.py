"""Words of which one is to be given."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["one_of"]


def one_of(value: object, words: Collection[str]) -> bool:
    """Whether it is one of the words; what is no text is none, such as an array, which has no one answer to ==."""
    return isinstance(value, str) and value in words
