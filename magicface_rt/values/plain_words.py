"""Settings that must be one of several words."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["one_of"]


def one_of(value: object, words: Collection[str]) -> bool:
    """Whether a value is one of the words. Anything but text is not, such as arrays, whose == has no single answer."""
    return isinstance(value, str) and value in words
