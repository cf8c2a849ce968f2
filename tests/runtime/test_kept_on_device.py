"""Kept concepts on a device that is made up: keys of all steps there, or brought up ahead of need."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicface_rt import Cancelled, Options, Request, Session
from magicface_rt.backends.device import Buffer, Device
from magicface_rt.backends.lane import Lane
from magicface_rt.backends.shelf import Shelf
from magicface_rt.bundle import Bundle
from magicface_rt.errors import DeviceError
from tests.runtime.drawn_backend import Drawn
from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_tensorrt import Recipe
from tests.runtime.fake_world import FLAVOUR, World
from tests.runtime.test_session import HAT, MAN, PROMPT

STEPS = 6


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle, drawn: Drawn) -> Iterator[World]:
    """Plans whose graphs are the drawn ones. After every test, nothing may be left on the device."""
    made = World(monkeypatch, tmp_path)
    for graph in bundle.graphs:
        runner, contract = drawn.load(bundle, graph), bundle.graph(graph)
        wanted = [t.name for t in contract.outputs if graph != "denoise_step" or t.name in STATE]
        made.build(bundle, graph, Recipe(contract_of(contract, wanted), compute(runner, wanted)))
    yield made
    gc.collect()
    assert made.nothing_left(), (made.cuda.alive(), made.trt.alive)


STATE = ("latents_out", "region_label_out")


def contract_of(contract: Any, outputs: list[str]) -> Any:
    return replace(contract, outputs=tuple(t for t in contract.outputs if t.name in outputs))


def compute(runner: Any, outputs: list[str]) -> Any:
    return lambda arrays: runner._run(arrays, outputs)


def open_session(world: World, bundle: Bundle, **options: Any) -> Session:
    return Session(bundle, backend=FLAVOUR, store=world.store, **options)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Any:
    with Session(bundle, backend=Drawn()) as session:
        return session.generate(PROMPT, [MAN, HAT], steps=STEPS, seed=7, images=2)


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("storage", ["exact", "8-bit"])
@pytest.mark.parametrize("memory", ["keep", "stream"])
def test_kept_keys_make_the_same_pictures(
    world: World, bundle: Bundle, drawn: Drawn, expected: Any, memory: str, storage: str
) -> None:
    with open_session(world, bundle, memory=memory, keep="1GiB", storage=storage) as session:
        counts: list[int] = []
        wanted = expected.latents
        if storage == "8-bit":
            wanted = (
                Session(bundle, backend=Drawn(), memory="keep", storage=storage)
                .generate(PROMPT, [MAN, HAT], steps=STEPS, seed=7, images=2)
                .latents
            )
        for _ in range(2):
            drawn.runs.clear()
            before = len(world.cuda.uploads())
            made = session.generate(PROMPT, [MAN, HAT], steps=STEPS, seed=7, images=2)
            counts.append(len(world.cuda.uploads()) - before)
            same(made.latents, wanted)
        assert drawn.runs["reference_kv"] == 0
        streams = {"keep": 1, "stream": 2}[memory]
        assert len(world.cuda.streams) == streams
        # A step's keys come up in one copy, or not at all.
        per_step = [name for name, a in world.cuda.calls if name == "cudaStreamWaitEvent"]
        assert bool(per_step) == (memory == "stream")
        steps = [run for run in world.trt.runs if run.graph == "denoise_step"]
        assert all(run.captured for run in steps[-STEPS + 1 :]), (
            "the keys' addresses stay, so the graphs are used again"
        )
    assert counts[1] < counts[0] or memory == "stream"


def test_streamed_keys_take_three_steps_of_device_memory_and_kept_ones_all(world: World, bundle: Bundle) -> None:
    used = {}
    for memory in ("stream", "keep"):
        with open_session(world, bundle, memory=memory, pad_keys=False) as session:
            kept = session.prepare(MAN, steps=20)
            session.generate("a man", steps=20)
            before = world.cuda.allocated()
            plan = session.plan([kept], 20)
            session.generate("a man", [kept], steps=20)
            used[memory] = world.cuda.allocated() - before
            assert used[memory] <= plan.peak.device
            assert used[memory] >= (20 if memory == "keep" else 2) * plan.bytes_per_step
    assert used["stream"] < used["keep"] / 5


def test_bare_and_kept_concepts_mix(world: World, bundle: Bundle, expected: Any) -> None:
    with open_session(world, bundle) as session:
        man = session.prepare(MAN, steps=STEPS)
        for memory in ("keep", "stream", "recompute"):
            with open_session(world, bundle, memory=memory) as mixed:
                made = mixed.generate(PROMPT, [man, HAT], steps=STEPS, seed=7, images=2)
                same(made.latents, expected.latents)
                made = mixed.generate(PROMPT, [MAN, HAT], steps=STEPS, seed=7, images=2)
                same(made.latents, expected.latents)


def test_a_batch_of_requests(world: World, bundle: Bundle, drawn: Drawn, expected: Any) -> None:
    for memory in ("keep", "stream"):
        with open_session(world, bundle, memory=memory) as session:
            man = session.prepare(MAN, steps=STEPS)
            batch = [
                Request("a man", [man], Options(steps=STEPS, seed=1, alpha=0.0)),
                Request(PROMPT, [man, HAT], Options(steps=STEPS, seed=7, images=2)),
                Request("a dog", (), Options(steps=STEPS)),
            ]
            same(session.generate_batch(batch)[1].latents, expected.latents)
            session.generate("a man", [man], steps=STEPS)
            same(session.generate_batch(batch)[1].latents, expected.latents)
            if memory == "keep":
                assert drawn.unseen == 0, "padding is zero, whatever stood there"


def test_a_device_that_fills_up_streams_and_what_was_kept_stays(
    world: World, bundle: Bundle, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Between plan and upload somebody else takes the memory."""
    with open_session(world, bundle, keep="1GiB", memory="auto") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        session.generate(PROMPT, kept, steps=STEPS)
        session._keeper.on_device.free_unused()
        planned = session._keeper.plan
        session._keeper.plan = lambda *a, **k: hog(world, planned(*a, **k))  # type: ignore[method-assign]
        made = session.generate(PROMPT, kept, steps=STEPS, seed=7, images=1)
        same(made.latents, expected.latents[:1])
        assert "no room for all steps" in caplog.text
        world.cuda.total = 8 * 10**9
    with open_session(world, bundle, memory="keep") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        session.generate(PROMPT, steps=STEPS)
        planned = session._keeper.plan
        session._keeper.plan = lambda *a, **k: hog(world, planned(*a, **k))  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match="reference keys needs"):
            session.generate(PROMPT, kept, steps=STEPS)
        world.cuda.total = 8 * 10**9
        session._keeper.plan = planned  # type: ignore[method-assign]
        made = session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2)
        same(made.latents, expected.latents)


