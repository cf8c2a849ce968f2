"""The TensorRT backend, with stand-ins for CUDA and TensorRT that compute, and a real engine store."""

from __future__ import annotations

import gc
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicface_rt.backends import Binding, TensorRT, runtime_cache
from magicface_rt.backends.device import Device
from magicface_rt.backends.pieces import Piece
from magicface_rt.backends.resident import MAX_CAPTURED, ResidentBinding
from magicface_rt.bundle import GraphContract, Tensor
from magicface_rt.engines.targets import FOLDER, load_target, targets_serving
from magicface_rt.errors import (
    BackendError,
    BackendMissingError,
    DeviceError,
    DeviceMemoryError,
    NonFiniteError,
    PlanError,
    TargetError,
)
from magicface_rt.store_folders import RUNTIME_CACHE
from tests.runtime.fake_cuda import KERNEL_FAILED
from tests.runtime.fake_tensorrt import FakeRuntimeCache, Recipe, TensorLocation
from tests.runtime.fake_world import STEP, SmallBundle, World, small_recipes, source, step

BUNDLE: Any = SmallBundle()
BIAS = np.array([1.0, 2.0], np.float32)
LABEL = np.array([5, 6])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    """After every test, nothing may be left on the device."""
    made = World(monkeypatch, tmp_path)
    for graph, recipe in small_recipes().items():
        made.build(BUNDLE, graph, recipe)
    yield made
    gc.collect()
    assert made.nothing_left(), (made.cuda.alive(), made.trt.alive)


class Loop:
    """`source` and `step` bound beside each other, and what they should compute."""

    def __init__(self, backend: TensorRT, *, images: int = 2, keys: int = 4) -> None:
        self.runners = [backend.load(BUNDLE, name) for name in ("source", "step")]
        self.source = self.runners[0].bind()
        self.step = self.runners[1].bind(["state_out", "label_out"], beside=self.source)
        self.start(images, keys)

    def start(self, images: int = 2, keys: int = 4) -> None:
        self.state = np.zeros((images, 3), np.float32)
        self.label = LABEL[:images]
        self.x = np.arange(keys * 2, dtype=np.float32).reshape(keys, 2)
        self.bias = np.resize(BIAS, images)
        self.step.set("state", self.state)
        self.step.set("label", self.label)
        self.step.set("bias", self.bias)
        self.source.set("x", self.x)

    def run(self, gain: float) -> None:
        self.source.set("gain", np.array([gain], np.float32))
        self.source.run()
        self.step.link("k", self.source, "k")
        self.step.run()
        self.step.feed_back("state", "state_out")
        self.step.feed_back("label", "label_out")
        k = source(self.x, np.array([gain], np.float32))["k"]
        expected = step(self.state, k[None], self.bias, self.label)
        self.state, self.label = expected["state_out"], expected["label_out"]

    def check(self) -> None:
        np.testing.assert_array_equal(self.step.read("state_out"), self.state)
        np.testing.assert_array_equal(self.step.read("label_out"), self.label)

    def close(self) -> None:
        for thing in (self.step, self.source, *self.runners):
            thing.close()


@pytest.fixture
def loop(world: World) -> Iterator[Loop]:
    made = Loop(world.backend())
    yield made
    made.close()


def runs(world: World, graph: str = "step") -> list[Any]:
    return [run for run in world.trt.runs if run.graph == graph]


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_loop_computes_what_it_should(world: World, cuda_graphs: bool) -> None:
    loop = Loop(world.backend(cuda_graphs=cuda_graphs))
    for number in range(7):
        loop.run(float(number))
    loop.check()
    assert (world.cuda.count("cudaGraphLaunch") > 0) is cuda_graphs
    loop.close()


def test_a_single_run_is_a_run_of_host_arrays(world: World) -> None:
    runner = world.backend().load(BUNDLE, "step")
    inputs = {"state": np.ones((1, 3), np.float32), "k": np.ones((1, 2, 2), np.float32)}
    inputs |= {"bias": BIAS[:1], "label": LABEL[:1]}
    for _ in range(2):
        found = runner.run(inputs)
        for name, array in step(**inputs).items():
            np.testing.assert_array_equal(found[name], array)
    assert runner.run(inputs, ["seen"]).keys() == {"seen"}
    runner.close()


def test_runs_from_several_threads_do_not_mix(world: World) -> None:
    runner = world.backend().load(BUNDLE, "source")
    found = {}

    def work(number: int) -> None:
        x = np.full((number + 1, 2), number, np.float32)
        found[number] = runner.run({"x": x, "gain": np.ones(1, np.float32)})["k"]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[n] == n).all() and len(found[n]) == n + 1 for n in range(6))
    runner.close()


