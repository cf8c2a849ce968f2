"""Run each contender in a process of its own, so its memory can be measured and none profits from another's caches.

The parent tells each process what to do, one thing at a time, so contenders take turns: while one computes, the others
wait.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter
from traceback import format_exc
from typing import Any

from magicface_rt.errors import MagicFaceError
from magicface_rt.process.interrupts import reraise_if_interrupt

from .contender import Run, Runner, Task, load
from .machine import DevicePeak, peak_host_bytes

JUDGE, PREPARE = "judge", "prepare"


class ContenderError(MagicFaceError):
    """A contender's process raised an error, or ended."""

    exit_code = 1


class Worker:
    """A contender in a process of its own. `started`: when the process was started, by `perf_counter`."""

    def __init__(self, task: Task, role: str = "") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, task, role), daemon=True)
        self._limit = task.settings.limit
        self.started = perf_counter()
        self._process.start()
        far.close()

    def call(self, what: str, *arguments: Any) -> Any:
        """Have the process do something, and return its result.

        Raises:
            ContenderError: it could not, or not in time; after that the process is not to be used any more.
        """
        try:
            self._pipe.send((what, arguments))
            if not self._pipe.poll(self._limit):
                self._process.kill()
                raise ContenderError(f"{what}: no answer after {self._limit:g} s")
            good, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            killed = "; was there not enough memory?" if code == -signal.SIGKILL else ""
            raise ContenderError(f"its process ended with exit code {code}{killed}") from None
        if not good:
            raise ContenderError(result)
        return result

    def close(self) -> None:
        """End the process. May be called twice."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProcessEndedError(Exception):
    """A process ended before it had answered."""


def call_in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `call(*arguments)` returns in a process of its own, or raise what it raises there.

    Not a pool of multiprocessing or concurrent.futures: the former waits for ever if its process is killed, and the
    semaphores of both are reported as leaked if Ctrl-C comes while they are made.

    Raises:
        ProcessEndedError: the process was ended.
        Exception: whatever `call` raises; its cause has the traceback from there.
    """
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(far, call, arguments), daemon=True)
    try:
        process.start()
        far.close()
        try:
            result, error, traceback = near.recv()
        except (EOFError, OSError) as broken:
            raise ProcessEndedError from broken
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        near.close()
        far.close()
    if error is not None:
        raise error from RuntimeError(traceback)
    return result


def _answer(pipe: Connection, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        try:
            pipe.send((call(*arguments), None, ""))
        except Exception as error:
            reraise_if_interrupt(error)
            _send_error(pipe, error)
    except (KeyboardInterrupt, BrokenPipeError):  # the parent has been interrupted as well, and reports it
        pass


def _send_error(pipe: Connection, error: Exception) -> None:
    traceback = format_exc()
    try:
        pipe.send((None, error, traceback))
    except Exception as reason:
        reraise_if_interrupt(reason)
        pipe.send((None, RuntimeError(f"{type(error).__name__}: {error}"), traceback))


def _serve(pipe: Connection, task: Task, role: str) -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    runner: Runner | None = None
    handlers: dict[str, Callable[..., Any]] = {}
    try:
        while (received := pipe.recv()) is not None:
            what, arguments = received
            try:
                if not handlers:
                    runner, handlers = _handlers(task, role)
                pipe.send((True, handlers[what](*arguments)))
            except Exception as error:
                reraise_if_interrupt(error)
                pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        if runner is not None:
            runner.close()


def _handlers(task: Task, role: str) -> tuple[Runner | None, dict[str, Callable[..., Any]]]:
    if role == PREPARE:
        from .ours import prepare

        return None, {"prepare": lambda: prepare(task)}
    if role == JUDGE and not task.contender.ours:
        from .pytorch import Judge

        judge = Judge(task)

        def rounded() -> Run:
            with judge.rounded():
                return judge.run()

        return judge, {"run": judge.run, "rounded": rounded, "become_plain": judge.become_plain}
    runner = load(task)
    device = DevicePeak(runner.on_device)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def and_look(*arguments: Any) -> Any:
            result = call(*arguments)
            device.look()
            return result

        return and_look

    def state() -> dict[str, Any]:
        return {
            "host": peak_host_bytes(),
            "device": device.bytes,
            "on_device": runner.on_device,
            "threads": runner.threads(),
            "kept": runner.kept_bytes(),
            "notes": runner.notes,
        }

    return runner, {
        "load": watched(runner.load),
        "run": watched(runner.run),
        "step": watched(runner.step),
        "request": watched(runner.request),
        "latents": lambda: runner.latents,
        "state": state,
    }
