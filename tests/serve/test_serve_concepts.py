"""Kept concepts over HTTP: prepared once, shared by processes through a folder, and erased so that nothing is left."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import kill, killed
from loopback import PROMPT, Gated, Oracle, Running, concept, disc, picture, png, running, until
from writes import Writes

from magicface_rt import Concept, KeptConcept, MagicFaceError, Reference
from magicface_rt.errors import (
    AnswerError,
    DeadlineError,
    ErasedError,
    EraseError,
    QueueFullError,
    StoreFullError,
    UnknownConceptError,
    UnreachableError,
)
from magicface_rt.files import atomic_files
from magicface_rt.serve import AsyncClient, FolderConcepts, KeptId, Made, MemoryConcepts, ServeSettings, local
from magicface_rt.serve.concepts import ConceptStore, StoredConcept, concept_id
from magicface_rt.serve.erasure import Trace
from magicface_rt.serve.server import local_service
from magicface_rt.session import HOLD_REFERENCES

MAN, HAT = concept("man", 1), concept("hat", 2)
STEPS = 2
ID = "0" * 64


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ConceptStore:
    return MemoryConcepts() if request.param == "memory" else FolderConcepts(tmp_path / "concepts")


@pytest.fixture
def server(session: Gated, store: ConceptStore) -> Iterator[Running]:
    with running(session, store=store, settings=ServeSettings(default_steps=STEPS, batch_wait=0)) as started:
        yield started


def arrays_of(concept: KeptConcept) -> list[np.ndarray[Any, Any]]:
    return [a for r in concept.references for stored in r.tensors.values() for a in stored.arrays.values()]


def test_uploads_of_the_same_that_race_are_prepared_once(server: Running, session: Gated) -> None:
    session.free.clear()

    def put() -> KeptId:
        with server.client() as client:
            return client.put_concept(MAN)

    with ThreadPoolExecutor(4) as pool:
        racing = [pool.submit(put) for _ in range(4)]
        until(lambda: session.prepared == 1, "nothing was prepared")
        late = pool.submit(put)
        session.free.set()
        found = [one.result(30) for one in (*racing, late)]
    assert session.prepared == 1
    assert len({one.id for one in found}) == 1
    assert sorted(one.new for one in found) == [False] * 4 + [True]
    with server.client() as client:
        assert not client.put_concept(MAN).new
        assert client.put_concept(MAN, steps=3).new
        assert client.put_concept(MAN, storage="8-bit").new
        assert client.put_concept(Concept("man", Reference(picture(1), mask=disc((0, 0, 50, 50))))).new
        assert len(client.concepts()) == 4
    assert session.prepared == 4


def test_an_upload_that_fails_leaves_its_place_to_the_next(server: Running, session: Gated) -> None:
    session.free.clear()
    with ThreadPoolExecutor(2) as pool, server.client() as client:
        first = pool.submit(client.put_concept, MAN)
        until(lambda: session.prepared == 1, "nothing was prepared")
        job = next(iter(server.service.engine._running))
        second = pool.submit(client.put_concept, MAN)
        server.service.engine.cancel(job, MagicFaceError("made to fail"))
        session.free.set()
        with pytest.raises(MagicFaceError):
            first.result(30)
        assert second.result(30).new


def test_a_concept_may_have_several_references(server: Running, oracle: Oracle) -> None:
    both = Concept("man", *MAN.references, *HAT.references)
    with server.client() as client:
        kept = client.put_concept(both)
        assert [one["prompt"] for one in kept.info["references"]] == ["a man", "a hat"]
        assert list(client.generate(PROMPT, [kept], seed=1).pngs) == oracle.pngs([both], seed=1, steps=STEPS)


def test_what_was_erased_is_nowhere(server: Running, session: Gated, store: ConceptStore) -> None:
    with server.client() as client:
        kept, other = client.put_concept(MAN), client.put_concept(HAT)
        client.generate(PROMPT, [kept], seed=1)
        assert client.concept(kept.id) == KeptId.of(kept.info)
        told = client.erase(kept)
        assert told == {"id": kept.id, "erased": True, "files": isinstance(store, FolderConcepts), "stopped": 0}
        for again in (lambda: client.erase(kept), lambda: client.concept(kept.id)):
            with pytest.raises(UnknownConceptError, match="never put, or it was erased"):
                again()
        with pytest.raises(UnknownConceptError) as refused:
            client.generate(PROMPT, [HAT, kept], seed=1)
        assert refused.value.field == "concepts[1].id"
        assert [one.id for one in client.concepts()] == [other.id]
        client.generate(PROMPT, [other], seed=1)
    if isinstance(store, FolderConcepts):
        assert [path.name for path in store.folder.iterdir()] == [f"{other.id}.concept"]
        assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_what_a_session_keeps_by_itself_and_its_bindings_are_cleared_too(tiny_bundle: Path) -> None:
    held = {"reference_kv", "vae_encoder", "denoise_step"}
    with (
        Gated(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1, keep="1GiB") as session,
        running(session, settings=ServeSettings(default_steps=STEPS)) as server,
        server.client() as client,
    ):
        kept = client.put_concept(MAN)
        client.generate(PROMPT, [kept], seed=1)
        assert session._keeper.store.content_keys
        (place,) = session._worker_contexts._free
        assert held <= place._bindings.keys()
        client.erase(kept)
        assert not session._keeper.store.content_keys
        assert not held & place._bindings.keys()


@pytest.mark.parametrize("held", [True, False], ids=["in memory", "no longer in memory"])
def test_keys_of_a_file_that_was_damaged_are_cleared_too(tiny_bundle: Path, tmp_path: Path, held: bool) -> None:
    """A Session may have drawn with it, also before the service forgot that it did."""
    with (
        Gated(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as session,
        running(session, store=FolderConcepts(tmp_path), settings=ServeSettings(default_steps=STEPS)) as server,
        server.client() as client,
    ):
        kept = client.put_concept(MAN)
        client.generate(PROMPT, [kept], seed=1)
        (place,) = session._worker_contexts._free
        assert "denoise_step" in place._bindings
        if not held:
            server.service.store.close()
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-100])
        assert client.erase(kept)["erased"]
        assert "denoise_step" not in place._bindings


def test_keys_of_a_file_that_was_replaced_are_looked_for_as_well(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory is not what the file holds as it is erased."""
    monkeypatch.setattr("magicface_rt.serve.local.ERASE_ATTEMPTS", 2)
    store = FolderConcepts(tmp_path)
    with running(session, store=store, settings=ServeSettings(default_steps=1)) as server, server.client() as client:
        kept = client.put_concept(MAN)
        held = arrays_of(store.get(kept.id).concept)
        (path,) = tmp_path.iterdir()
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").rename(path)
        with pytest.raises(EraseError, match=r"left in memory \(\d+ arrays\)"):
            client.erase(kept)
        del held
        assert client.erase(kept)["erased"]


