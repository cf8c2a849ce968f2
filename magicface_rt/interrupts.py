"""What a signal's handler raised while a library worked: the caller's word, and no failure of the library."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FrameType, TracebackType

__all__ = ["let_through", "was_interrupted"]


def let_through(error: BaseException) -> None:
    """To be called first where whatever a foreign library raises becomes an error of ours.

    Raises `error` again where a signal's handler raised it, such as one that ends a task at its time limit. Where a
    library made `error` of what a handler raised, or of Ctrl-C, that is raised in its place.

    A handler is called between any two instructions, and given the frame that it interrupts: in the traceback its frame
    stands after that one, which is an argument of it. Nothing else is called so but what follows a program
    (`sys.settrace`), and that is the caller's as well. Not seen are a handler that is no Python, or that has let go of
    its argument, and what a thread raises in another (`PyThreadState_SetAsyncExc`).
    """
    for one in _with_what_it_came_of(error):
        if isinstance(one, KeyboardInterrupt) or _is_of_a_handler(one):
            raise one


def was_interrupted(error: BaseException) -> bool:
    """Whether it is Ctrl-C, or what a library made of that: modules in C tell it as one that cannot be imported."""
    return any(isinstance(one, KeyboardInterrupt) for one in _with_what_it_came_of(error))


def _with_what_it_came_of(error: BaseException) -> Iterator[BaseException]:
    """`error`, and before it what it was raised from, or what was being handled on its way when it was raised.

    Not what the caller was handling already: that was caught in a frame that `error` has not passed.
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        before = found.__context__
        caught = None if before is None or before.__traceback__ is None else before.__traceback__.tb_frame
        passed = any(step.tb_frame is caught for step in _steps(found))
        found = found.__cause__ or (before if passed else None)


def _steps(error: BaseException) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        yield step
        step = step.tb_next


def _is_of_a_handler(error: BaseException) -> bool:
    return any(step.tb_next and _was_given(step.tb_next.tb_frame, step.tb_frame) for step in _steps(error))


def _was_given(called: FrameType, interrupted: FrameType) -> bool:
    given = inspect.getargvalues(called)
    named = [given.locals.get(name) for name in given.args]
    rest = given.locals.get(given.varargs, ()) if given.varargs else ()
    return any(one is interrupted for one in (*named, *(rest if isinstance(rest, tuple) else ())))
