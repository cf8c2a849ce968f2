"""Kept concepts on a device that is made up: keys of all steps there, or brought up ahead of need."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest

from magicface_rt import Cancelled, Concept, KeptConcept, MemoryPlan, Options, Reference, Request, Session
from magicface_rt.backends.device import Buffer, Device
from magicface_rt.backends.key_uploader import KeyUploader
from magicface_rt.backends.worker_stream import WorkerStream
from magicface_rt.bundle import Bundle
from magicface_rt.errors import BudgetError, DeviceError, DeviceMemoryError, KeptConceptError
from magicface_rt.kept.feed import KeyFeed
from magicface_rt.kept.memory import row_bytes
from magicface_rt.kept.on_device import OnDevice
from magicface_rt.kept.reference import KeptReference, Stored
from tests.runtime.drawn_backend import Drawn
from tests.runtime.fake_cuda import KERNEL_FAILED, FakeCuda
from tests.runtime.fake_tensorrt import Recipe
from tests.runtime.fake_world import FLAVOUR, World
from tests.runtime.test_kept_files import write_other_keys
from tests.runtime.test_kept_store import Interrupting, ends
from tests.runtime.test_session import HAT, MAN, PROMPT, disc, picture

STEPS = 6
PLENTY = 8 * 10**9


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle, drawn: Drawn) -> Iterator[World]:
    with drawn_world(World(monkeypatch, tmp_path), bundle, drawn) as made:
        yield made


@contextmanager
def drawn_world(made: World, bundle: Bundle, drawn: Drawn) -> Iterator[World]:
    """Plans whose graphs are the drawn ones. After the block, nothing may be left on the device."""
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


@contextmanager
def after_planning(session: Session, do: Callable[[MemoryPlan], object]) -> Iterator[None]:
    """What happens between a request's plan and all that follows."""
    planned = session._keeper.plan

    def plan(*arguments: Any, **options: Any) -> MemoryPlan:
        made = planned(*arguments, **options)
        do(made)
        return made

    session._keeper.plan = plan  # type: ignore[method-assign]
    yield
    session._keeper.plan = planned  # type: ignore[method-assign]


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
        for _ in range(3):
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
        assert all(run.captured for run in steps[-STEPS:]), "the keys' addresses stay, so the graphs are used again"
    assert counts[2] == counts[1] < counts[0] or memory == "stream"


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


@pytest.mark.parametrize("concepts", ["kept", "bare", "both"])
@pytest.mark.parametrize("memory", ["keep", "stream", "recompute"])
def test_no_request_takes_more_memory_of_the_device_than_its_plan(
    world: World, bundle: Bundle, memory: str, concepts: str
) -> None:
    with open_session(world, bundle) as session:
        man, hat = (session.prepare(one, steps=20) for one in (MAN, HAT))
    given: list[Any] = {"kept": [man, hat], "bare": [MAN, HAT], "both": [man, HAT]}[concepts]
    with open_session(world, bundle, memory=memory, pad_keys=False) as session:
        session.generate(PROMPT, steps=20)  # what the network itself needs
        before = world.cuda.most = world.cuda.allocated()
        plan = session.plan(given, 20)
        made = session.generate(PROMPT, given, steps=20)
        assert made.regions.any()
        used = world.cuda.most - before
        assert 0 < used <= plan.peak.device
        told = f"{used >> 10:,} KiB of the {plan.peak.device >> 10:,} KiB that its plan allows"
        figures.tell("memory", f"a device's stand-in, {memory}, {concepts}", told)


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
        with after_planning(session, lambda plan: hog(world, plan)):
            made = session.generate(PROMPT, kept, steps=STEPS, seed=7, images=1)
        same(made.latents, expected.latents[:1])
        assert "no room for all steps" in caplog.text
        world.cuda.total = PLENTY
    with open_session(world, bundle, memory="keep") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        session.generate(PROMPT, steps=STEPS)
        with (
            after_planning(session, lambda plan: hog(world, plan)),
            pytest.raises(DeviceMemoryError, match="reference keys needs"),
        ):
            session.generate(PROMPT, kept, steps=STEPS)
        world.cuda.total = PLENTY
        made = session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2)
        same(made.latents, expected.latents)


def hog(world: World, plan: MemoryPlan) -> None:
    """Leaves less than all steps need, and enough for a few."""
    world.leave(plan.bytes_per_step * 5)