def hog(world: World, plan: Any) -> Any:
    """Leaves less than all steps need, and enough for a few."""
    world.cuda.total = world.cuda.allocated() + plan.bytes_per_step * 5
    return plan


def test_keys_that_nobody_uses_make_room(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle, memory="keep") as session:
        man, hat = (session.prepare(concept, steps=40) for concept in (MAN, HAT))
        session.generate("a man", [man], steps=40)
        world.cuda.total = world.cuda.allocated() + hat.nbytes // 2
        held = session._keeper.on_device.unused_bytes([])
        assert held >= man.nbytes
        session.generate("a hat", [hat], steps=40)
        assert man.references[0].key not in session._keeper.on_device._entries


def test_a_request_that_ends_early_gives_its_keys_free(world: World, bundle: Bundle) -> None:
    for memory in ("keep", "stream"):
        with open_session(world, bundle, memory=memory) as session:
            man = session.prepare(MAN, steps=STEPS)
            with pytest.raises(Cancelled):
                session.generate("a man", [man], steps=STEPS, progress=lambda p: p.step < 2)
            with pytest.raises(KeyboardInterrupt):
                session.generate("a man", [man], steps=STEPS, progress=interrupt)
            session.generate("a man", [man], steps=STEPS)
            assert all(entry.users == 0 for entry in session._keeper.on_device._entries.values())


def test_unloading_frees_the_device_and_later_requests_work(world: World, bundle: Bundle, expected: Any) -> None:
    with open_session(world, bundle, memory="stream") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        session.generate(PROMPT, kept, steps=STEPS)
        before = world.cuda.allocated()
        session.unload("reference_kv")
        assert world.cuda.allocated() < before
        session.unload("denoise_step")
        made = session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2)
        same(made.latents, expected.latents)


def interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_brought_up_waits_for_what_still_reads_the_place() -> None:
    """Two places in turn: the third step's keys may not arrive before the first's were read."""
    cuda = FakeCuda()
    lane = Lane(Device(0, cuda=cuda))
    lane.join()
    shelf, results = Shelf(lane), []
    slot = Buffer(lane.device, 1024)
    for step in range(5):
        found = shelf.bring({"k": np.full(256, step, np.float32)})["k"]
        assert found.ready
        lane.stream.wait_for(found.ready)
        lane.stream.copy(found.buffer.address, slot.address, found.nbytes)
        shelf.used()
        cuda.submit(
            lane.stream.handle, lambda: results.append(float(cuda.view(slot.address, 1024).view(np.float32)[5]))
        )
    lane.wait("graph")
    assert results == [0.0, 1.0, 2.0, 3.0, 4.0]
    shelf.close()
    shelf.close()
    slot.free()
    lane.leave()
    assert not cuda.alive()
