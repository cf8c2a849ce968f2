"""Every setting and field of a request, changed alone: the picture changes, or a table here says why it must not.

The tables are held against the dataclasses, so that a new field without a row fails. `Changes` means latents that
differ by far more than rounding, `Same` equal bits, `Refused` an error that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest

from magicface_rt import Concept, KeptConcept, Options, Reference, Request, Session
from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.bundle import Bundle
from magicface_rt.concept import NamedConcept
from magicface_rt.errors import KeptConceptError
from magicface_rt.files.stamps import Stamp
from magicface_rt.kept import KeptReference
from magicface_rt.kept.reference import MappedFile
from magicface_rt.schedule import Schedule
from tests.runtime.drawn_backend import Drawn
from tests.runtime.test_session import disc, picture

PROMPT = "a man with a hat"
STEPS = 3
FAR = 1e-3
"""Of the largest latent; rounding is a thousandth of it."""


@dataclass(frozen=True)
class Changes:
    """Another picture."""

    value: Any


@dataclass(frozen=True)
class Same:
    """Equal bits, and why. `exact_only`: where rows of a batch are computed as they are alone, which ONNX Runtime's CPU
    kernels do up to rounding.
    """

    value: Any
    why: str
    exact_only: bool = False


@dataclass(frozen=True)
class Refused:
    """An error of that kind with these words."""

    value: Any
    error: type[Exception]
    words: str


Row = Changes | Same | Refused
Table = Mapping[str, Sequence[Row]]

# Grey in a ring around the man: where a mask begins depends on the threshold.
MASK = np.maximum(np.asarray(disc((20, 30, 70, 80))) * (200 / 255), np.asarray(disc((8, 12, 84, 92))) * (100 / 255))
VIEW = Reference(picture(1), mask=MASK.astype(np.uint8), prompt="a man")
SIDE = Reference(picture(4), mask=disc((30, 10, 90, 90)), prompt="a man from the side")
MAN = Concept("man", VIEW, weight=2.5)
HAT = Concept("hat", Reference(picture(2), mask=disc((20, 5, 90, 60)), prompt="a hat"), weight=2.0)
OPTIONS = Options(steps=STEPS, seed=7)

NOT_KEPT = "is for 3 steps, and the request has 4"
OF_OPTIONS: Table = {
    "negative_prompt": [Changes("rain")],
    "steps": [Changes(4)],
    "guidance": [Changes(5.0)],
    "alpha": [Changes(1.0), Changes(0.0), Same(0.45, "the second stage begins after step 1 of 3 as well")],
    "ca_scale": [Changes(0.95), Same(0.6, "what None comes to for two concepts")],
    "weight_mode": [Changes("scale")],
    "semantic_guidance": [Changes(False)],
    "seed": [Changes(8), Changes(2**64 - 1)],
    "images": [Same(2, "the first picture is the same, however many there are", exact_only=True)],
    "reference_seed": [Changes(1), Changes(2**64 - 1)],
}
OF_OPTIONS_KEPT: Table = {
    **OF_OPTIONS,
    "steps": [Refused(4, KeptConceptError, NOT_KEPT)],
    "reference_seed": [Refused(1, KeptConceptError, "the noise of reference_seed 0, and the request asks for 1")],
}
ONLY_CONCEPTS = "it is about references, and there are none"
OF_OPTIONS_PLAIN: Table = {
    **OF_OPTIONS,
    "alpha": [Same(1.0, ONLY_CONCEPTS), Same(0.0, ONLY_CONCEPTS)],
    "ca_scale": [Changes(0.6), Same(0.95, "all words compete alike, over the whole picture from 0.9 up")],
    "weight_mode": [Same("scale", ONLY_CONCEPTS)],
    "reference_seed": [Same(1, ONLY_CONCEPTS)],
}
OF_CONCEPT: Table = {
    "word": [Changes("with"), Same("a man", "token_index says where it stands")],
    "weight": [Changes(-5.0), Changes(0.0), Same(np.float32(2.5), "the same number")],
    "token_index": [Changes(1), Changes((2, 3)), Same(2, "where the word stands")],
    "name": [Same("the man", "it is for legends and messages")],
    "references": [Changes((SIDE,)), Changes((VIEW, SIDE))],
}
OF_REFERENCE: Table = {
    "image": [Changes(picture(9)), Same(picture(1).convert("RGBA"), "alpha is not blended where there is a mask")],
    "mask": [Changes(disc((0, 0, 40, 40))), Same(MASK.astype(np.uint8) // 2 + 60, "128 divides it in the same place")],
    "prompt": [Changes("a dog")],
    "mask_threshold": [Changes(64), Same(150, "the mask holds 0, 100 and 200")],
    "resample": [Changes("nearest")],
}
OF_REQUEST: Table = {
    "prompt": [Changes("an old man with a hat")],
    "concepts": [Changes([MAN]), Changes([])],
    "options": [Changes(replace(OPTIONS, seed=8))],
    "record_regions": [Same(True, "it is about what is given back")],
}
OF_SCHEDULE: Table = {
    "num_train_timesteps": [Changes(500)],
    "beta_start": [Changes(0.002)],
    "beta_end": [Changes(0.02)],
    "beta_schedule": [Changes("linear")],
    "steps_offset": [Changes(0)],
    "set_alpha_to_one": [Changes(True)],
}


def check_table(table: Table, of: type) -> None:
    given = sorted(field.name for field in fields(of) if field.init)
    assert sorted(table) == given, f"rows and fields of {of.__name__} differ"


def rows(table: Table) -> list[Any]:
    """For pytest: each row of a table with its field."""
    return [
        pytest.param(name, row, id=f"{name}-{type(row).__name__}-{number}")
        for name, of_field in table.items()
        for number, row in enumerate(of_field)
    ]


def judge(
    row: Row, base: np.ndarray, make: Callable[[], np.ndarray], *, subject: str, name: str, least: float = FAR
) -> None:
    """What the row says of the latents. least: where nothing is rounded, any difference is one."""
    if isinstance(row, Refused):
        with pytest.raises(row.error, match=row.words):
            make()
    else:
        found = make()[: len(base)]
        if isinstance(row, Same):
            np.testing.assert_array_equal(found, base, f"{name} changes the picture, and should not: {row.why}")
        else:
            far = np.abs(found - base).max() / np.abs(base).max()
            assert far > least, f"{name} does not reach the picture: it differs by {far:.1e}"
    TRIED.setdefault(subject, []).append(type(row).__name__)
    kinds = [f"{TRIED[subject].count(kind)} {kind.lower()}" for kind in ("Changes", "Same", "Refused")]
    figures.tell("numbers", f"fields of {subject}, changed alone", ", ".join(kinds))


TRIED: dict[str, list[str]] = {}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


class NotDecoded(Backend):
    """The exported graphs but the VAE's decoder, for latents are what is compared."""

    name = "not decoded"

    def __init__(self) -> None:
        self._exported, self._drawn = OnnxRuntime("cpu", threads=1), Drawn()

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        return (self._drawn if graph == "vae_decoder" else self._exported).load(bundle, graph)


