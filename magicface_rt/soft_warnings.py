"""Warnings of changes to an input that may not have been meant: issued through Python's warnings, or collected."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["MagicFaceWarning", "attributed_to", "collect_warnings", "warn"]

_PACKAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


class MagicFaceWarning(UserWarning):
    """Something was done to the input that the caller may not have meant, such as stretching a mask.

    kind   names what it was, such as `mask-stretched`
    field  the part of a service's request that it was done to, such as `mask`; None elsewhere
    """

    def __init__(self, message: str, kind: str = "input") -> None:
        super().__init__(message)
        self.kind = kind
        self.field: str | None = None


_collecting: ContextVar[list[MagicFaceWarning] | None] = ContextVar("magicface_rt_warnings", default=None)


def warn(kind: str, message: str) -> None:
    """Issue a warning that points to the line outside this package that led here, or add it to those collected."""
    warning, collecting = MagicFaceWarning(message, kind), _collecting.get()
    if collecting is None:
        frame, level = sys._getframe(1), 2
        while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
            frame, level = frame.f_back, level + 1
        warnings.warn(warning, stacklevel=level)
    elif all((one.kind, str(one)) != (kind, message) for one in collecting):
        collecting.append(warning)


@contextmanager
def collect_warnings() -> Iterator[list[MagicFaceWarning]]:
    """Collect the warnings issued in the block, in this thread or task and those that share its context, each once."""
    found: list[MagicFaceWarning] = []
    before = _collecting.set(found)
    try:
        yield found
    finally:
        _collecting.reset(before)


@contextmanager
def attributed_to(field: str) -> Iterator[None]:
    """Attribute warnings collected in the block to that field of a request, unless they name one themselves."""
    found = _collecting.get()
    before = len(found or ())
    try:
        yield
    finally:
        for warning in (found or [])[before:]:
            warning.field = warning.field or field or None
