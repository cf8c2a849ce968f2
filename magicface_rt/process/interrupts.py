"""Exceptions that signal handlers raise, such as KeyboardInterrupt: where they may arise, and whose they are.

CPython runs Python's signal handlers in the main thread, and only at certain points: as a Python function begins or
goes on after a `yield`, after a call, and at a jump (of 3.10 any that is taken, from 3.11 on one that goes back). A C
function that waits, as for a lock that another thread holds, runs them as well. So none runs, and no KeyboardInterrupt
arises, between two plain assignments: to a local name, to an attribute without a property, to an item of a dict, or
`del` of one of these.

What counts who is at work, or says for whom others wait, follows three rules:

R1  Count up as the last statement before leaving the guarded block, and count down inside `finally` before any call.
R2  Enter `try` before registering, so that an interrupt after it is cleaned up.
R3  In a `finally`, call C methods directly (`set.discard`, `dict.pop`): entering a Python function is itself a point
    where an interrupt may arise, before the function has done anything.

One such point remains at the end of every `with` over a generator (`contextlib.contextmanager`): after an interrupt on
the first line of contextlib's own `__exit__`, the generator goes on only when the traceback is freed.

What a library makes of such an exception is told from the library's own failures by `reraise_if_interrupt`.
"""

# ruff: noqa: C419 - lists, because closing a generator that is left in the middle needs memory. If there is none, Python
# reports that in the middle of what the command line says.

from __future__ import annotations

import inspect
from types import FrameType, TracebackType

__all__ = ["reraise_if_interrupt", "was_interrupted"]


def reraise_if_interrupt(error: BaseException) -> None:
    """Re-raise what a signal handler raised; call this first wherever a foreign library's error becomes one of ours.

    Raises `error` again if a signal handler raised it, such as one that ends a task at its time limit. If a library
    made `error` out of what a handler raised, or out of Ctrl-C, that is raised instead.

    A handler is called between any two instructions, with the frame that it interrupts as an argument: in the
    traceback, its own frame follows that one. Only trace functions (`sys.settrace`) are called in the same way, and
    they are the caller's as well. Not detected are a handler that is not Python code, or that has let go of its
    argument, and an exception that one thread raises in another (`PyThreadState_SetAsyncExc`).
    """
    for one in _causes(error):
        if isinstance(one, KeyboardInterrupt) or _raised_by_handler(one):
            raise one


def was_interrupted(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or what a library made of it: C modules report it as a failed import."""
    return any([isinstance(one, KeyboardInterrupt) for one in _causes(error)])


def _causes(error: BaseException) -> list[BaseException]:
    """`error` and the errors behind it: what it was raised from, or what was being handled on its way then.

    Errors that the caller was already handling are left out: they were caught in a frame that `error` has not passed.
    """
    found: BaseException | None = error
    causes: list[BaseException] = []
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        causes.append(found)
        seen.add(id(found))
        before = found.__context__
        caught = None if before is None or before.__traceback__ is None else before.__traceback__.tb_frame
        passed = caught is not None and caught in [step.tb_frame for step in _steps(found)]
        found = found.__cause__ or (before if passed else None)
    return causes


def _steps(error: BaseException) -> list[TracebackType]:
    steps: list[TracebackType] = []
    step = error.__traceback__
    while step is not None:
        steps.append(step)
        step = step.tb_next
    return steps


def _raised_by_handler(error: BaseException) -> bool:
    return any([step.tb_next and _received_frame(step.tb_next.tb_frame, step.tb_frame) for step in _steps(error)])


def _received_frame(called: FrameType, interrupted: FrameType) -> bool:
    given = inspect.getargvalues(called)
    named = [given.locals.get(name) for name in given.args]
    rest = given.locals.get(given.varargs, ()) if given.varargs else ()
    return any([one is interrupted for one in (*named, *(rest if isinstance(rest, tuple) else ()))])
