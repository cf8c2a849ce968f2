"""Processes that share a Session, a kept concept's file, or nothing: started by test_faults_threads, one a run.

python threads_processes.py fork BUNDLE           a Session is made, and its process forks while it rests
python threads_processes.py fork-busy BUNDLE      the process forks while other threads compute and hold locks
python threads_processes.py spawn BUNDLE          a child that multiprocessing starts anew opens its own
python threads_processes.py store BUNDLE FILE N   N times: prepare, save over FILE, load it, draw

Each prints one line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from threads_requests import HAT, MAN, PROMPT, STEPS, digest

from magicface_rt import KeptConcept, MagicFaceError, Session

CHILD_SECONDS = 60


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
            with session._loading:
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


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "fork": fork,
        "fork-busy": fork_busy,
        "spawn": spawn,
        "store": store,
    }
    found = work[what](*arguments)
    print(json.dumps(found), flush=True)
