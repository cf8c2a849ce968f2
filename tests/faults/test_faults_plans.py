"""What a request is planned to take it does not exceed, and what has no room is refused before it is computed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pytest
from allocated import peak_of
from memory_hollow import Hollow
from PIL import Image
from threads_requests import PROMPT

from magicface_rt import Concept, KeptConcept, MemoryPlan, Options, Reference, Request, Session
from magicface_rt.bundle import Bundle
from magicface_rt.encoding import load_references
from magicface_rt.errors import HostMemoryError
from magicface_rt.kept.memory import request_bytes
from magicface_rt.preparing import load_bare

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")

MIB = 1 << 20


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


WHOLE = [
    Concept(
        word,
        Reference(Image.fromarray(np.full((64, 64, 3), 90 * k, np.uint8)), mask=np.ones((64, 64), bool), prompt="a"),
    )
    for k, word in enumerate(("man", "hat"))
]
PLAN_STEPS = 20


def used_plans(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[MemoryPlan]:
    """What the Session plans from now on."""
    plans: list[MemoryPlan] = []
    real = session._keeper.plan

    def plan(*arguments: Any, **named: Any) -> MemoryPlan:
        plans.append(real(*arguments, **named))
        return plans[-1]

    monkeypatch.setattr(session._keeper, "plan", plan)
    return plans


SOURCES, ASKED = ("bare", "kept", "file", "stored"), ("one picture", "three pictures", "more than fit", "batch")
QUICK = {
    ("bare", "batch", "exact"),
    ("kept", "more than fit", "8-bit"),
    ("file", "three pictures", "8-bit"),
    ("stored", "one picture", "exact"),
}


@pytest.mark.parametrize(
    ("source", "asked", "storage", "padded"),
    [
        pytest.param(*kind, padded, marks=() if kind in QUICK and not padded else pytest.mark.slow)
        for kind in itertools.product(SOURCES, ASKED, ("exact", "8-bit"))
        for padded in (False, True)
    ],
)
@pytest.mark.parametrize("memory", ["keep", "stream", "recompute"])
def test_no_request_takes_more_than_its_plan(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
    storage: str,
    source: str,
    asked: str,
    padded: bool,
) -> None:
    """Every way to ask and to keep, over a network that takes nothing, so that nothing may be allowed for it either.

    The request's own pictures, of which a plan allows more than enough, are left out on both sides.
    """
    monkeypatch.setattr("magicface_rt.kept.memory.ROW_TENSORS", 0)
    # As many rows in a pass that prepares as the network's own rows would leave.
    monkeypatch.setattr("magicface_rt.kept.memory.WORKSPACE", 2 * MIB)
    monkeypatch.setattr("magicface_rt.kept.keeper.WORKSPACE", 2 * MIB)
    images = {"three pictures": 3, "more than fit": bundle.limits.images + 1}.get(asked, 1)
    steps = PLAN_STEPS
    settings: dict[str, Any] = {"memory": memory, "storage": storage, "pad_keys": padded}
    with Session(bundle, backend=Hollow(), **settings, keep="1GiB" if source == "stored" else None) as session:
        concepts: list[Any] = WHOLE
        if source in ("kept", "file"):
            concepts = [session.prepare(concept, steps=steps) for concept in WHOLE]
        if source == "file":
            for concept in concepts:
                concept.save(tmp_path / f"{concept.word}.concept")
            concepts = [KeptConcept.load(tmp_path / f"{concept.word}.concept") for concept in concepts]
        if source == "stored":
            for concept in WHOLE:
                session.prepare(concept, steps=steps)

        def request(concepts: Sequence[Any]) -> None:
            if asked == "batch":
                options = [Options(steps=steps, seed=seed, alpha=seed / 2) for seed in range(3)]
                session.generate_batch([Request(PROMPT, concepts, one) for one in options])
            else:
                session.generate(PROMPT, concepts, steps=steps, images=images)

        request([])
        without = peak_of(lambda: request([]))
        plans = used_plans(session, monkeypatch)
        held = 0 if source in ("bare", "file") else _in_memory(concepts, session)
        added = peak_of(lambda: request(concepts)) - without + held
    plan = plans[-1]  # the one before that only refuses what does not fit, before a graph is loaded
    assert plan.mode == memory
    pictures = 3 if asked == "batch" else images
    bare = len(WHOLE) if source == "bare" else 0
    allowed = plan.peak.host - request_bytes(bundle, pictures, bare)
    assert added <= allowed, f"{added:,} bytes were taken, and {allowed:,} were planned"
    _told(memory, storage, added / allowed)


HIGHEST: dict[tuple[str, str], float] = {}
COUNTED: dict[tuple[str, str], int] = {}


def _told(memory: str, storage: str, share: float) -> None:
    which = memory, storage
    HIGHEST[which] = max(HIGHEST.get(which, 0.0), share)
    COUNTED[which] = COUNTED.get(which, 0) + 1
    figures.tell(
        "memory",
        f"plan, {memory}, {storage}",
        f"{COUNTED[which]} kinds of requests took at most {100 * HIGHEST[which]:.0f} % of their plan",
    )


def _in_memory(concepts: Sequence[Any], session: Session) -> int:
    kept = [concept.nbytes for concept in concepts if isinstance(concept, KeptConcept)]
    return sum(kept) or session.kept_bytes


def test_what_a_limit_has_no_room_for_is_refused_before_it_is_computed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a device's free memory decides where keys are, so does a limit of the process: `auto` takes what fits."""
    left: int | None = None
    monkeypatch.setattr("magicface_rt.kept.keeper.available_bytes", lambda: left)
    with Session(bundle, backend=Hollow(), keep="1GiB") as session:
        plan = session.plan(WHOLE, PLAN_STEPS)
        assert plan.mode == "keep"
        left = plan.modes["keep"].host - 1
        assert session.plan(WHOLE, PLAN_STEPS).mode == "recompute"
        with pytest.raises(HostMemoryError, match=r"need [\d.,]+ MB more on the host \('keep'\)"):
            session.plan(WHOLE, PLAN_STEPS, memory="keep")
        left = plan.modes["recompute"].host - 1
        with pytest.raises(HostMemoryError, match="'recompute'"):
            session.generate(PROMPT, WHOLE, steps=PLAN_STEPS)
        assert not session._graphs.runners, "a graph was loaded"
        left = plan.bytes_kept // len(WHOLE) - 1
        with pytest.raises(HostMemoryError, match="keys of a reference for 20 steps need"):
            session.prepare(WHOLE[0], steps=PLAN_STEPS)
        session.generate(PROMPT, [], steps=1)
        left = None
        kept = [session.prepare(concept, steps=PLAN_STEPS) for concept in WHOLE]
        left = session.plan(kept, PLAN_STEPS).peak.host - plan.bytes_kept
        session.generate(PROMPT, kept, steps=PLAN_STEPS)  # what is in memory already takes no more


@pytest.mark.parametrize("resample", ["lanczos", "nearest"])
def test_a_photograph_is_held_in_the_bundles_size(bundle: Bundle, resample: Any) -> None:
    """Four bytes a pixel of a photograph, for as long as the request takes, are more than all of its keys."""
    values = np.random.default_rng(3).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    reference = Reference(Image.fromarray(values), mask=np.ones((700, 900), bool), prompt="a", resample=resample)
    concept = Concept("man", reference, reference)
    size = bundle.height, bundle.width
    as_read, held = load_references(concept, bundle), load_bare(concept, bundle)
    for one, of_request in zip(as_read, held, strict=True):
        assert of_request.loaded.image.size == size[::-1]
        np.testing.assert_array_equal(of_request.loaded.pixels(*size), one.pixels(*size))
        assert of_request.loaded.name == one.name