def test_sixteen_bits_that_numpy_lacks_travel_as_they_are(world: World) -> None:
    contract = GraphContract("step", (Tensor("a", "bfloat16", ("B",)),), (Tensor("b", "bfloat16", ("B",)),), {})
    bundle: Any = SmallBundle()
    bundle.hash, bundle.graphs = "bf16", {"step": contract}
    world.build(bundle, "step", Recipe(contract, lambda arrays: {"b": arrays["a"][::-1]}))
    runner = world.backend().load(bundle, "step")
    bits = np.array([0x3F80, 0x4000], np.uint16)
    assert (runner.run({"a": bits})["b"] == bits[::-1]).all()
    with pytest.raises(NonFiniteError, match="graph step: 1 of 2 values of b"):
        runner.run({"a": np.array([0x7F80, 0], np.uint16)})
    runner.close()


# -------------------------------------------------------------------------------------------------- calls and order


def test_only_what_changes_goes_up_and_nothing_comes_down(world: World, loop: Loop) -> None:
    loop.run(1.0)
    loop.run(2.0)
    before = world.cuda.uploads(), world.cuda.downloads()
    for number in range(4):
        loop.run(float(number))
    gain = loop.source._slots["gain"].buffer
    assert gain is not None
    assert world.cuda.uploads()[len(before[0]) :] == [gain.address] * 4
    assert world.cuda.downloads() == before[1] == []
    loop.check()


def test_state_ping_pongs_between_two_buffers(world: World, loop: Loop) -> None:
    for number in range(6):
        loop.run(float(number))
    loop.check()
    pairs = [(run.addresses["state"], run.addresses["state_out"]) for run in runs(world)]
    assert len(set(pairs)) == 2
    assert all(later == (out, into) for (into, out), later in pairwise(pairs))


def test_keys_are_read_where_they_were_written(world: World, loop: Loop) -> None:
    loop.run(1.0)
    loop.check()
    assert runs(world)[0].addresses["k"] == runs(world, "source")[0].addresses["k"]


def test_shapes_and_addresses_are_set_when_they_change_only(world: World) -> None:
    loop = Loop(world.backend(cuda_graphs=False))
    loop.run(1.0)
    assert isinstance(loop.step, ResidentBinding)
    context: Any = loop.step._free[0].executor._context  # type: ignore[attr-defined]
    context.calls.clear()
    loop.run(2.0)
    changed = ["address state", "address label", "address state_out", "address label_out", "enqueue"]
    assert sorted(context.calls) == sorted(changed)
    context.calls.clear()
    loop.source.run()
    loop.step.run()
    assert sorted(context.calls) == sorted(changed)
    loop.close()


def test_a_step_is_captured_after_a_run_and_then_replayed(world: World, loop: Loop) -> None:
    for number in range(10):
        loop.run(float(number))
    loop.check()
    # A run and a capture for each direction of the ping-pong: a captured graph has its context for itself.
    assert [run.captured for run in runs(world)] == [False, True, False] + [True] * 7
    assert world.trt.enqueued.count("step") == 4
    assert world.trt.enqueued.count("source") == 2


def test_other_shapes_are_captured_anew_and_the_first_are_still_there(world: World, loop: Loop) -> None:
    for number in range(5):
        loop.run(float(number))
    loop.check()
    loop.start(images=1, keys=4)  # less: nothing moves
    for number in range(5):
        loop.run(float(number))
    loop.check()
    assert [run.captured for run in runs(world)][5:] == [False, True, False, True, True]
    assert not world.cuda.count("cudaGraphExecDestroy")
    before = world.trt.enqueued.count("step")
    loop.start(images=2, keys=4)
    loop.run(1.0)
    loop.run(1.0)
    loop.check()
    assert world.trt.enqueued.count("step") == before


def test_captured_steps_are_dropped_when_a_buffer_moves(world: World, loop: Loop) -> None:
    for number in range(5):
        loop.run(float(number))
    loop.check()
    held, contexts = len(world.cuda.executables), len(world.trt.alive)
    assert held == 3
    loop.start(images=2, keys=60)  # more keys: the buffer behind k moves
    loop.run(1.0)
    loop.check()
    assert world.cuda.count("cudaGraphExecDestroy") == held
    for number in range(5):
        loop.run(float(number))
    loop.check()
    assert runs(world)[-1].captured
    assert len(world.trt.alive) == contexts, "their contexts are used again"


