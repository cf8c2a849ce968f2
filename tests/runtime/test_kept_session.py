"""Kept concepts through a Session: the same pictures for less work, whatever the way."""

from __future__ import annotations

import gc
import pickle
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from magicface_rt import (
    BudgetError,
    BundleError,
    Cancelled,
    Concept,
    ConceptError,
    KeptConcept,
    KeptConceptError,
    OptionError,
    Options,
    Progress,
    Reference,
    Request,
    Session,
)
from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.backends.onnxruntime import import_onnxruntime
from magicface_rt.backends.ort_arena import give_back
from magicface_rt.bundle import Bundle
from magicface_rt.concept import NamedConcept
from magicface_rt.errors import BackendError
from magicface_rt.kept.memory import row_bytes
from magicface_rt.kept.reference import Exact, KeptReference
from magicface_rt.preparing import PlannedReferences, Preparer, load_bare
from magicface_rt.schedule import Schedule
from magicface_rt.work import Work
from tests.runtime.drawn_backend import Drawn
from tests.runtime.test_kept_files import write_other_keys
from tests.runtime.test_session import HAT, MAN, PROMPT, disc, picture

STEPS = 6
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture
def backend() -> Drawn:
    return Drawn()


@pytest.fixture
def session(bundle: Bundle, backend: Drawn) -> Iterator[Session]:
    with Session(bundle, backend=backend) as opened:
        yield opened


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def latents(session: Session, concepts: Any = (MAN, HAT), prompt: str = PROMPT, **changes: Any) -> np.ndarray:
    return session.generate(prompt, concepts, **{"steps": STEPS, "seed": 7, **changes}).latents


def weighted(concept: Concept, weight: float) -> Concept:
    return Concept(concept.word, *concept.references, weight=weight)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the order of sums: 1e-5 of the largest value."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Counting(Backend):
    """ONNX Runtime, with its runs of `reference_kv` counted."""

    name = "counting"

    def __init__(self) -> None:
        self.inner = OnnxRuntime("cpu", threads=1)
        self.runs = 0

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        runner = self.inner.load(bundle, graph)
        if graph == "reference_kv":
            run = runner._run

            def counted(*arguments: Any) -> Any:
                self.runs += 1
                return run(*arguments)

            runner._run = counted  # type: ignore[method-assign]
        return runner


# -------------------------------------------------------------------------------------------- on the exported network


def test_every_way_gives_the_latents_of_the_plain_one(bundle: Bundle, tmp_path: Path) -> None:
    """On a real bundle in fp32: kept, from a file, stored, padded, mixed, batched; and `reference_kv` rests."""
    backend, few = Counting(), {"steps": 3, "alpha": 0.0}
    other = {"steps": 3, "seed": 3, "weight_mode": "scale", "negative_prompt": "rain"}
    with Session(bundle, backend=backend) as session:
        plain = latents(session, **few)
        alone = latents(session, [HAT], "a hat", **other)
        assert backend.runs == 6
        man, hat = (session.prepare(concept, steps=3) for concept in (MAN, HAT))
        by_one = session.prepare(MAN, steps=3, workspace=1)
        man.save(tmp_path / "man.concept")
        loaded = KeptConcept.load(tmp_path / "man.concept")
        assert backend.runs == 6 + 2 + 3
        for first in (man, by_one, loaded):
            same(latents(session, [first, hat], **few), plain)
        batch = [
            Request(PROMPT, [man, hat], Options(seed=7, **few)),
            Request("a hat", [hat], Options(**other)),
            Request(PROMPT, [man, hat], Options(seed=8, **few)),
        ]
        found = session.generate_batch(batch)
        same(found[0].latents, plain)
        same(found[1].latents, alone)
        assert backend.runs == 11
        same(latents(session, [MAN, hat], **few), plain)
        assert backend.runs == 14
    with Session(bundle, backend=backend, keep="64MiB", pad_keys=True) as session:
        same(latents(session, **few), plain)
        assert backend.runs == 16
        same(latents(session, **few), plain)
        assert backend.runs == 16, "the second request finds its references"
    hat.save(tmp_path / "hat.concept")
    from_files = [loaded, KeptConcept.load(tmp_path / "hat.concept")]
    for memory in ("keep", "stream", "recompute"):
        with Session(bundle, backend=backend, memory=memory) as session:
            found = latents(session, from_files, **few)
            np.testing.assert_array_equal(found, latents(session, [man, hat], **few), "files hold the very keys")
            same(found, plain)
    assert backend.runs == 16


# ------------------------------------------------------------------------------------------ on graphs made for looking


