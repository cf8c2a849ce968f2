"""What an object computes of itself when it is first asked, and then knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

__all__ = ["ComputedOnce"]

T = TypeVar("T")


class ComputedOnce(Generic[T]):
    """As `functools.cached_property`, but in no Python with a lock.

    Before 3.12 that has one for all objects of the class, which a process that is forked while a thread computes would
    find locked for ever. Two threads may both compute here; the value of one stays.
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
        # Where the value lies from then on it is found before this.
        return instance.__dict__.setdefault(self._name, self._compute(instance))  # type: ignore[no-any-return]
