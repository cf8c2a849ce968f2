"""A whole Session over the stand-in for TensorRT, which computes the tiny bundle's graphs on stand-in device memory."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from magicface_rt import Cancelled, Concept, NonFiniteError, Progress, Reference, Session, SessionClosedError
from magicface_rt.backends import Backend, GraphRunner, TensorRT
from magicface_rt.backends.host import from_bfloat16, to_bfloat16
from magicface_rt.backends.onnxruntime import DeviceRunner, import_onnxruntime
from magicface_rt.backends.ort_binding import GraphIds
from magicface_rt.bundle import Bundle, GraphContract, Tensor
from magicface_rt.errors import BackendError, BackendMissingError, DeviceError, OptionError, PlanError
from tests.runtime.fake_cuda import KERNEL_FAILED
from tests.runtime.fake_tensorrt import Recipe, bundle_recipe
from tests.runtime.fake_world import FLAVOUR, World

PROMPT = "a man with a hat"


def concept(word: str, seed: int, box: tuple[int, int, int, int]) -> Concept:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    picture = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
    return Concept(word, Reference(picture, mask=mask, prompt=f"a {word}"), weight=2.5)


MAN, HAT = concept("man", 1, (10, 20, 80, 90)), concept("hat", 2, (20, 5, 90, 60))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle) -> Iterator[World]:
    """After every test, nothing may be left on the device."""
    made = World(monkeypatch, tmp_path)
    made.build_all(bundle)
    yield made
    gc.collect()
    assert made.nothing_left(), (made.cuda.alive(), made.trt.alive)


def open_session(world: World, bundle: Bundle, **options: Any) -> Session:
    return Session(bundle, **{"backend": FLAVOUR, "store": world.store, **options})


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Any:
    with Session(bundle, backend="onnxruntime-cpu") as session:
        return session.generate(PROMPT, [MAN, HAT], steps=5, images=2, seed=7)


def test_it_makes_what_the_cpu_makes(world: World, bundle: Bundle, expected: Any) -> None:
    with open_session(world, bundle) as session:
        uploads: list[int] = []
        downloads: list[int] = []

        def look(progress: Progress) -> None:
            uploads.append(len(world.cuda.uploads()))
            downloads.append(len(world.cuda.downloads()))

        made = session.generate(PROMPT, [MAN, HAT], steps=5, images=2, seed=7, progress=look)
        np.testing.assert_array_equal(made.latents, expected.latents)
        np.testing.assert_array_equal(made.regions, expected.regions)
        assert made.backend == FLAVOUR
        assert [np.asarray(a).tolist() for a in made.images] == [np.asarray(a).tolist() for a in expected.images]
        # Steps 0 to 2 see all references and steps 3 and 4 their regions. Up go the noised references with their
        # timestep, the timestep and two coefficients; at the switch the keys' group, bias and scale as well.
        grids = len(bundle.factors)
        assert np.diff(uploads).tolist() == [4, 4, 4 + 3 * grids, 4]
        assert len(set(downloads)) == 1, "nothing comes down between the first noise and the last latents"
        assert made.timings.reference_pass > 0
        assert made.timings.denoising > 0

        # The second request finds everything in place: the same picture, with nothing new captured or allocated.
        calls = {name: world.cuda.count(name) for name in ("cudaMalloc", "cudaHostAlloc")}
        again = session.generate(PROMPT, [MAN, HAT], steps=5, images=2, seed=7)
        np.testing.assert_array_equal(again.latents, expected.latents)
        assert calls == {name: world.cuda.count(name) for name in calls}
        steps = [run for run in world.trt.runs if run.graph == "denoise_step"]
        assert [run.captured for run in steps] == [False, True, False, True, False] + [True] * 5
        assert len(world.cuda.streams) == 1


class OrtValues(Backend):
    """ONNX Runtime as its GPU providers are driven, on the CPU: IOBinding, OrtValues, numbers for CUDA graphs."""

    name = "ort-values"

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        ort, contract = import_onnxruntime(), bundle.graph(graph)
        path = bundle.path / contract.files["onnxruntime"]
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return DeviceRunner(contract, session, ort, ("cpu", 0), GraphIds(True))


def test_ort_values_make_what_host_arrays_make(bundle: Bundle, expected: Any) -> None:
    with Session(bundle, backend=OrtValues()) as session:
        made = session.generate(PROMPT, [MAN, HAT], steps=5, images=2, seed=7)
        np.testing.assert_array_equal(made.latents, expected.latents)
        np.testing.assert_array_equal(made.regions, expected.regions)
        assert not session.generate(PROMPT, steps=1).regions.any()


def test_a_session_that_nobody_holds_any_more_frees_the_device(world: World, bundle: Bundle) -> None:
    def dropped() -> weakref.ref[Session]:
        session = open_session(world, bundle, keep="64MiB")
        session.generate(PROMPT, [MAN], steps=3)
        assert world.cuda.alive()
        return weakref.ref(session)

    gone = dropped()
    gc.collect()
    assert gone() is None
    assert world.nothing_left()


@pytest.mark.parametrize("ending", ["cancel", "exception", "close"])
def test_a_request_that_ends_early_leaves_nothing_behind(world: World, bundle: Bundle, ending: str) -> None:
    session = open_session(world, bundle)

    def end(progress: Progress) -> bool:
        if progress.step == 2:
            if ending == "exception":
                raise KeyboardInterrupt
            if ending == "close":
                session.close()
            return False
        return True

    kinds = {"cancel": Cancelled, "exception": KeyboardInterrupt, "close": Cancelled}
    with pytest.raises(kinds[ending]):
        session.generate(PROMPT, [MAN], steps=3, progress=end)
    if ending == "close":
        assert world.nothing_left()
        with pytest.raises(SessionClosedError):
            session.generate(PROMPT)
    else:
        alone = session.generate(PROMPT, steps=1, seed=1).latents
        session.warm_up(steps=1)
        np.testing.assert_array_equal(session.generate(PROMPT, steps=1, seed=1).latents, alone)
    session.close()


def test_a_failure_on_the_device_ends_the_request_and_frees_its_memory(world: World, bundle: Bundle) -> None:
    recipe = world.trt.recipes[f"{bundle.hash} denoise_step"]
    compute = recipe.compute
    timesteps: list[int] = []

    def failing(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        timesteps.append(int(arrays["timestep"][0]))
        world.cuda.kernel_error = KERNEL_FAILED if len(timesteps) == 2 else 0
        return compute(arrays)

    recipe.compute = failing
    with open_session(world, bundle) as session:
        with pytest.raises(DeviceError, match="graph reference_kv or denoise_step failed on the device"):
            session.generate(PROMPT, [MAN], steps=3)
        assert not world.cuda.alive()
        world.cuda.kernel_error = 0
        assert len(session.generate(PROMPT, steps=1).images) == 1


def test_what_is_not_finite_names_the_first_graph_that_made_it(world: World, bundle: Bundle) -> None:
    whole = bundle_recipe(bundle, "reference_kv")

    def spoiled(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        results = dict(whole.compute(arrays))
        if arrays["timestep"][0] < 500:
            name = min(results)
            results[name] = np.full_like(results[name], np.nan)
        return results

    world.trt.recipes[f"{bundle.hash} reference_kv"] = Recipe(whole.contract, spoiled, whole.ranges)
    seen: list[int] = []
    with (
        open_session(world, bundle) as session,
        pytest.raises(NonFiniteError, match=r"graph reference_kv: \d+ of \d+ values of k_ref"),
    ):
        session.generate(PROMPT, [MAN], steps=3, progress=lambda p: seen.append(p.step))
    assert seen == [1, 2, 3]


def test_a_plan_for_fewer_at_once_makes_them_in_turn(world: World, bundle: Bundle) -> None:
    for graph in bundle.graphs:
        world.trt.recipes[f"{bundle.hash} {graph}"].ranges |= {"B": (1, 1), "K": (1, 1)}
    with open_session(world, bundle) as session:
        made = session.generate(PROMPT, [MAN, HAT], steps=1, images=2, seed=7)
        np.testing.assert_array_equal(made.latents[:1], session.generate(PROMPT, [MAN, HAT], steps=1, seed=7).latents)
        world.trt.recipes[f"{bundle.hash} reference_kv"].ranges["M1"] = (1, 20)
    with (
        open_session(world, bundle) as session,
        pytest.raises(BackendError, match=r"graph reference_kv: input kept_1 .* takes M1 from 1 to 20 \(axis 0\)"),
    ):
        session.generate(PROMPT, [MAN], steps=1)


def test_a_bundle_in_bf16_goes_through_as_bits(world: World, bundle: Bundle) -> None:
    def in_bf16(tensor: Tensor) -> Tensor:
        held = tensor.name == "text" or "_ref_" in tensor.name
        return replace(tensor, dtype="bfloat16") if held else tensor

    def recipe_of(contract: GraphContract) -> Recipe:
        whole = bundle_recipe(bundle, contract.name)

        def compute(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            bits = {t.name for t in (*contract.inputs, *contract.outputs) if t.dtype == "bfloat16"}
            exact = {name: from_bfloat16(array) if name in bits else array for name, array in arrays.items()}
            results = whole.compute(exact)
            return {name: to_bfloat16(array) if name in bits else array for name, array in results.items()}

        return Recipe(contract, compute)

    graphs = {
        name: replace(c, inputs=tuple(map(in_bf16, c.inputs)), outputs=tuple(map(in_bf16, c.outputs)))
        for name, c in bundle.graphs.items()
    }
    rounded = replace(bundle, dtype="bfloat16", hash="rounded", graphs=graphs)
    for name, contract in graphs.items():
        world.build(rounded, name, recipe_of(contract))
    with Session(bundle, backend="onnxruntime-cpu") as session:
        expected = [session.generate(PROMPT, c, steps=2, seed=7).latents for c in ([MAN], [])]
    with open_session(world, rounded) as session:
        for exact, concepts in zip(expected, ([MAN], []), strict=True):
            made = session.generate(PROMPT, concepts, steps=2, seed=7).latents
            assert 0 < np.abs(made - exact).max() < 0.05 * np.abs(exact).max()


def test_workers_compute_side_by_side(world: World, bundle: Bundle) -> None:
    with open_session(world, bundle, workers=2) as session:
        expected = {seed: session.generate(PROMPT, [MAN], steps=2, seed=seed).latents for seed in range(2)}
        both, found = threading.Barrier(2), {}

        def meet(progress: Progress) -> None:
            both.wait(timeout=60)

        def work(seed: int) -> None:
            found[seed] = session.generate(PROMPT, [MAN], steps=2, seed=seed, progress=meet).latents

        threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(world.cuda.streams) == 2
    assert all(np.array_equal(found[seed], expected[seed]) for seed in expected)


def test_too_little_memory_is_refused_before_it_is_allocated(world: World, bundle: Bundle) -> None:
    world.trt.recipes[f"{bundle.hash} denoise_step"].scratch = 10**10
    with (
        open_session(world, bundle) as session,
        pytest.raises(DeviceError, match=r"graph denoise_step needs [\d,.]+ MB more, and [\d,.]+ MB of 8,000\.0 MB"),
    ):
        session.generate(PROMPT, steps=1)
    assert world.nothing_left()


def test_a_session_that_cannot_open_leaves_nothing(world: World, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="engine store"):
        Session(bundle, backend=FLAVOUR)
    with pytest.raises(OptionError, match="device is -1"):
        open_session(world, bundle, device=-1)
    with pytest.raises(DeviceError, match="device 1 does not exist; there is one, 0"):
        open_session(world, bundle, device=1)
    with pytest.raises(BackendMissingError, match="tensorrt is not installed"):
        open_session(world, bundle, backend="tensorrt")
    with pytest.raises(PlanError, match="no plan for graph text_encoder"):
        open_session(world, bundle, store=tmp_path / "empty")
    assert world.nothing_left()


def test_a_bundle_that_does_not_fit_is_refused_as_it_is_opened(
    world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[TensorRT] = []
    monkeypatch.setattr(TensorRT, "close", lambda self: closed.append(self))
    world.cuda.total = 4000
    match = (
        r"bundle .*plans of 0\.0 MB, and at least 0\.0 MB to compute in\) needs 0\.0 MB more, and 0\.0 MB of 0\.0 MB"
    )
    with pytest.raises(DeviceError, match=match):
        open_session(world, bundle)
    assert len(closed) == 1
    mine = world.backend()
    with pytest.raises(DeviceError, match=match):
        Session(bundle, backend=mine)
    assert len(closed) == 1, "what the caller opened is the caller's to close"
    assert Session(bundle, store=world.store).backend.name == "onnxruntime-cpu"
    assert not world.cuda.count("cudaMalloc")
    world.cuda.total = 10**9


def test_missing_plans_are_built_when_that_is_allowed_and_auto_finds_them(
    world: World, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "store", type(world.store)(tmp_path / "other"))
    with Session(bundle, store=world.store) as session:
        assert session.backend.name == "onnxruntime-cpu"
    with open_session(world, bundle, build_missing=True) as session:
        session.generate(PROMPT, [MAN], steps=1)
    assert sorted(world.built) == sorted(bundle.graphs)
    with Session(bundle, store=world.store) as session:
        assert session.generate(PROMPT, steps=1).backend == FLAVOUR