def test_few_captured_steps_are_kept(world: World, loop: Loop) -> None:
    before = len(world.trt.alive)
    for keys in (*range(64, 40, -1), 64):
        loop.start(keys=keys)
        for number in range(3):
            loop.run(float(number))
        loop.check()
    assert len(world.cuda.executables) <= 2 * MAX_CAPTURED
    assert len(world.trt.alive) - before <= 2 * MAX_CAPTURED  # the first context of each of the two is there before


def test_a_context_is_not_changed_while_what_was_captured_from_it_runs(world: World, loop: Loop) -> None:
    """Nothing waits for the steps in between."""
    alive = len(world.trt.alive)
    loop.run(1.0)
    loop.step.run()
    world.trt.refuse_contexts = True
    for _ in range(6):
        loop.step.run()
    loop.step.wait()
    assert len(world.trt.alive) == alive, "memory was short, and contexts that nobody uses hold some"


def test_without_room_for_one_more_context_it_runs_without_and_says_so_once(
    world: World, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        loop.run(float(number))
    world.trt.refuse_contexts = True
    for number in range(6):
        loop.run(float(number))
    loop.check()
    loop.start(images=1)
    loop.run(1.0)
    loop.check()
    assert [run.captured for run in runs(world)] == [False, True] + [False] * 7
    assert len([r for r in caplog.records if r.message.startswith("graph step: CUDA graphs need one more")]) == 1


def test_where_nothing_can_be_captured_it_runs_without(
    world: World, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    world.cuda.fail["cudaGraphInstantiate"] = 1
    for number in range(4):
        loop.run(float(number))
    loop.check()
    assert not any(run.captured for run in runs(world))
    assert len([r for r in caplog.records if "graph step: no CUDA graph" in r.message]) == 1


def test_where_the_runtime_refuses_to_be_captured_it_runs_without_and_says_so_once(
    world: World, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    world.trt.capturable = False
    for number in range(5):
        loop.run(float(number))
    loop.check()
    assert [run.captured for run in runs(world)] == [False] * 5
    assert not world.cuda.count("cudaStreamBeginCapture")
    said = [r.message for r in caplog.records if r.message.startswith("graph step:")]
    assert said == ["graph step: the runtime says that no CUDA graph of it can be captured."]
    world.trt.capturable = True  # it may become so, when kernels have been compiled
    loop.run(1.0)
    loop.check()
    assert runs(world)[-1].captured


def test_graphs_of_one_worker_share_a_stream_and_scratch(world: World, loop: Loop) -> None:
    loop.run(1.0)
    loop.check()
    assert len(world.cuda.streams) == 1
    assert [len(block) for block in world.cuda.memory.values()].count(4096) == 1


def test_scratch_that_grew_for_another_graph_is_handed_over(world: World) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "uneven"
    recipes = small_recipes()
    recipes["step"].scratch = 1 << 16
    for name, recipe in recipes.items():
        world.build(bundle, name, recipe)
    backend = world.backend()
    runners = [backend.load(bundle, name) for name in ("source", "step")]
    first = runners[0].bind()
    inputs = {"x": np.ones((2, 2), np.float32), "gain": np.ones(1, np.float32)}
    for _ in range(3):
        first.once(inputs)
    second = runners[1].bind(beside=first)
    for _ in range(3):
        np.testing.assert_array_equal(first.once(inputs)["k"], inputs["x"])
    assert [run.captured for run in runs(world, "source")] == [False, True, True, True, True, True]
    assert world.trt.enqueued == ["source"] * 3, "the capture was dropped, and made again with the new memory"
    for thing in (second, first, *runners):
        thing.close()


def test_workers_have_streams_and_memory_of_their_own(world: World) -> None:
    backend = world.backend()
    loops = [Loop(backend), Loop(backend)]
    for number in range(4):
        loops[0].run(float(number))
        loops[1].run(float(-number))
    for loop in loops:
        loop.check()
    assert len(world.cuda.streams) == 2
    with pytest.raises(BackendError, match="cannot read k of graph source in place"):
        loops[0].step.link("k", loops[1].source, "k")
    for loop in loops:
        loop.close()


def test_every_thread_that_calls_is_given_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, devices=2)
    for graph, recipe in small_recipes().items():
        world.build(BUNDLE, graph, recipe)

    def elsewhere(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """In a thread of its own, in which other code chose device 0."""
        found, errors = [], []

        def work() -> None:
            Device(0)
            try:
                found.append(function(*arguments, **options))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return found[0]

    backend = world.backend(device=1)
    runners = [elsewhere(backend.load, BUNDLE, name) for name in ("source", "step")]
    first = elsewhere(runners[0].bind)
    second = elsewhere(runners[1].bind, beside=first)
    x, gain = np.ones((4, 2), np.float32), np.ones(1, np.float32)
    inputs = {"state": np.zeros((1, 3), np.float32), "bias": BIAS[:1], "label": LABEL[:1]}
    for _ in range(3):
        for name, array in (("x", x), ("gain", gain)):
            elsewhere(first.set, name, array)
        for name, array in inputs.items():
            elsewhere(second.set, name, array)
        elsewhere(first.run)
        elsewhere(second.lay, "k", (1, 4, 2), [Piece(0, 0, 4, x)])
        elsewhere(second.run)
        elsewhere(second.wait)
        np.testing.assert_array_equal(
            elsewhere(second.read, "state_out"),
            step(k=x[None], **inputs)["state_out"],  # type: ignore[arg-type]
        )
    assert runs(world)[-1].captured
    assert {world.cuda.owners[stream] for stream in world.cuda.streams} == {1}
    for thing in (second, first, *runners, backend):
        elsewhere(thing.close)
    gc.collect()
    assert world.nothing_left()


def test_contexts_of_a_plan_are_made_one_at_a_time(world: World) -> None:
    runner = world.backend().load(BUNDLE, "step")
    inside, most, ready = [0], [0], threading.Barrier(3)

    def making() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        inside[0] -= 1

    world.trt.making = making
    bindings: list[Binding] = []

    def work() -> None:
        ready.wait(timeout=30)
        bindings.append(runner.bind())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(bindings), most[0]) == (3, 1)
    assert len(world.trt.caches) == 1, "and they share one runtime cache"
    for binding in bindings:
        binding.close()
    runner.close()


def test_the_last_binding_of_a_worker_frees_what_they_shared(world: World) -> None:
    loop = Loop(world.backend())
    loop.run(1.0)
    loop.source.close()
    assert world.cuda.alive()["streams"] == 1
    loop.step.close()
    assert not world.cuda.alive()
    loop.step.close()
    loop.close()
    with pytest.raises(BackendError, match="was closed; bind the graph again"):
        loop.step.run()
    with pytest.raises(BackendError, match="it was closed"):
        loop.runners[0].bind()


# ----------------------------------------------------------------------------------------------------- what is refused


def test_a_request_outside_the_profile_is_refused_before_anything_is_enqueued(world: World, loop: Loop) -> None:
    with pytest.raises(
        BackendError, match=r"graph source: input x is float32\[65, 2\], .* M from 1 to 64 \(axis 0\), found 65"
    ):
        loop.source.set("x", np.zeros((65, 2), np.float32))
    with pytest.raises(BackendError, match="B from 1 to 4"):
        loop.start(images=5)
    assert not world.trt.enqueued
    loop.start()
    loop.run(1.0)
    loop.check()


def test_a_linked_input_outside_the_profile_is_refused_too(world: World) -> None:
    recipes = small_recipes()
    recipes["step"].ranges["M"] = (1, 8)
    bundle: Any = SmallBundle()
    bundle.hash = "narrow"
    for name, recipe in recipes.items():
        world.build(bundle, name, recipe)
    backend = world.backend()
    runners = [backend.load(bundle, name) for name in ("source", "step")]
    first = runners[0].bind()
    second = runners[1].bind(beside=first)
    first.set("x", np.zeros((9, 2), np.float32))
    first.set("gain", np.zeros(1, np.float32))
    first.run()
    for name, array in (("state", np.zeros((1, 3), np.float32)), ("bias", BIAS[:1]), ("label", LABEL[:1])):
        second.set(name, array)
    second.link("k", first, "k")
    with pytest.raises(BackendError, match=r"input k is float32\[1, 9, 2\].*M from 1 to 8"):
        second.run()
    assert world.trt.enqueued == ["source"]
    for thing in (second, first, *runners):
        thing.close()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda b: b.set("other", BIAS), "unknown input 'other'"),
        (lambda b: b.set("bias", BIAS.astype(np.float64)), "input bias is float64"),
        (lambda b: b.set("state", np.zeros((2, 4), np.float32)), r"input state is float32\[2, 4\], expected"),
        (lambda b: (b.set("bias", BIAS[:1]), b.run()), r"input .* with B = "),
        (lambda b: b.feed_back("state", "seen"), "no seen of a run before"),
        (lambda b: b.feed_back("bias", "state_out"), "cannot be fed back"),
        (lambda b: b.read("eps"), "no eps of a run before"),
    ],
)
def test_wrong_use_is_named_and_nothing_is_enqueued(
    world: World, loop: Loop, change: Callable[[Binding], object], found: str
) -> None:
    loop.run(1.0)
    before = len(world.trt.enqueued)
    with pytest.raises(BackendError, match=found):
        change(loop.step)
    assert len(world.trt.enqueued) == before