def test_a_second_request_runs_no_reference_whatever_changed_about_the_target(bundle: Bundle, backend: Drawn) -> None:
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "an old man with a red hat"},
        {"negative_prompt": "rain"},
        {"weight_mode": "scale"},
        {"alpha": 1.0},
        {"guidance": 3.0},
        {"images": 3},
        {"ca_scale": 0.95},
        {"concepts": [Concept("man", *MAN.references, weight=1.0)]},
        {"concepts": [Concept("hat", *MAN.references, weight=-2.0)]},
    ]
    with Session(bundle, backend=backend) as plain:
        expected = [latents(plain, **change) for change in changes]
    with Session(bundle, backend=backend, keep="1GiB") as session:
        latents(session)
        backend.runs.clear()
        for change, wanted in zip(changes, expected, strict=True):
            same(latents(session, **change), wanted)
        assert backend.runs["reference_kv"] == backend.runs["vae_encoder"] == 0
        latents(session, reference_seed=1)
        assert backend.runs["reference_kv"] == 2


def test_all_that_a_reference_depends_on_is_in_its_key(bundle: Bundle, backend: Drawn) -> None:
    image, mask = picture(1), disc((10, 20, 80, 90))
    references = [
        Reference(image, mask=mask, prompt="a man"),
        Reference(image, mask=mask, prompt="a dog"),
        Reference(image, mask=disc((10, 20, 70, 90)), prompt="a man"),
        Reference(picture(2), mask=mask, prompt="a man"),
        Reference(image, mask=mask, prompt="a man", resample="nearest"),
    ]
    with Session(bundle, backend=Drawn()) as plain, Session(bundle, backend=backend, keep="1GiB") as keeping:
        for reference in references:
            for change in ({}, {"reference_seed": 1}, {"steps": 4}):
                backend.runs.clear()
                for _ in range(2):
                    same(
                        latents(keeping, [Concept("man", reference)], **change),
                        latents(plain, [Concept("man", reference)], **change),
                    )
                assert backend.runs["reference_kv"] == 1, (reference.prompt, change)


@pytest.mark.parametrize("rows", [[1] * 6, [2, 2, 2], [4, 2], [6]])
def test_rows_of_many_steps_go_through_together(
    session: Session, bundle: Bundle, backend: Drawn, rows: list[int]
) -> None:
    plan = session.plan([MAN], STEPS)
    workspace = rows[0] * (row_bytes(bundle) + plan.bytes_per_step)
    expected = latents(session, [MAN])
    backend.rows.clear()
    kept = session.prepare(MAN, steps=STEPS, workspace=workspace)
    assert backend.rows == rows
    same(latents(session, [kept]), expected)


masks = st.one_of(
    st.just(np.ones((128, 128), bool)),
    st.tuples(st.integers(0, 31), st.integers(0, 31)).map(
        lambda at: np.pad(np.ones((1, 1), bool), ((4 * at[0], 127 - 4 * at[0]), (4 * at[1], 127 - 4 * at[1])))
    ),
    st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).random((128, 128)) < 0.3),
)
references = st.lists(masks, min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore:.*vanishes")
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(references, min_size=1, max_size=2),
    weights=st.lists(st.sampled_from([-1.0, 0.0, 2.5]), min_size=2, max_size=2),
    padded=st.booleans(),
    bare=st.sets(st.integers(0, 1)),
)
def test_any_masks_and_any_number_of_references(
    bundle: Bundle, shapes: list[list[np.ndarray]], weights: list[float], padded: bool, bare: set[int]
) -> None:
    """One token to all of them; kept, or beside the target, or one so and one so; alone and in a batch."""
    concepts = [
        Concept(
            word,
            *(
                Reference(picture(10 * k + n).resize((128, 128)), mask=mask, prompt=f"view {n}")
                for n, mask in enumerate(of_concept)
            ),
            weight=weight,
        )
        for k, (word, of_concept, weight) in enumerate(zip(("man", "hat"), shapes, weights, strict=False))
    ]
    with Session(bundle, backend=Drawn(), pad_keys=padded) as session:
        expected = latents(session, concepts, steps=3, alpha=0.0)
        kept = [c if k in bare else session.prepare(c, steps=3) for k, c in enumerate(concepts)]
        same(latents(session, kept, steps=3, alpha=0.0), expected)
        requests = [
            Request("a man", [], Options(steps=3, alpha=0.0)),
            Request(PROMPT, kept, Options(steps=3, seed=7, alpha=0.0)),
            Request(PROMPT, kept[:1], Options(steps=3, seed=1, alpha=1.0)),
        ]
        same(session.generate_batch(requests)[1].latents, expected)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("memory", ["keep", "stream"])
