"""Numbers that are none: NaN and infinity out of every graph, at any step, are found and named; nothing is drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest

from magicface_rt import KeptConcept, KeptConceptError, NonFiniteError, Session
from magicface_rt.backends import Backend, Binding, GraphRunner, OnnxRuntime
from magicface_rt.backends.checks import check_finite
from magicface_rt.backends.host import to_bfloat16
from magicface_rt.backends.onnxruntime import DeviceRunner, import_onnxruntime
from magicface_rt.backends.ort_binding import GraphIds, OrtBinding
from magicface_rt.bundle import Bundle
from magicface_rt.denoiser import SERVED_OUTPUTS
from magicface_rt.kept.reference import EightBit
from tests.runtime.drawn_backend import Drawn
from tests.runtime.test_session import HAT, MAN, PROMPT

STEPS = 3
BY_STEP = ("reference_kv", "denoise_step")
VALUES = [np.nan, np.inf, -np.inf]

values = pytest.mark.parametrize("value", VALUES)
spoils = pytest.mark.parametrize(
    ("value", "whole"),
    [
        *[pytest.param(value, False, id=f"{value}-one") for value in VALUES],
        pytest.param(np.nan, True, id="nan-all"),
        *[pytest.param(value, True, id=f"{value}-all", marks=pytest.mark.slow) for value in VALUES[1:]],
    ],
)


class Spoil:
    """Puts a value into an output of a graph: into one element, or into all; at a step, where the graph has steps.

    It does nothing until `of` is called. `times`: how often it may, None for always.
    """

    def __init__(self) -> None:
        self.armed = False
        self.spoiled = 0

    def of(
        self,
        graph: str,
        output: str,
        value: float,
        *,
        whole: bool = False,
        timestep: int | None = None,
        times: int | None = None,
    ) -> None:
        self.armed, self.spoiled = True, 0
        self.graph, self.output, self.value, self.whole = graph, output, value, whole
        self.timestep, self.times = timestep, times

    def wanted(self, graph: str, output: str, timestep: np.ndarray | None) -> bool:
        if not self.armed or (graph, output) != (self.graph, self.output):
            return False
        at_this_step = self.timestep is None or (timestep is not None and self.timestep in timestep)
        return at_this_step and (self.times is None or self.spoiled < self.times)

    def apply(self, array: np.ndarray) -> np.ndarray:
        self.spoiled += 1
        array = array.copy()
        array.reshape(-1)[slice(None) if self.whole else array.size // 2] = self.value
        return array


class OnHost(Backend):
    """Graphs that take and give host arrays."""

    name = "spoiled"

    def __init__(self, inner: Backend, spoil: Spoil) -> None:
        self.inner, self.spoil = inner, spoil

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        runner = self.inner.load(bundle, graph)
        run = runner._run

        def spoiled(inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
            results, timestep = run(inputs, outputs), inputs.get("timestep")
            return {n: self.spoil.apply(a) if self.spoil.wanted(graph, n, timestep) else a for n, a in results.items()}

        runner._run = spoiled  # type: ignore[method-assign]
        return runner


class OnDevice(Backend):
    """The bundle's graphs as ONNX Runtime's GPU providers are driven: nobody looks at a step's outputs.

    But for the VAE's decoder, which takes long, where nothing is asked of it.
    """

    name = "spoiled"

    def __init__(self, spoil: Spoil, *, decodes: bool = False) -> None:
        self.spoil, self.decodes = spoil, decodes

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        if graph == "vae_decoder" and not self.decodes:
            return Drawn().load(bundle, graph)
        ort, contract = import_onnxruntime(), bundle.graph(graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = bundle.path / contract.files["onnxruntime"]
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        spoil = self.spoil

        class Spoiled(OrtBinding):
            def _run(self, graph_id: str) -> None:
                super()._run(graph_id)
                timestep = self._values["timestep"].numpy() if "timestep" in self._values else None
                for name in self.outputs:
                    if spoil.wanted(graph, name, timestep):
                        self._values[name].update_inplace(spoil.apply(self._values[name].numpy()))

        class Runner(DeviceRunner):
            def bind(self, outputs: Sequence[str] | None = None, *, beside: Binding | None = None) -> Binding:
                return Spoiled(contract, ort, session, ("cpu", 0), GraphIds(False), outputs)

        return Runner(contract, session, ort, ("cpu", 0), GraphIds(False))


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture
def spoil() -> Spoil:
    return Spoil()


def latents(session: Session, concepts: Any = (MAN, HAT), **settings: Any) -> np.ndarray:
    return session.generate(PROMPT, concepts, **{"steps": STEPS, "seed": 7, "alpha": 0.0, **settings}).latents


def outputs(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Every output of a graph that a request computes and that can hold something else than numbers."""
    for graph, contract in bundle.graphs.items():
        for tensor in contract.outputs:
            if tensor.dtype != "int64" and tensor.name in SERVED_OUTPUTS.get(graph, (tensor.name,)):
                yield graph, tensor.name


