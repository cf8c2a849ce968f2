"""The engine without HTTP: fair order, cancelling, draining, errors of one request among several."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loopback import PROMPT, Gated, Oracle, concept, png, running, until

from magicface_rt import Cancelled, MagicFaceError, NonFiniteError, OptionError, Options, Request
from magicface_rt.errors import BundleError, DeadlineError, DrainingError, HostMemoryError, QueueFullError
from magicface_rt.files.stamps import Stamp
from magicface_rt.serve.engine import Engine, EngineObserver
from magicface_rt.serve.fair import FairQueue
from magicface_rt.serve.job import EngineJob
from magicface_rt.serve.settings import ServeSettings

MAN = concept("man", 1)


def job(seed: int = 0, owner: str = "", *, alone: bool = True, steps: int = 1, **settings: Any) -> EngineJob:
    return EngineJob(Request(PROMPT, (), Options(seed=seed, steps=steps)), owner=owner, alone=alone, **settings)


@pytest.fixture
def engine(session: Gated) -> Iterator[Engine]:
    started = Engine([session], ServeSettings(batch_wait=0, queue=8))
    started.start()
    yield started
    session.free.set()
    assert started.close()


def hold(engine: Engine, session: Gated) -> EngineJob:
    session.free.clear()
    first = engine.submit(job(1000))
    session.wait_for_step()
    return first


def test_owners_take_turns(engine: Engine, session: Gated) -> None:
    hold(engine, session)
    jobs = [job(n, owner) for n, owner in enumerate(["a", "a", "a", "b", "b", "c"])]
    for one in jobs:
        engine.submit(one)
    session.free.set()
    for one in jobs:
        one.future.result(30)
    assert session.calls[1:] == [[0], [3], [5], [1], [4], [2]]


def test_a_fair_queue_keeps_each_owners_order_and_counts() -> None:
    queue: FairQueue[EngineJob] = FairQueue()
    jobs = [job(n, owner, steps=n % 2 + 1) for n, owner in enumerate("aabab")]
    for one in jobs:
        queue.put(one)
    assert queue.take(lambda one: one.steps == 2) is jobs[1]  # overtakes its owner's first, whose turn it still is
    assert queue.remove(jobs[2])
    assert not queue.remove(jobs[2])
    assert [len(queue), queue.take(), queue.take(), queue.take(), queue.take(), len(queue)] == [
        3,
        jobs[0],
        jobs[4],
        jobs[3],
        None,
        0,
    ]


def test_what_is_next_comes_before_what_would_have_to_overtake() -> None:
    queue: FairQueue[EngineJob] = FairQueue()
    long, behind, others = job(0, "a", steps=50), job(1, "a", steps=20), job(2, "b", steps=20)
    for one in (long, behind, others):
        queue.put(one)
    assert [queue.take(lambda one: one.steps == 20) for _ in range(3)] == [others, behind, None]
    assert queue.take() is long


def test_a_request_that_fits_no_batch_has_its_turn_while_others_that_fit_keep_coming() -> None:
    queue: FairQueue[EngineJob] = FairQueue()
    long = job(0, "a", steps=50)
    for one in (job(0, "b", steps=20), long, *(job(n, "ab"[n % 2], steps=20) for n in range(8))):
        queue.put(one)
    begun = []
    while long not in begun and len(begun) < 10:
        first = queue.take()
        assert first is not None
        begun.append(first)
        taken = [first]
        while len(taken) < 4 and (more := queue.take(lambda one: one.steps == 20)) is not None:
            taken.append(more)
        for one in taken:  # whoever has a picture asks for the next
            queue.put(job(0, one.owner, steps=20))
    assert long in begun[:2], "as many batches as there are owners"


def test_a_job_that_waits_is_cancelled_at_once_and_makes_room(engine: Engine, session: Gated) -> None:
    hold(engine, session)
    waiting = [engine.submit(job(n)) for n in range(8)]
    with pytest.raises(QueueFullError) as full:
        engine.submit(job())
    assert full.value.retry_after is not None
    assert full.value.retry_after >= 1
    engine.cancel(waiting[3], Cancelled("no more"))
    with pytest.raises(Cancelled):
        waiting[3].future.result(0)
    last = engine.submit(job(8))
    session.free.set()
    last.future.result(30)
    assert [3] not in session.calls
    assert engine.waiting == 0


def test_a_deadline_that_passed_before_the_work_began_does_none(engine: Engine, session: Gated) -> None:
    hold(engine, session)
    late = engine.submit(job(1, deadline=time.monotonic() + 0.01))
    time.sleep(0.02)
    session.free.set()
    with pytest.raises(DeadlineError, match="deadline"):
        late.future.result(30)
    assert session.calls == [[1000]]


def test_one_request_that_fails_in_a_batch_fails_alone(
    session: Gated, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Gated.generate_batch

    def failing(self: Gated, requests: Any, **settings: Any) -> Any:
        if any(request.options.seed == 2 for request in requests):
            self.calls.append([request.options.seed for request in requests])
            raise NonFiniteError("made to fail")
        return real(self, requests, **settings)

    monkeypatch.setattr(Gated, "generate_batch", failing)
    engine = Engine([session], ServeSettings(batch_wait=0.5))
    engine.start()
    jobs = [engine.submit(job(seed, alone=False)) for seed in (1, 2, 3)]
    for one in (jobs[0], jobs[2]):
        seed = 1 if one is jobs[0] else 3
        assert [png(i) for i in one.future.result(30).result.images] == oracle.pngs(seed=seed, steps=1)
    with pytest.raises(NonFiniteError):
        jobs[1].future.result(30)
    assert session.calls == [[1, 2, 3], [1], [2], [3]]
    engine.close()


def test_what_a_batch_that_failed_held_is_gone_before_its_requests_are_made_alone(
    session: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of them had less memory than it would have alone."""
    real, held = Gated.generate_batch, []

    class Keys:
        """What an attempt takes memory for."""

    def failing(self: Gated, requests: Any, **settings: Any) -> Any:
        assert [one() for one in held] == [None] * len(held)
        if [request.options.seed for request in requests] == [3]:
            return real(self, requests, **settings)
        keys = Keys()
        held.append(weakref.ref(keys))
        raise HostMemoryError("made to fail")

    monkeypatch.setattr(Gated, "generate_batch", failing)
    engine = Engine([session], ServeSettings(batch_wait=0.5))
    engine.start()
    jobs = [engine.submit(job(seed, alone=False)) for seed in (1, 2, 3)]
    for one in jobs[:2]:
        with pytest.raises(HostMemoryError):
            one.future.result(30)
    assert jobs[2].future.result(30).batch == 1
    engine.close()
    assert len(held) == 3