@pytest.fixture(scope="module")
def real(bundle: Bundle) -> Iterator[Session]:
    with Session(bundle, backend=NotDecoded()) as opened:
        yield opened


@pytest.fixture(scope="module")
def drawn(bundle: Bundle) -> Iterator[Session]:
    """Graphs that compute each row by itself, to the bit."""
    with Session(bundle, backend=Drawn()) as opened:
        yield opened


graphs = pytest.mark.parametrize("some", ["drawn", pytest.param("real", marks=pytest.mark.slow)], indirect=True)
"""Where only the way to the graphs differs from that of bare concepts, quick tests look at what arrives there."""


@pytest.fixture
def some(request: pytest.FixtureRequest) -> Session:
    session: Session = request.getfixturevalue(request.param)
    return session


def latents(
    session: Session, concepts: Sequence[NamedConcept], options: Options = OPTIONS, prompt: str = PROMPT
) -> np.ndarray:
    return session.generate(prompt, concepts, options=options).latents


class Bases:
    """What there is to compare with, made once: the latents of a request by the session and its concepts' kind."""

    def __init__(self) -> None:
        self._kept: dict[int, list[KeptConcept]] = {}
        self._latents: dict[tuple[int, str], np.ndarray] = {}

    def concepts(self, session: Session, kind: str) -> list[NamedConcept]:
        if kind == "kept":
            if id(session) not in self._kept:
                self._kept[id(session)] = [session.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
            return list(self._kept[id(session)])
        return [MAN, HAT] if kind == "bare" else []

    def latents(self, session: Session, kind: str) -> np.ndarray:
        key = id(session), kind
        if key not in self._latents:
            self._latents[key] = latents(session, self.concepts(session, kind))
        return self._latents[key]


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


# -------------------------------------------------------------------------------------------------------------- options


def test_the_tables_have_every_field() -> None:
    for table in (OF_OPTIONS, OF_OPTIONS_KEPT, OF_OPTIONS_PLAIN):
        check_table(table, Options)
    check_table(OF_CONCEPT, Concept)
    check_table(OF_REFERENCE, Reference)
    check_table(OF_REQUEST, Request)
    check_table(OF_SCHEDULE, Schedule)
    check_table(OF_KEPT_CONCEPT, KeptConcept)
    check_table(OF_KEPT_REFERENCE, KeptReference)


def check_option(real: Session, drawn: Session, bases: Bases, kind: str, name: str, row: Row) -> None:
    session = drawn if isinstance(row, Same) and row.exact_only else real
    concepts = bases.concepts(session, kind)
    judge(
        row,
        bases.latents(session, kind),
        lambda: latents(session, concepts, replace(OPTIONS, **{name: row.value})),
        subject=f"Options, {kind}",
        name=name,
        least=0 if session is drawn else FAR,
    )


@pytest.mark.parametrize(("name", "row"), rows(OF_OPTIONS))
def test_options_with_bare_concepts(real: Session, drawn: Session, bases: Bases, name: str, row: Row) -> None:
    check_option(real, drawn, bases, "bare", name, row)


@pytest.mark.parametrize(("name", "row"), rows(OF_OPTIONS_PLAIN))
def test_options_without_concepts(real: Session, drawn: Session, bases: Bases, name: str, row: Row) -> None:
    check_option(real, drawn, bases, "plain", name, row)


@graphs
@pytest.mark.parametrize(("name", "row"), rows(OF_OPTIONS_KEPT))
def test_options_with_kept_concepts(some: Session, drawn: Session, bases: Bases, name: str, row: Row) -> None:
    check_option(some, drawn, bases, "kept", name, row)


@pytest.mark.parametrize("change", [{"steps": 4}, {"reference_seed": 1}], ids=str)
def test_what_a_kept_concept_is_prepared_for_reaches_the_picture(
    real: Session, bases: Bases, change: dict[str, int]
) -> None:
    options = replace(OPTIONS, **change)
    prepared = [real.prepare(one, steps=options.steps, reference_seed=options.reference_seed) for one in (MAN, HAT)]
    judge(
        Changes(change),
        bases.latents(real, "kept"),
        lambda: latents(real, prepared, options),
        subject="Options, kept",
        name=str(change),
    )


# ------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(("name", "row"), rows(OF_REQUEST))
def test_requests(real: Session, bases: Bases, name: str, row: Row) -> None:
    request = replace(Request(PROMPT, [MAN, HAT], OPTIONS), **{name: row.value})
    judge(
        row,
        bases.latents(real, "bare"),
        lambda: real.generate_batch([request])[0].latents,
        subject="Request",
        name=name,
    )


@pytest.mark.parametrize(("name", "row"), rows(OF_CONCEPT))
def test_concepts(real: Session, bases: Bases, name: str, row: Row) -> None:
    changes = {name: row.value}
    if name == "word" and isinstance(row, Same):
        changes["token_index"] = 2
    concept = replace(MAN, **changes)
    judge(row, bases.latents(real, "bare"), lambda: latents(real, [concept, HAT]), subject="Concept", name=name)


@graphs
@pytest.mark.parametrize("kind", ["bare", "kept"])
@pytest.mark.parametrize(("name", "row"), rows(OF_REFERENCE))
def test_references(some: Session, drawn: Session, bases: Bases, kind: str, name: str, row: Row) -> None:
    concept: NamedConcept = replace(MAN, references=(replace(VIEW, **{name: row.value}),))
    if kind == "kept":
        concept = some.prepare(concept, steps=STEPS)  # type: ignore[arg-type]
    judge(
        row,
        bases.latents(some, kind),
        lambda: latents(some, [concept, bases.concepts(some, kind)[1]]),
        subject=f"Reference, {kind}",
        name=name,
        least=0 if some is drawn else FAR,
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Reference)])
def test_a_hidden_reference_changes_nothing(drawn: Session, name: str) -> None:
    """A weight of 0 switches a concept's references off: none of their fields may be seen then."""
    hidden = replace(MAN, weight=0.0)
    other = replace(hidden, references=(replace(VIEW, **{name: OF_REFERENCE[name][0].value}),))
    np.testing.assert_array_equal(latents(drawn, [hidden, HAT]), latents(drawn, [other, HAT]))


