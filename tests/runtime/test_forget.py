"""`Session.forget`: what a Session has of references goes, and no request notices."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicface_rt import Concept, KeptConcept, OptionError, Progress, Session
from magicface_rt.bundle import Bundle
from tests.runtime.drawn_backend import Drawn
from tests.runtime.fake_world import World
from tests.runtime.test_kept_on_device import drawn_world, open_session
from tests.runtime.test_session import HAT, MAN, PROMPT

STEPS = 4
HOLD_REFERENCES = {"vae_encoder", "reference_kv", "denoise_step"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture
def backend() -> Drawn:
    return Drawn()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle, backend: Drawn) -> Iterator[World]:
    with drawn_world(World(monkeypatch, tmp_path), bundle, backend) as made:
        yield made


def latents(session: Session, concepts: Any = (MAN, HAT), **changes: Any) -> np.ndarray:
    return session.generate(PROMPT, concepts, **{"steps": STEPS, "seed": 7, **changes}).latents


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def keys_of(kept: KeptConcept) -> list[str]:
    return [reference.key for reference in kept.references]


class Watched:
    """Arrays, watched without being held."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        assert arrays
        self._arrays = [weakref.ref(array) for array in arrays]

    @classmethod
    def keys(cls, kept: KeptConcept) -> Watched:
        tensors = [stored for reference in kept.references for stored in reference.tensors.values()]
        return cls([array for stored in tensors for array in stored.arrays.values()])

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(array() is not None for array in self._arrays)


def put(session: Session, concept: Concept) -> tuple[list[str], Watched]:
    """Have the Session's store hold a concept, and nobody else: its keys, and the memory that they are in."""
    kept = session.prepare(concept, steps=STEPS)
    return keys_of(kept), Watched.keys(kept)


def test_what_is_forgotten_is_gone_and_comes_back_when_it_is_wanted(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, keep="1GiB") as session:
        expected = latents(session)
        (man, of_man), (hat, of_hat) = put(session, MAN), put(session, HAT)
        backend.runs.clear()
        latents(session, seed=8)
        assert backend.runs["reference_kv"] == 0, "both are kept"
        assert of_man.alive
        assert session.forget(man) is True
        assert of_man.alive == 0
        assert of_hat.alive
        assert list(session._keeper.store.content_keys) == hat
        same(latents(session), expected)
        assert backend.runs["reference_kv"] == 1, "the man is prepared again, and the hat is there"
        assert session.forget() is True
        assert of_hat.alive == 0
        assert session._keeper.store.content_keys == ()
        same(latents(session), expected)


def test_on_the_exported_network_the_picture_is_the_same_byte_for_byte(bundle: Bundle) -> None:
    with Session(bundle, backend="onnxruntime-cpu", threads=1, keep="1GiB") as session:

        def picture() -> bytes:
            return session.generate(PROMPT, [MAN], steps=2, seed=3).images[0].tobytes()

        first = picture()
        keys = keys_of(session.prepare(MAN, steps=2))
        assert session._keeper.store.content_keys == tuple(keys)
        assert session.forget(keys) is True
        assert session._keeper.store.content_keys == ()
        assert picture() == first
        assert session._keeper.store.content_keys == tuple(keys)


def test_the_buffers_of_the_graphs_are_let_go_of_and_the_graphs_stay(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend) as session:
        expected = latents(session)
        loaded = dict(session._graphs.runners)
        (place,) = session._worker_contexts._free
        assert place._bindings.keys() > HOLD_REFERENCES
        inputs = {name: place._bindings[name]._arrays for name in HOLD_REFERENCES}  # type: ignore[attr-defined]
        results = place._bindings["reference_kv"]._results  # type: ignore[attr-defined]
        held = Watched([inputs["vae_encoder"]["pixels"], inputs["reference_kv"]["latents"], *results.values()])
        del inputs, results
        assert held.alive
        assert session.forget([]) is True
        assert held.alive == 0
        assert not place._bindings.keys() & HOLD_REFERENCES
        assert session._graphs.runners == loaded
        same(latents(session), expected)


def test_a_request_that_runs_goes_on_and_then_nothing_is_left(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, keep="1GiB") as session:
        expected = latents(session)
        man, of_man = put(session, MAN)
        said: list[bool] = []
        same(latents(session, progress=lambda step: said.append(session.forget(man))), expected)
        assert said == [False] * STEPS
        assert of_man.alive == 0
        (place,) = session._worker_contexts._free
        assert not place._bindings.keys() & HOLD_REFERENCES
        assert session.forget(man) is True