def test_an_unexpected_error_ends_its_job_and_not_the_engine(engine: Engine) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("made to fail")

    with pytest.raises(ZeroDivisionError):
        engine.submit(EngineJob(fails)).future.result(30)
    assert engine.submit(job(1)).future.result(30).batch == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(1)], ids=repr)
def test_an_observer_that_fails_takes_nothing_from_the_jobs(session: Gated, error: BaseException) -> None:
    class Failing(EngineObserver):
        def batch(self, *_: object) -> None:
            raise error

    engine = Engine([session], observer=Failing())
    engine.start()
    for seed in (1, 2):
        assert engine.submit(job(seed)).future.result(30).batch == 1
    assert engine.failure is None
    assert engine.close()


def test_a_job_that_would_end_its_thread_ends_alone(engine: Engine) -> None:
    def ends(*_: object) -> None:
        raise SystemExit(1)

    with pytest.raises(MagicFaceError, match="raised SystemExit"):
        engine.submit(EngineJob(ends)).future.result(30)
    assert engine.submit(job(1)).future.result(30).batch == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("place", ["begin", "is_request"])
def test_where_a_thread_ends_that_should_not_nobody_waits_in_vain(session: Gated, place: str) -> None:
    """`begin` is called of what runs, `is_request` of what is taken next."""

    def fails(_: object) -> None:
        raise MemoryError("made to fail")

    spoiled = type("Spoiled", (EngineJob,), {place: property(fails) if place == "is_request" else fails})
    engine = Engine([session], ServeSettings(queue=8))
    engine.start()
    hold(engine, session)
    jobs = [engine.submit(one) for one in (spoiled(Request(PROMPT, (), Options(steps=1))), job(1))]
    session.free.set()
    for one in jobs:
        with pytest.raises(DrainingError, match="before this request was done"):
            one.future.result(30)
    until(lambda: engine.failure is not None, "no failure is told")
    assert str(engine.failure) == "a thread that computes has ended: MemoryError: made to fail."
    with pytest.raises(DrainingError):
        engine.submit(job())
    assert engine.exclusive(len) == 1, "nothing runs"
    assert engine.close()