def test_a_missing_input_is_named(world: World) -> None:
    runner = world.backend().load(BUNDLE, "step")
    binding = runner.bind()
    binding.set("bias", BIAS)
    with pytest.raises(BackendError, match=r"missing inputs \['k', 'label', 'state'\]"):
        binding.run()
    with pytest.raises(BackendError, match="there is no state_out of a run before"):
        binding.feed_back("state", "state_out")
    binding.close()
    runner.close()


def test_outputs_that_the_plan_left_out_are_named(world: World) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "lean"
    lean = GraphContract("step", STEP.inputs, STEP.outputs[:2], {})
    world.build(bundle, "step", Recipe(lean, lambda a: step(**a)))
    runner = world.backend().load(bundle, "step")
    binding = runner.bind()
    assert binding.outputs == ("state_out", "label_out")
    inputs = {"state": np.ones((1, 3), np.float32), "k": np.ones((1, 2, 2), np.float32)}
    inputs |= {"bias": BIAS[:1], "label": LABEL[:1]}
    assert runner.run(inputs).keys() == {"state_out", "label_out"}
    for use in (lambda: runner.bind(["seen"]), lambda: runner.run(inputs, ["seen"])):
        with pytest.raises(BackendError, match=r"the plan does not have the outputs \['seen'\], only"):
            use()
    binding.close()
    runner.close()


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (
            {"capability": "12.0"},
            r"capability 8\.6, 8\.9, and device 0 \(compute capability 8\.9\).* It said: a reason .* remove "
            r"/.*/[0-9a-f]+, and build it here: `magicface-rt build small --flavour tensorrt-rtx --target rtx-4090 ",
        ),
        ({"location": TensorLocation.HOST}, "contract .* on the device"),
        ({"contract": GraphContract("step", STEP.inputs[:1], (), {})}, "it has no outputs"),
        (
            {"contract": GraphContract("step", (Tensor("bias", "float16", ("B",)),), STEP.outputs, {})},
            "it has bias float16, and the bundle's contract bias float32",
        ),
        (
            {"contract": GraphContract("step", (Tensor("new", "float32", ("B",)),), STEP.outputs, {})},
            "it has new float32, and the bundle's contract one of",
        ),
    ],
)
def test_a_plan_for_another_gpu_or_bundle_is_refused(world: World, recipe: dict[str, Any], found: str) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "other"
    world.build(bundle, "step", Recipe(**{"contract": STEP, "compute": lambda a: step(**a), **recipe}))
    with pytest.raises(PlanError, match=found):
        world.backend().load(bundle, "step")


