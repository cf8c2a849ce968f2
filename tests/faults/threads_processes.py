"""Processes that share a Session, a kept concept's file, or nothing: started by test_faults_threads, one a run.

python threads_processes.py fork BUNDLE           a Session is made, and its process forks while it rests
python threads_processes.py fork-busy BUNDLE      the process forks while other threads compute and hold locks
python threads_processes.py spawn BUNDLE          a child that multiprocessing starts anew opens its own
python threads_processes.py store BUNDLE FILE N   N times: prepare, save over FILE, load it, draw
python threads_processes.py close BUNDLE N        a Session is closed at N calls of its work, in the thread that does it
python threads_processes.py load BUNDLE HOW       it is closed while a graph is loaded: by a signal, or a finalizer
python threads_processes.py end BUNDLE HOW        the process ends while a daemon thread computes, see `ENDS`

Each prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from memory_hollow import Hollow
from threads_requests import HAT, MAN, PROMPT, STEPS, digest

import magicface_rt
from magicface_rt import KeptConcept, MagicFaceError, Options, Request, Session
from magicface_rt.backends import GraphRunner
from magicface_rt.bundle import Bundle
from magicface_rt.errors import SessionClosedError
from magicface_rt.serve.engine import Engine
from magicface_rt.serve.job import EngineJob

CHILD_SECONDS = 60
HANG_SECONDS = 240
"""After so many a process that hangs says where, and ends."""


def draw(session: Session, concepts: Any = (MAN, HAT)) -> str:
    return digest(session.generate(PROMPT, concepts, steps=STEPS, seed=3))


def open_session(bundle: str) -> Session:
    return Session(bundle, backend="onnxruntime-cpu", threads=2, keep="16MiB", check_hashes=False)


def told(call: Callable[[], object]) -> list[str]:
    """The error that a call raised: its class and its words."""
    try:
        found = call()
    except MagicFaceError as error:
        return [type(error).__name__, str(error)]
    return ["none", repr(found)[:200]]


def in_the_child(session: Session, bundle: str) -> dict[str, Any]:
    """Everything that a Session can be asked, in a process that was forked from its own."""
    found = {
        "generate": told(lambda: draw(session)),
        "prepare": told(lambda: session.prepare(MAN, steps=STEPS)),
        "plan": told(lambda: session.plan([MAN], STEPS)),
        "warm_up": told(lambda: session.warm_up(PROMPT)),
        "forget": told(lambda: session.forget()),
        "unload": told(lambda: session.unload("vae_encoder")),
        "close": told(session.close),
    }
    with open_session(bundle) as own:
        found["own"] = draw(own)
    return found


def forked(session: Session, bundle: str) -> dict[str, Any]:
    """What a child says that ends as any program does, or that it hung."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as stream:
            json.dump(in_the_child(session, bundle), stream)
        sys.exit(7)  # through Python's own end, where what is left of the Session is torn down
    os.close(writing)
    killer = threading.Timer(CHILD_SECONDS, lambda: os.kill(child, 9))
    killer.start()
    with os.fdopen(reading) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    return {"code": os.waitstatus_to_exitcode(status), "said": json.loads(said) if said else None}


def fork(bundle: str) -> dict[str, Any]:
    with open_session(bundle) as session:
        before = draw(session)
        child = forked(session, bundle)
        return {"before": before, "child": child, "after": draw(session)}


def fork_busy(bundle: str) -> dict[str, Any]:
    """Other threads are in the middle of requests, and one holds the Session's lock for as long as the fork takes."""
    with open_session(bundle) as session:
        before, stop, drawn = draw(session), threading.Event(), []
        holding, let_go = threading.Event(), threading.Event()

        def busy() -> None:
            while not stop.is_set():
                drawn.append(draw(session))
                time.sleep(0.1)

        def hold() -> None:
            with session._admission._lock:
                holding.set()
                let_go.wait(CHILD_SECONDS)

        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        while not drawn:
            time.sleep(0.01)
        holder = threading.Thread(target=hold)
        holder.start()
        holding.wait()
        releaser = threading.Timer(1.0, let_go.set)  # the parent's threads go on, the child's copy stays locked
        releaser.start()
        child = forked(session, bundle)
        let_go.set()
        stop.set()
        for thread in (*threads, holder):
            thread.join()
        return {"before": before, "child": child, "after": draw(session), "meanwhile": sorted(set(drawn))}


def _spawned(bundle: str, answers: Any) -> None:
    with open_session(bundle) as session:
        answers.put(draw(session))