def refused(make: Callable[[], object], graph: str, output: str, step: int | None, *, count: int | None = None) -> str:
    """The message of the error, which names graph, output and step, and what to do."""
    with pytest.raises(NonFiniteError) as caught:
        make()
    message = str(caught.value)
    assert re.search(rf"\bgraph {graph}: {count or '[0-9]+'} of [0-9]+ values of {output} ", message), message
    assert step is None or message.startswith(f"step {step + 1} of {STEPS}: "), message
    assert "export it in bf16 or fp32" in message
    assert "magicface-rt verify" in message
    return message


# ------------------------------------------------------------------------------------------------------------ a request


@spoils
def test_every_output_at_every_step_where_the_host_sees_them(
    bundle: Bundle, spoil: Spoil, value: float, whole: bool
) -> None:
    timesteps = [int(t) for t in bundle.schedule.timesteps(STEPS)]
    tried = 0
    with Session(bundle, backend=OnHost(Drawn(), spoil)) as session:
        expected = latents(session)
        for graph, output in outputs(bundle):
            for step in range(STEPS) if graph in BY_STEP else [None]:
                spoil.of(graph, output, value, whole=whole, timestep=None if step is None else timesteps[step])
                refused(lambda: latents(session), graph, output, step, count=None if whole else 1)
                assert spoil.spoiled == 1, "it went on"
                tried += 1
            spoil.armed = False
            np.testing.assert_array_equal(latents(session), expected, "the next request is as if nothing had been")
    assert tried == len(list(outputs(bundle))) + 2 * sum(graph in BY_STEP for graph, _ in outputs(bundle))
    kind = f"{value}, {'all values' if whole else 'one value'}"
    figures.tell("numbers", f"host: {kind}", f"{tried} outputs and steps, {tried} named, 0 drawn")


QUICK = [("reference_kv", "k_ref_10", 0), ("reference_kv", "v_ref_15", 1), ("denoise_step", "latents_out", 2)]


@pytest.mark.parametrize("some", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "every"])
@values
def test_every_output_at_every_step_where_nobody_looks(
    bundle: Bundle, spoil: Spoil, value: float, some: list[tuple[str, str, int]] | None
) -> None:
    """On a device steps go unseen: what is not finite must reach the last latents, and is then looked for."""
    timesteps = [int(t) for t in bundle.schedule.timesteps(STEPS)]
    cases = some or [(g, o, s) for g, o in outputs(bundle) if g in BY_STEP for s in range(STEPS)]
    with Session(bundle, backend=OnDevice(spoil)) as session:
        expected = latents(session)
        for graph, output, step in cases:
            for whole in (False, True) if some is None else (False,):
                spoil.of(graph, output, value, whole=whole, timestep=timesteps[step])
                refused(lambda: latents(session), graph, output, step)
        spoil.armed = False
        np.testing.assert_array_equal(latents(session), expected)
    count = len(cases) * (2 if some is None else 1)
    figures.tell("numbers", f"device, {'some' if some else 'every'}: {value}", f"{count} outputs and steps, all named")


def test_every_output_before_and_after_the_steps_on_a_device(bundle: Bundle, spoil: Spoil) -> None:
    """The graphs that have no steps are looked at as they end, also where they run on a device."""
    cases = [(graph, output, value) for graph, output in outputs(bundle) if graph not in BY_STEP for value in VALUES]
    assert {graph for graph, _, _ in cases} == bundle.graphs.keys() - set(BY_STEP)
    with Session(bundle, backend=OnDevice(spoil, decodes=True)) as session:
        expected = latents(session)
        for graph, output, value in cases:
            spoil.of(graph, output, value)
            refused(lambda: latents(session, steps=1), graph, output, None, count=1)
            assert spoil.spoiled == 1, "it went on"
        spoil.armed = False
        np.testing.assert_array_equal(latents(session), expected)
    figures.tell("numbers", "device, graphs without steps", f"{len(cases)} outputs and values, all named")


def test_what_does_not_come_again_is_refused_all_the_same(bundle: Bundle, spoil: Spoil) -> None:
    """A device that errs once: the steps are gone through again, find nothing, and still there is no picture."""
    with Session(bundle, backend=OnDevice(spoil)) as session:
        expected = latents(session)
        spoil.of("reference_kv", "v_ref_13", np.nan, times=1)
        message = refused(lambda: latents(session), "denoise_step", "latents_out", None)
        assert "the same steps gave numbers" in message
        assert spoil.spoiled == 1
        np.testing.assert_array_equal(latents(session), expected)


