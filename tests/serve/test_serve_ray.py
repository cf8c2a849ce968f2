"""The service on Ray Serve: two replicas on the CPU, over HTTP, with the same client as for any other service."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import grpc
import httpx
from loopback import PROMPT, Oracle, concept, picture, png, until
from PIL import Image
from raylike import TOKEN, OnRay, listening, on_ray, other_bundle, stored_bytes

from magicface_rt import BundleError, Cancelled, Concept, Progress, Reference
from magicface_rt.errors import AnswerError, DeadlineError, ErasedError, QueueFullError, UnknownConceptError
from magicface_rt.serve import Made, ServeSettings

pytestmark = pytest.mark.ray

MAN, HAT = concept("man", 1, weight=2.5), concept("hat", 2, weight=2.0)
STEPS = 3
SETTINGS = ServeSettings(default_steps=STEPS, batch=2, batch_wait=0, queue=2, drain=20, deadline=60)
WINDOW = 64  # bytes of a photograph that are looked for in one piece
DISTINCT = 8  # values that such a piece has at least: any file may have a run of zeros
AT_ONCE = 2  # of one replica; it has as many more that wait there
MOST = SETTINGS.queue + 2 * AT_ONCE


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    with on_ray(tiny_bundle, tmp_path_factory.mktemp("ray"), settings=SETTINGS) as started:
        yield started


@pytest.fixture(autouse=True)
def _free(service: OnRay) -> Iterator[None]:
    service.gate.forget()
    yield
    service.gate.free()
    time.sleep(0.1)  # for all that was held up to see it


def generating(service: OnRay, pool: ThreadPoolExecutor, seeds: range, concepts: list[Any]) -> list[Future[Made]]:
    """A request for each seed, at the same time."""

    def generate(seed: int) -> Made:
        with service.client() as client:
            return client.generate(PROMPT, concepts, seed=seed)

    return [pool.submit(generate, seed) for seed in seeds]


def makers(service: OnRay, seeds: range) -> set[int]:
    """The processes that began requests of these seeds."""
    return {pid for pid, made in service.gate.notes("made") if set(map(int, made.split())) & set(seeds)}


def test_a_picture_is_the_sessions_byte_for_byte(service: OnRay, oracle: Oracle) -> None:
    with service.client() as client:
        made = client.generate(PROMPT, [MAN, HAT], seed=7, steps=4, negative_prompt="rain", images=2)
        assert list(made.pngs) == oracle.pngs([MAN, HAT], seed=7, steps=4, negative_prompt="rain", images=2)
        assert made.region_names == ("man", "hat")
        assert made.timings["queued"] >= 0
        kept = client.put_concept(MAN)
        assert kept.new
        again = client.generate(PROMPT, [kept.use(weight=2.5), HAT], seed=3)
        assert list(again.pngs) == oracle.pngs([MAN, HAT], seed=3, steps=STEPS)
        assert [one.id for one in client.concepts()] == [kept.id]
        assert client.concept(kept.id).nbytes == kept.nbytes
        assert client.bundle()["backend"] == "onnxruntime-cpu"
        assert client.bundle()["limits"]["queue"] == SETTINGS.queue
        client.erase(kept)
        with pytest.raises(UnknownConceptError):
            client.concept(kept.id)


def test_each_request_has_the_concept_that_it_names(service: OnRay, oracle: Oracle) -> None:
    with service.client() as client, ThreadPoolExecutor(6) as pool:
        kept = [client.put_concept(MAN).use(weight=2.5), client.put_concept(HAT).use(weight=2.0)]
        seeds = range(20, 26)
        service.gate.hold()
        futures = [generating(service, pool, range(seed, seed + 1), [kept[seed % 2]])[0] for seed in seeds]
        until(lambda: len(makers(service, seeds)) == 2, "not both replicas make them")
        service.gate.free()
        for seed, future in zip(seeds, futures, strict=True):
            assert list(future.result(60).pngs) == oracle.pngs([(MAN, HAT)[seed % 2]], seed=seed, steps=STEPS)
        for one in client.concepts():
            client.erase(one)


def test_who_has_no_token_is_refused(service: OnRay) -> None:
    with service.client(token=None) as client:
        with pytest.raises(AnswerError) as refused:
            client.concepts()
        assert refused.value.status == 401
        assert client.ready()


def test_what_is_at_fault_is_named_as_in_one_process(service: OnRay) -> None:
    with service.client() as client:
        with pytest.raises(AnswerError, match="not in the prompt") as refused:
            client.generate("a house", [MAN])
        assert (refused.value.status, refused.value.field) == (422, "concepts[0].word")
        with pytest.raises(UnknownConceptError) as unknown:
            client.generate(PROMPT, [HAT, "0" * 64])
        assert unknown.value.field == "concepts[1].id"
        with pytest.raises(UnknownConceptError):
            client.generate(PROMPT, ["../../etc/passwd"])
        for id in ("0" * 64, "../../etc/passwd"):
            with pytest.raises((UnknownConceptError, AnswerError)):
                client.erase(id)
    with service.http() as http:  # also where events were asked for
        answer = http.post("/v1/images", json={"prompt": "man " * 400, "stream": True})
    assert (answer.status_code, answer.json()["kind"]) == (422, "prompt")


def test_progress_comes_step_by_step_and_can_cancel(service: OnRay, oracle: Oracle) -> None:
    seen: list[Progress] = []
    with service.client() as client:
        made = client.generate(PROMPT, seed=2, steps=5, alpha=0.4, progress=seen.append)
        assert [(p.step, p.stage) for p in seen] == [(1, "rsa"), (2, "rsa"), (3, "rsa"), (4, "rba"), (5, "rba")]
        assert list(made.pngs) == oracle.pngs(seed=2, steps=5, alpha=0.4)
        with pytest.raises(Cancelled, match="after step 2 of 150"):
            client.generate(PROMPT, steps=150, progress=lambda p: p.step < 2)
        until(lambda: service.admitted() == 0, "the front did not see that the client has gone")


def test_a_client_that_goes_stops_the_replica_at_its_next_step(service: OnRay) -> None:
    service.gate.hold()
    order = {"prompt": PROMPT, "steps": 100, "stream": True}
    with service.http() as http, http.stream("POST", "/v1/images", json=order) as answer:
        assert "accepted" in next(answer.iter_lines())
        service.gate.wait_for("step")
    until(lambda: service.admitted() == 0, "the front did not see that the client has gone")
    with ThreadPoolExecutor(MOST) as pool:  # each replica makes some of these, behind what it has
        futures = generating(service, pool, range(30, 30 + MOST), [])
        until(lambda: service.admitted() == MOST, "they did not come")
        service.gate.free()
        assert all(future.result(60).pngs for future in futures)
    assert len(makers(service, range(30, 30 + MOST))) == 2
    assert len(service.gate.notes("step")) <= 1 + MOST * STEPS


def test_a_deadline_ends_a_request_that_runs_and_its_place_is_free(service: OnRay) -> None:
    service.gate.hold()
    with service.client() as client, pytest.raises(DeadlineError, match="deadline"):
        client.generate(PROMPT, steps=50, deadline=1.0)
    assert len(service.gate.notes("step")) == 1
    assert service.admitted() == 0


def test_a_full_queue_says_when_to_come_back_and_those_in_it_are_made_together(service: OnRay, oracle: Oracle) -> None:
    service.gate.hold()
    with ThreadPoolExecutor(MOST) as pool:
        futures = generating(service, pool, range(100, 100 + MOST), [])
        until(lambda: service.admitted() == MOST, "the queue did not fill")
        service.gate.wait_for("made", 2)
        with service.client() as client, pytest.raises(QueueFullError) as full:
            client.generate(PROMPT, seed=1)
        assert full.value.retry_after is not None
        assert full.value.retry_after >= 1
        service.gate.free()
        made = [future.result(60) for future in futures]
    for seed, one in enumerate(made, 100):
        assert list(one.pngs) == oracle.pngs(seed=seed, steps=STEPS)
    assert max(one.batch for one in made) == AT_ONCE
    assert len(makers(service, range(100, 100 + MOST))) == 2


def test_a_concept_goes_where_it_is_and_is_prepared_once_for_all(service: OnRay, oracle: Oracle) -> None:
    own = concept("man", 77, weight=2.5)  # Ray remembers where others were
    before = service.metric("magicface_concept_preparations_total")
    with service.client() as client, ThreadPoolExecutor(5) as pool:
        kept = client.put_concept(own)
        ((maker, _),) = service.gate.notes("prepared")
        time.sleep(1.5)  # Ray tells its routers now and then who has what
        for seed in range(200, 206):
            assert list(client.generate(PROMPT, [kept.use(weight=2.5)], seed=seed).pngs)
        assert makers(service, range(200, 206)) == {maker}
        # while it has no place left, the other one takes what comes, and maps the same file
        service.gate.hold()
        futures = generating(service, pool, range(210, 215), [kept.use(weight=2.5)])
        until(lambda: len(makers(service, range(210, 215))) == 2, "the other replica was given nothing")
        service.gate.free()
        for seed, future in enumerate(futures, 210):
            assert list(future.result(60).pngs) == oracle.pngs([own], seed=seed, steps=STEPS)
        assert service.mapped(kept.id) == service.replicas()
        assert not client.put_concept(own).new
        assert len(service.gate.notes("prepared")) == 1
        assert service.metric("magicface_concept_preparations_total") - before == 1
        assert client.erase(kept)["files"] == 1
    assert service.mapped(kept.id) == set()


def test_what_is_erased_is_gone_from_every_replica_that_was_using_it(service: OnRay, oracle: Oracle) -> None:
    with service.client() as client, ThreadPoolExecutor(7) as pool:
        kept, other = client.put_concept(MAN), client.put_concept(HAT)
        service.gate.hold()
        using = generating(service, pool, range(300, 305), [kept])
        until(lambda: len(makers(service, range(300, 305))) == 2, "not both replicas use it")
        until(lambda: service.admitted() == 5, "not all have come")
        assert service.mapped(kept.id) == service.replicas()
        erasing = pool.submit(client.erase, kept)
        for future in using:
            with pytest.raises(ErasedError, match="erased while this request used it"):
                future.result(30)
        assert not erasing.done()  # what runs has not come to its next step yet
        service.gate.free()
        assert erasing.result(30) == {"id": kept.id, "erased": True, "files": 1, "stopped": 5}
        assert service.mapped(kept.id) == set()
        assert [path.name for path in service.concepts.iterdir()] == [f"{other.id}.concept"]
        with pytest.raises(UnknownConceptError):
            client.erase(kept)
        with pytest.raises(UnknownConceptError):
            client.generate(PROMPT, [kept])
        assert list(client.generate(PROMPT, [other.use(weight=2.0)], seed=1).pngs) == oracle.pngs(
            [HAT], seed=1, steps=STEPS
        )
        assert client.put_concept(MAN).new  # it may come back
        for one in (kept, other):
            client.erase(one)


def test_an_erasure_waits_for_a_preparation_and_a_preparation_for_an_erasure(service: OnRay) -> None:
    with service.client() as client, ThreadPoolExecutor(3) as pool:
        id = client.put_concept(MAN).id
        client.erase(id)
        service.gate.forget()
        service.gate.hold()
        putting = pool.submit(service.client().put_concept, MAN)
        service.gate.wait_for("prepared")
        erasing = pool.submit(client.erase, id)
        time.sleep(0.5)
        assert not erasing.done()
        service.gate.free()
        assert erasing.result(30)["erased"]
        with contextlib.suppress(ErasedError):
            putting.result(30)  # what was prepared for it went with it
        with pytest.raises(UnknownConceptError):
            client.concept(id)
        kept = client.put_concept(MAN)
        assert kept.new
        service.gate.hold()
        using = pool.submit(service.client().generate, PROMPT, [kept])
        service.gate.wait_for("made")
        erasing = pool.submit(client.erase, kept)
        with pytest.raises(ErasedError):
            using.result(30)
        again = pool.submit(service.client().put_concept, MAN)
        assert not erasing.done()
        service.gate.free()
        assert erasing.result(30)["erased"]
        assert again.result(30).new
        assert client.concept(kept.id).id == kept.id
        client.erase(kept)


def test_no_photograph_and_no_token_is_written_or_left_in_rays_store(service: OnRay) -> None:
    """In no file of Ray's and no concept's, neither as it is sent nor decoded; looked for before it is erased as well,
    and while pictures are made of it.
    """
    photograph = picture(9, 1200)
    noise = Concept("man", Reference(photograph, mask=picture(8, 1200).convert("L"), prompt="a man"))
    assert len(png(photograph)) > 200_000
    secrets = windows_of(photograph)
    before = stored_bytes()
    with service.client() as client, ThreadPoolExecutor(1) as pool:
        kept = client.put_concept(noise, steps=1)
        check_files(service, secrets)
        service.gate.hold()
        made = pool.submit(client.generate, "a man of words that nobody else says", [noise], steps=1)
        service.gate.wait_for("step")
        check_files(service, secrets)
        service.gate.free()
        assert made.result(60).pngs
        client.erase(kept)
    assert stored_bytes() - before < 100_000
    check_files(service, secrets)
    for pid, command in service.cluster.processes().items():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"MAGICFACE_RT_TOKENS" not in environment, command
            assert TOKEN.encode() not in environment, command


def windows_of(photograph: Image.Image) -> dict[str, list[bytes]]:
    """Pieces of a photograph, spread over it, by the form in which a file could have them."""
    sent = png(photograph)
    forms = {
        "bytes": sent,
        "base64": base64.b64encode(sent),
        "hex": sent.hex().encode(),
        "repr": repr(sent)[2:-1].encode(),
        "decoded": photograph.tobytes(),
    }
    found = {name: [one for one in spread(form) if len(set(one)) >= DISTINCT] for name, form in forms.items()}
    assert all(len(windows) > 10 for windows in found.values())
    return found


def spread(form: bytes) -> list[bytes]:
    """Begins late enough that no other picture's header looks like it."""
    return [form[at : at + WINDOW] for at in range(200, len(form) - WINDOW, len(form) // 40)]


def check_files(service: OnRay, secrets: dict[str, list[bytes]]) -> None:
    """Nothing of a request is in a file of Ray's, or of the photograph in the folder of concepts."""
    written = [path for path in service.cluster.folder.rglob("*") if path.is_file()]
    assert written
    for path in (*written, *service.concepts.iterdir()):
        content = path.read_bytes()
        assert b"a-token-that-nobody" not in content, path
        assert b"words that nobody else" not in content, path
        for name, windows in secrets.items():
            assert not any(window in content for window in windows), f"{name} in {path}"


def test_rays_ports_are_this_machines_or_ask_for_its_token(service: OnRay) -> None:
    own = service.cluster.processes()
    rays = [f"{address}:{port}" for port, (address, pid) in listening().items() if pid in own]
    codes = set()
    for place in rays:
        with grpc.insecure_channel(place) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
        codes.add(refused.value.code())
        for path in ("/api/job_agent/jobs/", "/get_or_create_runtime_env"):  # either would run a command
            with contextlib.suppress(httpx.TransportError):  # it speaks something else
                asked = httpx.post(f"http://{place}{path}", json={"entrypoint": "true"}, trust_env=False)
                assert asked.status_code in (401, 403, 404, 405), place
    assert grpc.StatusCode.UNAUTHENTICATED in codes
    assert grpc.StatusCode.OK not in codes


def test_a_replica_that_is_killed_costs_time_and_no_picture(service: OnRay, oracle: Oracle) -> None:
    with service.client() as client, ThreadPoolExecutor(2) as pool:
        kept = client.put_concept(MAN)
        service.gate.hold()
        (future,) = generating(service, pool, range(400, 401), [kept.use(weight=2.5)])
        until(lambda: makers(service, range(400, 401)), "it was not begun")
        (maker,) = makers(service, range(400, 401))
        os.kill(maker, signal.SIGKILL)
        service.gate.free()
        assert list(future.result(60).pngs) == oracle.pngs([MAN], seed=400, steps=STEPS)
        assert len(makers(service, range(400, 401))) == 2
        # one that is dead holds nothing: nobody waits for its word
        assert client.erase(kept)["files"] == 1
        assert service.mapped(kept.id) == set()
    service.wait_for_replicas(2)
    assert maker not in service.replicas()


def test_replicas_are_replaced_by_those_of_another_bundle_and_no_request_fails(
    service: OnRay, tiny_bundle: Path, oracle: Oracle, tmp_path: Path
) -> None:
    after = other_bundle(tiny_bundle, tmp_path / "other")
    with Oracle(after, backend="onnxruntime-cpu", check_hashes=False, threads=1) as updated:
        old, new = oracle.pngs([MAN], seed=5, steps=STEPS), updated.pngs([MAN], seed=5, steps=STEPS)
    assert old != new
    over = threading.Event()
    made: list[list[bytes]] = []
    errors: list[Exception] = []

    def keep_asking() -> None:
        with service.client() as client:
            while not over.is_set():
                try:
                    made.append(list(client.generate(PROMPT, [MAN], seed=5).pngs))
                except Exception as error:
                    errors.append(error)

    asking = [threading.Thread(target=keep_asking) for _ in range(2)]
    for thread in asking:
        thread.start()
    before = service.replicas()
    try:
        service.running.update(replace(service.running.plan, bundle=str(after)))
        count = len(made)
        until(lambda: len(made) > count + 4 or errors, "nothing was made after the update")
    finally:
        over.set()
        for thread in asking:
            thread.join(60)
    assert errors == []
    assert made[0] == old
    assert made[-1] == new
    assert all(one in (old, new) for one in made)
    assert not before & service.replicas()
    with service.client() as client:
        assert client.bundle()["hash"] == updated.bundle.hash


def test_a_bundle_that_cannot_be_opened_is_no_update_and_the_service_goes_on(service: OnRay, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        service.running.update(replace(service.running.plan, bundle=str(tmp_path / "gone")))
    with service.client() as client:
        assert client.ready()
        assert client.generate(PROMPT, seed=1).pngs