# -------------------------------------------------------------------------------------------------------- kept concepts

OTHER = "of another"
"""Stands for the value that a concept prepared from another reference has."""

OF_KEPT_CONCEPT: Table = {
    "word": [Changes("with")],
    "weight": [Changes(-5.0), Changes(0.0)],
    "token_index": [Changes(1), Same(2, "where the word stands")],
    "name": [Same("the man", "it is for legends and messages")],
    "references": [Changes(OTHER)],
    "origin": [Refused({"reference_seed": 1}, KeptConceptError, "reference_seed 1, and the request asks for 0")],
    "source": [Same(None, "the keys are there already")],
    "note": [Same("agreed to", "it is for people to read")],
    "pictures": [Same({"image_0": np.zeros((8, 8, 3), np.uint8)}, "the keys are there already")],
}
MADE_ALREADY = "the keys are computed from it, and are there already"
OF_KEPT_REFERENCE: Table = {
    "key": [Same("0" * 64, "it names the content")],
    "prompt": [Same("a dog", MADE_ALREADY)],
    "storage": [Same("8-bit", "a tensor knows its own form")],
    "tokens": [Changes(("tokens", "tensors"))],
    "tensors": [Changes(("tokens", "tensors"))],
    "error": [Same(0.5, "it says what was lost")],
    "file": [Same(MappedFile("/nowhere/man.concept", Stamp(1, 2, 3)), "where the keys are is no matter")],
}