def spawn(bundle: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with open_session(bundle) as session:
        before, answers = draw(session), context.Queue()
        child = context.Process(target=_spawned, args=(bundle, answers))
        child.start()
        found = answers.get(timeout=CHILD_SECONDS)
        child.join(CHILD_SECONDS)
        sent = told(lambda: pickle.dumps(session))
        return {"before": before, "child": found, "code": child.exitcode, "sent": sent, "after": draw(session)}


def store(bundle: str, file: str, turns: str) -> dict[str, Any]:
    """Both save over the file that the other may be reading."""
    drawn, errors, path = set(), [], Path(file)
    sys.stdin.readline()
    with open_session(bundle) as session:
        for turn in range(int(turns)):
            session.forget()
            session.prepare(MAN, steps=STEPS).save(path, overwrite=True)
            try:
                kept = KeptConcept.load(path)
            except MagicFaceError as error:
                errors.append(f"turn {turn}: {error}")
                continue
            drawn.add(draw(session, [kept, HAT]))
    return {"drawn": sorted(drawn), "errors": errors}


class Counted(Hollow):
    """`open`: graphs that are loaded and not closed."""

    def __init__(self) -> None:
        self.open = 0

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        runner = super().load(bundle, graph)
        self.open += 1

        def close() -> None:
            self.open -= 1

        runner.close = close  # type: ignore[method-assign]
        return runner


def close_at_calls(bundle: str, most: str) -> dict[str, Any]:
    """As a signal's handler or a finalizer closes: between any two calls of the thread that works, with what it holds.

    Says how often, at how many calls there are, and after which graphs were left open.
    """
    package, opened = os.path.dirname(magicface_rt.__file__), Bundle.open(bundle, check_hashes=False)
    names = ("session.py", "admission.py", "worker_context.py", "graphs.py", "kept/store.py", "kept/keeper.py")
    files = {os.path.join(package, name) for name in names}
    files.add(threading.__file__)

    def work(at: int) -> tuple[int, bool]:
        backend, calls = Counted(), 0
        session = Session(opened, backend=backend, keep="16MiB")

        def called(frame: FrameType, event: str, _: object) -> None:
            nonlocal calls
            if event in ("call", "return") and frame.f_code.co_filename in files:
                calls += 1
                if calls == at:
                    session.close()

        sys.setprofile(called)
        with contextlib.suppress(SessionClosedError):
            session.generate(PROMPT, [MAN], steps=1)
            session.plan([MAN], 1)
            session.forget()
            session.unload("vae_encoder", "denoise_step")
        sys.setprofile(None)
        session.close()
        return calls, backend.open == 0

    calls, _ = work(-1)
    chosen = sorted(random.Random(calls).sample(range(1, calls + 1), min(int(most), calls)))
    left = [at for at in chosen if not work(at)[1]]
    return {"closed": len(chosen), "calls": calls, "left open after": left}


def close_in_load(bundle: str, how: str) -> dict[str, Any]:
    session = open_session(bundle)
    real = session.backend.load

    class Owner:
        """Closes what it owns; in a cycle, so that the collector ends it."""

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            session.close()

    def load(bundle: Bundle, graph: str) -> GraphRunner:
        if how == "signal":
            signal.raise_signal(signal.SIGTERM)
        else:
            gc.collect()
        return real(bundle, graph)

    if how == "signal":
        signal.signal(signal.SIGTERM, lambda *_: session.close())
    else:
        gc.disable()
        Owner()
    session.backend.load = load  # type: ignore[method-assign]
    said = told(lambda: draw(session))
    return {"said": said[0], "left": sorted(session._graphs.runners)}


def _stepping(ask: Callable[[Callable[[object], object]], object]) -> None:
    """A daemon thread that asks; until its first step is done."""
    stepped = threading.Event()
    threading.Thread(target=lambda: told(lambda: ask(lambda _: stepped.set())), daemon=True).start()
    assert stepped.wait(CHILD_SECONDS)


def end_drawing(session: Session) -> None:
    _stepping(lambda step: session.generate(PROMPT, [MAN, HAT], steps=500, progress=step))


def end_closed(session: Session) -> None:
    with session:
        end_drawing(session)


def end_engine(session: Session) -> None:
    engine = Engine([session])
    engine.start()
    stepped = threading.Event()
    request = Request(PROMPT, [MAN, HAT], Options(steps=500))
    engine.submit(EngineJob(request, progress=lambda _: stepped.set()))
    engine.submit(EngineJob(request))
    assert stepped.wait(CHILD_SECONDS)


ENDS = {"drawing": end_drawing, "closed": end_closed, "engine": end_engine}


def end(bundle: str, how: str) -> dict[str, Any]:
    kept_open.append(open_session(bundle))
    ENDS[how](kept_open[0])
    return {"ends": "now"}


kept_open: list[Session] = []


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    if not what.startswith("fork"):  # whose child would wait for faulthandler's thread, which it has not
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "fork": fork,
        "fork-busy": fork_busy,
        "spawn": spawn,
        "store": store,
        "close": close_at_calls,
        "load": close_in_load,
        "end": end,
    }
    found = work[what](*arguments)
    print(json.dumps(found))  # written as Python ends, should it come so far