def test_a_service_whose_thread_has_ended_ends(session: Gated) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("made to fail")

    with running(session) as server, server.client() as client:
        assert client.ready()
        one = job()
        one.begin = fails  # type: ignore[method-assign]
        server.service.engine.submit(one)
        until(lambda: not server.thread.is_alive(), "the server goes on with nobody to compute")
        assert server.service.not_ready() == "a thread that computes has ended."


def test_a_service_whose_bundle_was_written_to_ends(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request can be done with it any more, so whoever watches over the service shall start it anew."""
    monkeypatch.setattr("magicface_rt.serve.local.LOOK_SECONDS", 0.1)
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    with (
        Gated(folder, backend="onnxruntime-cpu", check_hashes=False, threads=1) as session,
        running(session) as server,
        server.client() as client,
    ):
        client.generate(PROMPT, steps=1)
        looks: list[bool] = []
        real = Stamp.was_modified

        def seen(stamp: Stamp, path: str) -> Stamp | None:
            looks.append(True)
            return real(stamp, path)

        monkeypatch.setattr(Stamp, "was_modified", seen)
        until(lambda: len(looks) > 3 * len(session.bundle.stamps), "nobody looks")
        assert client.ready()
        with (folder / "weights.bin").open("r+b") as file:
            file.write(b"\1" * 64)
        until(lambda: not server.thread.is_alive(), "the server goes on with nothing to draw with")
        assert server.service.not_ready() == "a file of its bundle was written to."
        failure = server.service.failure()
        assert isinstance(failure, BundleError)
        assert "weights.bin was written to since the bundle was opened" in str(failure)


def test_an_outcome_that_comes_as_its_owner_gives_up_is_none(engine: Engine) -> None:
    given_up = EngineJob(lambda *_: None)
    given_up.future.cancel()
    given_up.future.done = lambda: False  # type: ignore[method-assign] - as it was a moment before
    engine.submit(given_up)
    assert engine.submit(job(1)).future.result(30).batch == 1
    assert given_up.future.cancelled()


def test_draining_finishes_what_is_there_and_takes_nothing_new(engine: Engine, session: Gated) -> None:
    first = hold(engine, session)
    waiting = engine.submit(job(1))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(engine.drain(30)))
    thread.start()
    while not engine.draining:
        time.sleep(0.001)
    with pytest.raises(DrainingError):
        engine.submit(job(2))
    assert not done
    session.free.set()
    thread.join(30)
    assert done == [0]
    assert first.future.done()
    assert waiting.future.result(0).batch == 1


def test_draining_cuts_off_what_takes_too_long(engine: Engine, session: Gated) -> None:
    first, waiting = hold(engine, session), engine.submit(job(1))
    assert engine.drain(0.05) == 2
    for one in (first, waiting):
        with pytest.raises(DrainingError, match="before this request was done"):
            one.future.result(0)


def test_what_runs_exclusively_runs_alone(engine: Engine, session: Gated) -> None:
    first = hold(engine, session)
    seen: list[tuple[bool, int]] = []
    thread = threading.Thread(
        target=lambda: engine.exclusive(lambda sessions: seen.append((first.future.done(), len(session.calls))))
    )
    thread.start()
    time.sleep(0.02)
    second = engine.submit(job(1))
    assert not seen
    session.free.set()
    second.future.result(30)
    thread.join(30)
    assert seen == [(True, 1)]


def test_what_runs_exclusively_runs_beside_no_warm_up(session: Gated) -> None:
    """Neither before it has ended nor the other way round; and draining does not wait for it."""
    seen: list[str] = []
    warming, warmed, alone, go = (threading.Event() for _ in range(4))

    def warm(_: object) -> None:
        seen.append("warm-up begins")
        warming.set()
        assert warmed.wait(30)
        seen.append("warm-up ends")

    engine = Engine([session], warm=warm)
    engine.start()
    assert warming.wait(30)
    thread = threading.Thread(target=lambda: engine.exclusive(lambda _: seen.append("alone")))
    thread.start()
    assert engine.drain(30) == 0
    time.sleep(0.05)
    warmed.set()
    thread.join(30)
    assert seen == ["warm-up begins", "warm-up ends", "alone"]
    assert engine.close()

    engine = Engine([session], warm=warm)
    seen.clear()

    def exclusively(_: object) -> None:
        alone.set()
        assert go.wait(30)
        seen.append("alone")

    thread = threading.Thread(target=lambda: engine.exclusive(exclusively))
    thread.start()
    assert alone.wait(30)
    engine.start()
    time.sleep(0.05)
    go.set()
    until(lambda: engine.warm, "it did not warm up")
    thread.join(30)
    assert seen == ["alone", "warm-up begins", "warm-up ends"]
    assert engine.close()


def test_a_job_lets_go_of_its_images_when_it_has_ended(engine: Engine, session: Gated) -> None:
    done = job(1)
    engine.submit(done).future.result(30)
    while engine.running:
        time.sleep(0.001)
    assert done._work is None
    hold(engine, session)
    waiting = engine.submit(job(2))
    engine.cancel(waiting, Cancelled("no more"))
    assert waiting._work is None


def test_what_waits_to_run_alone_ends_with_the_engine(session: Gated) -> None:
    """A warm-up may take minutes, and a process waits at its exit for the threads of its pools."""
    warming, warmed = threading.Event(), threading.Event()

    def warm(_: object) -> None:
        warming.set()
        assert warmed.wait(30)

    engine = Engine([session], warm=warm)
    engine.start()
    assert warming.wait(30)
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(engine.exclusive, lambda _: pytest.fail("it ran beside a warm-up"))
        while not engine._paused:
            time.sleep(0.001)
        try:
            assert not engine.close(0)
            with pytest.raises(DrainingError, match="has ended before"):
                alone.result(30)
        finally:
            warmed.set()
    assert engine.close()


def test_a_warm_up_that_fails_is_told_and_nothing_is_taken(session: Gated) -> None:
    def fails(_: object) -> None:
        raise MagicFaceError("made to fail")

    engine = Engine([session], warm=fails)
    engine.start()
    while engine.failure is None:
        time.sleep(0.001)
    assert not engine.warm
    with pytest.raises(DrainingError):
        engine.submit(job())
    engine.close()


def test_several_sessions_work_at_the_same_time(session: Gated, tiny_bundle: Path) -> None:
    with Gated(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as other:
        engine = Engine([session, other], ServeSettings(batch=1))
        for one in (session, other):
            one.free.clear()
        engine.start()
        jobs = [engine.submit(job(n)) for n in range(2)]
        session.wait_for_step()
        other.wait_for_step()
        assert engine.running == 2
        for one in (session, other):
            one.free.set()
        for done in jobs:
            done.future.result(30)
        engine.close()
    assert len(session.calls) == len(other.calls) == 1


def test_concepts_and_sessions_may_come_out_of_what_is_gone_through_once(session: Gated, oracle: Oracle) -> None:
    engine = Engine(one for one in [session])  # type: ignore[arg-type]
    engine.start()
    request = Request(PROMPT, iter([MAN]), Options(seed=3, steps=1))  # type: ignore[arg-type]
    for one in [engine.submit(EngineJob(request)) for _ in range(2)]:
        assert one.bare == 1
        (image,) = one.future.result(30).result.images
        assert png(image) == oracle.pngs([MAN], seed=3, steps=1)[0]
    assert engine.close()


def test_settings_that_cannot_be_used_are_named(session: Gated) -> None:
    for name, value in {"queue": 0, "batch": True, "deadline": 0.0, "batch_wait": -1.0, "drain": float("nan")}.items():
        with pytest.raises(OptionError, match=f"^{name} is "):
            ServeSettings(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="default_steps"):
        ServeSettings(steps=10)
    with pytest.raises(OptionError, match=r"body_bytes is 300, more than the 200 of bodies_bytes"):
        ServeSettings(body_bytes=300, bodies_bytes=200)
    with pytest.raises(OptionError, match="workers"):
        Engine([session], workers=0)
    with pytest.raises(OptionError, match="Sessions"):
        Engine([])