@pytest.fixture(scope="module")
def other(real: Session) -> KeptConcept:
    return real.prepare(replace(MAN, references=(SIDE,)), steps=STEPS)


@pytest.mark.parametrize(("name", "row"), rows(OF_KEPT_CONCEPT))
def test_kept_concepts(real: Session, bases: Bases, other: KeptConcept, name: str, row: Row) -> None:
    man, hat = bases.concepts(real, "kept")
    assert isinstance(man, KeptConcept)
    value = row.value
    if value is OTHER:
        value = getattr(other, name)
    elif name == "origin":
        value = replace(man.origin, **value)
    changed = replace(man, **{name: value})
    judge(row, bases.latents(real, "kept"), lambda: latents(real, [changed, hat]), subject="KeptConcept", name=name)


@pytest.mark.parametrize(("name", "row"), rows(OF_KEPT_REFERENCE))
def test_kept_references(real: Session, bases: Bases, other: KeptConcept, name: str, row: Row) -> None:
    man, hat = bases.concepts(real, "kept")
    changes = {name: row.value}
    if isinstance(row, Changes):  # the tokens say how many keys the tensors hold
        changes = {one: getattr(other.references[0], one) for one in row.value}
    changed = replace(man, references=(replace(man.references[0], **changes),))
    judge(row, bases.latents(real, "kept"), lambda: latents(real, [changed, hat]), subject="KeptReference", name=name)


# ------------------------------------------------------------------------------------------------------------- schedule


@graphs
@pytest.mark.parametrize("kind", ["bare", "kept", "plain"])
@pytest.mark.parametrize(("name", "row"), rows(OF_SCHEDULE))
def test_the_schedule(
    some: Session, bases: Bases, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, row: Row
) -> None:
    """Of the checkpoint: what it says reaches the steps' coefficients, the noise on the references and their keys."""
    concepts, base = bases.concepts(some, kind), bases.latents(some, kind)
    monkeypatch.setattr(some, "bundle", replace(some.bundle, schedule=replace(Schedule(), **{name: row.value})))
    if kind == "kept":
        with pytest.raises(KeptConceptError, match=rf"another schedule \({name} differ\)"):
            latents(some, concepts)
        concepts = [some.prepare(concept, steps=STEPS) for concept in (MAN, HAT)]
    judge(row, base, lambda: latents(some, concepts), subject=f"Schedule, {kind}", name=name)