def test_a_missing_plan_is_an_error_and_a_damaged_one_is_not_deserialised(world: World) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "never built"
    with pytest.raises(PlanError, match="no plan for graph step"):
        world.backend().load(bundle, "step")
    (plan,) = (p for p in world.store.plans() if p.key.graph == "step")
    plan.path.write_bytes(b"small stem")
    with pytest.raises(PlanError):
        world.backend().load(BUNDLE, "step")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_plan_is_built_again_where_that_is_allowed(world: World, damage: str) -> None:
    (plan,) = (p for p in world.store.plans() if p.key.graph == "step")
    content = plan.path.read_bytes()
    if damage == "manifest":
        (plan.folder / "manifest.json").write_text("{}")
    elif damage == "remove":
        plan.path.unlink()
    else:
        plan.path.write_bytes(content[:-1] + (b"?" if damage == "flip" else b""))
    with pytest.raises(PlanError):
        world.backend().load(BUNDLE, "step")
    assert not world.built
    runner = world.backend(build_missing=True).load(BUNDLE, "step")
    assert world.built == ["step"]
    runner.close()
    world.backend().load(BUNDLE, "step").close()


def test_a_bundle_is_checked_before_anything_is_loaded(world: World) -> None:
    world.backend().check(BUNDLE)
    world.cuda.total = 4000
    (needed,) = [f"{(4096 + sum(p.bytes for p in world.store.plans())) / 1e6:.1f} MB"]
    with pytest.raises(DeviceError, match=rf"bundle small .* at least 0\.0 MB .* needs {needed} more, and 0\.0 MB of"):
        world.backend().check(BUNDLE)
    world.cuda.total = 10**9
    bundle: Any = SmallBundle()
    bundle.hash = "never built"
    with pytest.raises(PlanError, match="no plan for graph source"):
        world.backend().check(bundle)
    world.backend(build_missing=True).check(bundle)
    with pytest.raises(TargetError):
        world.backend(target="abacus").check(BUNDLE)
    assert not world.built
    assert not world.trt.alive