def test_a_file_that_claims_the_key_of_another_reference_is_drawn_with_its_own_keys(
    bundle: Bundle, tmp_path: Path, memory: str, checked: bool
) -> None:
    with Session(bundle, backend=Drawn(), memory=memory) as session:
        man, hat = (session.prepare(one, steps=STEPS) for one in (MAN, HAT))
        claiming = [replace(hat.references[0], key=man.references[0].key)]
        KeptConcept("hat", claiming, hat.origin, weight=HAT.weight).save(tmp_path / "hat.concept")
        claims = KeptConcept.load(tmp_path / "hat.concept", check_hashes=checked)
        assert claims.references[0].key == man.references[0].key
        for expected, found in (([man, hat], [man, claims]), ([hat, man], [claims, man])):
            drawn = [session.generate(PROMPT, one, steps=STEPS, seed=7).latents for one in (expected, found)]
            np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_other_keys_are_drawn_with_beside_those_that_they_were_made_from(
    session: Session, tmp_path: Path, where: str
) -> None:
    """As docs/kept-concepts.md shows, and in one batch with the original and a copy of that."""
    kept = session.prepare(MAN, steps=STEPS)
    if where == "file":
        kept = KeptConcept.load(kept.save(tmp_path / "man.concept"))
    one = kept.references[0]
    weaker = {name: Exact(one.tensors[name].arrays[""] * 0.5) for name in ("v_ref_10", "v_ref_11", "v_ref_12")}
    other = replace(kept, references=[replace(one, tensors={**one.tensors, **weaker}, file=None)])
    sent = pickle.loads(pickle.dumps(kept))
    expected, changed = latents(session, [kept]), latents(session, [other])
    assert not np.array_equal(expected, changed)
    requests = [Request(PROMPT, [each], Options(steps=STEPS, seed=7)) for each in (kept, other, sent)]
    drawn = session.generate_batch(requests)
    for found, alone in zip(drawn, (expected, changed, expected), strict=True):
        same(found.latents, alone)