def test_keys_that_nobody_uses_make_room(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle, memory="keep") as session:
        man, hat = (session.prepare(concept, steps=40) for concept in (MAN, HAT))
        session.generate("a man", [man], steps=40)
        world.leave(hat.nbytes // 2)
        held = session._keeper.on_device.unused_bytes([])
        assert held >= man.nbytes
        session.generate("a hat", [hat], steps=40)
        assert not session._keeper.on_device.has(man.references[0])


def test_a_request_that_ends_early_gives_its_keys_free(world: World, bundle: Bundle) -> None:
    for memory in ("keep", "stream"):
        with open_session(world, bundle, memory=memory) as session:
            man = session.prepare(MAN, steps=STEPS)
            with pytest.raises(Cancelled):
                session.generate("a man", [man], steps=STEPS, progress=lambda p: p.step < 2)
            with pytest.raises(KeyboardInterrupt):
                session.generate("a man", [man], steps=STEPS, progress=interrupt)
            session.generate("a man", [man], steps=STEPS)
            assert not any(entry.users for entry in session._keeper.on_device._entries.values())


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
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    key_uploader, results = KeyUploader(worker_stream, "denoise_step", "reference keys"), []
    slot = Buffer(worker_stream.device, 1024)
    for step in range(5):
        found = key_uploader.bring({"k": np.full(256, step, np.float32)})["k"]
        assert found.ready
        worker_stream.stream.wait_for(found.ready)
        worker_stream.stream.copy(found.buffer.address, slot.address, found.nbytes)
        key_uploader.used()
        cuda.submit(
            worker_stream.stream.handle,
            lambda: results.append(float(cuda.view(slot.address, 1024).view(np.float32)[5])),
        )
    worker_stream.wait("graph")
    assert results == [0.0, 1.0, 2.0, 3.0, 4.0]
    key_uploader.close()
    key_uploader.close()
    slot.free()
    worker_stream.leave()
    assert not cuda.alive()


# ------------------------------------------------------------------------------------------- who needs memory gets it


def keep_on_device(session: Session, steps: int = 20) -> OnDevice:
    """Has the keys of two concepts on the device, and nobody uses them."""
    for concept, prompt in ((MAN, "a man"), (HAT, "a hat")):
        session.generate(prompt, [session.prepare(concept, steps=steps)], steps=steps)
    on_device = session._keeper.on_device
    assert len(on_device._entries) == 2
    return on_device


@pytest.fixture(scope="module")
def four(bundle: Bundle) -> Any:
    with Session(bundle, backend=Drawn()) as session:
        return session.generate(PROMPT, [MAN, HAT], steps=STEPS, seed=7, images=4)


def test_keys_that_nobody_uses_make_room_for_more_images(world: World, bundle: Bundle, four: Any) -> None:
    with open_session(world, bundle, memory="keep") as session:
        on_device = keep_on_device(session)
        plain = Session(bundle, backend=Drawn()).generate("a man", steps=STEPS, seed=7, images=4)
        world.leave(1000)
        same(session.generate("a man", steps=STEPS, seed=7, images=4).latents, plain.latents)
        assert len(on_device._entries) == 1, "no more is freed than is needed"
        world.cuda.total = PLENTY
        same(session.generate(PROMPT, [MAN, HAT], steps=STEPS, seed=7, images=4).latents, four.latents)


def test_keys_that_nobody_uses_make_room_for_keys_that_are_streamed_and_for_another_session(
    world: World, bundle: Bundle, expected: Any
) -> None:
    backend = world.backend()
    with Session(bundle, backend=backend, memory="keep") as keeping:
        with Session(bundle, backend=backend, memory="stream", budget=PLENTY) as streaming:
            kept = [streaming.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
            streaming.generate(PROMPT, steps=STEPS, images=2)
            on_device = keep_on_device(keeping)
            world.leave(1000)
            made = streaming.generate(PROMPT, kept, steps=STEPS, seed=7, images=2)
            same(made.latents, expected.latents)
            assert len(on_device._entries) < 2
        world.cuda.total = PLENTY
    backend.close()
    assert not backend.device._reclaims, "a session that is closed is not asked any more"


def test_keys_make_no_room_for_those_of_the_same_request(world: World, bundle: Bundle) -> None:
    other = Concept("hat", Reference(picture(3), mask=disc((10, 20, 80, 90)), prompt="a face"), weight=2.0)
    with open_session(world, bundle, memory="keep") as session:
        man, hat, face = (session.prepare(concept, steps=20) for concept in (MAN, HAT, other))
        session.generate(PROMPT, [man, face], steps=20)
        session._keeper.on_device.free_unused()
        session.generate("a man", [man], steps=20)
        session.generate("a hat", [hat], steps=20)
        world.leave(man.nbytes * 3 // 4)
        before = len(world.cuda.uploads())
        session.generate(PROMPT, [face, man], steps=20)
        assert not session._keeper.on_device.holds(hat.references[0].key)
        assert len(world.cuda.uploads()) - before < 2 * 20 * 2 * len(bundle.injection_layers)
        world.cuda.total = PLENTY


@pytest.mark.parametrize("known", [True, False])
def test_keys_that_nobody_uses_make_room_for_a_graph(world: World, bundle: Bundle, tmp_path: Path, known: bool) -> None:
    """`known`: the plan's file says how much memory it takes; else the library finds too little as it loads."""
    with open_session(world, bundle) as session:
        nbytes = session.prepare(MAN, steps=20).nbytes
    heavy(world, bundle, tmp_path, {"vae_decoder": nbytes // 2 if known else 0})
    with open_session(world, bundle, memory="keep") as session:
        on_device = keep_on_device(session)
        session.unload("vae_decoder")
        world.leave(nbytes // 4)
        world.trt.beside_weights = 0 if known else nbytes // 2
        session.generate("a man", steps=1)
        assert len(on_device._entries) == 1
        world.cuda.total = PLENTY


def heavy(world: World, bundle: Bundle, folder: Path, weights: dict[str, int]) -> None:
    """New plans, of which the engines take memory."""
    world.store = type(world.store)(folder / "heavy")
    for graph in bundle.graphs:
        recipe = world.trt.recipes[f"{bundle.hash} {graph}"]
        world.build(bundle, graph, replace(recipe, weights=weights.get(graph, 0)))


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaGraphInstantiate"])
def test_keys_that_nobody_uses_make_room_where_it_was_not_known_to_be_short(
    world: World, bundle: Bundle, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """Free memory may lie in pieces, and nobody says beforehand what a CUDA graph takes."""
    with open_session(world, bundle, memory="keep") as session:
        on_device = keep_on_device(session)

        def short(*arguments: Any) -> Any:
            return (2, None) if on_device._entries else getattr(FakeCuda, call)(world.cuda, *arguments)

        setattr(world.cuda, call, short)
        session.generate("a man", steps=STEPS, images=4)
        assert not on_device._entries
        assert "no CUDA graph" not in caplog.text


@pytest.mark.parametrize("bare", [False, True])
def test_the_networks_memory_is_not_given_to_keys(
    world: World, bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, bare: bool
) -> None:
    with open_session(world, bundle) as session:
        man = session.prepare(MAN, steps=40)
    late = ("denoise_step", "vae_decoder", *(("vae_encoder", "reference_kv") if bare else ()))
    heavy(world, bundle, tmp_path, dict.fromkeys(late, man.nbytes))
    rest = man.nbytes // 2 + (2 * row_bytes(bundle) if bare else 0)
    world.cuda.total = len(late) * man.nbytes + rest
    with open_session(world, bundle, memory="auto", keep="1GiB") as session:
        plans: list[Any] = []
        with after_planning(session, plans.append):
            for _ in range(2):
                session.generate("a man", [MAN if bare else man], steps=40)
                assert plans[-1].budget <= rest
        assert [plan.mode for plan in plans] == ["recompute" if bare else "stream"] * 2
        assert "no room" not in caplog.text
    world.cuda.total = PLENTY


# --------------------------------------------------------------------------------------------------- a budget is held


@pytest.mark.parametrize("given", [True, False])
def test_on_a_device_a_request_over_its_budget_computes_no_reference_and_with_a_given_one_loads_no_graph(
    world: World, bundle: Bundle, drawn: Drawn, given: bool
) -> None:
    """Unless it is given, the budget is what the loaded graphs leave free."""
    with open_session(world, bundle, budget=1000 if given else None) as session:
        if not given:
            session.generate("a man", steps=1)
            world.leave(row_bytes(bundle))
            drawn.runs.clear()
        with pytest.raises(BudgetError, match=r"on the device .*budget is"):
            session.generate("a man", [MAN], steps=STEPS)
        assert bool(session._graphs.runners) != given
        assert set(drawn.runs) == (set() if given else {"text_encoder"})
        world.cuda.total = PLENTY
        session.generate("a man", steps=1)


def test_what_earlier_requests_left_counts_in_a_budget(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle) as session:
        kept = {prompt: session.prepare(one, steps=20) for one, prompt in ((MAN, "a man"), (HAT, "a hat"))}
        plans = {prompt: session.plan([one], 20, memory="keep") for prompt, one in kept.items()}
    one_fits = max(plan.peak.device for plan in plans.values())
    both_fit = sum(plan.peak.device for plan in plans.values())
    for budget, left in ((one_fits, 1), (both_fit, 2)):
        with open_session(world, bundle, memory="keep", budget=budget) as session:
            on_device = session._keeper.on_device
            for prompt in ("a man", "a hat", "a man"):
                before = len(world.cuda.uploads())
                session.generate(prompt, [kept[prompt]], steps=20)
                assert on_device.nbytes <= budget
                assert on_device.holds(kept[prompt].references[0].key)
            assert len(on_device._entries) == left
            went_up = len(world.cuda.uploads()) - before
            tensors = 20 * 2 * len(bundle.injection_layers)
            assert (went_up >= tensors) == (left == 1), "what is there and is wanted is not freed"


def test_what_earlier_requests_left_counts_where_keys_are_streamed(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle) as session:
        man, hat = (session.prepare(one, steps=20) for one in (MAN, HAT))
        budget = session.plan([man], 20, memory="keep").peak.device
    with open_session(world, bundle, budget=budget) as session:
        on_device = session._keeper.on_device
        session.generate("a man", [man], steps=20)
        assert on_device.holds(man.references[0].key)
        streamed = session.plan([man, hat], 20)
        assert streamed.mode == "stream"
        session.generate(PROMPT, [man, hat], steps=20)
        assert on_device.nbytes + streamed.peak.device <= budget


# ------------------------------------------------------------------------------------------------ what goes wrong there


def test_a_failed_device_is_no_lack_of_memory(
    world: World, bundle: Bundle, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with open_session(world, bundle, memory="auto") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]

        def failing(_: MemoryPlan) -> None:
            world.cuda.calls.clear()
            world.cuda.fail["cudaMemcpyAsync"] = KERNEL_FAILED

        with (
            after_planning(session, failing),
            pytest.raises(DeviceError, match=r"cudaMemcpyAsync .* error 719") as caught,
        ):
            session.generate(PROMPT, kept, steps=STEPS)
        assert not isinstance(caught.value, DeviceMemoryError)
        assert "streamed" not in caplog.text
        assert world.cuda.count("cudaMemcpyAsync") == 1, "nothing is tried again"
        world.cuda.fail.clear()
        same(session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2).latents, expected.latents)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("device", "graph denoise_step: reference keys needs .* more, and"),
        ("locked", "graph denoise_step: reference keys: CUDA call cudaHostAlloc failed .* Free memory on the host"),
    ],
)
def test_memory_that_runs_out_between_steps_ends_the_request_alone(
    world: World, bundle: Bundle, expected: Any, monkeypatch: pytest.MonkeyPatch, what: str, found: str
) -> None:
    with open_session(world, bundle, memory="stream") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        prepare, done = KeyFeed.prepare, []

        def full(feed: KeyFeed, step: int) -> None:
            """Somebody else takes all that is left while the first step is computed."""
            if what == "device":
                world.leave(0)
            else:
                world.cuda.lockable = world.cuda.locked()
            prepare(feed, step)

        with monkeypatch.context() as patched:
            patched.setattr(KeyFeed, "prepare", full)
            with pytest.raises(DeviceMemoryError, match=found):
                session.generate(PROMPT, kept, steps=STEPS, images=2, progress=lambda p: done.append(p.step))
        assert not done
        world.cuda.total, world.cuda.lockable = PLENTY, None
        same(session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2).latents, expected.latents)


@pytest.mark.parametrize("memory", ["keep", "auto"])
def test_keys_of_which_nothing_can_be_page_locked(
    world: World, bundle: Bundle, expected: Any, caplog: pytest.LogCaptureFixture, memory: str
) -> None:
    with open_session(world, bundle, memory=memory) as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]

        def full(_: MemoryPlan) -> None:
            world.cuda.lockable = world.cuda.locked()

        with (
            after_planning(session, full),
            pytest.raises(DeviceMemoryError, match=r"cudaHostAlloc failed .* Free memory on the host"),
        ):
            session.generate(PROMPT, kept, steps=STEPS, images=2)
        assert ("no room for all steps" in caplog.text) == (memory == "auto")
        assert not session._keeper.on_device._entries
        world.cuda.lockable = None
        same(session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2).latents, expected.latents)


def test_a_larger_request_that_finds_no_room_beside_its_own_keys(world: World, bundle: Bundle, four: Any) -> None:
    with open_session(world, bundle, memory="keep") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        session.generate(PROMPT, kept, steps=STEPS)
        with (
            after_planning(session, lambda plan: world.leave(1000)),
            pytest.raises(DeviceMemoryError, match=r"graph denoise_step(: input \w+)? needs .* more, and"),
        ):
            session.generate(PROMPT, kept, steps=STEPS, images=4)
        world.cuda.total = PLENTY
        same(session.generate(PROMPT, kept, steps=STEPS, seed=7, images=4).latents, four.latents)


def test_keys_are_not_freed_while_they_are_read(
    world: World, bundle: Bundle, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(world, bundle, memory="keep") as session:
        kept = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
        session.generate(PROMPT, kept, steps=STEPS)
        start = KeyFeed.start

        def interrupted(feed: KeyFeed, step: int) -> None:
            start(feed, step)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(KeyFeed, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.generate(PROMPT, kept, steps=STEPS)
        on_device = session._keeper.on_device
        on_device.free_unused()
        assert not on_device._entries
        same(session.generate(PROMPT, kept, steps=STEPS, seed=7, images=2).latents, expected.latents)


# ------------------------------------------------------------------------------------------------ one beside the other


class Slow(Stored):
    """Keys that come when `go_on` is set; then `error` is raised, if there is one."""

    def __init__(self, stored: Stored, error: BaseException | None = None) -> None:
        self.stored = stored
        self.error = error
        self.asked, self.go_on = threading.Event(), threading.Event()

    def put(self, step: int, values: np.ndarray) -> None:
        raise AssertionError("nothing is stored here")

    def step(self, step: int) -> np.ndarray:
        self.asked.set()
        assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error
        return self.stored.step(step)

    def finite_witness(self, step: int) -> np.ndarray:
        return self.stored.finite_witness(step)

    @property
    def arrays(self) -> Any:
        return self.stored.arrays


def slowed(reference: KeptReference, error: BaseException | None = None) -> tuple[KeptReference, Slow]:
    name = min(reference.tensors)
    slow = Slow(reference.tensors[name], error)
    return replace(reference, tensors={**reference.tensors, name: slow}).with_identity(reference.identity), slow


def thread(function: Callable[..., object], *arguments: Any, **options: Any) -> threading.Thread:
    made = threading.Thread(target=function, args=arguments, kwargs=options, daemon=True)
    made.start()
    return made


class Writing(Slow):
    """Its file is written to as it is read."""

    def __init__(self, stored: Stored, file: Path) -> None:
        super().__init__(stored, None)
        self.file = file

    def step(self, step: int) -> np.ndarray:
        if not self.asked.is_set():
            self.asked.set()
            write_other_keys(self.file)
        return self.stored.step(step)


def test_a_file_that_is_written_to_as_its_keys_come_up_leaves_none_of_them(
    world: World, bundle: Bundle, tmp_path: Path
) -> None:
    with open_session(world, bundle, memory="keep") as session:
        man = session.prepare(MAN, steps=STEPS)
        expected = session.generate(PROMPT, [man], steps=STEPS).latents
        session.forget()
        (loaded,) = KeptConcept.load(man.save(tmp_path / "man.concept")).references
        name = min(loaded.tensors)
        tensors = {**loaded.tensors, name: Writing(loaded.tensors[name], tmp_path / "man.concept")}
        (sound,) = man.references
        written = replace(loaded, tensors=tensors).with_identity(sound.identity)
        before = world.cuda.alive()
        with pytest.raises(KeptConceptError, match="was written to since it was loaded"):
            session.generate(PROMPT, [KeptConcept("man", [written], man.origin)], steps=STEPS)
        assert not session.device_kept_bytes
        assert world.cuda.alive()["memory"] == before["memory"]
        same(session.generate(PROMPT, [man], steps=STEPS).latents, expected)


def test_an_upload_holds_up_nobody_else(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle, memory="keep", workers=2) as session:
        man, hat = (session.prepare(concept, steps=STEPS) for concept in (MAN, HAT))
        reference, slow = slowed(man.references[0])
        coming = KeptConcept("man", [reference], man.origin)
        first = thread(session.generate, "a man", [coming], steps=STEPS)
        assert slow.asked.wait(60)
        others = [
            thread(session.plan, [man, hat], STEPS),
            thread(session.generate, "a hat", [hat], steps=STEPS),
            thread(session._keeper.on_device.reclaim, PLENTY),
        ]
        for other in others:
            other.join(60)
        stuck = [other.is_alive() for other in others]
        slow.go_on.set()
        for one in (first, *others):
            one.join(60)
        assert stuck == [False] * 3
        assert session._keeper.on_device.holds(reference.key)


@pytest.mark.parametrize("fails", [False, True])
def test_two_that_want_the_same_keys_bring_them_up_once_unless_that_fails(bundle: Bundle, fails: bool) -> None:
    cuda, on_device = FakeCuda(), OnDevice()
    with Session(bundle, backend=Drawn()) as session:
        reference = session.prepare(MAN, steps=STEPS).references[0]
    slow_reference, slow = slowed(reference, RuntimeError("no more") if fails else None)
    worker_streams = [WorkerStream(Device(0, cuda=cuda)) for _ in range(2)]
    found: list[Any] = []

    def use(number: int, wanted: KeptReference) -> None:
        worker_streams[number].join()
        try:
            with on_device.use(
                wanted, KeyUploader(worker_streams[number], "denoise_step", "reference keys"), bundle, STEPS
            ) as keys:
                ((_, name), array) = next(iter(keys.items()))
                expected = reference.tensors[name].step(0)
                there = cuda.view(array.buffer.address + array.offset, array.nbytes)
                found.append((there == expected.reshape(-1).view(np.uint8)).all())
        except RuntimeError as error:
            found.append(str(error))
        finally:
            worker_streams[number].leave()

    first = thread(use, 0, slow_reference)
    assert slow.asked.wait(60)
    second = thread(use, 1, reference)
    until = time.monotonic() + 60
    while len(on_device._entries[reference.identity].users) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    slow.go_on.set()
    for one in (first, second):
        one.join(60)
    assert sorted(map(str, found)) == (["True", "no more"] if fails else ["True", "True"])
    assert cuda.count("cudaMalloc") == (2 if fails else 1)
    assert [len(entry.users) for entry in on_device._entries.values()] == [0]
    on_device.close()
    assert not cuda.alive()


def test_waiting_for_keys_that_another_brings_up_can_be_cancelled(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle, memory="keep", workers=2) as session:
        man = session.prepare(MAN, steps=STEPS)
        reference, slow = slowed(man.references[0])
        first = thread(session.generate, "a man", [KeptConcept("man", [reference], man.origin)], steps=STEPS)
        assert slow.asked.wait(60)
        told: list[Any] = []

        def cancel(progress: Any) -> bool:
            told.append((progress.stage, progress.step))
            return False

        with pytest.raises(Cancelled):
            session.generate("a man", [man], steps=STEPS, progress=cancel)
        assert told == [("prepare", 0)]
        (entry,) = session._keeper.on_device._entries.values()
        assert len(entry.users) == 1, "only the one that brings them up"
        slow.go_on.set()
        first.join(60)
        assert not entry.users


def test_an_interrupt_at_any_moment_leaves_nobody_waiting_and_nobody_using(bundle: Bundle) -> None:
    with Session(bundle, backend=Drawn()) as session:
        reference = session.prepare(MAN, steps=STEPS).references[0]
    cuda = FakeCuda()
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    for at in range(20):
        on_device = OnDevice()

        def use(on_device: OnDevice = on_device) -> None:
            with on_device.use(reference, KeyUploader(worker_stream, "denoise_step", "reference keys"), bundle, STEPS):
                pass

        interrupting = Interrupting(at)
        on_device._lock = interrupting  # type: ignore[assignment]
        try:
            use()
        except KeyboardInterrupt:
            assert interrupting.came
        interrupting.at = -1  # not from here on
        assert not any(entry.users for entry in on_device._entries.values())
        assert ends(use), f"after the lock was let go {at} times"
        assert len(on_device._entries) == 1
        on_device.close()
        if not interrupting.came:
            break
    assert at == 2
    worker_stream.leave()
    assert not cuda.alive()


# ------------------------------------------------------------------------------------------- which keys are the same


def claiming(hat: KeptConcept, key: str, path: Path, *, check_hashes: bool) -> KeptConcept:
    """A file with the hat's keys that says it were another reference's."""
    references = [replace(hat.references[0], key=key)]
    KeptConcept("hat", references, hat.origin, weight=HAT.weight).save(path, overwrite=True)
    return KeptConcept.load(path, check_hashes=check_hashes)


@pytest.mark.parametrize("checked", [True, False])
def test_a_file_that_claims_the_key_of_another_reference_spoils_no_request(
    world: World, bundle: Bundle, expected: Any, tmp_path: Path, checked: bool
) -> None:
    with open_session(world, bundle, memory="keep") as session:
        man, hat = (session.prepare(one, steps=STEPS) for one in (MAN, HAT))
        claims = claiming(hat, man.references[0].key, tmp_path / "hat.concept", check_hashes=checked)
        for first in (man, claims):
            session._keeper.on_device.free_unused()
            session.generate("a man", [first.renamed("man")], steps=STEPS)
            for _ in range(2):
                made = session.generate(PROMPT, [man, claims], steps=STEPS, seed=7, images=2)
                same(made.latents, expected.latents)
        assert len(session._keeper.on_device._entries) == 2


def test_what_is_sure_to_be_the_same_is_brought_up_once(world: World, bundle: Bundle, tmp_path: Path) -> None:
    with open_session(world, bundle, memory="keep") as session:
        man = session.prepare(MAN, steps=STEPS)
        man.save(tmp_path / "man.concept")
        on_device = session._keeper.on_device
        session.generate(PROMPT, [man, man.renamed("hat")], steps=STEPS)
        session.generate("a man", [session.prepare(MAN, steps=STEPS)], steps=STEPS)
        assert len(on_device._entries) == 1
        for _ in range(2):
            session.generate("a man", [KeptConcept.load(tmp_path / "man.concept")], steps=STEPS)
        assert len(on_device._entries) == 2
        assert session.forget([man.references[0].key])
        assert not on_device._entries


def test_keys_of_another_size_are_refused(bundle: Bundle) -> None:
    with Session(bundle, backend=Drawn()) as session:
        man, hat = (session.prepare(one, steps=STEPS).references[0] for one in (MAN, HAT))
    cuda, on_device = FakeCuda(), OnDevice()
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    with on_device.use(man, KeyUploader(worker_stream, "denoise_step", "reference keys"), bundle, STEPS):
        other = replace(hat).with_identity(man.identity)
        with (
            pytest.raises(KeptConceptError, match=r"on the device have \d+ bytes, and a request wants \d+ bytes"),
            on_device.use(other, KeyUploader(worker_stream, "denoise_step", "reference keys"), bundle, STEPS),
        ):
            raise AssertionError("it was given")
    assert not any(entry.users for entry in on_device._entries.values())
    on_device.close()
    worker_stream.leave()
    assert not cuda.alive()


def test_the_next_steps_keys_are_on_their_way_before_a_step_is_waited_for(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle, memory="stream") as session:
        man = session.prepare(MAN, steps=STEPS)
        session.generate("a man", [man], steps=STEPS)
        worker_stream, up = world.cuda.streams
        world.cuda.calls.clear()
        ahead = []

        def look(_: object) -> None:
            """How many steps' keys had been sent when this step was waited for."""
            calls = world.cuda.calls
            waits = [
                n for n, (name, a) in enumerate(calls) if name == "cudaStreamSynchronize" and a[0] == worker_stream
            ]
            ahead.append(sum(name == "cudaMemcpyAsync" and a[4] == up for name, a in calls[: waits[-1]]))

        session.generate("a man", [man], steps=STEPS, progress=look)
        assert ahead == [*range(2, STEPS + 1), STEPS]
