"""What kept concepts count and lay out, number by number, on a bundle that can be reckoned with by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import BudgetError, Concept, ConceptError, KeptConcept, KeptConceptError, OptionError, Reference
from magicface_rt.backends.checks import Limits
from magicface_rt.images import LoadedReference
from magicface_rt.kept import KeptReference, MemoryUse, Origin
from magicface_rt.kept.keeper import Keeper, KeepSettings, checked_storage
from magicface_rt.kept.memory import (
    Tokens,
    make_plan,
    request_bytes,
    row_bytes,
    rows_per_pass,
    step_bytes,
    stored_bytes,
)
from magicface_rt.kept.preparation import EncodedReference, inside, prepare_reference, token_counts
from magicface_rt.kept.reference import Exact
from magicface_rt.kept.store import KeptStore
from magicface_rt.schedule import Schedule, reference_noise

LAYERS = ((10, 2, 24), (13, 1, 8))
STEPS = 5
KIB = 1024


class SmallBundle:
    """As much of a `Bundle` as kept concepts look at: 64 x 64 px, grids of 8 x 8 and 4 x 4."""

    hash, architecture, dtype = "b" * 64, "small", "float16"
    height = width = 64
    rows = columns = 8
    latent_channels, text_width = 4, 16
    factors = (1, 2)
    injection_layers = tuple(SimpleNamespace(index=i, factor=f, width=w) for i, f, w in LAYERS)
    limits = SimpleNamespace(images=4, references=6)
    schedule = Schedule()

    def grid(self, factor: int) -> tuple[int, int]:
        return 8 // factor, 8 // factor


BUNDLE: Any = SmallBundle()
BARE = Tokens({1: 7, 2: 3}, "no", 0)  # 512 bytes a step
IN_MEMORY = Tokens({1: 4, 2: 2}, "memory", 1000)  # 320
IN_FILE = Tokens({1: 5, 2: 1}, "file", 2000)  # 256
HIDDEN = Tokens({1: 9, 2: 9}, "no", 0, used=False)
HIDDEN_KEPT = Tokens({1: 1, 2: 1}, "memory", 300, used=False)
ROW = 60 * 512 * 2
REQUEST = 12288 * (20 + 2 * 5) + (5 + 1) * 8 * (1024 + 4928) + KIB * KIB


# --------------------------------------------------------------------------------------------------------- memory plan


def plan(references: Sequence[Tokens], **changes: Any) -> Any:
    given: dict[str, Any] = {
        "steps": 10,
        "images": 5,
        "at_once": 4,
        "own_keys": False,
        "storage": "exact",
        "memory": "keep",
        "budget": None,
        "store_limit": 0,
        "on_device": False,
        "rows": 3,
    }
    return make_plan(BUNDLE, references, **{**given, **changes})


def test_bytes_of_a_step_of_all_steps_and_of_a_row() -> None:
    assert step_bytes(BUNDLE, {1: 7, 2: 3}) == 2 * (7 * 8 + 3 * 24) * 2 == 512
    assert stored_bytes(BUNDLE, {1: 7, 2: 3}, 5, "exact") == 5 * 512
    assert stored_bytes(BUNDLE, {1: 7, 2: 3}, 5, "8-bit") == 5 * (2 * 8 * (7 + 8) + 2 * 24 * (3 + 8))
    assert row_bytes(BUNDLE) == ROW
    assert request_bytes(BUNDLE, 5, 1) == REQUEST


@pytest.mark.parametrize(
    ("workspace", "largest", "tokens", "rows"),
    [
        (3 * (ROW + 512), {}, BARE.tokens, 3),
        (3 * (ROW + 512) - 1, {}, BARE.tokens, 2),
        (0, {}, BARE.tokens, 1),
        (10**9, {}, BARE.tokens, 5),
        (10**9, {"R": 2, "M1": None}, BARE.tokens, 2),
        (10**9, {"M1": 3 * 7 - 1}, BARE.tokens, 2),
        (10**9, {"M1": 6}, BARE.tokens, 1),
        (10**9, {"M2": 4 * 3}, BARE.tokens, 4),
        (10**9, {"M2": 4}, {1: 7, 2: 0}, 5),
    ],
)
def test_rows_of_a_pass(workspace: int, largest: dict[str, int | None], tokens: dict[int, int], rows: int) -> None:
    assert rows_per_pass(BUNDLE, tokens, 5, largest, workspace) == rows


def test_what_each_mode_needs_without_a_device() -> None:
    found = plan([BARE, IN_MEMORY, IN_FILE, HIDDEN, HIDDEN_KEPT])
    slot = 1088 + 272  # a step's keys, and a quarter more
    preparing, beside = 3 * (ROW + 2 * 512), ROW + 2 * 512
    assert found.modes == {
        "keep": MemoryUse(5120 + 1300 + 2000 + 2 * slot + preparing + REQUEST, 0),
        "stream": MemoryUse(5120 + 1300 + 2 * slot + preparing + REQUEST, 0),
        "recompute": MemoryUse(1300 + 3 * slot + beside + REQUEST, 0),
    }
    assert (found.bytes_kept, found.bytes_per_step, found.rows_per_pass) == (5120 + 1300 + 2000, 1088, 3)
    assert found.tokens == {1: 16, 2: 6}
    assert found.peak == found.modes["keep"]
    assert found.to_dict() == {
        "mode": "keep",
        "budget": None,
        "on_device": False,
        "steps": 10,
        "images": 5,
        "modes": {mode: {"host": use.host, "device": 0} for mode, use in found.modes.items()},
        "bytes_kept": 8420,
        "bytes_per_step": 1088,
        "tokens": {"1": 16, "2": 6},
        "rows_per_pass": 3,
    }


def test_what_each_mode_needs_with_a_device() -> None:
    found = plan([BARE, IN_MEMORY, IN_FILE, HIDDEN, HIDDEN_KEPT], on_device=True)
    slot, kept = 1360, 5120 + 1300 + 2000
    preparing, beside = 3 * (ROW + 2 * 512), ROW + 2 * 512
    assert found.modes == {
        "keep": MemoryUse(kept + 3 * 512 + 1088 + REQUEST, 10 * 1088 + slot + preparing),
        "stream": MemoryUse(kept + 3 * 512 + 2 * slot + REQUEST, 3 * slot + preparing),
        "recompute": MemoryUse(1300 + 2000 + 2 * slot + REQUEST, 3 * slot + beside),
    }
    own = plan([BARE, IN_MEMORY, IN_FILE, HIDDEN, HIDDEN_KEPT], on_device=True, own_keys=True)
    assert own.modes["stream"].device - found.modes["stream"].device == 3 * 3 * slot, "four images have four rows"


def test_what_prepared_references_need() -> None:
    """No pass prepares them; what has to be spread out before it is laid is counted, and only then."""
    slot = 400
    exact = plan([replace(IN_MEMORY, held="no", nbytes=0), HIDDEN])
    assert exact.modes["stream"].host - plan([HIDDEN]).modes["stream"].host == (
        3200 + slot + 3 * (ROW + 640) + 8 * (1024 + 4928)
    )
    small = plan([replace(IN_MEMORY, held="no", nbytes=0)], storage="8-bit")
    assert small.bytes_kept == stored_bytes(BUNDLE, IN_MEMORY.tokens, 10, "8-bit")
    assert small.modes["stream"].host - exact.modes["stream"].host == small.bytes_kept - 3200 + slot
    kept = plan([IN_MEMORY])
    nothing = 12288 * 30 + 5 * 8 * (1024 + 4928) + KIB * KIB
    assert kept.modes["keep"].host == 1000 + 2 * slot + nothing
    assert kept.modes["recompute"].host == 1000 + 3 * slot + nothing
    assert kept.rows_per_pass == 0


@pytest.mark.parametrize(
    ("references", "changes", "mode"),
    [
        ([BARE], {"images": 4, "store_limit": 5119}, "recompute"),
        ([BARE], {"images": 4, "store_limit": 5120}, "keep"),
        ([BARE], {"images": 5}, "keep"),
        ([BARE, IN_FILE], {"images": 5}, "stream"),
        ([BARE, IN_FILE], {"images": 5, "on_device": True}, "keep"),
        ([BARE, IN_FILE], {"images": 4}, "recompute"),
        ([IN_MEMORY], {"images": 4}, "keep"),
        ([IN_FILE], {"images": 4}, "stream"),
        ([], {"images": 4}, "keep"),
    ],
)
def test_auto_takes_what_serves_again_first(references: list[Tokens], changes: dict[str, Any], mode: str) -> None:
    assert plan(references, memory="auto", **changes).mode == mode


@pytest.mark.parametrize("on_device", [False, True])
def test_auto_takes_the_first_that_fits_to_the_byte(on_device: bool) -> None:
    needs = plan([BARE], on_device=on_device).modes
    needed = {mode: use.device if on_device else use.host for mode, use in needs.items()}
    assert needed["keep"] > needed["recompute"]
    order = sorted(needed, key=lambda mode: -needed[mode])
    for mode, smaller in zip(order, [*order[1:], None], strict=True):
        exactly = {"memory": "auto", "on_device": on_device}
        if needed[mode] == min(needed[other] for other in order):
            assert plan([BARE], budget=needed[mode], **exactly).mode == mode
            where = "device" if on_device else "host"
            with pytest.raises(BudgetError, match=rf"at least {needed[mode] / 1e6:,.1f} MB on the {where} \(memory="):
                plan([BARE], budget=needed[mode] - 1, **exactly)
        elif smaller is not None:
            assert needed[plan([BARE], budget=needed[mode] - 1, **exactly).mode] < needed[mode]
    for mode in needs:
        chosen = {"memory": mode, "on_device": on_device}
        assert plan([BARE], budget=needed[mode], **chosen).mode == mode
        with pytest.raises(BudgetError, match=f"memory='{mode}'"):
            plan([BARE], budget=needed[mode] - 1, **chosen)
    assert plan([HIDDEN], budget=0, on_device=on_device).budget == 0, "nothing that a budget could hold down"
    with pytest.raises(OptionError, match="memory is 'ram', expected one of auto, keep, stream, recompute"):
        plan([BARE], memory="ram")


def test_a_plan_cannot_be_changed() -> None:
    found = plan([BARE])
    for frozen in (found, found.peak, BARE, KeepSettings()):
        with pytest.raises(FrozenInstanceError):
            frozen.mode = frozen.host = frozen.held = frozen.keep = 0


# -------------------------------------------------------------------------------------------------------------- keeper


def keeper(*, free: int | None = None, **settings: Any) -> Keeper:
    backend: Any = SimpleNamespace(free_device_memory=lambda: free)
    return Keeper(BUNDLE, backend, KeepSettings(**settings))


def test_settings_are_read_and_checked() -> None:
    assert KeepSettings() == KeepSettings(0, "auto", None, "exact", False)
    assert KeepSettings.of(None, "auto", None, "exact", False) == KeepSettings()
    assert KeepSettings.of("1kB", "stream", "2kB", "8-bit", True) == KeepSettings(1000, "stream", 2000, "8-bit", True)
    assert [checked_storage(one) for one in ("exact", "8-bit")] == ["exact", "8-bit"]
    with pytest.raises(OptionError, match="memory is 'ram', expected one of auto, keep"):
        KeepSettings.of(None, "ram", None, "exact", False)
    with pytest.raises(OptionError, match="storage is '4-bit', expected one of exact, 8-bit"):
        KeepSettings.of(None, "auto", None, "4-bit", False)


def test_a_keeper_plans_by_its_settings_unless_told_otherwise() -> None:
    mine = keeper(memory="stream", budget=10**9, keep=5120, storage="8-bit")
    found = mine.plan([BARE], steps=10, images=5)
    rows = rows_per_pass(BUNDLE, BARE.tokens, 10, {}, 10**9 // 4)
    assert found == plan([BARE], memory="stream", budget=10**9, storage="8-bit", rows=min(rows, 10))
    other = mine.plan([BARE], steps=10, images=5, memory="recompute", budget=10**8, own_keys=True)
    assert (other.mode, other.budget) == ("recompute", 10**8)
    assert mine.plan([IN_MEMORY], steps=10, images=3, own_keys=True).modes["stream"].host == (
        plan([IN_MEMORY], memory="stream", storage="8-bit", images=3, at_once=3, own_keys=True).modes["stream"].host
    )
    assert keeper(memory="auto", keep=5120).plan([BARE], steps=10, images=1).mode == "keep"
    assert keeper(memory="auto", keep=5119).plan([BARE], steps=10, images=1).mode == "recompute"


def test_a_keeper_counts_on_nine_tenths_of_what_is_free_on_a_device() -> None:
    assert keeper(free=10**9).plan([BARE], steps=10, images=1).budget == 9 * 10**8
    assert keeper(free=10**9).plan([BARE], steps=10, images=1).on_device
    assert keeper(free=10**9, budget=10**8).plan([BARE], steps=10, images=1).budget == 10**8
    assert keeper().plan([BARE], steps=10, images=1).budget is None


def test_a_pass_takes_a_quarter_of_the_budget_and_512_mib_at_most() -> None:
    assert keeper().rows(BARE.tokens, 10**6, {}) == 512 * KIB * KIB // (ROW + 512)
    assert keeper(budget=40 * (ROW + 512)).rows(BARE.tokens, 100, {}) == 10
    assert keeper(budget=10**12).rows(BARE.tokens, 10**6, {}) == 512 * KIB * KIB // (ROW + 512)
    assert keeper(budget=1).rows(BARE.tokens, 100, {}, 7 * (ROW + 512)) == 7


@pytest.mark.parametrize(
    ("settings", "on_device", "mode", "trimmed"),
    [
        ({"budget": 10**6}, True, "keep", [("key",)]),
        ({"budget": 10**6}, True, "stream", [()]),
        ({"budget": 10**6}, False, "keep", []),
        ({}, True, "keep", []),
    ],
)
def test_room_is_made_under_a_budget_on_a_device(
    settings: dict[str, Any], on_device: bool, mode: str, trimmed: list[Any]
) -> None:
    mine, found = keeper(**settings), plan([BARE], memory=mode, on_device=on_device)
    calls: list[Any] = []
    mine.on_device.trim = lambda nbytes, keys: calls.append((nbytes, keys))  # type: ignore[method-assign]
    mine.make_room(found, ("key",))
    assert calls == [(10**6 - found.peak.device, keys) for keys in trimmed]
    mine.make_room(plan([HIDDEN], on_device=True), ("key",))
    assert len(calls) == len(trimmed), "without keys there is no room to be made"


def test_a_keeper_says_whether_what_was_to_be_forgotten_is_gone() -> None:
    mine = keeper(keep=10**6)
    for key in ("a", "b"):
        mine.store.get_or_make(key, lambda key=key: KeptReference(key, "", "exact", {}, {}))
    held = ["b"]
    mine.on_device.holds = lambda key: key in held  # type: ignore[method-assign]
    assert mine.forget(["a"])
    assert mine.store.keys == ("b",)
    assert not mine.forget(["a", "b"]), "a request uses it on the device"
    held.clear()
    assert mine.forget(None)
    type_of = type(mine.on_device)
    mine.on_device.__class__ = type("Busy", (type_of,), {"nbytes": 5})
    assert not mine.forget(None)


def test_what_a_store_has_is_found_and_is_the_newest_then() -> None:
    store, of = KeptStore(10**6), {key: KeptReference(key, "", "exact", {}, {}) for key in "ab"}
    for key, one in of.items():
        assert store.get_or_make(key, lambda one=one: one) is one
    assert store.keys == ("a", "b")
    assert store.find("a") is of["a"]
    assert store.keys == ("b", "a")
    assert store.get_or_make("b", lambda: of["a"]) is of["b"]
    assert store.keys == ("a", "b")
    assert store.find("c") is None


# --------------------------------------------------------------------------------------------------------- preparation


class Graph:
    """`reference_kv`, whose keys say their timestep, their row's place and the token; see `expected`."""

    def __init__(self) -> None:
        self.limits: Limits = {}
        self.inputs: list[Mapping[str, np.ndarray]] = []

    def once(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.inputs.append(inputs)
        found = {}
        for index, factor, width in LAYERS:
            kept = inputs[f"kept_{factor}"]
            cells = (8 // factor) ** 2
            values = inputs["timestep"][kept // cells] + (kept % cells) / 100
            for kind, sign in (("k", 1), ("v", -1)):
                found[f"{kind}_ref_{index}"] = np.repeat(sign * values[:, None], width, axis=1).astype(np.float32)
        return found


def encoded(mask: np.ndarray) -> EncodedReference:
    loaded = LoadedReference(Image.new("RGB", (64, 64)), mask, "x")
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, 8, 8), dtype=np.float32)
    return EncodedReference(loaded, "a man", latents, np.ones((1, 77, 16), np.float32))


def corner(side: int) -> np.ndarray:
    mask = np.zeros((128, 128), np.uint8)
    mask[:side, :side] = 1
    return mask


def prepared(mask: np.ndarray, rows: int, **given: Any) -> tuple[KeptReference, Graph, list[int], EncodedReference]:
    graph, reported, reference = Graph(), list[int](), encoded(mask)
    bundle: Any = SmallBundle()
    bundle.dtype = "float32"
    origin = Origin.of(bundle, STEPS, 3)
    kept = prepare_reference(
        bundle,
        graph,
        reference,
        origin,
        "key",
        storage="exact",
        rows=rows,
        report=reported.append,
        **given,  # type: ignore[arg-type]
    )
    return kept, graph, reported, reference


def test_tokens_inside_a_mask() -> None:
    loaded = encoded(corner(33)).loaded
    assert {factor: tokens.tolist() for factor, tokens in inside(loaded, BUNDLE).items()} == {
        1: [0, 1, 2, 8, 9, 10, 16, 17, 18],
        2: [0, 1, 4, 5],
    }
    assert token_counts(loaded, BUNDLE) == {1: 9, 2: 4}


@pytest.mark.parametrize(("rows", "passes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_steps_go_through_in_rows_and_come_out_in_order(rows: int, passes: list[int]) -> None:
    kept, graph, reported, reference = prepared(corner(33), rows)
    timesteps = [int(t) for t in Schedule().timesteps(STEPS)]
    assert [len(inputs["timestep"]) for inputs in graph.inputs] == passes
    assert reported == np.cumsum(passes).tolist()
    step = 0
    for inputs in graph.inputs:
        for row in range(len(inputs["timestep"])):
            noise = reference_noise(3, step, (1, 4, 8, 8))
            expected = Schedule().add_noise(reference.latents, noise, timesteps[step])
            np.testing.assert_array_equal(inputs["latents"][row : row + 1], expected)
            assert inputs["timestep"][row] == timesteps[step]
            step += 1
        assert inputs["text"].shape == (len(inputs["timestep"]), 77, 16)
    assert (kept.key, kept.prompt, kept.storage, kept.tokens) == ("key", "a man", "exact", {1: 9, 2: 4})
    for index, factor, width in LAYERS:
        tokens = inside(reference.loaded, BUNDLE)[factor]
        for step, timestep in enumerate(timesteps):
            values = np.repeat((timestep + tokens / 100)[:, None], width, axis=1).astype(np.float32)
            np.testing.assert_array_equal(kept.tensors[f"k_ref_{index}"].step(step), values)
            np.testing.assert_array_equal(kept.tensors[f"v_ref_{index}"].step(step), -values)


def test_noise_of_the_callers_own_and_a_mask_that_vanishes_on_a_grid() -> None:
    speck = np.zeros((128, 128), np.uint8)
    speck[16, 16] = 1  # on the grid of 8 x 8, between the points of that of 4 x 4
    ones = np.ones((1, 4, 8, 8), np.float32)
    kept, graph, _, reference = prepared(speck, 2, noise=lambda step: ones * step)
    assert kept.tokens == {1: 1, 2: 0}
    assert kept.tensors["k_ref_10"].arrays[""].shape == (STEPS, 0, 24)
    assert graph.inputs[0]["kept_2"].tolist() == [0], "one stands in for none"
    assert graph.inputs[0]["kept_1"].tolist() == [9, 64 + 9]
    timestep = int(Schedule().timesteps(STEPS)[1])
    np.testing.assert_array_equal(
        graph.inputs[0]["latents"][1:], Schedule().add_noise(reference.latents, ones, timestep)
    )


# ------------------------------------------------------------------------------------------------------- kept concepts


def concept(**given: Any) -> KeptConcept:
    tensors = {"k_ref_10": Exact(np.zeros((2, 3, 4), np.float16))}
    references = [KeptReference(str(k), "", "exact", {1: 3}, tensors, error=k / 10) for k in range(2)]
    origin = Origin.of(BUNDLE, 2, 9)
    return KeptConcept(**{"word": "hat", "references": references, "origin": origin, **given})


def test_a_kept_concept_says_what_it_is_good_for_and_what_it_holds() -> None:
    one = concept()
    assert (one.steps, one.reference_seed, one.nbytes, one.error) == (2, 9, 96, 0.1)
    assert (one.weight, one.token_index, one.name, one.source, one.pictures) == (3.0, None, "hat", None, {})
    with pytest.raises(KeptConceptError, match="kept concept 'hat' has no reference"):
        concept(references=[])
    source = Concept("hat", *[Reference("a.png")] * 2)
    assert concept(source=source).source is source


def test_a_kept_concept_is_itself_and_cannot_be_changed() -> None:
    one = concept()
    assert one != concept()
    assert len({one, one.renamed()}) == 2
    with pytest.raises(FrozenInstanceError):
        one.weight = 1.0  # type: ignore[misc]


def test_a_name_of_ones_own_and_what_stays_with_it() -> None:
    pictures = {"image_0": np.zeros((2, 2, 3), np.uint8)}
    one = concept(
        weight=2.5, token_index=[4, 3], name="cap", pictures=pictures, source=Concept("hat", *[Reference("a.png")] * 2)
    )
    same = one.renamed(weight=1.0)
    assert (same.word, same.weight, same.token_index, same.name) == ("hat", 1.0, (3, 4), "cap")
    assert (same.references, same.origin, same.source) == (one.references, one.origin, one.source)
    assert same.pictures == pictures
    other = one.renamed("cat")
    assert (other.word, other.weight, other.token_index, other.name) == ("cat", 2.5, None, "cat")
    placed = one.renamed("cat", token_index=5, name="pet")
    assert (placed.token_index, placed.name) == ((5,), "pet")
    moved = one.renamed(token_index=6, name="lid")
    assert (moved.word, moved.token_index, moved.name) == ("hat", (6,), "lid")
    with pytest.raises(ConceptError, match="weight is nan"):
        one.renamed(weight=float("nan"))


def test_what_a_kept_concept_says_as_json() -> None:
    said = concept(token_index=4).to_dict()
    assert said == {
        "word": "hat",
        "name": "hat",
        "weight": 3.0,
        "token_index": [4],
        "references": [
            {"key": str(k), "prompt": "", "storage": "exact", "tokens": {"1": 3}, "error": k / 10} for k in range(2)
        ],
        "origin": Origin.of(BUNDLE, 2, 9).to_dict(),
        "note": None,
    }
    assert concept().to_dict()["token_index"] is None


# -------------------------------------------------------------------------------------------------------------- origin

WANTED = Origin.of(BUNDLE, 2, 9)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"bundle_hash": "c" * 64},
            "is of the bundle cccccccccccccccc... (small, 64 x 64 px, float16), and this is bbbb",
        ),
        (
            {"timesteps": (1, 2, 3)},
            "is for 3 steps, and the request has 2. Ask for steps=3, or prepare it again with steps=2.",
        ),
        ({"timesteps": (5, 1)}, "is of another schedule (timesteps differ). Prepare it again: magicface-rt prepare"),
        ({"scheduler": {**WANTED.scheduler, "beta_end": 0.5, "x": 1}}, "is of another schedule (beta_end, x differ)."),
        ({"reference_seed": 8}, "has the noise of reference_seed 8, and the request asks for 9."),
        ({"dtype": "float32"}, "does not fit the bundle it names. Prepare it again: "),
        ({"layers": ((10, 2, 24),)}, "does not fit the bundle it names."),
    ],
)
def test_keys_of_another_origin_are_refused_with_what_differs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KeptConceptError) as caught:
        replace(WANTED, **changes).check(WANTED, "man")
    assert f"kept concept 'man' {said}" in str(caught.value)