@pytest.mark.parametrize("memory", ["keep", "stream"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_is_written_to_in_its_place_is_not_drawn_with(
    session: Session, tmp_path: Path, memory: str, when: str
) -> None:
    man = session.prepare(MAN, steps=STEPS)
    expected = latents(session, [man])
    loaded = KeptConcept.load(man.save(tmp_path / "man.concept"))

    def write(_: object = None) -> None:
        write_other_keys(tmp_path / "man.concept")

    with Session(session.bundle, backend=Drawn(), memory=memory) as other:
        same(latents(other, [loaded]), expected)
        if when == "before":
            write()
        with pytest.raises(KeptConceptError, match=r"'man\.concept' was written to since it was loaded.*Load it again"):
            latents(other, [loaded], progress=None if when == "before" else write)
        same(latents(other, [man]), expected)


def test_a_batch_gives_each_request_what_it_gets_alone(session: Session, backend: Drawn) -> None:
    man, hat = (session.prepare(concept, steps=STEPS) for concept in (MAN, HAT))
    requests = [
        Request(PROMPT, [man, hat], Options(steps=STEPS, seed=1, images=2, alpha=0.0)),
        Request("a hat", [HAT], Options(steps=STEPS, seed=2, alpha=0.4, weight_mode="scale", reference_seed=5)),
        Request("a dog", (), Options(steps=STEPS, seed=3, semantic_guidance=False, guidance=2.0)),
        Request("a man", [MAN], Options(steps=STEPS, seed=2, alpha=1.0)),
        Request(PROMPT, [HAT, man], Options(steps=STEPS, seed=4, ca_scale=0.95)),
    ]
    together = session.generate_batch(requests)
    assert [len(result.images) for result in together] == [2, 1, 1, 1, 1]
    for request, result in zip(requests, together, strict=True):
        single = session.generate(request.prompt, request.concepts, options=request.options)
        same(result.latents, single.latents)
        np.testing.assert_array_equal(result.regions, single.regions)
        assert result.prompt == request.prompt
        assert result.token_indices == single.token_indices


def test_images_and_requests_that_share_their_concepts_share_one_row_of_keys(session: Session, backend: Drawn) -> None:
    man, hat = (session.prepare(concept, steps=2) for concept in (MAN, HAT))
    settings = Options(steps=2, images=3)
    session.generate(PROMPT, [man, hat], options=settings)
    session.generate_batch([Request(PROMPT, [man, hat], Options(steps=2, seed=s)) for s in range(3)])
    assert {shape[0] for shape in backend.keys} == {1}
    backend.keys.clear()
    session.generate_batch([Request("a man", [man.renamed(weight=w)], Options(steps=2)) for w in (1.0, 2.0)])
    assert {shape[0] for shape in backend.keys} == {2}


@pytest.mark.parametrize("other", [{"alpha": 0.9}, {"weight_mode": "scale"}])
def test_requests_that_look_at_the_same_concepts_otherwise_have_rows_of_their_own(
    session: Session, other: dict[str, Any]
) -> None:
    concepts = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
    both = [Options(steps=STEPS, seed=1), Options(**{"steps": STEPS, "seed": 1, **other})]
    together = session.generate_batch([Request(PROMPT, concepts, options) for options in both])
    for options, found in zip(both, together, strict=True):
        same(found.latents, session.generate(PROMPT, concepts, options=options).latents)
    assert not np.array_equal(together[0].latents, together[1].latents)


def test_with_buckets_masks_of_about_a_size_have_one_shape(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, pad_keys=True) as session:
        for side in (70, 71, 72, 73):
            reference = Reference(picture(1), mask=disc((10, 10, side, side)), prompt="a man")
            session.generate("a man", [session.prepare(Concept("man", reference), steps=1)], steps=1)
    assert len(set(backend.keys)) == 1


def test_pictures_in_turn_compute_their_references_once(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend) as session:
        several = bundle.limits.images + 1
        latents(session, [MAN], images=several)
        assert sum(backend.rows) == STEPS
        backend.rows.clear()
    with Session(bundle, backend=backend, memory="recompute") as session:
        latents(session, [MAN], images=several)
        assert sum(backend.rows) == 2 * STEPS


def test_two_threads_that_want_one_reference_compute_it_once(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, keep="1GiB", workers=4) as session:
        expected, found = latents(session, [HAT], seed=1), {}
        backend.runs.clear()
        threads = [threading.Thread(target=lambda n=n: found.update({n: latents(session, seed=n)})) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert backend.runs["reference_kv"] == 1
        assert len(found) == 4
        same(latents(session, [HAT], seed=1), expected)


def test_waiting_for_another_request_can_be_cancelled(bundle: Bundle, backend: Drawn) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        begun.set()
        assert go_on.wait(30)

    with Session(bundle, backend=backend, keep="1GiB", workers=2) as session:
        settings = {"steps": STEPS, "workspace": 1}
        other = threading.Thread(target=lambda: session.prepare(MAN, progress=hold, **settings))
        other.start()
        assert begun.wait(30)
        try:
            with pytest.raises(Cancelled, match="prepared step 0 of 6"):
                session.prepare(MAN, progress=lambda _: False, **settings)
        finally:
            go_on.set()
            other.join()
        backend.runs.clear()
        session.prepare(MAN, **settings)
        assert not backend.runs, "what the other has prepared is kept"


def test_progress_while_preparing_can_cancel_and_what_was_done_stays_valid(bundle: Bundle, backend: Drawn) -> None:
    seen: list[Progress] = []
    with Session(bundle, backend=backend, keep="1GiB") as session:
        session.prepare(MAN, steps=STEPS, workspace=1, progress=seen.append)
        assert [p.step for p in seen] == list(range(1, STEPS + 1))
        assert {(p.stage, p.steps) for p in seen} == {("prepare", STEPS)}
        backend.runs.clear()
        with pytest.raises(Cancelled, match="prepared step 2 of 6"):
            session.prepare(HAT, steps=STEPS, workspace=1, progress=lambda p: p.step < 2)
        assert backend.runs["reference_kv"] == 2
        latents(session)
        assert backend.runs["reference_kv"] == 3, "the man is there still, the hat is computed"


@pytest.mark.parametrize("ask", ["prepare", "bare", "batch"])
def test_cancelled_at_any_step_it_stops_there_and_the_next_picture_is_right(
    bundle: Bundle, backend: Drawn, ask: str
) -> None:
    """At each of all the steps that are told, of references and of pictures, in both stages and in every batch."""
    with Session(bundle, backend=backend) as session:
        images = bundle.limits.images + 1 if ask == "batch" else 1

        def whole(progress: Any = None) -> Any:
            if ask == "prepare":
                return session.prepare(MAN, steps=STEPS, workspace=1, progress=progress)
            return latents(session, [MAN, HAT], alpha=0.5, images=images, progress=progress)

        told: list[Progress] = []
        expected = whole(told.append)
        stages = {"prepare": {"prepare"}, "bare": {"rsa", "rba"}, "batch": {"prepare", "rsa", "rba"}}
        assert {one.stage for one in told} == stages[ask]
        assert {one.batch for one in told} == ({0, 1} if ask == "batch" else {0})
        for count, last in enumerate(told, 1):
            seen: list[Progress] = []

            def until(progress: Progress, seen: list[Progress] = seen, count: int = count) -> bool:
                seen.append(progress)
                return len(seen) < count

            with pytest.raises(Cancelled, match=f"step {last.step} of {STEPS}"):
                whole(until)
            assert seen == told[:count], "it went on"
        again = whole()
    if ask == "prepare":
        for name, stored in expected.references[0].tensors.items():
            np.testing.assert_array_equal(again.references[0].tensors[name].arrays[""], stored.arrays[""])
    else:
        np.testing.assert_array_equal(again, expected)


def test_the_store_forgets_what_was_used_longest_ago(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend) as session:
        each = [session.prepare(concept, steps=STEPS).nbytes for concept in (MAN, HAT)]
    other = Concept("man", Reference(picture(5), mask=MAN.references[0].mask, prompt="a man"))
    with Session(bundle, backend=backend, keep=sum(each) + 100) as session:
        for concepts in ([MAN], [HAT], [MAN], [other]):
            latents(session, concepts)
        backend.runs.clear()
        latents(session, [other])
        assert backend.runs["reference_kv"] == 0
        latents(session, [HAT])
        assert backend.runs["reference_kv"] == 1
        assert session.kept_bytes <= sum(each) + 100
    with Session(bundle, backend=backend, keep=100) as session:
        same(latents(session), latents(session))
        assert session.kept_bytes == 0


def test_eight_bits_say_what_they_cost_and_cost_little(session: Session, bundle: Bundle) -> None:
    exact, small = session.prepare(MAN, steps=STEPS), session.prepare(MAN, steps=STEPS, storage="8-bit")
    assert exact.error == 0
    assert 0 < small.error < 0.01
    assert small.nbytes < 0.55 * exact.nbytes / 2, "half of what 16 bits take"
    expected = latents(session, [exact])
    drift = np.linalg.norm(latents(session, [small]) - expected) / np.linalg.norm(expected)
    assert 0 < drift < 0.01
    with Session(bundle, backend=Drawn(), keep="1GiB", storage="8-bit") as stored:
        np.testing.assert_array_equal(latents(stored, [MAN]), latents(session, [small]))


def test_bytes_kept_are_those_of_the_tokens_inside_the_mask(session: Session, bundle: Bundle) -> None:
    kept = session.prepare(MAN, steps=STEPS)
    share = {f: kept.references[0].tokens[f] / np.prod(bundle.grid(f)) for f in bundle.factors}
    full = {f: sum(8 * layer.width for layer in bundle.injection_layers if layer.factor == f) for f in bundle.factors}
    expected = STEPS * sum(share[f] * full[f] * np.prod(bundle.grid(f)) for f in bundle.factors)
    assert kept.nbytes == round(expected)


# --------------------------------------------------------------------------------------------------------- memory plan


@pytest.mark.parametrize("memory", ["keep", "stream", "recompute"])
@pytest.mark.parametrize("storage", ["exact", "8-bit"])
def test_every_mode_makes_the_same_picture_and_stays_under_its_plan(
    bundle: Bundle, tmp_path: Path, memory: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured by numpy's allocations, with nothing allowed for the network: its rows would hide what is forgotten."""
    monkeypatch.setattr("magicface_rt.kept.memory.ROW_TENSORS", 0)
    steps = 20
    with Session(bundle, backend=Drawn()) as session:
        expected = latents(session, steps=steps)
        session.prepare(HAT, steps=steps, storage=storage).save(tmp_path / "hat.concept")
    hat = KeptConcept.load(tmp_path / "hat.concept")
    with Session(bundle, backend=Drawn(), memory=memory, storage=storage) as session:
        session.generate("a man", steps=1)
        plan = session.plan([MAN, hat], steps)
        assert plan.mode == memory
        tracemalloc.start()
        found = latents(session, [MAN, hat], steps=steps)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert plan.peak.host / 3 < peak <= plan.peak.host
    if storage == "exact":
        same(found, expected)
    else:
        assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_keys_that_nobody_keeps_are_gone_before_pictures_are_decoded(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder needs memory too."""
    made: list[weakref.ref[KeptReference]] = []
    alive: list[int] = []
    prepare, decode = Preparer.prepare, Work._decode

    def preparing(self: Preparer, *arguments: Any) -> list[KeptReference]:
        found = list(prepare(self, *arguments))
        made.extend(map(weakref.ref, found))
        return found

    def decoding(self: Work, *arguments: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        return decode(self, *arguments)

    monkeypatch.setattr(Preparer, "prepare", preparing)
    monkeypatch.setattr(Work, "_decode", decoding)
    with Session(bundle, backend=Drawn(), memory="keep") as session:
        session.generate(PROMPT, [MAN, HAT], steps=STEPS)
    assert (len(made), alive) == (2, [0])


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("storage", ["exact", "8-bit"])
def test_storage_that_changes_a_picture_is_said_of_it(bundle: Bundle, memory: str, storage: str) -> None:
    """Else nobody could make it again from its run.json, or from the picture."""
    with Session(bundle, backend=Drawn(), memory=memory, storage=storage, keep="1GiB") as session:
        hat = session.prepare(HAT, steps=STEPS, storage="8-bit")
        for _ in range(2):  # prepared, and found in the store
            made = session.generate(PROMPT, [MAN, hat], steps=STEPS)
            man, kept = made.to_dict()["concepts"]
            changed = storage == "8-bit" and memory == "keep"
            assert man["references"][0].get("storage") == ("8-bit" if changed else None)
            assert kept["references"][0]["storage"] == "8-bit"
            man, kept = made._picture_provenance(0)["concepts"]
            assert man.get("storage") == ("8-bit" if changed else None)
            assert kept["storage"] == "8-bit"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory as Linux tells it")
@pytest.mark.parametrize("memory", ["keep", "stream", "recompute"])
def test_resident_memory_stays_under_the_plan(bundle: Bundle, tmp_path: Path, memory: str) -> None:
    """With the real runtime: what concepts add to the process, beyond what the same request takes without them.

    A peak of one run among several does not show here; allocations are counted, run by run, where
    `test_no_request_takes_more_than_its_plan` is.
    """
    steps = 50
    whole = [
        Concept(word, Reference(picture(seed), mask=np.ones((64, 64), bool), prompt=f"a {word}"))
        for seed, word in enumerate(("man", "hat"))
    ]
    concepts: list[Any] = whole
    if memory != "recompute":
        with Session(bundle, backend="onnxruntime-cpu") as session:
            for concept in whole:
                session.prepare(concept, steps=steps).save(tmp_path / f"{concept.word}.concept")
        concepts = [KeptConcept.load(tmp_path / f"{concept.word}.concept") for concept in whole]

    def peak(session: Session, concepts: Any) -> int:
        """While the request runs, the arena that graphs have worked in having been given back before."""
        gc.collect()
        give_back(import_onnxruntime())
        seen, over = [anonymous_memory()], threading.Event()

        def watch() -> None:
            while not over.wait(0.001):
                seen.append(anonymous_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            session.generate(PROMPT, concepts, steps=steps)
        finally:
            over.set()
            watcher.join()
        return max(seen)

    with Session(bundle, backend="onnxruntime-cpu", memory=memory) as session:
        session.generate(PROMPT, whole, steps=1)  # loads every graph
        # In turns, and the lowest of each: blocks that the arena and the heap have freed may stay with the process.
        peaks = [(peak(session, []), peak(session, concepts)) for _ in range(3)]
        added = min(with_keys for _, with_keys in peaks) - min(without for without, _ in peaks)
        plan = session.plan(concepts, steps)
    assert plan.mode == memory
    assert added <= plan.peak.host
    assert memory != "keep" or added > plan.bytes_kept / 2, "the keys were not seen"
    told = f"{max(added, 0) >> 10:,} KiB of the {plan.peak.host >> 10:,} KiB that its plan allows"
    figures.tell("memory", f"resident, ONNX Runtime, {memory}", told)


def test_a_plan_knows_what_each_mode_needs(session: Session, bundle: Bundle, tmp_path: Path) -> None:
    kept = session.prepare(MAN, steps=STEPS)
    plan = session.plan([MAN], STEPS)
    assert plan.bytes_kept == kept.nbytes == STEPS * plan.bytes_per_step
    assert plan.modes["keep"].host > kept.nbytes
    assert plan.modes["recompute"].host < session.plan([MAN], 50).modes["keep"].host
    kept.save(tmp_path / "man.concept")
    mapped = session.plan([KeptConcept.load(tmp_path / "man.concept")], STEPS).modes
    assert mapped["keep"].host - mapped["stream"].host == kept.nbytes
    assert session.plan([KeptConcept.load(tmp_path / "man.concept")], STEPS).mode == "stream", "a copy gains nothing"
    assert session.plan([], STEPS).bytes_kept == 0


def test_a_plan_knows_what_the_store_has(bundle: Bundle, backend: Drawn) -> None:
    """So a request is not made to compute again what is there, because preparing it would not fit the budget."""
    with Session(bundle, backend=backend, keep="1GiB") as session:
        prepared = latents(session)
        modes = session.plan([MAN, HAT], STEPS).modes
        fits_no_pass = modes["keep"].host
        session._keeper.settings = replace(session._keeper.settings, budget=fits_no_pass)
        backend.runs.clear()
        np.testing.assert_array_equal(latents(session), prepared)
        session._keeper.settings = replace(session._keeper.settings, memory="recompute", budget=None)
        np.testing.assert_array_equal(latents(session), prepared)
        assert not backend.runs["reference_kv"]
        session._keeper.store.forget()
        assert session.plan([MAN, HAT], STEPS).modes["keep"].host > fits_no_pass


def test_a_plan_counts_shared_references_once_and_unused_ones_not(session: Session) -> None:
    man = session.prepare(MAN, steps=STEPS)
    one = session.plan([man], STEPS)
    shared = session.plan([man, man.renamed(weight=2.0), man.renamed(weight=0.0)], STEPS)
    assert shared.modes == one.modes
    assert session.plan([weighted(MAN, 0.0)], STEPS, memory="keep").bytes_kept == 0


def test_a_plan_counts_every_bare_reference(bundle: Bundle) -> None:
    """Also where nobody else holds it, so that the next one could come to lie in its place."""
    listed, (loaded,) = PlannedReferences(), load_bare(MAN, bundle)
    for _ in range(20):
        listed.add(MAN, [replace(loaded)], [None])
    assert len(listed.references) == 20


def test_bare_references_of_a_batch_go_through_a_plan_that_takes_few(bundle: Bundle, backend: Drawn) -> None:
    """A plan of `reference_kv` for two references, and a batch whose requests have two each."""
    requests = [
        Request(PROMPT, [weighted(MAN, w), weighted(HAT, w)], Options(steps=2, seed=7, alpha=0.0))
        for w in (1.0, 2.0, 3.0)
    ]
    with Session(bundle, backend=backend) as session:
        expected = [session.generate(r.prompt, r.concepts, options=r.options).latents for r in requests]
    shape = bundle.latent_channels, bundle.rows, bundle.columns
    few = Drawn(limits={"reference_kv": {"latents": ((1, *shape), (3, *shape))}})
    with Session(bundle, backend=few, memory="recompute") as session:
        found = session.generate_batch(requests)
    assert set(few.rows) == {2}
    for one, wanted in zip(found, expected, strict=True):
        same(one.latents, wanted)


def test_auto_takes_what_fits_the_budget(bundle: Bundle, session: Session) -> None:
    with Session(bundle, backend=Drawn(), keep="1GiB") as keeping:
        whole = keeping.plan([MAN], 50)
        assert whole.mode == "keep"
        tight = keeping.plan([MAN], 50, budget=whole.modes["keep"].host - 1)
        assert tight.mode == "keep"
        assert tight.rows_per_pass < whole.rows_per_pass, "a smaller budget is met by smaller passes"
        assert keeping.plan([MAN], 50, budget=whole.bytes_kept).mode == "recompute"
        with pytest.raises(BudgetError, match=r"at least [\d.,]+ MB on the host .*budget is 0\.0 MB"):
            keeping.plan([MAN], 50, budget=1000)
    assert session.plan([MAN], 50).mode == "recompute", "nothing would use the keys again"
    assert session.plan([MAN], 50, images=bundle.limits.images + 1).mode == "keep"
    assert session.plan([session.prepare(MAN, steps=STEPS)], STEPS).mode == "keep"


@pytest.mark.parametrize("memory", ["auto", "keep", "recompute"])
def test_a_plan_for_a_budget_is_that_of_a_session_which_has_it(bundle: Bundle, memory: str) -> None:
    with Session(bundle, backend=Drawn(), keep="1GiB") as session:
        keep = session.plan([MAN], 50).modes["keep"].host
        for budget in (keep, keep - 1, 3 * keep // 4):
            with Session(bundle, backend=Drawn(), keep="1GiB", budget=budget, memory=memory) as other:
                assert session.plan([MAN], 50, memory=memory, budget=budget) == other.plan([MAN], 50)


def test_a_budget_too_small_for_a_step_is_refused_and_the_session_goes_on(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, budget=1000, keep="1GiB") as session:
        with pytest.raises(BudgetError, match="budget"):
            latents(session, [MAN])
        assert not session._graphs.runners, "a graph was loaded"
        assert not backend.runs
        without = [latents(session, concepts) for concepts in ([], [weighted(MAN, 0.0)])]
        assert session.plan([], STEPS, budget=1).budget == 1
    with Session(bundle, backend=backend) as session:
        for found, concepts in zip(without, ([], [weighted(MAN, 0.0)]), strict=True):
            np.testing.assert_array_equal(found, latents(session, concepts), "nothing that a budget could hold down")
    for bad in ({"memory": "ram"}, {"keep": "much"}, {"budget": -1}, {"storage": "4-bit"}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            Session(bundle, backend=backend, **bad)


def test_a_session_prepares_in_its_own_storage(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, storage="8-bit") as session:
        found = [session.prepare(MAN, steps=2, **said).references[0].storage for said in ({}, {"storage": "exact"})]
    assert found == ["8-bit", "exact"]


def test_warming_up_runs_few_steps_and_decodes_however_many_the_request_has(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend) as session:
        kept = session.prepare(MAN, steps=20, reference_seed=5)
        cases: list[tuple[Any, dict[str, Any], int]] = [
            ([kept], {}, 3),
            ([kept, HAT], {"options": Options(steps=20, seed=3)}, 3),
            ([MAN], {"steps": 50}, 3),
            ([MAN], {}, 3),
            ([], {"steps": 1}, 1),
        ]
        for concepts, settings, steps in cases:
            backend.runs.clear()
            session.warm_up(PROMPT, concepts, **settings)
            assert (backend.runs["denoise_step"], backend.runs["vae_decoder"]) == (steps, 1)
            assert backend.runs["reference_kv"] == (steps if {MAN, HAT} & set(concepts) else 0)
        backend.runs.clear()
        with pytest.raises(Cancelled, match="after step 2 of 20"):
            session.warm_up(PROMPT, [kept], progress=lambda p: p.step < 2)
        assert backend.runs["vae_decoder"] == 0
        with pytest.raises(KeptConceptError, match="is for 20 steps, and the request has 4"):
            session.warm_up(PROMPT, [kept], steps=4)


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_request_or_holds_no_concepts_is_refused(session: Session, backend: Drawn) -> None:
    wrong: list[Any] = [MAN, 5, None, "man", [MAN, "hat"], [[MAN]], [NamedConcept("man", 1.0)]]
    for concepts in wrong:
        for ask in (
            lambda concepts: session.generate_batch([Request("a man", concepts)]),
            lambda concepts: session.generate("a man", concepts),
            lambda concepts: session.warm_up("a man", concepts),
            lambda concepts: session.plan(concepts, 20),
        ):
            with pytest.raises(ConceptError, match=r"expected a (list of concepts|Concept)"):
                ask(concepts)
    batches: dict[str, Any] = {
        "requests is a Request, expected a list": Request("a man"),
        "requests is a NoneType, expected a list": None,
        r"requests\[1\] is a Concept, expected a Request": [Request("a man"), MAN],
        r"requests\[0\] is a str, expected a Request": ["a man"],
        r"requests\[0\]\.options is a dict, expected an Options": [Request("a man", (), {"steps": 5})],  # type: ignore[arg-type]
    }
    for reason, requests in batches.items():
        with pytest.raises(OptionError, match=reason):
            session.generate_batch(requests)
    assert not backend.runs


def test_what_can_be_gone_through_once_is_taken_out_at_once(session: Session) -> None:
    kept = session.prepare(MAN, steps=STEPS)
    again = KeptConcept("man", (one for one in kept.references), kept.origin, weight=2.5, source=MAN)
    expected = latents(session, [kept, HAT])
    request = Request(PROMPT, (one for one in (again, HAT)), Options(steps=STEPS, seed=7))
    for _ in range(2):
        for result in session.generate_batch(iter([request, request])):
            np.testing.assert_array_equal(result.latents, expected)
    np.testing.assert_array_equal(latents(session, iter([again, HAT])), expected)
    assert session.plan(iter([again, HAT]), STEPS) == session.plan([again, HAT], STEPS)
    session.warm_up(PROMPT, iter([again, HAT]))


def test_a_request_keeps_the_concepts_that_it_was_made_with(session: Session) -> None:
    expected = latents(session, [MAN, HAT])
    concepts = [MAN, HAT]
    request = Request(PROMPT, concepts, Options(steps=STEPS, seed=7))
    concepts.clear()
    np.testing.assert_array_equal(session.generate_batch([request])[0].latents, expected)


@pytest.mark.parametrize("no", [False, np.False_, np.array([1.0]).max() > 2])
def test_any_false_of_a_callback_cancels_and_nothing_else(session: Session, no: Any) -> None:
    for ask in (
        lambda progress: session.generate(PROMPT, [MAN], steps=STEPS, progress=progress),
        lambda progress: session.prepare(MAN, steps=STEPS, workspace=1, progress=progress),
        lambda progress: session.warm_up(PROMPT, [MAN], progress=progress),
    ):
        with pytest.raises(Cancelled):
            ask(lambda _: no)
        for other in (None, 0, 0.0, "", [], np.int64(0), np.True_, np.array([False, False])):
            ask(lambda _, other=other: other)  # type: ignore[misc]


def test_a_kept_concept_is_refused_where_it_does_not_fit_and_the_session_goes_on(
    session: Session, bundle: Bundle, backend: Drawn
) -> None:
    kept = session.prepare(MAN, steps=STEPS)
    expected = latents(session, [kept])
    backend.runs.clear()
    with pytest.raises(KeptConceptError, match="'man' is for 6 steps, and the request has 5"):
        latents(session, [kept], steps=5)
    with pytest.raises(KeptConceptError, match="reference_seed 0, and the request asks for 1"):
        latents(session, [kept], reference_seed=1)
    with pytest.raises(ConceptError, match="expected a Concept or a KeptConcept"):
        latents(session, [kept.references[0]])
    with pytest.raises(ConceptError, match="kept one is prepared"):
        session.prepare(kept)
    with pytest.raises(OptionError, match="5 and 6 steps"):
        session.generate_batch([Request("a", (), Options(steps=s)) for s in (5, 6)])
    with pytest.raises(OptionError, match="empty"):
        session.generate_batch([])
    others = {
        "is of the bundle": replace(bundle, hash="0" * 64),
        r"another schedule \(beta_end differ\)": replace(bundle, schedule=Schedule(beta_end=0.013)),
    }
    for reason, other in others.items():
        with Session(other, backend=backend) as foreign, pytest.raises(KeptConceptError, match=reason):
            latents(foreign, [kept])
    assert not backend.runs
    np.testing.assert_array_equal(latents(session, [kept]), expected)


def test_a_failure_while_preparing_keeps_what_was_kept_before(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, keep="1GiB") as session:
        expected = latents(session)
        session._keeper.store.forget()
        latents(session, [MAN])
        backend.fail["reference_kv"] = BackendError("the device is full")
        with pytest.raises(BackendError, match="full"):
            latents(session)
        backend.fail.clear()
        backend.runs.clear()
        np.testing.assert_array_equal(latents(session), expected)
        assert backend.runs["reference_kv"] == 1, "only the hat was missing"


def test_a_result_with_kept_concepts_can_be_saved(session: Session, tmp_path: Path) -> None:
    kept = session.prepare(MAN, steps=STEPS)
    result = session.generate(PROMPT, [kept, HAT], steps=STEPS)
    folder = result.save(tmp_path / "out")
    text = (folder / "run.json").read_text()
    assert kept.references[0].key in text
    with Image.open(folder / "image-0.png") as image:
        assert "a man" in str(image.info)


def test_graphs_that_rest_can_be_freed_and_come_back(bundle: Bundle, backend: Drawn) -> None:
    with Session(bundle, backend=backend, keep="1GiB") as session:
        expected = latents(session)
        session.unload("reference_kv", "vae_encoder")
        assert sorted(session._graphs.runners) == ["denoise_step", "text_encoder", "vae_decoder"]
        np.testing.assert_array_equal(latents(session), expected)
        assert "reference_kv" not in session._graphs.runners
        latents(session, reference_seed=1)
        assert "reference_kv" in session._graphs.runners
        with pytest.raises(OptionError, match="running"):
            session.generate("a", steps=1, progress=lambda p: session.unload("vae_encoder"))
        with pytest.raises(BundleError, match="no graph 'unet'"):
            session.unload("unet")
