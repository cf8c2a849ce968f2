"""What serving on Ray is made of, without Ray: places in the queue, the roster, the shared folder, the plan, errors."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopback import Gated, concept

import magicface_rt.errors
from magicface_rt import MagicFaceError, OptionError, Options, Request
from magicface_rt.errors import (
    AnswerError,
    DeadlineError,
    DrainingError,
    QueueFullError,
    ServiceError,
    UnknownConceptError,
)
from magicface_rt.serve import Engine, ServeSettings
from magicface_rt.serve.concepts import FolderConcepts, concept_id
from magicface_rt.serve.erasure import STILL_RUNS
from magicface_rt.serve.job import EngineJob
from magicface_rt.serve.problems import Problem
from magicface_rt.serve.ray import roster as roster_module
from magicface_rt.serve.ray.messages import ErasureReport, ReplicaErasure
from magicface_rt.serve.ray.places import Places
from magicface_rt.serve.ray.plan import RayPlan, parse_replicas, wants_gpu
from magicface_rt.serve.ray.replica import ErasureParts, ReplicaService
from magicface_rt.serve.ray.roster import Roster
from magicface_rt.serve.ray.shared import SharedConcepts

ID = "ab" * 32


# --------------------------------------------------------------------------------------------------------------- errors


FAMILY: list[type[MagicFaceError]] = [getattr(magicface_rt.errors, name) for name in magicface_rt.errors.__all__]


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_every_error_comes_through_as_it_was(kind: type[MagicFaceError]) -> None:
    error = kind("what it is", field="seed", retry_after=3.0) if issubclass(kind, ServiceError) else kind("what it is")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == "what it is"
    assert Problem.of(found) == Problem.of(error)


def test_too_little_memory_on_the_host_has_a_kind_of_its_own() -> None:
    problem = Problem.of(magicface_rt.errors.HostMemoryError("too little"))
    assert (problem.status, problem.kind) == (503, "out-of-memory")


def test_an_answers_status_and_kind_come_through() -> None:
    error = AnswerError("what it is", status=418, kind="teapot", field="spout", retry_after=2.0)
    assert Problem.of(pickle.loads(pickle.dumps(error))) == Problem(418, "teapot", "what it is", "spout", 2.0)


# --------------------------------------------------------------------------------------------------------------- places


class Guests:
    """Requests that want a place, by name; each stays until it is told to go."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.inside: list[str] = []
        self.before: dict[str, int] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        for name in names:
            self._leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.ensure_future(self._stay(name))
            await settle()

    async def go(self, *names: str) -> None:
        for name in names:
            self._leave[name].set()
            await self.tasks[name]
            await settle()

    async def _stay(self, name: str) -> None:
        async with self.places.taken(name[0], lambda waiting: self.before.setdefault(name, waiting)):
            self.inside.append(name)
            await self._leave[name].wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_owners_take_turns_for_the_places_of_the_replicas() -> None:
    async def scenario() -> None:
        guests = Guests(Places(10, at_once=1, ahead=1))
        guests.places.replicas = 1
        await guests.come("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        assert guests.inside == ["a1", "a2"]
        assert guests.before == {"a3": 2, "a4": 3, "b1": 4, "b2": 5, "c1": 6}
        await guests.go("a1", "a2", "a3", "b1", "c1")
        assert guests.inside == ["a1", "a2", "a3", "b1", "c1", "a4", "b2"]
        await guests.go("a4", "b2")
        assert guests.places.admitted == 0

    asyncio.run(scenario())


def test_as_many_wait_as_may_and_one_more_is_refused() -> None:
    async def scenario() -> None:
        guests = Guests(Places(2, at_once=2, ahead=2))
        guests.places.replicas = 1
        await guests.come("a", "b", "c", "d")  # two are made, two wait
        await guests.come("e")
        with pytest.raises(QueueFullError, match="2 requests wait") as full:
            await guests.tasks["e"]
        assert full.value.retry_after is not None
        guests.places.replicas = 2
        await guests.come("f", "g")
        assert len(guests.inside) == 6
        await guests.go("a", "b", "c", "d", "f", "g")

    asyncio.run(scenario())


def test_without_replicas_requests_wait_and_with_the_first_they_go_on() -> None:
    async def scenario() -> None:
        guests = Guests(Places(3, at_once=1, ahead=1))
        await guests.come("a", "b")
        assert guests.inside == []
        guests.places.replicas = 1
        await settle()
        assert guests.inside == ["a", "b"]
        guests.places.closed = True
        await guests.come("c")
        with pytest.raises(DrainingError):
            await guests.tasks["c"]
        await guests.go("a", "b")

    asyncio.run(scenario())


def test_who_gives_up_leaves_no_gap_whenever_that_is() -> None:
    async def scenario() -> None:
        guests = Guests(Places(10, at_once=1, ahead=0))
        guests.places.replicas = 1
        await guests.come("a", "b", "c", "d")
        guests.tasks["b"].cancel()  # while it waits
        await settle()
        guests._leave["a"].set()
        await asyncio.sleep(0)
        guests.tasks["c"].cancel()  # in the moment in which its turn comes, or just before or after
        await settle()
        assert guests.inside[-1] == "d"
        guests.tasks["d"].cancel()  # inside
        await settle()
        assert guests.places.admitted == 0
        await guests.come("e")
        assert guests.inside[-1] == "e"
        await guests.go("e")

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------------------- roster


class Members:
    """Replicas that do their part when they are told to, or are dead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roster_module, "PING_SECONDS", 0.02)
        monkeypatch.setattr(roster_module, "SETTLING_SECONDS", 0.0)
        self.dead: set[str] = set()

        async def gone(handle: str) -> bool:
            return handle in self.dead

        self.roster = Roster(gone)

    async def done(self, name: str, part: ReplicaErasure) -> None:
        """Say that a replica has done its part of the erasure that goes on."""
        key = (await self.roster.watch(name, 0)).parts[ID]
        await self.roster.done(name, ID, key, part)


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> Members:
    return Members(monkeypatch)


def test_an_erasure_is_done_when_every_replica_has_done_its_part(members: Members, tmp_path: Path) -> None:
    roster = members.roster
    (tmp_path / f"{ID}.concept").write_bytes(b"x")
    (tmp_path / f".{ID}.concept.{'0' * 32}.part").write_bytes(b"x")  # what a killed upload left counts

    async def scenario() -> None:
        await roster.register("one", "1")
        await roster.register("two", "2")
        erasing = asyncio.ensure_future(roster.erase(ID, str(tmp_path), 20))
        view = await roster.watch("one", (await roster.watch("one", 0)).version)
        assert view.erasing == view.parts.keys() == {ID}
        await members.done("one", ReplicaErasure(True, 2, None))
        await roster.register("late", "3")  # it starts meanwhile, and is waited for as well
        await members.done("two", ReplicaErasure())
        await asyncio.sleep(0.1)
        assert not erasing.done()
        (tmp_path / f"{ID}.concept").write_bytes(b"y")  # a preparation that was going on has ended
        await members.done("late", ReplicaErasure())
        report = await erasing
        assert report.files == 3
        assert report.parts == {"one": ReplicaErasure(True, 2, None), "two": ReplicaErasure(), "late": ReplicaErasure()}
        assert (report.silent, report.left) == ((), None)
        assert (await roster.watch(None, 0)).erasing == frozenset()

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_the_dead_are_not_waited_for_and_the_silent_are_named(members: Members, tmp_path: Path) -> None:
    roster = members.roster

    async def scenario() -> None:
        for name in ("dead", "silent"):
            await roster.register(name, name)
        members.dead.add("dead")
        report = await roster.erase(ID, str(tmp_path), 0.3)
        assert report.silent == ("silent",)
        assert await roster.replicas() == ["silent"]
        await roster.leave("silent")
        assert (await roster.erase(ID, str(tmp_path), 0.3)).silent == ()

    asyncio.run(scenario())


@pytest.mark.parametrize("lost", [0, 1], ids=["all is said", "a word is lost"])
def test_two_erasures_of_the_same_are_done_one_after_the_other(members: Members, lost: int, tmp_path: Path) -> None:
    """Also for a replica that is told of the second one when it has not yet heard that the first is over."""
    roster, done, said = members.roster, [], []
    (tmp_path / f"{ID}.concept").write_bytes(b"x")

    async def do(id: str) -> ReplicaErasure:
        done.append(id)
        return ReplicaErasure(True, len(done), None)

    async def say(id: str, key: str, part: ReplicaErasure) -> None:
        said.append(key)
        if len(said) > lost:
            await roster.done("one", id, key, part)

    async def scenario() -> None:
        await roster.register("one", "1")
        both = [asyncio.ensure_future(roster.erase(ID, str(tmp_path), 20)) for _ in range(2)]
        parts, seen = ErasureParts(do, say), 0
        while not all(one.done() for one in both):
            view = await roster.watch("one", seen)
            seen = view.version
            parts.begin(view.parts)
            await asyncio.sleep(0.05)  # it is slow to ask again: the second erasure is there by then
        assert sorted(one.result().files for one in both) == [0, 1]
        assert all(one.result().silent == () for one in both)
        assert sorted(one.result().parts["one"].stopped for one in both) == [1, 2], "a part that was done is said again"

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert len(set(said)) == 2


def test_what_was_done_for_an_earlier_erasure_is_not_taken_for_a_later_one(members: Members, tmp_path: Path) -> None:
    async def scenario() -> None:
        roster = members.roster
        await roster.register("one", "1")
        keys = []
        for _ in range(2):
            erasing = asyncio.ensure_future(roster.erase(ID, str(tmp_path), 20))
            await asyncio.sleep(0.05)
            keys.append((await roster.watch("one", 0)).parts[ID])
            await roster.done("one", ID, keys[0], ReplicaErasure())
            await asyncio.sleep(0.1)
            assert erasing.done() == (len(keys) == 1)
        await roster.done("one", ID, keys[1], ReplicaErasure())
        await erasing

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_erasure_waits_no_longer_for_another_of_the_same_than_it_may(members: Members, tmp_path: Path) -> None:
    async def scenario() -> None:
        await members.roster.register("one", "1")
        first = asyncio.ensure_future(members.roster.erase(ID, str(tmp_path), 20))
        await members.roster.watch("one", (await members.roster.watch("one", 0)).version)
        assert not (await members.roster.erase(ID, str(tmp_path), 0.2)).begun
        await members.done("one", ReplicaErasure())
        assert (await first).begun

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_the_front_has_as_many_erasures_going_on_as_it_may(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from magicface_rt.serve.ray.counting import FrontMetrics
    from magicface_rt.serve.ray.front import RayService

    async def scenario() -> None:
        go = asyncio.Event()

        async def erase(*_: object) -> ErasureReport:
            await go.wait()
            return ErasureReport(files=1, begun=False)

        roster = SimpleNamespace(actor=SimpleNamespace(erase=SimpleNamespace(remote=erase)))
        settings, store = ServeSettings(queue=2), SharedConcepts(tmp_path)
        front = RayService(None, roster, settings=settings, workers=1, store=store, metrics=FrontMetrics())
        waiting = [asyncio.ensure_future(front.erase(ID)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="2 erasures"):
            await front.erase(ID)
        go.set()
        for one in waiting:
            with pytest.raises(DeadlineError, match="Erase it again"):
                await one
        await front.close()

    asyncio.run(scenario())


def test_a_replica_waits_no_longer_for_what_runs_than_a_request_may_take(session: Gated, tmp_path: Path) -> None:
    async def scenario() -> None:
        store = SharedConcepts(tmp_path)
        made = session.prepare(concept("man", 1), steps=1)
        id = concept_id([made.references[0].key])
        store.put(id, made)
        del made
        service = ReplicaService(Engine([session], ServeSettings(deadline=0.5)), store)
        await service.start()
        session.reset()
        session.free.clear()
        job = service.engine.submit(EngineJob(Request("a man", options=Options(steps=1))))
        await asyncio.to_thread(session.wait_for_step)
        assert await service.erase_here(id) == ReplicaErasure(True, 0, STILL_RUNS)
        session.free.set()
        await asyncio.wrap_future(job.future)
        assert await service.erase_here(id) == ReplicaErasure(True, 0, None)
        await service.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_file_that_cannot_be_removed_is_said(
    members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{ID}.concept").write_bytes(b"x")

    def fails(*_: object, **__: object) -> None:
        raise PermissionError("made to fail")

    monkeypatch.setattr(Path, "unlink", fails)
    report = asyncio.run(members.roster.erase(ID, str(tmp_path), 1))
    assert report.left is not None
    assert "made to fail" in report.left


def test_a_new_roster_waits_for_replicas_of_the_one_before_it(
    members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "SETTLING_SECONDS", 0.5)

    async def gone(_: object) -> bool:
        return False

    async def scenario() -> None:
        roster = Roster(gone)
        (tmp_path / f"{ID}.concept").write_bytes(b"x")
        erasing = asyncio.ensure_future(roster.erase(ID, str(tmp_path), 20))
        await asyncio.sleep(0.1)
        assert not erasing.done()  # nobody is known, and somebody may hold it
        await roster.register("one", "1")
        view = await roster.watch("one", 0)
        assert view.erasing == view.parts.keys() == {ID}
        await asyncio.sleep(0.6)
        assert not erasing.done()
        await roster.done("one", ID, view.parts[ID], ReplicaErasure(True, 0, None))
        assert (await erasing).parts == {"one": ReplicaErasure(True, 0, None)}

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_replica_that_a_new_roster_does_not_know_is_told_so(members: Members) -> None:
    async def scenario() -> None:
        assert not (await members.roster.watch("one", 0)).known
        await members.roster.register("one", "1")
        assert (await members.roster.watch("one", 0)).known

    asyncio.run(scenario())


def test_the_front_that_began_last_is_the_one_that_stays(members: Members) -> None:
    async def scenario() -> None:
        roster = members.roster
        assert (await roster.watch(None, 0)).front == 0
        await roster.front(2.0)
        seen = await roster.watch(None, 0)
        assert seen.front == 2.0
        await roster.front(1.0)  # it is about to end, and speaks to a roster that has just been made
        assert (await roster.watch(None, 0)) == seen
        await roster.front(3.0)
        assert (await roster.watch(None, seen.version)).front == 3.0

    asyncio.run(scenario())


# -------------------------------------------------------------------------------------------------------- shared folder


@pytest.mark.parametrize("kind", [FolderConcepts, SharedConcepts])
def test_a_concept_that_is_erased_while_it_is_read_is_not_mapped(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[FolderConcepts]
) -> None:
    """An erasure that comes before there is a map finds none to release."""
    made = session.prepare(concept("man", 1), steps=1)
    id = concept_id([made.references[0].key])
    FolderConcepts(tmp_path).put(id, made)
    store, read = kind(tmp_path), kind._read

    def reading(*arguments: Any, **options: Any) -> Any:
        found = read(*arguments, **options)
        if isinstance(store, SharedConcepts):
            store.set_erasing([id])
            store.unmap(id)
        else:
            FolderConcepts(tmp_path).erase(id)
        return found

    monkeypatch.setattr(kind, "_read", staticmethod(reading))
    with pytest.raises(UnknownConceptError):
        store.get(id)
    assert not store._mapped
    if isinstance(store, SharedConcepts):
        (trace,) = store.traces(id)
        assert trace.alive() == 0


def test_a_replica_finds_what_a_request_was_still_reading_when_its_erasure_began(
    session: Gated, tmp_path: Path
) -> None:
    made = session.prepare(concept("man", 1), steps=1)
    id = concept_id([made.references[0].key])
    FolderConcepts(tmp_path).put(id, made)
    store, held = SharedConcepts(tmp_path), []

    async def scenario() -> None:
        service = ReplicaService(Engine([session], ServeSettings()), store)
        await service.start()
        try:
            let_go = service._let_go

            async def reading(*arguments: Any) -> Any:
                held.append(store.get(id))  # what was going on comes to its end
                return await let_go(*arguments)

            service._let_go = reading  # type: ignore[method-assign]
            found = await service.erase_here(id)
            assert found.found
            assert "memory" in (found.place or "")
            held.clear()
            service._let_go = let_go  # type: ignore[method-assign]
            assert (await service.erase_here(id)).place is None
        finally:
            await service.close()

    asyncio.run(scenario())


def test_what_is_being_erased_is_there_for_nobody_and_leaves_a_trace(session: Gated, tmp_path: Path) -> None:
    made = session.prepare(concept("man", 1), steps=1)
    id = concept_id([made.references[0].key])
    FolderConcepts(tmp_path).put(id, made)
    store = SharedConcepts(tmp_path)
    assert store.traces(id) == []
    assert store.peek(id).concept.nbytes == made.nbytes
    assert store.traces(id) == []  # a look at the file is no use of it
    held = store.get(id)
    assert store.get(id) is held
    (trace,) = store.traces(id)
    assert trace.alive()
    store.set_erasing([id])
    for look in (store.get, store.peek):
        with pytest.raises(UnknownConceptError):
            look(id)
    assert not store.has(id)
    store.unmap(id)
    del held
    assert trace.alive() == 0
    store.forget(id)
    assert store.traces(id) == []
    store.set_erasing([])
    assert store.has(id)
    assert store.get(id).concept.nbytes == made.nbytes


def test_all_maps_of_a_concept_are_watched(session: Gated, tmp_path: Path) -> None:
    made = session.prepare(concept("man", 1), steps=1)
    id = concept_id([made.references[0].key])
    store = SharedConcepts(tmp_path)
    first = store.put(id, made)
    del made
    store.unmap(id)
    second = store.get(id)
    assert first is not second
    with ThreadPoolExecutor(4) as pool:
        assert all(one is second for one in pool.map(store.get, [id] * 8))
    store.unmap(id)
    assert sum(trace.alive() > 0 for trace in store.traces(id)) == 2
    del first, second
    assert sum(trace.alive() for trace in store.traces(id)) == 0
    assert store.traces(id)  # which Session may have copied keys is still to be seen


# ----------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_read_from_the_arguments_of_a_config_file() -> None:
    plan = RayPlan.of(
        {
            "bundle": "/bundles/a",
            "concepts": "/concepts",
            "replicas": "1-4",
            "backend": "onnxruntime-cuda",
            "queue": 8,
            "most_concepts": 5,
            "body_bytes": "1MiB",
            "tokens": "/run/tokens",
            "page": True,
            "revision": 7,
        }
    )
    assert (plan.range, plan.gpus, plan.token_file, plan.revision) == ((1, 4), 1.0, "/run/tokens", "7")
    assert (plan.settings.queue, plan.settings.concepts, plan.settings.body_bytes) == (8, 5, 2**20)
    assert plan.concepts == "/concepts"
    assert plan.page
    assert not RayPlan.of({"bundle": "b", "concepts": "c"}).page
    assert plan.session == {"backend": "onnxruntime-cuda"}
    assert RayPlan.of({"bundle": "b", "concepts": "c"}).gpus == 0
    assert RayPlan.of({"bundle": "b", "concepts": "c", "gpus": 0.5}).gpus == 0.5
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"bundle": ""}, "argument 'bundle' is ''"),
        ({"concepts": None}, "argument 'concepts' is None"),
        ({"colour": "red"}, "argument 'colour' is not known. There are backend, "),
        ({"token_file": "t"}, "'token_file' is not known"),
        ({"device": 1}, "'device' is not known"),
        ({"replicas": "four"}, "replicas is 'four'"),
        ({"replicas": "4-1"}, "replicas is 4-1"),
        ({"replicas": 0}, "replicas is 0-0"),
        ({"workers": True}, "workers is True"),
        ({"gpus": -1}, "gpus is -1"),
        ({"page": "yes"}, "page is 'yes', expected true or false"),
        ({"queue": 0}, "queue is 0"),
        ({"backend": "abacus"}, "backend 'abacus' is not known"),
        ({"memory": "some"}, "memory is 'some'"),
        ({"storage": "4-bit"}, "storage is '4-bit'"),
        ({"body_bytes": "much"}, "body_bytes is 'much'"),
        ({"tokens": ["a"]}, "'tokens' is a list"),
    ],
)
def test_what_is_wrong_in_it_is_named(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(MagicFaceError, match="^.*" + reason.replace("[", r"\[")):
        RayPlan.of({"bundle": "b", "concepts": "c", **given})


def test_numbers_of_replicas_and_what_needs_a_gpu() -> None:
    assert [parse_replicas(text) for text in (2, "2", "1-4")] == [(2, 2), (2, 2), (1, 4)]
    for text in (True, "-1", "1-", "1 4", None, "٣", "1-" + "9" * 5000):
        with pytest.raises(OptionError):
            parse_replicas(text)
    assert [wants_gpu(name, True) for name in ("auto", "onnxruntime-cpu", "tensorrt")] == [True, False, True]
    assert [wants_gpu(name, False) for name in ("auto", "onnxruntime", "onnxruntime-cuda")] == [False, False, True]