def test_a_plan_for_any_target_that_this_gpu_can_load_serves(world: World) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "wide"
    names = targets_serving(world.flavour, "8.9")
    wide = load_target(next(name for name in names if name != world.target().name))
    world.build(bundle, "step", small_recipes()["step"], wide)
    world.backend().load(bundle, "step").close()
    world.backend(target=wide.name).load(bundle, "step").close()
    world.backend(target=wide).load(bundle, "step").close()
    with pytest.raises(PlanError, match="no plan for graph step"):
        world.backend(target=world.target()).load(bundle, "step")
    with pytest.raises(TargetError, match="not known"):
        world.backend(target="abacus").load(bundle, "step")


@pytest.mark.parametrize("kind", ["own", "old"])
def test_the_command_of_an_error_builds_the_plan_that_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    world = World(monkeypatch, tmp_path, capability=(7, 5) if kind == "old" else (8, 9))
    bundle: Any = SmallBundle()
    options = {}
    if kind == "own":
        mine = tmp_path / "my own.toml"
        mine.write_text((FOLDER / "rtx-4090.toml").read_text())
        options = {"target": mine}

    def key_of(refused: PlanError) -> Any:
        (command,) = re.findall("`(magicface-rt build .*?)`", str(refused))
        words = shlex.split(command)
        named = {name: words[words.index(name) + 1] for name in ("--flavour", "--target", "--store")}
        assert words[2] == str(bundle.path)
        assert named["--store"] == str(world.store.root)
        target = load_target(named["--target"], named["--flavour"])
        return world.plan_key(bundle, "step", world._load_flavour(named["--flavour"]), target)

    backend = world.backend(**options)
    with pytest.raises(PlanError, match="no plan for graph step") as missing:
        backend.find(bundle, "step")
    wanted = load_target(options["target"]) if options else world.target()
    expected = world.plan_key(bundle, "step", backend.flavour, wanted)
    assert key_of(missing.value) == expected
    world.build(bundle, "step", small_recipes()["step"], wanted)
    (plan,) = world.store.plans()
    plan.path.write_bytes(b"?" * plan.bytes)
    with pytest.raises(PlanError, match="Build it again") as damaged:
        backend.load(bundle, "step")
    assert key_of(damaged.value) == expected


def test_the_command_names_the_gpu_that_is_not_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, devices=2)
    with pytest.raises(PlanError, match=r"--store \S+ --device 1`"):
        world.backend(device=1).find(BUNDLE, "step")


def test_plans_of_one_target_serve_all_graphs_where_they_are_complete(world: World) -> None:
    """Targets differ in how many tokens their plans take, and what one graph made goes into the other."""
    bundle: Any = SmallBundle()
    bundle.hash = "two targets"
    names = targets_serving(world.flavour, "8.9")
    wide = load_target(next(name for name in names if name != world.target().name))
    for graph in bundle.graphs:
        world.build(bundle, graph, small_recipes()[graph], wide)
    world.build(bundle, "step", small_recipes()["step"])  # of the narrower target, not all
    made_for = {plan.folder: plan.key.builder_options["target"] for plan in world.store.plans()}
    found = [made_for[world.backend().find(bundle, graph).folder] for graph in bundle.graphs]
    assert found == [wide.name, wide.name]
    world.build(bundle, "source", small_recipes()["source"])
    made_for |= {plan.folder: plan.key.builder_options["target"] for plan in world.store.plans()}
    found = [made_for[world.backend().find(bundle, graph).folder] for graph in bundle.graphs]
    assert found == [world.target().name] * 2


def test_a_plan_that_there_is_no_memory_for_is_not_called_unfit(world: World) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "heavy"
    world.build(bundle, "step", Recipe(STEP, lambda a: step(**a), weights=10**5))
    world.trt.beside_weights = world.cuda.total
    with pytest.raises(DeviceMemoryError, match=r"has too little memory for it \(0\.1 MB, and .*out of memory"):
        world.backend().load(bundle, "step")
    world.trt.beside_weights = 0
    world.backend().load(bundle, "step").close()


def test_a_plan_that_is_served_is_not_pruned(world: World) -> None:
    runner = world.backend().load(BUNDLE, "step")
    world.store.size_limit = 0
    world.store.prune()
    assert [plan.key.graph for plan in world.store.plans()] == ["step"]
    runner.close()
    world.store.prune()
    assert not world.store.plans()


