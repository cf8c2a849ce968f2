"""One Session and many threads, forks and ends: each picture is what a single caller gets, and nothing hangs."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
import threads_processes
from memory_hollow import Hollow
from memory_slopes import held
from threads_requests import HAT, MAN, PROMPT, STEPS, Mixed, digest

from magicface_rt import Cancelled, MagicFaceError, Options, Progress, Request, Session, SessionClosedError
from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.bundle import Bundle
from magicface_rt.errors import BackendError, OptionError, OtherProcessError

JOIN_SECONDS = 120
SOON_SECONDS = 30
THREADS = 8


@pytest.fixture(scope="module")
def mixed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tiny_bundle, tmp_path_factory.mktemp("kept"))


@pytest.fixture
def switching() -> Iterator[None]:
    """Python's threads take turns every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Crowd:
    """Threads that all start at once. `join` raises what one of them raised, and fails where one hangs."""

    def __init__(self, *work: Callable[[], object]) -> None:
        self._errors: list[BaseException] = []
        self._ready = threading.Barrier(len(work))
        self.threads = [threading.Thread(target=self._run, args=(one,), daemon=True) for one in work]
        for thread in self.threads:
            thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            self._ready.wait(JOIN_SECONDS)
            work()
        except BaseException as error:
            self._errors.append(error)

    def join(self, seconds: float = JOIN_SECONDS) -> None:
        for thread in self.threads:
            thread.join(seconds)
            assert not thread.is_alive(), "a thread hangs"
        if self._errors:
            raise self._errors[0]