def test_erasing_says_so_where_something_holds_on_to_it(
    server: Running, store: ConceptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("magicface_rt.serve.local.ERASE_ATTEMPTS", 2)
    with server.client() as client:
        kept = client.put_concept(MAN)
        held = arrays_of(store.get(kept.id).concept)
        with pytest.raises(MagicFaceError, match=r"left in memory \(\d+ arrays\)"):
            client.erase(kept)
        del held
        gc.collect()
        with pytest.raises(UnknownConceptError):
            client.concept(kept.id)
        assert client.erase(kept)["erased"]
        with pytest.raises(UnknownConceptError):
            client.erase(kept)


def test_requests_that_use_an_erased_concept_end_and_others_of_their_batch_go_on(
    server: Running, session: Gated, oracle: Oracle
) -> None:
    with server.client() as client, ThreadPoolExecutor(4) as pool:
        man, hat = client.put_concept(MAN), client.put_concept(HAT)
        session.reset()
        session.free.clear()

        def generate(concepts: list[Any], seed: int) -> Made:
            with server.client() as own:
                return own.generate(PROMPT, concepts, seed=seed)

        with server.patient(1.0):
            using, other = pool.submit(generate, [man, hat], 1), pool.submit(generate, [hat], 2)
            session.wait_for_step()
        waiting = pool.submit(generate, [man], 3)
        until(lambda: server.service.engine.waiting == 1, "the third request was not queued")
        erasing: Future[dict[str, Any]] = pool.submit(client.erase, man)
        for one in (using, waiting):
            with pytest.raises(ErasedError, match="erased while this request used it"):
                one.result(30)
        assert not erasing.done()  # the batch still runs, for the other request
        session.free.set()
        assert erasing.result(30)["stopped"] == 2
        assert list(other.result(30).pngs) == oracle.pngs([HAT], seed=2, steps=STEPS)
        with pytest.raises(UnknownConceptError):
            client.generate(PROMPT, [man])
        assert client.put_concept(MAN).new
    assert len(session.calls) == 1


def test_a_second_process_serves_what_the_first_prepared(
    session: Gated, tiny_bundle: Path, oracle: Oracle, tmp_path: Path
) -> None:
    settings = ServeSettings(default_steps=STEPS)
    with (
        Gated(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1) as beside,
        running(session, store=FolderConcepts(tmp_path), settings=settings) as first,
        running(beside, store=FolderConcepts(tmp_path), settings=settings) as second,
        first.client() as one,
        second.client() as other,
    ):
        kept = one.put_concept(MAN)
        assert not other.put_concept(MAN).new
        assert beside.prepared == 0
        made = other.generate(PROMPT, [kept], seed=4)
        assert list(made.pngs) == oracle.pngs([MAN], seed=4, steps=STEPS)
        assert made.timings["reference_pass"] == 0
        one.erase(kept)
        with pytest.raises(UnknownConceptError):
            other.generate(PROMPT, [kept], seed=4)
        assert other.concepts() == []


@pytest.mark.parametrize(
    "runs", ["nothing", "another request", "a request that uses it", "a request that uses it and waits"]
)
def test_what_another_process_erased_is_let_go_of_though_nobody_asks_for_it(
    session: Gated, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: str
) -> None:
    """At once, but for what a request has that runs or waits there: it gets its picture, and that goes after it."""
    monkeypatch.setattr("magicface_rt.serve.local.LOOK_SECONDS", 0.1)
    settings = ServeSettings(default_steps=STEPS)
    here, there = FolderConcepts(tmp_path), FolderConcepts(tmp_path)
    waits = runs.endswith("waits")
    with (
        Gated(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False, threads=1, keep="1GiB") as beside,
        running(session, store=here, settings=settings) as first,
        running(beside, store=there, settings=settings) as second,
        first.client() as one,
        second.client() as other,
        ThreadPoolExecutor(2) as pool,
    ):
        kept = one.put_concept(MAN)
        other.generate(PROMPT, [kept], seed=4)
        other.generate(PROMPT, [MAN], seed=4)  # the Session keeps what it has prepared by itself
        trace = Trace(there.get(kept.id).concept)
        assert trace.alive()
        assert beside.kept_bytes
        beside.reset()
        if runs != "nothing":
            beside.free.clear()
            request = pool.submit(other.generate, PROMPT, [kept] if runs == "a request that uses it" else [], seed=5)
            beside.wait_for_step()
        if waits:
            waiting = pool.submit(other.generate, PROMPT, [kept], seed=6)
            until(lambda: second.service.engine.waiting == 1, "it waits in the queue")
        one.erase(kept)
        until(lambda: not there._mapped and not beside.kept_bytes, "the other process keeps it for later requests")
        if runs.startswith("a request that uses it"):
            assert trace.alive()
        else:
            until(lambda: not trace.alive(), "the other process holds it")
        if runs != "nothing":
            assert not request.done()
            beside.free.set()
            assert len(request.result(30).pngs) == 1
        if waits:
            assert len(waiting.result(30).pngs) == 1
        until(lambda: not trace.alive() and not beside.kept_bytes, "the other process holds it")
        if runs.startswith("a request that uses it"):
            until(
                lambda: not any(set(HOLD_REFERENCES) & one._bindings.keys() for one in beside._worker_contexts._free),
                "the buffers of the graphs hold it",
            )


@pytest.mark.parametrize("look", ["entries", "used", "get"])
def test_a_store_finds_what_another_has_erased_whatever_it_is_asked(session: Gated, tmp_path: Path, look: str) -> None:
    one, other = FolderConcepts(tmp_path), FolderConcepts(tmp_path)
    kept, stays = put_both(session, one)
    for id in (kept, stays):
        other.get(id)
    one.erase(kept)
    assert other.take_vanished() == frozenset()
    if look == "get":
        with pytest.raises(UnknownConceptError):
            other.get(kept)
    else:
        getattr(other, look)()
    assert list(other._mapped) == [stays]
    assert other.take_vanished() == {kept}
    assert other.take_vanished() == frozenset()
    assert one.take_vanished() == frozenset(), "it has erased it itself"


def put_both(session: Gated, store: ConceptStore) -> list[str]:
    """The ids of two concepts, put."""
    prepared = [session.prepare(one, steps=1) for one in (MAN, HAT)]
    ids = [concept_id([reference.key for reference in one.references]) for one in prepared]
    for id, one in zip(ids, prepared, strict=True):
        store.put(id, one)
    return ids


@pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")
def test_what_a_killed_upload_left_goes_with_the_next_start(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody was told its id, so nobody could erase it. What else is in the folder stays."""
    man, hat = (session.prepare(one, steps=1) for one in (MAN, HAT))
    store = FolderConcepts(tmp_path)
    store.put("b" * 64, hat)
    with monkeypatch.context() as patched:
        patched.setattr(atomic_files, "replace_into_place", kill)
        killed(lambda: store.put("a" * 64, man))
    (left,) = tmp_path.glob(f".{'a' * 64}.concept.*.part")
    assert left.stat().st_size > man.nbytes
    foreign = tmp_path / f".{'a' * 64}.zip.{'0' * 32}.part"
    foreign.write_bytes(b"not ours")
    with atomic_files.temporary_sibling(tmp_path / f"{'c' * 64}.concept") as written:
        FolderConcepts(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([foreign, written, tmp_path / f"{'b' * 64}.concept"])


def test_a_file_under_the_name_of_another_is_not_served(session: Gated, tmp_path: Path) -> None:
    man, hat = put_both(session, FolderConcepts(tmp_path))
    (tmp_path / f"{man}.concept").replace(tmp_path / "aside")
    (tmp_path / f"{hat}.concept").replace(tmp_path / f"{man}.concept")
    (tmp_path / "aside").replace(tmp_path / f"{hat}.concept")
    store = FolderConcepts(tmp_path)
    for id in (man, hat):
        with pytest.raises(UnknownConceptError, match="Put the concept again"):
            store.get(id)
    assert store.entries() == []


@pytest.mark.parametrize("what", ["key", "prompt", "word", "name"])
def test_a_file_that_no_service_wrote_is_not_served_and_in_nobodys_way(
    session: Gated, tmp_path: Path, what: str
) -> None:
    """Its hashes are sound, but it has text that no answer can hold, or a key that names no content."""
    settings = ServeSettings(default_steps=1)
    with running(session, store=FolderConcepts(tmp_path), settings=settings) as server, server.client() as client:
        kept = client.put_concept(MAN)
        path = tmp_path / f"{kept.id}.concept"
        concept = KeptConcept.load(path)
        if what in ("key", "prompt"):
            spoiled = [replace(concept.references[0], **{what: "\udc80"}, file=None)]
            other = KeptConcept(concept.word, spoiled, concept.origin)
        else:
            other = concept.renamed(**{what: "\udc80"})
        other.save(path, overwrite=True)
        assert client.concepts() == []
        with pytest.raises(UnknownConceptError):
            client.concept(kept.id)
        assert client.put_concept(MAN).new
        assert [one.id for one in client.concepts()] == [kept.id]
        other.save(path, overwrite=True)
        client.erase(kept)
    assert list(tmp_path.iterdir()) == []


class Held(FolderConcepts):
    """Stores nothing before it may. `putting`: how many want to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.putting, self.go = 0, threading.Event()

    def put(self, id: str, concept: KeptConcept) -> StoredConcept:
        self.putting += 1
        assert self.go.wait(120)
        return super().put(id, concept)


async def give_up(server: Running, store: Held) -> None:
    """An upload, and its client goes as it is stored."""
    async with AsyncClient(server.url, retries=0, trust_env=False) as client:
        putting = asyncio.ensure_future(client.put_concept(MAN))
        while not store.putting:
            await asyncio.sleep(0.01)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting


def id_of(session: Gated, one: Concept, steps: int) -> str:
    return concept_id([reference.key for reference in session.prepare(one, steps=steps).references])


def test_an_upload_that_is_given_up_as_it_is_stored_is_stored_before_anyone_else_has_its_turn(
    session: Gated, tmp_path: Path
) -> None:
    store, settings = Held(tmp_path), ServeSettings(default_steps=1)
    with running(session, store=store, settings=settings) as server, ThreadPoolExecutor(1) as pool:
        asyncio.run(give_up(server, store))
        with server.client() as client:
            erasing = pool.submit(client.erase, id_of(session, MAN, 1))
            time.sleep(0.3)
            assert not erasing.done(), "an erasure has found nothing of what was about to appear"
            store.go.set()
            assert erasing.result(30)["erased"]
            assert client.concepts() == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named_and_replaced_by_putting_it_again(session: Gated, tmp_path: Path) -> None:
    settings = ServeSettings(default_steps=STEPS)
    with running(session, store=FolderConcepts(tmp_path), settings=settings) as server, server.client() as client:
        kept = client.put_concept(MAN)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UnknownConceptError, match="is damaged"):
            client.generate(PROMPT, [kept])
        assert client.concepts() == []
        assert client.put_concept(MAN).new
        client.generate(PROMPT, [kept])
        path.write_bytes(path.read_bytes()[:-100])
        client.erase(kept)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_cannot_be_read_is_not_what_is_not_there(
    session: Gated, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, settings = FolderConcepts(tmp_path / "concepts"), ServeSettings(default_steps=1)
    with running(session, store=store, settings=settings) as server, server.client() as client:
        kept, http = client.put_concept(MAN), client._http
        spoiled = store.folder / f"{kept.id}.concept" if what == "file" else store.folder
        spoiled.rename(tmp_path / "aside")
        spoiled.symlink_to(spoiled)  # leads nowhere, which the system says of it, whoever asks
        for ask in (
            lambda: client.put_concept(MAN),
            lambda: client.put_concept(HAT),
            lambda: client.erase(kept),
            lambda: client.concept(kept.id),
            lambda: client.concepts(),
            lambda: client.generate(PROMPT, [kept]),
        ):
            with pytest.raises(AnswerError, match="cannot be read") as refused:
                ask()
            assert (refused.value.status, refused.value.kind) == (503, "store-unusable")
            assert str(tmp_path) not in str(refused.value)
        assert "magicface_concepts NaN" in http.get("/metrics").text
        assert session.prepared == 1
        assert "Traceback" not in caplog.text
        spoiled.unlink()
        (tmp_path / "aside").rename(spoiled)
        assert client.generate(PROMPT, [kept])
        assert not client.put_concept(MAN).new
        assert client.erase(kept)["files"] == 1
        assert "magicface_concepts 0.0" in http.get("/metrics").text


def test_a_file_that_cannot_be_removed_is_told_without_where_it_is(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = FolderConcepts(tmp_path / "concepts"), ServeSettings(default_steps=1)
    with running(session, store=store, settings=settings) as server, server.client() as client:
        kept = client.put_concept(MAN)

        def refuses(path: Path, missing_ok: bool = False) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "unlink", refuses)
        with pytest.raises(EraseError, match="cannot be removed: Permission denied") as refused:
            client.erase(kept)
        monkeypatch.undo()
        assert str(tmp_path) not in str(refused.value)
        assert client.erase(kept)["files"] == 1


def test_a_folder_that_goes_is_made_again_for_its_owner_only(session: Gated, tmp_path: Path) -> None:
    store, settings = FolderConcepts(tmp_path / "some" / "concepts"), ServeSettings(default_steps=1)
    with running(session, store=store, settings=settings) as server, server.client() as client:
        client.put_concept(HAT)
        shutil.rmtree(tmp_path / "some")
        assert client.concepts() == []
        kept = client.put_concept(MAN)
        assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
        assert [one.id for one in client.concepts()] == [kept.id]


def test_what_another_process_is_writing_is_neither_taken_from_it_nor_called_erased(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = FolderConcepts(tmp_path), ServeSettings(default_steps=1)
    with running(session, store=store, settings=settings) as server, server.client() as client:
        kept = client.put_concept(MAN)
        path = tmp_path / f"{kept.id}.concept"
        with atomic_files.temporary_sibling(path) as part:
            part.write_bytes(path.read_bytes())
            monkeypatch.setattr("magicface_rt.serve.local.ERASE_ATTEMPTS", 2)
            with pytest.raises(AnswerError, match="Erase it again") as refused:
                client.erase(kept)
            assert (refused.value.status, refused.value.kind) == (409, "concept-put-again")
            assert [one.name for one in tmp_path.iterdir()] == [part.name]
            with ThreadPoolExecutor(1) as pool:
                monkeypatch.setattr("magicface_rt.serve.local.ERASE_ATTEMPTS", 1000)  # the machine may be busy
                erasing = pool.submit(client.erase, kept)
                time.sleep(0.3)
                atomic_files.replace_into_place(part, path)
                assert erasing.result(60)["files"] == 1
        assert list(tmp_path.iterdir()) == []
        path.with_name(f".{path.name}.{'0' * 32}.part").write_bytes(b"of a process that was killed")
        assert client.erase(kept)["files"] == 1
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before it is there", "after"])
def test_who_puts_what_another_process_erases_is_told_so(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    put = atomic_files.replace_into_place

    def erased(new: Path, target: Path, **how: Any) -> None:
        if when == "after":
            put(new, target, **how)
        (new if new.exists() else target).unlink()
        if when != "after":
            put(new, target, **how)

    store, settings = FolderConcepts(tmp_path), ServeSettings(default_steps=1)
    with running(session, store=store, settings=settings) as server, server.client() as client:
        monkeypatch.setattr(atomic_files, "replace_into_place", erased)
        with pytest.raises(ErasedError, match="erased by another process as it was put"):
            client.put_concept(MAN)
        monkeypatch.undo()
        assert client.put_concept(MAN).new


def test_a_link_in_the_folder_leads_no_concept_out_of_it(session: Gated, tmp_path: Path) -> None:
    folder, outside = tmp_path / "kept", tmp_path / "outside"
    outside.write_text("somebody's")
    store, kept = FolderConcepts(folder), session.prepare(MAN, steps=STEPS)
    id = concept_id([one.key for one in kept.references])
    (folder / f"{id}.concept").symlink_to(outside)
    store.put(id, kept)
    assert outside.read_text() == "somebody's"
    assert not (folder / f"{id}.concept").is_symlink()
    assert store.get(id).concept.references[0].key == kept.references[0].key


def test_no_upload_is_written_and_no_image_is_kept(server: Running, store: ConceptStore) -> None:
    with server.client() as client:
        client.erase(client.put_concept(MAN))  # whatever is loaded late is loaded now
        client.generate(PROMPT, [HAT], seed=1)
        writes = Writes()
        with writes.noted() as put:
            kept = client.put_concept(MAN)
        with writes.noted() as made:
            client.generate(PROMPT, [HAT, kept], seed=1)
        found = store.get(kept.id).concept
        assert found.source is None
        assert not found.pictures
        assert made == [], "a picture writes nothing"
        if isinstance(store, FolderConcepts):
            assert {path.parent for path in put} == {store.folder}, "keys are written, in the folder of concepts"
            assert all(kept.id in path.name for path in put)
            assert not KeptConcept.load(store.folder / f"{kept.id}.concept").pictures
            assert not any(data in (store.folder / f"{kept.id}.concept").read_bytes() for data in (png(picture(1)),))
        else:
            assert put == []


def test_limits_of_number_and_bytes_refuse_before_anything_is_prepared(session: Gated) -> None:
    settings = ServeSettings(default_steps=STEPS)
    with running(session, store=MemoryConcepts(most=1), settings=settings) as server, server.client() as client:
        kept = client.put_concept(MAN)
        with pytest.raises(StoreFullError, match="1 concepts are kept"):
            client.put_concept(HAT)
        assert session.prepared == 1
        client.erase(kept)
        client.put_concept(HAT)
    exactly = MemoryConcepts(most_bytes=kept.nbytes)
    with running(session, store=exactly, settings=settings) as server, server.client() as client:
        client.erase(client.put_concept(MAN))
    session.prepared = 0
    for store in (MemoryConcepts(most_bytes=kept.nbytes - 1), MemoryConcepts(most=0)):
        full = running(session, store=store, settings=settings)
        with full as server, server.client() as client, pytest.raises(StoreFullError):
            client.put_concept(MAN)
    assert session.prepared == 0


def test_uploads_that_race_for_the_last_place_are_not_all_prepared(session: Gated) -> None:
    """What is being prepared counts: else all would be, and all but one for nothing."""
    with running(session, settings=ServeSettings(concepts=1)) as server, server.client() as client:
        session.free.clear()
        with ThreadPoolExecutor(5) as pool:
            puts = [pool.submit(client.put_concept, concept("man", seed)) for seed in range(5)]
            until(lambda: sum(put.done() for put in puts) == 4, "those that have no room were not told so")
            session.free.set()
        outcomes = [put.exception() for put in puts]
        assert sorted(type(error).__name__ for error in outcomes) == ["NoneType", *["StoreFullError"] * 4]
        assert session.prepared == 1
        assert len(client.concepts()) == 1
        with pytest.raises(StoreFullError):
            client.put_concept(concept("man", 9))
        client.erase(client.concepts()[0])
        client.put_concept(concept("man", 9))


def test_room_that_was_held_is_given_back_where_nothing_came_of_it(session: Gated) -> None:
    with running(session, settings=ServeSettings(concepts=1)) as server, server.client() as client:
        session.free.clear()
        with ThreadPoolExecutor(1) as pool:
            put = pool.submit(server.client(timeout=1.0).put_concept, concept("man", 2))  # and goes
            assert isinstance(put.exception(30), UnreachableError)
        session.free.set()
        until(lambda: not server.service.store._reserved, "the room was not given back")  # type: ignore[attr-defined]
        client.put_concept(concept("man", 3))


class Asked(MemoryConcepts):
    """How much it keeps is known only when it may be."""

    def __init__(self, most: int) -> None:
        super().__init__(most=most)
        self.asked, self.go = threading.Event(), threading.Event()

    def used(self) -> tuple[int, int]:
        self.asked.set()
        assert self.go.wait(120)
        return super().used()


def test_who_goes_as_room_is_looked_for_leaves_it_to_the_next(session: Gated) -> None:
    """A thread holds it, and cannot be told that nobody wants it any more."""

    async def put(server: Running, store: Asked) -> None:
        async with AsyncClient(server.url, retries=0, trust_env=False) as client:
            putting = asyncio.ensure_future(client.put_concept(MAN))
            await asyncio.to_thread(store.asked.wait, 30)
            (over,) = server.service._making.values()
            putting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await putting
        until(lambda: not server.server.server_state.connections, "the connection is there still")
        await asyncio.sleep(0.3)
        assert not over.is_set(), "another upload has its turn, and the thread has not ended"
        store.go.set()
        until(over.is_set, "nobody else has its turn")

    store = Asked(1)
    with running(session, store=store, settings=ServeSettings(default_steps=1)) as server:
        asyncio.run(put(server, store))
        with server.client() as client:
            assert client.put_concept(HAT).new


def test_who_gives_room_back_does_not_wait_for_a_disk_that_others_wait_for() -> None:
    store = Asked(2)
    store.go.set()
    release = store.reserve("a", 1)
    store.go.clear()
    store.asked.clear()
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(store.reserve, "b", 1)
        assert store.asked.wait(30)
        pool.submit(release).result(30)
        store.go.set()
        other.result(30)()
    assert store._reserved == {}


def test_an_erasure_while_a_service_warms_up_waits_for_that(session: Gated, tmp_path: Path) -> None:
    """A concept may be in the folder before a service begins."""
    prepared, store = session.prepare(MAN, steps=1), FolderConcepts(tmp_path)
    id = concept_id([reference.key for reference in prepared.references])
    store.put(id, prepared)
    del prepared
    session.reset()

    async def erase_early() -> None:
        service = local_service([session], store=store)
        session.free.clear()
        await service.start()
        try:
            await asyncio.to_thread(session.wait_for_step)
            erasing = asyncio.ensure_future(service.erase(id))
            await asyncio.wait({erasing}, timeout=1.0)
            assert not erasing.done()
            assert not list(tmp_path.iterdir())
            session.free.set()
            assert (await asyncio.wait_for(erasing, 60)).erased
            while service.not_ready() is not None:
                await asyncio.sleep(0.01)
        finally:
            session.free.set()
            await service.close()

    asyncio.run(erase_early())


def test_many_erasures_beside_a_batch_hold_up_nobody_else(session: Gated) -> None:
    """Each waits until the batch has ended, and must not take the threads with which others are read and answered."""
    many = (os.cpu_count() or 1) + 6  # more than asyncio has threads of its own
    with running(session, settings=ServeSettings(queue=many)) as server, server.client() as client:
        kept = [client.put_concept(concept("man", seed)) for seed in range(many)]
        session.free.clear()
        with ThreadPoolExecutor(many + 1) as pool:
            held = pool.submit(client.generate, "a man", steps=2)
            session.wait_for_step()
            erasures = [pool.submit(client.erase, one) for one in kept]
            until(lambda: not client.concepts(), "the erasures did not begin")
            assert not any(erasure.done() for erasure in erasures)
            with pytest.raises(DeadlineError):
                client.generate("a man", steps=1, deadline=0.2)
            assert client.bundle()["limits"]["queue"] > 0
            with pytest.raises(QueueFullError, match="erasures are waited for"):
                client.erase(ID)
            session.free.set()
            assert all(erasure.result(30)["id"] for erasure in erasures)
            assert len(held.result(30).images) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_an_erasure_whose_deadline_passed_is_done_later_and_may_be_done_again(
    session: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Also of a file that nobody here can read any more."""
    forgotten: list[int] = []
    real = session.forget

    def forget(*given: Any) -> bool:
        forgotten.append(1)
        return real(*given)

    monkeypatch.setattr(session, "forget", forget)
    monkeypatch.setattr(local, "LOOK_SECONDS", 0.05)
    store = FolderConcepts(tmp_path)
    with running(session, store=store, settings=ServeSettings(default_steps=1)) as server, server.client() as client:
        kept = client.put_concept(MAN)
        if damaged:
            store.close()
            (path,) = tmp_path.iterdir()
            path.write_bytes(path.read_bytes()[:-100])
        session.reset()
        session.free.clear()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(client.generate, "a man", steps=1)
            session.wait_for_step()
            with server.hasty(0.3), pytest.raises(EraseError, match="left in what still ran when the deadline passed"):
                client.erase(kept)
            until(lambda: forgotten, "Sessions hold what they held")
            session.free.set()
            assert other.result(30).batch == 1
        assert client.erase(kept)["erased"]
        with pytest.raises(UnknownConceptError):
            client.erase(kept)


def test_an_erasure_that_waits_for_what_runs_has_a_deadline(session: Gated) -> None:
    """Then it says what is left, and may be done again."""
    with running(session) as server, server.client() as client:
        kept = client.put_concept(MAN, steps=1)
        session.reset()
        session.free.clear()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(client.generate, "a man", steps=1)
            session.wait_for_step()
            with server.hasty(0.3), pytest.raises(EraseError, match="left in what still ran when the deadline passed"):
                client.erase(kept)
            until(lambda: not server.service.engine._paused, "other workers are kept from their work")
            with pytest.raises(UnknownConceptError):
                client.concept(kept.id)
            session.free.set()
            assert other.result(30).batch == 1
        assert client.erase(kept)["erased"]
        with pytest.raises(UnknownConceptError):
            client.erase(kept)
        client.generate("a man", steps=1)


def test_who_writes_holds_up_nobody_who_reads_draws_or_erases(session: Gated, tmp_path: Path) -> None:
    """On a disk on which nothing gets written; an erasure of what is being written has its deadline."""
    store, uploads = Held(tmp_path), [concept("man", seed) for seed in (3, 4, 5)]
    with (
        running(session, store=store, settings=ServeSettings(default_steps=1)) as server,
        server.client(timeout=120.0) as client,
        ThreadPoolExecutor(len(uploads)) as pool,
    ):
        store.go.set()
        kept, other = client.put_concept(MAN), client.put_concept(HAT)
        id = id_of(session, uploads[0], 1)
        store.go.clear()
        store.putting = 0
        puts = [pool.submit(client.put_concept, one) for one in uploads]
        until(lambda: store.putting >= 2, "nothing is stored")
        until(lambda: not server.service.engine.running, "all are prepared")
        assert {one.id for one in client.concepts()} == {kept.id, other.id}
        assert client.concept(kept.id).id == kept.id
        assert client.generate(PROMPT, [kept], seed=1).batch == 1
        assert client.erase(other)["erased"]
        with server.hasty(0.3), pytest.raises(DeadlineError, match="Erase it again"):
            client.erase(id)
        assert not any(put.done() for put in puts)
        store.go.set()
        assert all(put.result(30).new for put in puts)
        assert client.erase(id)["erased"]


def test_an_upload_that_waits_has_a_place_in_the_queue_and_a_deadline(session: Gated) -> None:
    settings = ServeSettings(queue=1, deadline=3.0)
    with running(session, settings=settings) as server, server.client() as client:
        session.free.clear()
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(client.put_concept, concept("man", 1))
            until(lambda: session.prepared == 1, "nothing was prepared")
            second = pool.submit(client.put_concept, concept("man", 1))  # waits for the first, which makes the same
            until(lambda: server.service._arriving == 1, "it did not arrive")
            with pytest.raises(QueueFullError):
                client.put_concept(concept("man", 2))
            with pytest.raises(DeadlineError):
                second.result(30)
            assert isinstance(first.exception(30), DeadlineError)
            session.free.set()
        until(lambda: server.service.engine.running == 0, "the engine did not become free")
        assert server.service._arriving == 0


def test_a_concept_is_used_as_the_one_that_was_put(session: Gated, oracle: Oracle) -> None:
    """With its weight, tokens and name, as `Session.prepare` keeps them."""
    one = concept("hat", 3, weight=1.25, token_index=(5,), name="red hat")
    with running(session) as server, server.client() as client:
        kept = client.put_concept(one, steps=2)
        made = client.generate("a man with a hat", [kept], seed=4, steps=2)
        assert list(made.pngs) == oracle.pngs([one], seed=4, steps=2)
        assert made.region_names == ("red hat",)
        assert kept.use(weight=2.0)["weight"] == 2.0
        assert kept.use("man")["token_index"] is None  # another word's tokens are others
        assert client.concept(kept.id).use()["weight"] == 3.0


def test_a_concept_is_used_under_the_word_that_it_was_put_with_whoever_put_it_first(
    session: Gated, oracle: Oracle
) -> None:
    """Its id covers the keys alone, and a service keeps the first word."""
    other = Concept("hat", *MAN.references)
    with running(session) as server, server.client() as client:
        first = client.put_concept(MAN, steps=STEPS)
        kept = client.put_concept(other, steps=STEPS)
        assert (kept.id, kept.new) == (first.id, False)
        for one, its in ((kept, other), (first, MAN)):
            made = client.generate(PROMPT, [one], seed=4, steps=STEPS)
            assert list(made.pngs) == oracle.pngs([its], seed=4, steps=STEPS)


def test_a_name_that_is_no_id_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.concept").write_bytes(b"x")
    store = FolderConcepts(tmp_path / "kept")
    for name in ("../secret", "secret", "", "0" * 63, "G" * 64, "0" * 64, "/etc/passwd", "\x00"):
        with pytest.raises(UnknownConceptError):
            store.get(name)
        with pytest.raises(UnknownConceptError):
            store.erase(name)
        assert store.left(name) is None
    assert (tmp_path / "secret.concept").exists()