def test_too_little_memory_is_refused_before_anything_is_allocated(world: World) -> None:
    bundle: Any = SmallBundle()
    bundle.hash = "large"
    world.build(bundle, "step", Recipe(STEP, lambda a: step(**a), scratch=9 * 10**9))
    runner = world.backend().load(bundle, "step")
    with pytest.raises(DeviceError, match=r"graph step needs 9,000\.0 MB more, and 8,000\.0 MB of 8,000"):
        runner.bind()
    assert not world.cuda.count("cudaMalloc")
    runner.close()
    world.cuda.total = 5
    with pytest.raises(DeviceError, match="plan of graph source needs"):
        world.backend().load(BUNDLE, "source")
    world.cuda.total = 10**9


def test_what_does_not_fit_at_a_request_names_the_graph(world: World, loop: Loop) -> None:
    loop.run(1.0)
    world.cuda.total = world.cuda.allocated() + 100
    loop.source.wait()
    with pytest.raises(DeviceError, match="graph source: input x needs"):
        loop.source.set("x", np.zeros((60, 2), np.float32))


# -------------------------------------------------------------------------------------------- when something goes wrong


@pytest.mark.parametrize(
    "call", ["cudaStreamCreateWithFlags", "cudaEventCreateWithFlags", "cudaMalloc", "cudaMemGetInfo"]
)
def test_a_bind_that_fails_half_way_leaves_nothing(world: World, call: str) -> None:
    runner = world.backend().load(BUNDLE, "step")
    world.cuda.fail[call] = 2
    with pytest.raises(DeviceError, match=call):
        runner.bind()
    world.cuda.fail.clear()
    assert not world.cuda.alive()
    runner.close()


def test_a_context_that_cannot_be_made_leaves_nothing(world: World) -> None:
    runner = world.backend().load(BUNDLE, "step")
    world.trt.refuse_contexts = True
    world.trt.logger.errors = ["about something else"]
    with pytest.raises(BackendError, match=r"graph step: tensorrt-rtx could not make .* context\. It said: a reason$"):
        runner.bind()
    assert not world.cuda.alive()
    runner.close()


def test_an_enqueue_that_fails_in_the_middle_is_named_and_everything_is_freed(world: World) -> None:
    loop = Loop(world.backend(cuda_graphs=False))
    loop.run(1.0)
    world.trt.fail_enqueue_after = 3
    loop.run(2.0)
    with pytest.raises(DeviceError, match=r"graph step: it could not be enqueued\. It said: a reason$"):
        loop.run(3.0)
    with pytest.raises(BackendError, match="of a run before"):
        loop.step.read("state_out")
    loop.close()


def test_a_failure_on_the_device_names_the_graphs_and_everything_is_freed(world: World) -> None:
    loop = Loop(world.backend())
    loop.run(1.0)
    loop.step.wait()
    loop.run(2.0)
    world.cuda.kernel_error = KERNEL_FAILED
    with pytest.raises(DeviceError, match="graph source or step failed on the device"):
        loop.step.wait()
    loop.close()


def test_a_failure_while_freeing_is_logged_and_the_rest_is_freed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(world.backend())
    loop.run(1.0)
    world.cuda.fail["cudaEventDestroy"] = 1
    loop.close()
    world.cuda.fail.clear()
    assert world.cuda.alive().keys() == {"events"}
    assert "cudaEventDestroy failed" in caplog.text
    world.cuda.events.clear()


def test_what_is_not_finite_is_found_by_looking(world: World, loop: Loop) -> None:
    loop.run(float("nan"))
    with pytest.raises(NonFiniteError, match="graph source: 8 of 8 values of k"):
        loop.source.check()
    with pytest.raises(NonFiniteError, match="graph step: 6 of 6 values of state_out"):
        loop.step.check()


# ------------------------------------------------------------------------------------------- the flavours' differences


def test_tensorrt_has_no_runtime_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, tmp_path, flavour="tensorrt")
    for graph, recipe in small_recipes().items():
        world.build(BUNDLE, graph, recipe)
    loop = Loop(world.backend())
    loop.run(1.0)
    loop.check()
    loop.close()
    assert not world.trt.configs
    assert not (world.store.root / RUNTIME_CACHE).exists()
    with pytest.raises(BackendMissingError, match="tensorrt-rtx"):
        TensorRT("tensorrt-rtx", store=world.store)


