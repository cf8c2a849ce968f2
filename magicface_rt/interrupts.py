"""What a signal's handler raised while a library worked: the caller's word, and no failure of the library."""

from __future__ import annotations

import inspect
from types import FrameType

__all__ = ["let_through"]


def let_through(error: BaseException) -> None:
    """To be called first where whatever a foreign library raises becomes an error of ours.

    Raises `error` again where a signal's handler raised it, such as one that ends a task at its time limit. A handler
    is called between any two instructions, and given the frame that it interrupts: in the traceback its frame stands
    after that one, which is an argument of it. Nothing else is called so but what follows a program (`sys.settrace`),
    and that is the caller's as well. Not seen are a handler that is no Python, or that has let go of its argument, and
    what a thread raises in another (`PyThreadState_SetAsyncExc`).
    """
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        if _was_given(step.tb_next.tb_frame, step.tb_frame):
            raise error
        step = step.tb_next


def _was_given(called: FrameType, interrupted: FrameType) -> bool:
    given = inspect.getargvalues(called)
    named = [given.locals.get(name) for name in given.args]
    rest = given.locals.get(given.varargs, ()) if given.varargs else ()
    return any(one is interrupted for one in (*named, *(rest if isinstance(rest, tuple) else ())))