def test_a_batch_with_one_that_is_none_gives_no_picture(bundle: Bundle, spoil: Spoil) -> None:
    with Session(bundle, backend=OnHost(Drawn(), spoil)) as session:
        spoil.of("vae_decoder", "pixels", np.nan, times=1)
        refused(lambda: latents(session, images=3), "vae_decoder", "pixels", None, count=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@values
@pytest.mark.parametrize("place", [0, 3_000_017, -1])
def test_one_among_millions(dtype: str, value: float, place: int) -> None:
    array = np.ones((4, 1_000_003), np.float32)
    array.reshape(-1)[place] = value
    held = to_bfloat16(array) if dtype == "bfloat16" else array.astype(dtype)
    with pytest.raises(NonFiniteError, match=rf"graph g: 1 of 4000012 values of x \({dtype}\)"):
        check_finite("g", "x", held, dtype)


def test_the_largest_numbers_are_numbers() -> None:
    for dtype in (np.float16, np.float32):
        check_finite("g", "x", np.array([np.finfo(dtype).max, np.finfo(dtype).min, 0], dtype))
    check_finite("g", "x", np.array([0x7F7F, 0xFF7F], np.uint16), "bfloat16")
    check_finite("g", "label", np.array([2**62]), "int64")


# -------------------------------------------------------------------------------------------------------- kept concepts


@pytest.mark.parametrize("workspace", [1, "1GiB"], ids=["step by step", "all at once"])
@spoils
def test_keys_that_are_none_are_not_kept(
    bundle: Bundle, spoil: Spoil, value: float, whole: bool, workspace: int | str
) -> None:
    timesteps = [int(t) for t in bundle.schedule.timesteps(STEPS)]
    names = [output for graph, output in outputs(bundle) if graph == "reference_kv"]
    with Session(bundle, backend=OnHost(Drawn(), spoil), keep="1GiB") as session:
        for step in range(STEPS):
            for output in (names[0], names[-1]):
                spoil.of("reference_kv", output, value, whole=whole, timestep=timesteps[step])
                message = refused(
                    lambda: session.prepare(MAN, steps=STEPS, workspace=workspace), "reference_kv", output, None
                )
                which = f"step {step + 1} of 3" if workspace == 1 else "steps 1 to 3 of 3"
                assert message.startswith(f"concept 'man': {which}: "), message
                assert session.kept_bytes == 0
        spoil.armed = False
        kept = session.prepare(MAN, steps=STEPS)
    with Session(bundle, backend=Drawn()) as session:
        expected = session.prepare(MAN, steps=STEPS)
    for name, stored in expected.references[0].tensors.items():
        np.testing.assert_array_equal(kept.references[0].tensors[name].arrays[""], stored.arrays[""])


def kinds_of_files() -> list[Any]:
    """Where graphs run, the form of the keys and the value: a few, and with time all."""
    few = ("host-exact-nan", "host-8-bit-inf", "device-exact--inf")
    kinds = [(*kind, "-".join(map(str, kind))) for kind in product(("host", "device"), ("exact", "8-bit"), VALUES)]
    return [pytest.param(*kind, id=name, marks=() if name in few else pytest.mark.slow) for *kind, name in kinds]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("place", "storage", "value"), kinds_of_files())
def test_keys_of_a_file_are_blamed_and_not_the_graph(
    bundle: Bundle, spoil: Spoil, tmp_path: Path, place: str, storage: str, value: float
) -> None:
    """A file that was made so, or has changed, and is read without a look at its content."""
    path, step = tmp_path / "man.concept", 1
    backend = OnDevice(spoil) if place == "device" else OnnxRuntime("cpu", threads=1)
    with Session(bundle, backend=backend) as session:
        kept = session.prepare(MAN, steps=STEPS, storage=storage)
        expected = latents(session, [kept])
        stored = kept.references[0].tensors["v_ref_13"]
        array = stored.scale if isinstance(stored, EightBit) else stored.arrays[""]
        array.setflags(write=True)
        array[step].reshape(-1)[-1] = value
        kept.save(path)
        with pytest.raises(KeptConceptError, match=r"0\.v_ref_13 holds \d+ values that are NaN or infinite"):
            KeptConcept.load(path)
        for spoiled in (kept, KeptConcept.load(path, check_hashes=False)):
            with pytest.raises(NonFiniteError) as caught:
                latents(session, [spoiled])
            assert re.match(
                rf"step 2 of 3: kept keys v_ref_13 of the reference 'a man' \({kept.references[0].key[:16]}\.\.\.\): "
                r"\d+ of \d+ values are NaN or infinite\. .*Prepare the concept again",
                str(caught.value),
            ), str(caught.value)
        again = session.prepare(MAN, steps=STEPS, storage=storage)
        np.testing.assert_array_equal(latents(session, [again]), expected)


def test_keys_too_far_apart_for_eight_bits_are_not_kept(bundle: Bundle) -> None:
    """Finite as they are, but their range is none in the float32 of a channel's scale."""
    stored = EightBit.empty(1, 2, 1, "float32")
    with np.errstate(over="ignore"), pytest.raises(NonFiniteError, match="storage='exact'"):
        stored.put(0, np.array([[3e38], [-3e38]], np.float32))
