"""Pictures over HTTP: those of the Session, alone, in batches, as PNG, JSON and events."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from loopback import PROMPT, Gated, Oracle, Running, concept, disc, picture, png, running, until
from PIL import Image

from magicface_rt import Cancelled, Concept, Progress, Reference
from magicface_rt.errors import AnswerError, ConceptError, HostMemoryError, QueueFullError
from magicface_rt.provenance import read_provenance
from magicface_rt.serve import AsyncClient, Client, Made, ServeSettings
from magicface_rt.serve.wire import error_of, pause

MAN, HAT = concept("man", 1, weight=2.5), concept("hat", 2, weight=2.0)
STEPS = 3


@pytest.fixture(scope="module")
def server(session: Gated) -> Iterator[Running]:
    settings = ServeSettings(default_steps=STEPS, batch_wait=0, queue=6)
    with running(session, settings=settings, warm=True) as started:
        yield started


def test_a_picture_is_the_sessions_byte_for_byte(server: Running, oracle: Oracle) -> None:
    with server.client() as client:
        made = client.generate(PROMPT, [MAN, HAT], seed=7, steps=4, negative_prompt="rain", images=2)
    expected = oracle.generate(PROMPT, [MAN, HAT], seed=7, steps=4, negative_prompt="rain", images=2)
    assert list(made.pngs) == [png(image) for image in expected.images]
    np.testing.assert_array_equal(made.regions, expected.regions)
    assert made.region_names == ("man", "hat")
    assert made.settings["options"] == expected.to_dict()["options"]
    assert made.timings["total"] > 0
    assert [image.size for image in made.images] == [(256, 256)] * 2


def test_a_kept_concept_makes_the_same_picture_and_comes_with_its_steps(server: Running, oracle: Oracle) -> None:
    with server.client() as client:
        kept = client.put_concept(MAN, steps=2)
        made = client.generate(PROMPT, [kept.use(weight=2.5), HAT], seed=3)
        assert list(made.pngs) == oracle.pngs([MAN, HAT], seed=3, steps=2)
        assert made.timings["reference_pass"] < made.timings["total"]
        renamed = client.generate("a person", [kept.use("person", weight=1.0)], seed=3)
        client.erase(kept)
    (reference,) = MAN.references
    assert list(renamed.pngs) == oracle.pngs([Concept("person", reference, weight=1.0)], "a person", seed=3, steps=2)


def test_a_png_is_answered_where_it_is_asked_for(server: Running, oracle: Oracle, tmp_path: Path) -> None:
    order = {"prompt": PROMPT, "seed": 5}
    expected = oracle.pngs(seed=5, steps=STEPS)[0]
    with httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
        by_header = http.post("/v1/images", json=order, headers={"Accept": "image/png"})
        by_field = http.post("/v1/images", json={**order, "response": "png"})
        plain = http.post("/v1/images", json=order)
        mostly = http.post("/v1/images", json=order, headers={"Accept": "application/json;q=0.2, image/*;q=0.9"})
    for answer in (by_header, by_field, mostly):
        assert answer.headers["content-type"] == "image/png"
        assert answer.content == expected
    assert plain.json()["settings"]["prompt"] == PROMPT
    (tmp_path / "out.png").write_bytes(expected)
    found = read_provenance(tmp_path / "out.png")
    assert found is not None
    assert found["options"]["seed"] == 5


def test_masks_files_and_alpha_channels_reach_the_service_as_they_reach_a_session(
    server: Running, oracle: Oracle, tmp_path: Path
) -> None:
    picture(4).save(tmp_path / "man.jpg")
    picture(4).save(tmp_path / "man.bmp")
    disc((5, 5, 60, 90)).save(tmp_path / "mask.png")
    cut_out = picture(5).convert("RGBA")
    cut_out.putalpha(disc((30, 30, 90, 90)))
    grey = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (96, 1)))
    references = [
        Reference(tmp_path / "man.jpg", mask=tmp_path / "mask.png", prompt="a man"),
        Reference(tmp_path / "man.bmp", mask=np.asarray(disc((5, 5, 60, 90))) > 0),
        Reference(cut_out, prompt="a man"),
        Reference(picture(6), mask=grey, mask_threshold=60, resample="nearest"),
    ]
    with server.client() as client:
        for reference in references:
            one = Concept("man", reference)
            expected = oracle.pngs([one], seed=1, steps=1)
            assert list(client.generate(PROMPT, [one], seed=1, steps=1).pngs) == expected
            kept = client.put_concept(one, steps=1)
            assert list(client.generate(PROMPT, [kept], seed=1).pngs) == expected
            client.erase(kept)


def together(server: Running, session: Gated, orders: list[dict[str, object]]) -> list[Future[Made]]:
    """Requests that come while another is being made, so that they wait together."""
    session.free.clear()
    pool = ThreadPoolExecutor(len(orders) + 1)

    def generate(order: dict[str, object]) -> Made:
        with server.client() as client:
            return client.generate(PROMPT, **order)  # type: ignore[arg-type]

    first = pool.submit(generate, {"seed": 1000, "steps": 1, "alone": True})
    session.wait_for_step()
    futures = []
    for waiting, order in enumerate(orders, 1):
        futures.append(pool.submit(generate, order))
        until(lambda w=waiting: server.service.engine.waiting == w, "a request was not queued")  # type: ignore[misc]
    session.free.set()
    first.result(60)
    pool.shutdown(wait=False)
    return futures


def test_requests_are_made_together_and_their_pictures_stay_the_same(
    server: Running, session: Gated, oracle: Oracle
) -> None:
    with server.client() as client:
        kept = client.put_concept(HAT, steps=STEPS)
        orders: list[dict[str, object]] = [
            {"concepts": [MAN, HAT], "seed": 1},
            {"concepts": [kept.use(weight=2.0)], "seed": 2, "guidance": 5.0, "alpha": 1.0},
            {"seed": 3, "negative_prompt": "rain", "images": 2},
        ]
        made = [future.result(60) for future in together(server, session, orders)]
        client.erase(kept)
    assert session.calls == [[1000], [1, 2, 3]]
    assert [one.batch for one in made] == [4, 4, 4]
    expected = [
        oracle.pngs([MAN, HAT], seed=1, steps=STEPS),
        oracle.pngs([HAT], seed=2, guidance=5.0, alpha=1.0, steps=STEPS),
        oracle.pngs(seed=3, negative_prompt="rain", images=2, steps=STEPS),
    ]
    assert [list(one.pngs) for one in made] == expected


def test_what_cannot_be_made_together_is_made_one_after_the_other(server: Running, session: Gated) -> None:
    orders: list[dict[str, object]] = [
        {"seed": 1, "steps": 1},
        {"seed": 2, "steps": 2},
        {"seed": 3, "steps": 1},
        {"seed": 4, "steps": 1, "alone": True},
        {"seed": 5, "steps": 1, "images": 4},
    ]
    for future in together(server, session, orders):
        future.result(60)
    assert session.calls == [[1000], [1, 3], [2], [4], [5]]


def test_a_request_that_is_given_up_does_not_disturb_the_others_of_its_batch(
    server: Running, session: Gated, oracle: Oracle
) -> None:
    session.free.clear()
    with server.patient(1.0), ThreadPoolExecutor(2) as pool:

        def generate(seed: int, **more: object) -> Made:
            with server.client() as client:
                return client.generate(PROMPT, seed=seed, **more)  # type: ignore[arg-type]

        # they wait for a third, which does not come, and are made together
        good, late = pool.submit(generate, 5), pool.submit(generate, 6, deadline=2.0)
        session.wait_for_step()
        assert sorted(session.calls[0]) == [5, 6]
        with pytest.raises(Exception, match="deadline"):
            late.result(30)
        session.free.set()
        assert list(good.result(30).pngs) == oracle.pngs(seed=5, steps=STEPS)
    assert len(session.calls) == 1


def test_progress_comes_step_by_step_and_can_cancel(server: Running, session: Gated, oracle: Oracle) -> None:
    seen: list[Progress] = []
    with server.client() as client:
        made = client.generate(PROMPT, seed=2, steps=5, alpha=0.4, progress=seen.append)
        assert [(p.step, p.stage) for p in seen] == [(1, "rsa"), (2, "rsa"), (3, "rsa"), (4, "rba"), (5, "rba")]
        assert list(made.pngs) == oracle.pngs(seed=2, steps=5, alpha=0.4)
        session.reset()
        with pytest.raises(Cancelled, match="after step 2 of 40"):
            client.generate(PROMPT, steps=40, progress=lambda p: p.step < 2)
        until(lambda: server.service.engine.running == 0, "the request went on")
        assert len(session.steps) < 40
        assert list(client.generate(PROMPT, seed=2).pngs) == oracle.pngs(seed=2, steps=STEPS)


def test_events_have_the_pictures_last(server: Running) -> None:
    order = {"prompt": PROMPT, "stream": True, "steps": 2}
    with httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
        answer = http.post("/v1/images", json=order)
        refused = http.post("/v1/images", json={**order, "concepts": [{"id": "0" * 64}]})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in answer.text.strip().split("\n\n") if not block.startswith(":")]
    assert [lines[0] for lines in events] == [
        "event: accepted",
        "event: progress",
        "event: progress",
        "event: pictures",
    ]
    assert json.loads(events[1][1].removeprefix("data: "))["steps"] == 2
    assert len(json.loads(events[-1][1].removeprefix("data: "))["pictures"]) == 1
    assert refused.status_code == 404
    assert refused.headers["content-type"] == "application/problem+json"


def test_a_request_whose_client_has_gone_stops_at_its_next_step(server: Running, session: Gated) -> None:
    session.free.clear()
    order = json.dumps({"prompt": PROMPT, "steps": 50}).encode()
    for extra in (b"", b'"stream": true, '):
        session.steps.clear()
        body = order.replace(b"{", b"{" + extra, 1)
        with socket.create_connection(server.socket.getsockname()) as connection:
            connection.sendall(
                b"POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            session.wait_for_step()
        until(lambda: not server.service._uses, "the service did not see that the client has gone")
        session.free.set()
        until(lambda: server.service.engine.running == 0, "the request went on")
        assert len(session.steps) == 1
        session.free.clear()


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits(server: Running, session: Gated) -> None:
    session.free.clear()
    with ThreadPoolExecutor(2) as pool, httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
        order = {"prompt": PROMPT, "steps": 50}
        running_one = pool.submit(http.post, "/v1/images", json={**order, "deadline": 1.0})
        session.wait_for_step()
        waiting = http.post("/v1/images", json={**order, "deadline": 0.05, "steps": 2})
        assert waiting.status_code == 504
        assert waiting.json()["kind"] == "deadline-passed"
        assert server.service.engine.waiting == 0
        assert running_one.result(30).status_code == 504
    session.free.set()
    until(lambda: server.service.engine.running == 0, "the request went on")
    assert len(session.steps) == 1


def test_a_full_queue_says_when_to_come_back_and_the_client_does(server: Running, session: Gated) -> None:
    limit = server.service.settings.queue
    session.free.clear()
    with (
        ThreadPoolExecutor(limit + 2) as pool,
        httpx.Client(base_url=server.url, trust_env=False, verify=False) as http,
    ):

        def generate(retries: int = 0) -> Made:
            with server.client(retries=retries) as client:
                return client.generate(PROMPT, steps=1, alone=True)

        waiting = [pool.submit(generate)]
        session.wait_for_step()
        waiting += [pool.submit(generate) for _ in range(limit)]
        until(lambda: server.service.engine.waiting == limit, "the queue did not fill")
        refused = http.post("/v1/images", json={"prompt": PROMPT, "steps": 1})
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["kind"] == "queue-full"
        patient = pool.submit(generate, 4)
        waited = threading.Event()
        waited.wait(0.2)
        session.free.set()
        assert [len(one.result(60).pngs) for one in (*waiting, patient)] == [1] * (limit + 2)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("600", 600, 600),
        ("1.5", 1.5, 1.5),
        (timedelta(seconds=300), 1, 301),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("-5", 0, 0),
        ("nan", 1, 1),
        ("soon", 1, 1),
    ],
    ids=["seconds", "part of one", "date", "past date", "below 0", "nan", "text"],
)
def test_a_client_comes_back_when_it_is_told_to(header: str | timedelta, least: float, most: float) -> None:
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(timezone.utc) + header, usegmt=True)
    error = error_of(429, b'{"kind": "queue-full", "status": 429}', header)
    assert error.retry_after is not None
    assert least <= error.retry_after <= most
    assert pause(error, 0, 4, 660.0) == error.retry_after
    assert pause(error, 4, 4, 660.0) is None


@pytest.mark.parametrize(
    ("body", "header", "expected"),
    [
        ({"retry_after": 7}, None, 7.0),
        ({"retry_after": 7}, "3", 3.0),
        ({"retry_after": -7}, None, 0.0),
        ({"retry_after": 10**400}, None, 2.0**31),
        *(({"retry_after": wrong}, None, None) for wrong in (None, True, 0.5, "7", [7], {})),
        ([7], None, None),
    ],
    ids=repr,
)
def test_the_body_of_a_problem_says_it_where_there_is_no_header(
    body: object, header: str | None, expected: float | None
) -> None:
    assert error_of(503, json.dumps(body).encode(), header).retry_after == expected


def test_a_request_whose_events_end_in_a_problem_is_sent_again_after_the_seconds_that_it_names(
    server: Running, session: Gated, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, steps, slept, short = session.generate_batch, list[int](), list[float](), ["once"]

    def generate_batch(requests: Any, *, progress: Any) -> Any:
        def failing(step: Progress) -> object:
            if step.step == 2 and short:
                raise HostMemoryError(short.pop())
            return progress(step)

        return generate(requests, progress=failing)

    monkeypatch.setattr(session, "generate_batch", generate_batch)
    monkeypatch.setattr("magicface_rt.serve.client.time", SimpleNamespace(sleep=slept.append))
    with server.client(retries=1) as client:
        made = client.generate(PROMPT, steps=3, seed=5, progress=lambda step: steps.append(step.step))
    assert list(made.pngs) == oracle.pngs((), seed=5, steps=3)
    assert (steps, slept) == ([1, 1, 2, 3], [1.0])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_client_that_would_wait_longer_than_it_may_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    asked: list[str] = []

    def full(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        problem = httpx.ByteStream(b'{"kind": "queue-full", "status": 429}')
        return httpx.Response(429, headers={"Retry-After": "120"}, stream=problem)

    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)

    async def use_later() -> None:
        transport = httpx.MockTransport(full)
        async with AsyncClient("http://x", retries=2, timeout=60, transport=transport) as client:
            await client.generate(PROMPT)

    def use() -> None:
        with Client("http://x", retries=2, timeout=60, transport=httpx.MockTransport(full)) as client:
            client.generate(PROMPT)

    with pytest.raises(QueueFullError) as refused:
        asyncio.run(use_later()) if asynchronous else use()
    assert refused.value.retry_after == 120
    assert (asked, slept) == (["/v1/images"], [])
    with pytest.raises(QueueFullError), Client("http://x", retries=2, transport=httpx.MockTransport(full)) as client:
        client.generate(PROMPT, progress=print)
    assert slept == [120, 120]


@pytest.mark.parametrize("answer", [b"<html>sign in</html>", b'{"hello": "you"}', b"[1]"])
def test_a_success_that_the_service_did_not_send_is_an_error_of_ours(answer: bytes) -> None:
    def strange(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=httpx.ByteStream(answer))

    with Client("http://x", transport=httpx.MockTransport(strange)) as client:
        calls = (
            lambda: client.generate(PROMPT),
            lambda: client.put_concept(MAN),
            client.concepts,
            lambda: client.concept("1" * 64),
        )
        for call in calls:
            with pytest.raises(AnswerError, match="does not send") as refused:
                call()
            assert (refused.value.status, refused.value.kind) == (200, "no-answer")


def test_the_asynchronous_client_does_the_same(server: Running, oracle: Oracle) -> None:
    seen: list[Progress] = []

    async def use() -> tuple[Made, Made]:
        async with AsyncClient(server.url, retries=0, trust_env=False) as client:
            assert await client.ready()
            assert (await client.bundle())["dtype"] == "float32"
            kept = await client.put_concept(MAN, steps=2)
            assert [one.id for one in await client.concepts()] == [kept.id]
            assert (await client.concept(kept.id)).word == "man"
            made = await client.generate(PROMPT, [kept.use(weight=2.5)], seed=4)
            streamed = await client.generate(PROMPT, [kept.use(weight=2.5)], seed=4, progress=seen.append)
            assert (await client.erase(kept))["erased"]
            return made, streamed

    made, streamed = asyncio.run(use())
    assert list(made.pngs) == list(streamed.pngs) == oracle.pngs([MAN], seed=4, steps=2)
    assert [p.step for p in seen] == [1, 2]


def test_what_the_client_is_given_is_sent_as_it_was_then(server: Running, oracle: Oracle) -> None:
    """Out of an iterator; and out of a list that changes while the images are encoded in another thread."""
    expected = oracle.pngs([MAN, HAT], seed=6, steps=2)
    with server.client() as client:
        assert list(client.generate(PROMPT, iter([MAN, HAT]), seed=6, steps=2).pngs) == expected
        for wrong in (MAN, "0" * 64, {"id": "0" * 64}, 5, None):
            with pytest.raises(ConceptError, match="expected a list of concepts"):
                client.generate(PROMPT, wrong)  # type: ignore[arg-type]

    async def use() -> Made:
        async with AsyncClient(server.url, retries=0, trust_env=False) as client:
            concepts = [MAN, HAT]
            asked = asyncio.create_task(client.generate(PROMPT, concepts, seed=6, steps=2))
            await asyncio.sleep(0)
            concepts.clear()
            return await asked

    assert list(asyncio.run(use()).pngs) == expected


def test_numbers_and_answers_of_numpy_are_what_they_are_to_a_session(server: Running, oracle: Oracle) -> None:
    settings: dict[str, Any] = {
        "steps": np.int64(2),
        "seed": np.uint64(2**63 + 1),
        "guidance": np.float32(5.1),
        "alpha": np.float16(0.3),
        "semantic_guidance": np.bool_(False),
    }
    with server.client() as client:
        kept = client.put_concept(MAN, steps=settings["steps"])
        for tokens in (np.int64(2), np.array([2])):
            use = kept.use(weight=np.float32(2.1), token_index=tokens)  # type: ignore[arg-type]
            made = client.generate(PROMPT, [use], **settings)
            again = Concept("man", *MAN.references, weight=2.1, token_index=2)
            assert list(made.pngs) == oracle.pngs([again], **settings)
        client.erase(kept)
        with pytest.raises(Cancelled, match="after step 1 of 2"):
            client.generate(PROMPT, [MAN], steps=2, progress=lambda p: np.int64(p.step) < 1)
    assert made.settings["options"]["guidance"] == 5.1


def test_metrics_count_what_was_done(server: Running) -> None:
    def value(name: str) -> float:
        with httpx.Client(base_url=server.url, trust_env=False, verify=False) as http:
            lines = http.get("/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))

    names = (
        "magicface_pictures_total",
        'magicface_stage_seconds_count{stage="denoising"}',
        'magicface_concept_lookups_total{result="hit"}',
        'magicface_concept_lookups_total{result="miss"}',
        "magicface_concept_preparations_total",
        "magicface_batch_pictures_sum",
    )
    before = [value(name) for name in names]
    with server.client() as client:
        kept = client.put_concept(MAN, steps=1)
        assert value("magicface_concepts") == 1
        assert value("magicface_concept_kept_bytes") == kept.nbytes
        client.put_concept(MAN, steps=1)
        client.generate(PROMPT, [kept], images=2)
        client.erase(kept)
    assert [value(name) - then for name, then in zip(names, before, strict=True)] == [2, 1, 2, 1, 1, 2]
    assert value('magicface_request_seconds_count{method="POST",route="/v1/images",status="200"}') >= 1
    assert value("magicface_queue_length") == value("magicface_running") == value("magicface_concepts") == 0


def test_the_bundle_and_its_limits_are_told(server: Running, session: Gated) -> None:
    with server.client() as client:
        found = client.bundle()
    assert found["hash"] == session.bundle.hash
    assert (found["height"], found["width"], found["backend"]) == (256, 256, "onnxruntime-cpu")
    assert found["limits"]["queue"] == 6
