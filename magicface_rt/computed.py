"""An attribute that is computed on first access and then stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

__all__ = ["ComputedOnce"]

T = TypeVar("T")


class ComputedOnce(Generic[T]):
    """Like `functools.cached_property`, but without a lock in any Python version.

    Before 3.12 `cached_property` has one lock for all objects of the class, which a process that is forked while a
    thread computes would find locked for ever. Here two threads may both compute the value; one of the two is kept.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> ComputedOnce[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> ComputedOnce[T] | T:
        if instance is None:
            return self
        # From then on the value in `__dict__` is found before this descriptor.
        return instance.__dict__.setdefault(self._name, self._compute(instance))  # type: ignore[no-any-return]