def test_what_is_being_prepared_is_not_kept_in_the_end(bundle: Bundle, backend: Drawn) -> None:
    preparing, go_on = threading.Event(), threading.Event()

    def hold(step: Progress) -> None:
        preparing.set()
        assert go_on.wait(30)

    with Session(bundle, backend=Drawn()) as other:
        keys = keys_of(other.prepare(MAN, steps=STEPS))
    with Session(bundle, backend=backend, keep="1GiB") as session:
        made: list[KeptConcept] = []
        thread = threading.Thread(target=lambda: made.append(session.prepare(MAN, steps=STEPS, progress=hold)))
        thread.start()
        try:
            assert preparing.wait(30)
            assert session.forget(keys) is False
        finally:
            go_on.set()
            thread.join(30)
        assert keys_of(made[0]) == keys, "whoever asked for it has it"
        assert session._keeper.store.content_keys == ()
        same(latents(session, made), latents(session, [MAN]))


def test_in_a_session_that_is_never_idle_it_goes_with_those_that_ran(bundle: Bundle, backend: Drawn) -> None:
    """Each of many requests begins before the one before it ends; nothing is noted for longer than that."""
    with Session(bundle, backend=Drawn()) as other:
        keys = keys_of(other.prepare(MAN, steps=STEPS))
    with Session(bundle, backend=backend, keep="1GiB", workers=2) as session, ThreadPoolExecutor(2) as pool:

        def begun(ask: Callable[[Callable[[Progress], object]], object]) -> tuple[Future[object], threading.Event]:
            stepped, go_on = threading.Event(), threading.Event()
            asking = pool.submit(ask, lambda _: (stepped.set(), go_on.wait(30)))
            assert stepped.wait(30)
            return asking, go_on

        earlier, go_on = begun(lambda step: session.prepare(MAN, steps=STEPS, progress=step))
        for _ in range(3):
            assert session.forget(keys) is False
            later, last = begun(lambda step: session.generate(PROMPT, steps=1, progress=step))
            go_on.set()
            earlier.result(30)
            assert session._keeper.store.content_keys == (), "what was made meanwhile has gone, though another one runs"
            assert not session._admission._finished
            earlier, go_on = later, last
        assert [running.forgotten for running in session._admission.running] == [set()]
        go_on.set()
        earlier.result(30)
        assert session.forget(keys) is True


def test_who_holds_a_kept_concept_goes_on_with_it(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend) as session:
        kept = session.prepare(MAN, steps=STEPS)
        expected = latents(session, [kept])
        assert session.forget(keys_of(kept)) is True
        same(latents(session, [kept]), expected)


def test_keys_on_the_device_are_freed_and_come_up_again(world: World, bundle: Bundle, backend: Drawn) -> None:
    with open_session(world, bundle, memory="keep") as session:
        man, hat = (session.prepare(concept, steps=STEPS) for concept in (MAN, HAT))
        expected = latents(session, [man, hat])
        before = world.cuda.allocated()
        assert session.forget(keys_of(man)) is True
        assert world.cuda.allocated() <= before - man.nbytes
        assert session._keeper.on_device.holds(hat.references[0].key)
        assert not session._keeper.on_device.holds(man.references[0].key)
        same(latents(session, [man, hat]), expected)
        assert session._keeper.on_device.holds(man.references[0].key)

        # while a request reads them they stay, and go when it has ended
        said: list[bool] = []
        forget: Callable[[Progress], None] = lambda step: said.append(session.forget(keys_of(man)))  # noqa: E731
        same(latents(session, [man, hat], progress=forget), expected)
        assert said == [False] * STEPS
        assert not session._keeper.on_device.holds(man.references[0].key)
        assert session._keeper.on_device.holds(hat.references[0].key)


def test_what_is_not_there_is_no_error_and_what_are_no_keys_is(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, keep="1GiB") as session:
        keys, watched = put(session, MAN)
        assert session.forget(["0" * 64]) is True
        assert watched.alive
        for wrong in (keys[0], 7, [7], [None], session.prepare(MAN, steps=STEPS)):
            with pytest.raises(OptionError, match=r"expected content keys.*kept\.references"):
                session.forget(wrong)  # type: ignore[arg-type]
        assert session._keeper.store.content_keys == tuple(keys)
        assert session.forget(iter(keys)) is True
        assert session._keeper.store.content_keys == ()
    assert session.forget(keys) is True, "a closed Session holds nothing"