@pytest.mark.parametrize(("cuda_graphs", "strategy"), [(True, "EAGER"), (False, "LAZY")])
def test_kernels_are_final_before_they_are_captured(world: World, cuda_graphs: bool, strategy: str) -> None:
    loop = Loop(world.backend(cuda_graphs=cuda_graphs))
    loop.close()
    for config in world.trt.configs:
        assert config.cuda_graph_strategy.name == "DISABLED"
        assert config.dynamic_shapes_kernel_specialization_strategy.name == strategy


def files(world: World) -> list[Path]:
    return sorted((world.store.root / RUNTIME_CACHE).glob("*"))


def compile_and_close(world: World, content: bytes = b"kernels of step") -> None:
    runner = world.backend().load(BUNDLE, "step")
    binding = runner.bind()
    world.trt.caches[-1].content = content
    binding.close()
    runner.close()


def test_a_runtime_cache_that_is_refused_is_said(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The library says so by False alone, and would compile at every start."""
    Loop(world.backend()).close()
    assert not caplog.records
    world.trt.takes_caches = False
    Loop(world.backend()).close()
    assert "graph step: tensorrt-rtx keeps nothing of what it compiles" in caplog.text


def test_what_was_compiled_is_kept_for_the_next_start(world: World) -> None:
    compile_and_close(world)
    (path,) = files(world)
    assert "sm8.9-driver13.2-1.7.1" in path.name
    assert path.stat().st_mode & 0o77 == 0
    runner = world.backend().load(BUNDLE, "step")
    bindings = [runner.bind(), runner.bind()]
    assert world.trt.caches[-1].content == b"kernels of step"
    assert len(world.trt.caches) == 2, "contexts of one plan share its cache"
    for binding in bindings:
        binding.close()
    before = path.stat().st_mtime_ns
    runner.close()
    assert path.stat().st_mtime_ns == before, "nothing new was compiled"


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "foreign"])
def test_a_cache_that_cannot_be_used_is_replaced_with_a_warning(
    world: World, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    compile_and_close(world, b"other" if damage == "foreign" else b"kernels of step")
    (path,) = files(world)
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage != "foreign":
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    with caplog.at_level(logging.WARNING, "magicface_rt.tensorrt"):
        compile_and_close(world, b"kernels compiled again")
    assert "runtime cache" in caplog.text
    assert files(world) == [path]
    assert path.read_bytes().endswith(b"kernels compiled again")


def test_a_store_that_cannot_be_written_is_no_error(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    compile_and_close(world)
    assert "cannot be written" in caplog.text
    assert files(world) == []


def test_what_was_compiled_is_kept_as_soon_as_it_is_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(runtime_cache, "monotonic", lambda: clock[0])
    runner = world.backend().load(BUNDLE, "source")
    binding = runner.bind()
    (cache,) = world.trt.caches

    def run(kernels: bytes, rows: int) -> bytes:
        cache.content = kernels
        binding.once({"x": np.zeros((rows, 2), np.float32), "gain": np.ones(1, np.float32)})
        return files(world)[0].read_bytes()[32:] if files(world) else b""

    assert run(b"kernels a", 2) == b"kernels a"
    assert run(b"kernels a late", 2) == b"kernels a", "nothing is compiled for shapes that ran before"
    assert run(b"kernels a b", 3) == b"kernels a", "not at every new shape"
    clock[0] += runtime_cache.SAVED_AT_MOST_EVERY + 1
    assert run(b"kernels a b", 4) == b"kernels a b"
    cache.content = b"kernels a b c"
    binding.close()
    runner.close()
    assert files(world)[0].read_bytes().endswith(b"kernels a b c")


@pytest.mark.parametrize("replaces", [False, True])
def test_what_another_process_compiled_meanwhile_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """`replaces`: a library that does not add to a cache what it reads."""
    monkeypatch.setattr(FakeRuntimeCache, "replaces", replaces)
    runners = [world.backend().load(BUNDLE, "step") for _ in range(2)]
    bindings = [runner.bind() for runner in runners]
    for cache, content in zip(world.trt.caches, (b"kernels many and long", b"kernels few"), strict=True):
        cache.content = content
    for binding, runner in zip(bindings, runners, strict=True):
        binding.close()
        runner.close()
    found = set(files(world)[0].read_bytes()[32:].split())
    assert found == {b"kernels", b"many", b"and", b"long"} | (set() if replaces else {b"few"})
    compile_and_close(world, b"kernels few many and long more")
    assert set(files(world)[0].read_bytes()[32:].split()) == {b"kernels", b"few", b"many", b"and", b"long", b"more"}