# ------------------------------------------------------------------------------------------------------ many at a time


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(("turns", "form"), [(4, "quick"), pytest.param(100, "slow", marks=pytest.mark.slow)])
def test_threads_draw_what_a_serial_run_draws(mixed: Mixed, turns: int, form: str) -> None:
    """Bit by bit, whatever stands beside it: also what is refused, cancelled or fails does so in the same words."""
    kinds = len(mixed.kinds)
    draw, order = random.Random(turns), []
    for _ in range(-(-THREADS * turns // mixed.turns)):
        order += draw.sample(range(mixed.turns), mixed.turns)
    del order[THREADS * turns :]
    with Session(mixed.bundle, backend=mixed.backend) as session:
        serial = {(kind, seed): what for kind, seed, what in (mixed.turn(session, number) for number in set(order))}
    found: list[tuple[str, int, str]] = []
    with Session(mixed.bundle, backend=mixed.backend, workers=3, keep="8MiB") as session:

        def work(mine: list[int]) -> None:
            for number in mine:
                found.append(mixed.turn(session, number))

        Crowd(*(lambda mine=order[n::THREADS]: work(mine) for n in range(THREADS))).join(10 * THREADS * turns)
    assert len(found) == THREADS * turns
    for kind, seed, what in found:
        assert what == serial[kind, seed], f"{kind}, seed {seed}"
    assert len({kind for kind, _, _ in found}) > kinds // 2
    told = f"{THREADS} threads x {turns} requests of {kinds} kinds, switch interval 1 us: {len(found)} bit-equal"
    figures.tell("threads", f"one Session ({form})", told)


class Seen(list[Any]):
    """A list that says when it is gone through."""

    def __init__(self, *content: Any) -> None:
        super().__init__(content)
        self.taken = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        self.taken.set()
        return super().__iter__()


@pytest.mark.parametrize("what", ["concepts", "requests"])
def test_what_was_asked_for_is_drawn_whatever_becomes_of_the_list_meanwhile(mixed: Mixed, what: str) -> None:
    """One worker, which another request has while the list is emptied."""
    options = Options(steps=STEPS, seed=1)
    given = Seen(*([MAN] if what == "concepts" else [Request(PROMPT, [MAN], options)]))
    begun, go = threading.Event(), threading.Event()
    found: list[str] = []

    def first() -> None:
        session.generate(PROMPT, steps=1, progress=lambda _: begun.set() or go.wait(JOIN_SECONDS))

    def second() -> None:
        if what == "concepts":
            found.append(digest(session.generate(PROMPT, given, options=options)))
        else:
            found.append(digest(*session.generate_batch(given)))

    with Session(mixed.bundle, backend=mixed.backend) as session:
        expected = digest(session.generate(PROMPT, [MAN], options=options))
        running = Crowd(first)
        assert begun.wait(JOIN_SECONDS)
        waiting = Crowd(second)
        try:
            assert given.taken.wait(10), "the list is looked at when the worker is free"
            given.clear()
        finally:
            go.set()
            running.join()
            waiting.join()
    assert found == [expected]


def test_threads_that_want_one_reference_prepare_it_once_and_alike(mixed: Mixed) -> None:
    runs = mixed.backend.runs
    with Session(mixed.bundle, backend=mixed.backend, keep="64MiB") as session:
        runs.clear()
        alone = mixed.ask(session, "two bare", 1)
        once = runs["reference_kv"]
        assert once > 0
    with Session(mixed.bundle, backend=mixed.backend, workers=THREADS, keep="64MiB") as session:
        runs.clear()
        found: list[str] = []
        Crowd(*[lambda: found.append(mixed.ask(session, "two bare", 1))] * THREADS).join()
        assert runs["reference_kv"] == once
    assert found == [alone] * THREADS


@pytest.mark.parametrize("loads", ["once", pytest.param("again", marks=pytest.mark.slow)])
def test_forgetting_and_unloading_beside_requests_change_no_picture(mixed: Mixed, loads: str) -> None:
    """`unload` is refused while one runs, `forget` says that something is left; both come at any moment."""
    refused: list[str] = []
    backend = mixed.backend if loads == "once" else OnnxRuntime("cpu", threads=1)
    with Session(mixed.bundle, backend=backend, workers=2, keep="64MiB") as session:
        expected = {kind: mixed.ask(session, kind, 2) for kind in ("two bare", "kept", "kept and bare")}
        over = threading.Event()

        def disturb() -> None:
            while not over.wait(0.002):
                session.forget()
                try:
                    session.unload("reference_kv", "vae_encoder", "denoise_step")
                except MagicFaceError as error:
                    refused.append(str(error))

        disturber = Crowd(disturb)
        found: list[tuple[str, str]] = []

        def work() -> None:
            for kind in expected:
                found.append((kind, mixed.ask(session, kind, 2)))

        try:
            Crowd(work, work, work).join()
        finally:
            over.set()
            disturber.join()
        assert session.forget()
    assert len(found) == 9
    assert all(what == expected[kind] for kind, what in found)
    assert set(refused) <= {"graphs cannot be unloaded while a request is running; wait for it to end."}


# ------------------------------------------------------------------------------------------------------------ the end


def asks(mixed: Mixed, session: Session) -> dict[str, Callable[[], object]]:
    return {
        "generate": lambda: session.generate(PROMPT, [MAN], steps=STEPS),
        "generate_batch": lambda: mixed.kinds["batch"](session, 1),
        "prepare": lambda: session.prepare(MAN, steps=STEPS),
        "plan": lambda: session.plan([MAN], STEPS),
        "warm_up": lambda: session.warm_up(PROMPT, [mixed.man]),
    }


def test_a_closed_session_refuses_all_that_it_can_be_asked(mixed: Mixed) -> None:
    session = Session(mixed.bundle, backend=mixed.backend, keep="8MiB")
    session.generate(PROMPT, [MAN], steps=STEPS)
    session.close()
    for name, ask in asks(mixed, session).items():
        with pytest.raises(SessionClosedError, match="open a new one"):
            ask()
        assert not session._graphs.runners, name
    assert session.forget()
    session.unload("vae_encoder")
    assert session.kept_bytes == 0


def test_closing_ends_those_that_run_and_those_that_wait(mixed: Mixed) -> None:
    """Six requests of 500 steps on two workers: two run, four wait, and eight threads close at once."""
    session = Session(mixed.bundle, backend="onnxruntime-cpu", threads=1, workers=2)
    ended: list[str] = []
    both = threading.Barrier(3)
    first = threading.local()

    def stepped(progress: Progress) -> None:
        if progress.step and not getattr(first, "done", False):
            first.done = True
            both.wait(JOIN_SECONDS)

    def long() -> None:
        try:
            session.generate(PROMPT, [HAT], steps=500, progress=stepped)
            ended.append("drawn")
        except SessionClosedError:
            ended.append("closed")

    asking = Crowd(*[long] * 6)
    both.wait(JOIN_SECONDS)  # two are in their loops
    Crowd(*[session.close] * THREADS).join()
    asking.join()
    assert ended == ["closed"] * 6
    assert not session._graphs.runners
    assert not session._admission._running
    session.close()


def test_another_thread_cancels(mixed: Mixed) -> None:
    with Session(mixed.bundle, backend=mixed.backend) as session:
        expected = mixed.ask(session, "bare", 1)
        begun, stop = threading.Event(), threading.Event()

        def progress(_: object) -> bool:
            begun.set()
            return not stop.wait(0.01)

        def long() -> None:
            with pytest.raises(Cancelled, match="of 500"):
                session.generate(PROMPT, [HAT], steps=500, progress=progress)

        asking = Crowd(long)
        assert begun.wait(JOIN_SECONDS)
        stop.set()
        asking.join()
        assert mixed.ask(session, "bare", 1) == expected


def test_who_waits_for_a_worker_can_cancel(mixed: Mixed) -> None:
    """Also where the one that has it takes for ever."""
    with Session(mixed.bundle, backend=mixed.backend) as session:
        asks = {
            "after prepared step 0 of 7": lambda ask: session.generate(PROMPT, [HAT], steps=7, progress=ask),
            "after prepared step 0 of 3": lambda ask: session.prepare(MAN, steps=3, progress=ask),
        }
        with held_up(session):
            for said, ask in asks.items():
                told: list[Progress] = []
                with pytest.raises(Cancelled, match=said):
                    ask(lambda progress, told=told: told.append(progress) or len(told) < 3)
                assert [(one.step, one.stage) for one in told] == [(0, "prepare")] * 3
        assert not session._admission._running
        assert mixed.ask(session, "bare", 1) == mixed.ask(session, "bare", 1)


def test_closing_ends_who_waits_for_a_worker_before_the_one_that_has_it(mixed: Mixed) -> None:
    session = Session(mixed.bundle, backend=mixed.backend)
    with held_up(session):
        waiting = Crowd(lambda: session.generate(PROMPT, [HAT], steps=1), lambda: session.prepare(MAN, steps=1))
        session.close()
        for thread in waiting.threads:
            thread.join(JOIN_SECONDS)
            assert not thread.is_alive()
        with pytest.raises(SessionClosedError):
            waiting.join()


@contextmanager
def held_up(session: Session) -> Iterator[None]:
    """Another thread's request has the only worker, and does not go on before the block ends."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        begun.set()
        assert go_on.wait(JOIN_SECONDS)

    def ask() -> None:
        with suppress(SessionClosedError):
            session.generate(PROMPT, [HAT], steps=1, progress=hold)

    asking = Crowd(ask)
    try:
        assert begun.wait(JOIN_SECONDS)
        yield
    finally:
        go_on.set()
        asking.join()


class Blocking(Backend):
    """Loads a graph when it is allowed to, and not before. `loads`: how often each was; `open`: those not closed."""

    name = "blocking"

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.loads: Counter[str] = Counter()
        self.open: Counter[str] = Counter()
        self.beside = 0
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.fails = False
        self._busy = threading.Lock()

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        if not self._busy.acquire(blocking=False):
            self.beside += 1
            raise AssertionError("two graphs are loaded at a time")
        try:
            self.loads[graph] += 1
            self.begun.set()
            assert self.go_on.wait(JOIN_SECONDS)
            if self.fails:
                self.fails = False
                raise BackendError(f"graph {graph}: it could not be loaded")
            runner = self.inner.load(bundle, graph)
            self.open[graph] += 1
            runner.close = lambda: self.open.subtract([graph])  # type: ignore[method-assign]
            return runner
        finally:
            self._busy.release()


@contextmanager
def loading(mixed: Mixed, **settings: Any) -> Iterator[tuple[Session, Blocking, Crowd]]:
    """A Session, a thread's request of which loads its first graph, which does not end before the block does."""
    backend = Blocking(Hollow())
    session = Session(mixed.bundle, backend=backend, workers=2, **settings)

    def ask() -> None:
        with suppress(SessionClosedError, BackendError):
            session.generate(PROMPT, [HAT], steps=1)

    asking = Crowd(ask)
    try:
        assert backend.begun.wait(JOIN_SECONDS)
        yield session, backend, asking
    finally:
        backend.go_on.set()
        asking.join()
        session.close()
        assert not backend.beside
        assert not +backend.open, "what was loaded was freed"


@pytest.mark.parametrize("workers", ["one free", "none free"])
def test_who_waits_while_another_thread_loads_a_graph_can_cancel(mixed: Mixed, workers: str) -> None:
    """Also a time limit that a callback raises ends it, and others that wait have their graph once it is loaded."""
    with loading(mixed) as (session, backend, _), second_worker(session, workers) as busy:
        for ask in (
            lambda progress: session.generate(PROMPT, [HAT], steps=7, progress=progress),
            lambda progress: session.prepare(MAN, steps=7, progress=progress),
        ):
            told: list[Progress] = []
            with pytest.raises(Cancelled, match="after prepared step 0 of 7"):
                ask(lambda progress, told=told: told.append(progress) or len(told) < 3)
            assert [(one.step, one.stage) for one in told] == [(0, "prepare")] * 3
        with pytest.raises(TimeoutError):
            session.generate(PROMPT, [HAT], steps=7, progress=too_late)
        assert backend.loads.total() == 1
        waiting = Crowd(*[lambda: session.generate(PROMPT, [HAT], steps=1)] * 3)
        backend.go_on.set()
        busy.set()
        waiting.join()
        assert set(backend.loads.values()) == {1}, "each graph is loaded once"


@contextmanager
def second_worker(session: Session, workers: str) -> Iterator[threading.Event]:
    """With "none free", another request waits for the graph that is loaded, and so has the second worker."""
    end, begun = threading.Event(), threading.Event()

    def hold(_: object) -> bool:
        begun.set()
        return not end.is_set()

    def ask() -> None:
        with suppress(Cancelled, SessionClosedError):
            session.generate(PROMPT, [HAT], steps=1, progress=hold)

    if workers == "one free":
        yield end
        return
    holding = Crowd(ask)
    try:
        assert begun.wait(JOIN_SECONDS)
        yield end
    finally:
        end.set()
        holding.join()


def too_late(_: object) -> None:
    raise TimeoutError("the caller's time limit")


def test_closing_while_another_thread_loads_a_graph_waits_for_nothing(mixed: Mixed) -> None:
    """Those that wait end, the one that loads ends with its graph, and what it loaded is freed then, not before."""
    with loading(mixed) as (session, backend, asking):
        waiting = Crowd(
            lambda: session.generate(PROMPT, [HAT], steps=1),  # waits for the graph
            lambda: session.prepare(MAN, steps=1),  # one of these two waits for a worker
            lambda: session.runner("vae_decoder"),
        )
        time.sleep(0.1)
        assert not session.forget(), "a request is running"
        with pytest.raises(OptionError, match="while a request is running"):
            session.unload("vae_decoder")
        began = time.monotonic()
        session.close()
        assert time.monotonic() - began < SOON_SECONDS
        for thread in waiting.threads:
            thread.join(SOON_SECONDS)
            assert not thread.is_alive(), "it waits for the thread that loads"
        with pytest.raises(SessionClosedError):
            waiting.join()
        assert not session.wait_stopped(0.1), "a graph is being loaded"
        backend.go_on.set()
        asking.join()
        assert session.wait_stopped(SOON_SECONDS)
        assert backend.loads.total() == 1
        assert not session._graphs.runners


def test_a_graph_that_is_loaded_for_no_request_is_freed_after_closing(mixed: Mixed) -> None:
    backend = Blocking(Hollow())
    session = Session(mixed.bundle, backend=backend)
    closed: list[Counter[str]] = []
    session._owns_backend = True
    backend.close = lambda: closed.append(+backend.open)  # type: ignore[method-assign]
    loading = Crowd(lambda: session.runner("vae_decoder"))
    assert backend.begun.wait(JOIN_SECONDS)
    session.close()
    assert not closed, "the backend is closed while it loads a graph"
    assert not session.wait_stopped(0.1)
    backend.go_on.set()
    with pytest.raises(SessionClosedError):
        loading.join()
    assert closed == [Counter()]
    assert backend.loads == {"vae_decoder": 1}
    assert session.wait_stopped(SOON_SECONDS)


def test_where_a_graph_cannot_be_loaded_who_waited_loads_it(mixed: Mixed) -> None:
    """The one that waited gets the errors of its own attempt only."""
    with loading(mixed) as (session, backend, asking):
        backend.fails = True
        found: list[str] = []
        waits = threading.Event()  # set by the progress that is reported while it waits

        def ask() -> None:
            found.append(digest(session.generate(PROMPT, [HAT], steps=1, progress=lambda _: waits.set())))

        waiting = Crowd(ask)
        assert waits.wait(SOON_SECONDS)
        backend.go_on.set()
        waiting.join()
        asking.join()
        assert len(found) == 1
        assert sorted(set(backend.loads.values())) == [1, 2]


def test_a_session_that_nobody_holds_any_more_leaves_nothing(mixed: Mixed) -> None:
    def cycle() -> weakref.ref[Session]:
        session = Session(mixed.bundle, backend="onnxruntime-cpu", threads=3, keep="8MiB")
        session.generate(PROMPT, [MAN], steps=STEPS)
        assert len(os.listdir("/proc/self/task")) > int(before["tasks"][0]), "the runtime has threads of its own"
        return weakref.ref(session)

    gc.collect()
    before = held()
    gone = cycle()
    gc.collect()
    assert gone() is None
    assert held() == before


def test_a_session_that_cannot_be_opened_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    before = held()
    for backend, error in (("onnxruntime-cuda", MagicFaceError), ("abacus", MagicFaceError)):
        with pytest.raises(error):
            Session(tiny_bundle, backend=backend, check_hashes=False)
    with pytest.raises(MagicFaceError):
        Session(tmp_path)
    gc.collect()
    assert held() == before


# ---------------------------------------------------------------------------------------------------------- processes


def process(*arguments: object, **pipes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, threads_processes.__file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        **pipes,
    )


def answer(started: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, said = started.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        started.kill()
        pytest.fail(f"it hangs: {started.communicate()[1][-2000:]}")
    assert started.returncode == 0, said[-3000:]
    return dict(json.loads(out.splitlines()[-1]))


@pytest.fixture(scope="module")
def drawn(mixed: Mixed) -> str:
    """What the processes draw."""
    with Session(mixed.bundle, backend="onnxruntime-cpu", threads=2, keep="16MiB") as session:
        return threads_processes.draw(session)


@pytest.fixture(scope="module")
def forked(tiny_bundle: Path) -> Callable[[str], dict[str, Any]]:
    """What a process says of itself and of the one that it forks, by the moment; asked once."""
    return cache(lambda when: answer(process(when, tiny_bundle)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_another_process_draws_the_same_byte_for_byte(forked: Callable[[str], dict[str, Any]], drawn: str) -> None:
    """Latents, regions and pictures of one request: in this process, in one that was started, in one that forked."""
    found = forked("fork")
    assert [found["before"], found["child"]["said"]["own"], found["after"]] == [drawn] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["fork", pytest.param("fork-busy", marks=pytest.mark.slow)])
def test_a_session_is_refused_in_a_forked_process_and_its_own_goes_on(
    forked: Callable[[str], dict[str, Any]], drawn: str, when: str
) -> None:
    found = copy.deepcopy(forked(when))
    assert found["before"] == found["after"] == drawn
    assert set(found.get("meanwhile", [drawn])) == {drawn}
    child = found["child"]
    assert child["code"] == 7, f"it hung, or died at its end: {child}"
    assert child["said"].pop("own") == drawn, "a Session of its own"
    assert child["said"].pop("close") == ["none", "None"]
    assert set(child["said"]) == {"generate", "prepare", "plan", "warm_up", "forget", "unload"}
    for name, (kind, text) in child["said"].items():
        assert kind == "OtherProcessError", name
        assert "open a Session in each process" in text
    figures.tell("threads", f"forked ({when})", f"{len(child['said'])} calls refused, none hung, the parent bit-equal")


@pytest.mark.parametrize(("most", "form"), [(40, "quick"), pytest.param(4000, "slow", marks=pytest.mark.slow)])
def test_closing_at_any_call_of_the_thread_that_works_hangs_nothing_and_frees_all(
    tiny_bundle: Path, most: int, form: str
) -> None:
    found = answer(process("close", tiny_bundle, most))
    assert found["left open after"] == []
    figures.tell("threads", f"closed at any call ({form})", f"{found['closed']} of {found['calls']} calls, none hung")


@pytest.mark.parametrize("how", ["signal", "finalizer"])
def test_closing_while_the_same_thread_loads_a_graph_ends_its_request(tiny_bundle: Path, how: str) -> None:
    assert answer(process("load", tiny_bundle, how)) == {"said": "SessionClosedError", "left": []}


@pytest.mark.parametrize("how", sorted(threads_processes.ENDS))
def test_a_process_ends_well_while_a_daemon_thread_computes(tiny_bundle: Path, how: str) -> None:
    """With code 0, and what it has printed is there; else the runtime ends it by SIGABRT."""
    assert answer(process("end", tiny_bundle, how)) == {"ends": "now"}


@pytest.mark.slow
def test_a_process_that_starts_anew_opens_its_own(tiny_bundle: Path, drawn: str) -> None:
    found = answer(process("spawn", tiny_bundle))
    assert found["before"] == found["after"] == found["child"] == drawn
    assert found["code"] == 0
    kind, text = found["sent"]
    assert kind == "OtherProcessError"
    assert "send the bundle's path" in text


def test_a_session_is_not_copied(mixed: Mixed) -> None:
    with Session(mixed.bundle, backend=mixed.backend) as session, pytest.raises(OtherProcessError, match="copied"):
        copy.copy(session)


@pytest.mark.parametrize(("turns", "form"), [(1, "quick"), pytest.param(40, "slow", marks=pytest.mark.slow)])
def test_two_processes_on_one_file_draw_the_same(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    """Both prepare, save over the file that the other may be reading, load it and draw with it."""
    both = [process("store", tiny_bundle, tmp_path / "man.concept", turns) for _ in range(2)]
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    found = [answer(one) for one in both]
    assert [one["errors"] for one in found] == [[], []]
    assert found[0]["drawn"] == found[1]["drawn"]
    assert len(found[0]["drawn"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["man.concept"]
    figures.tell("threads", f"two processes, one file ({form})", f"2 x {turns} saved, loaded and drawn, all bit-equal")


def test_the_digest_sees_every_bit(mixed: Mixed) -> None:
    """What all comparisons here stand on."""
    with Session(mixed.bundle, backend=mixed.backend) as session:
        result = session.generate(PROMPT, [mixed.man], steps=STEPS)
    before = digest(result)
    bits = result.latents.view(np.uint32)
    bits[0, 0, 0, 0] ^= 1
    assert digest(result) != before
    bits[0, 0, 0, 0] ^= 1
    result.regions[0, 0, 0] += 1
    assert digest(result) != before
    result.regions[0, 0, 0] -= 1
    assert digest(result) == before