def test_an_origin_that_fits_and_what_it_says() -> None:
    WANTED.check(Origin.of(BUNDLE, 2, 9), "man")
    assert Origin.from_dict(WANTED.to_dict()) == WANTED
    assert WANTED.widths == {"k_ref_10": (2, 24), "v_ref_10": (2, 24), "k_ref_13": (1, 8), "v_ref_13": (1, 8)}
    assert (WANTED.factors, WANTED.steps, WANTED.timesteps) == ((1, 2), 2, (501, 1))
    with pytest.raises(FrozenInstanceError):
        WANTED.height = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"height": 0}, "height is 0, expected a whole number from 1"),
        ({"width": 0}, "width is 0, expected a whole number from 1"),
        ({"reference_seed": 2**64}, "reference_seed is 18446744073709551616, expected a whole number from 0"),
        ({"layers": [[10, 0, 24]]}, "layers has a factor or a width of 0"),
        ({"layers": [[13, 1, 8], [13, 2, 24]]}, "layers has an index that is not above the one before it"),
        ({"layers": []}, "layers is"),
        ({"layers": {}}, "layers is"),
        ({"scheduler": {"x": None}}, "scheduler is"),
        ({"architecture": 5}, "architecture is 5, expected text"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of float32, float16, bfloat16"),
    ],
)
def test_what_is_no_origin_is_refused_by_its_entry(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Origin.from_dict({**WANTED.to_dict(), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 1},
        {"width": 1},
        {"reference_seed": 2**64 - 1},
        {"layers": [[0, 1, 1], [1, 1, 1]]},
        {"timesteps": [0]},
        {"scheduler": {"a": "b", "c": True, "d": 5, "e": 0.5}},
        {"dtype": "bfloat16"},
    ],
)
def test_the_smallest_and_largest_of_an_origin(changes: dict[str, Any]) -> None:
    found = Origin.from_dict({**WANTED.to_dict(), **changes}).to_dict()
    assert {name: found[name] for name in changes} == changes
