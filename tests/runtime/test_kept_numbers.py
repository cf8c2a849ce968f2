"""What kept concepts count and lay out, number by number, on a bundle that can be reckoned with by hand."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import BudgetError, Concept, ConceptError, KeptConcept, KeptConceptError, OptionError, Reference
from magicface_rt.backends.checks import ShapeRanges
from magicface_rt.backends.device import Device
from magicface_rt.backends.host import from_bfloat16, to_bfloat16
from magicface_rt.backends.key_uploader import KeyUploader
from magicface_rt.backends.pieces import Piece, lay_on_host
from magicface_rt.backends.worker_stream import WorkerStream
from magicface_rt.errors import DeviceMemoryError, HostMemoryError, NonFiniteError
from magicface_rt.files.stamps import Stamp
from magicface_rt.images import LoadedReference
from magicface_rt.kept import KeptReference, MemoryUse, Origin, awaited
from magicface_rt.kept.awaited import Awaited
from magicface_rt.kept.feed import ComputedKeys, KeyFeed, PlacedKeys, ReferencePass, StoredKeys
from magicface_rt.kept.keeper import Keeper, KeepSettings, checked_storage
from magicface_rt.kept.memory import (
    MEMORY,
    PlannedReference,
    make_plan,
    request_bytes,
    row_bytes,
    rows_per_pass,
    step_bytes,
    stored_bytes,
)
from magicface_rt.kept.on_device import OnDevice
from magicface_rt.kept.origin import content_key, finite_number
from magicface_rt.kept.preparation import EncodedReference, inside, prepare_reference, token_counts
from magicface_rt.kept.reference import EightBit, Exact, MappedFile, empty_tensors, worst_error
from magicface_rt.kept.store import KeptStore
from magicface_rt.regions import PADDING
from magicface_rt.schedule import Schedule, reference_noise
from tests.runtime.fake_cuda import FakeCuda

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
BARE = PlannedReference({1: 7, 2: 3}, "nowhere", 0)  # 512 bytes a step
IN_MEMORY = PlannedReference({1: 4, 2: 2}, "memory", 1000)  # 320
IN_FILE = PlannedReference({1: 5, 2: 1}, "file", 2000)  # 256
HIDDEN = PlannedReference({1: 9, 2: 9}, "nowhere", 0, used=False)
HIDDEN_KEPT = PlannedReference({1: 1, 2: 1}, "memory", 300, used=False)
ROW = 60 * 512 * 2
REQUEST = 12288 * (20 + 2 * 5) + (5 + 1) * 8 * (1024 + 4928) + KIB * KIB


# --------------------------------------------------------------------------------------------------------- memory plan


def plan(references: Sequence[PlannedReference], **changes: Any) -> Any:
    given: dict[str, Any] = {
        "steps": 10,
        "images": 5,
        "at_once": 4,
        "keys_per_image": False,
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
    wide: Any = SmallBundle()
    wide.grid = lambda factor: (8 // factor, 16 // factor)
    assert row_bytes(wide) == 2 * ROW
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
    whole = PlannedReference({1: 64, 2: 16}, "nowhere", 0)  # 3584 bytes a step
    two = plan([BARE, whole, IN_MEMORY], on_device=True).modes["keep"]
    assert two.device - plan([BARE, IN_MEMORY], on_device=True).modes["keep"].device == (
        10 * 3584 + 3584 + 896 + 3 * 2 * (3584 - 512)
    ), "of two that are prepared one after the other the larger counts"
    ready = plan([IN_MEMORY], on_device=True)
    assert ready.modes["keep"].host == 1000 + 320 + REQUEST - 8 * (1024 + 4928), "nothing is prepared"
    own = plan([BARE, IN_MEMORY, IN_FILE, HIDDEN, HIDDEN_KEPT], on_device=True, keys_per_image=True)
    assert own.modes["stream"].device - found.modes["stream"].device == 3 * 3 * slot, "four images have four rows"


def test_what_prepared_references_need() -> None:
    """No pass prepares them; what has to be spread out before it is laid is counted, and only then."""
    slot = 400
    exact = plan([replace(IN_MEMORY, stored_in="nowhere", nbytes=0), HIDDEN])
    assert exact.modes["stream"].host - plan([HIDDEN]).modes["stream"].host == (
        3200 + slot + 3 * (ROW + 640) + 8 * (1024 + 4928)
    )
    small = plan([replace(IN_MEMORY, stored_in="nowhere", nbytes=0)], storage="8-bit")
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
def test_auto_takes_what_serves_again_first(
    references: list[PlannedReference], changes: dict[str, Any], mode: str
) -> None:
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


def test_a_mode_has_to_have_room_on_the_host_as_well() -> None:
    references = [BARE, IN_MEMORY, IN_FILE]
    modes = plan(references).modes
    more = {mode: use.host - IN_MEMORY.nbytes for mode, use in modes.items()}
    assert more["keep"] > more["stream"] > more["recompute"], "those in memory take no more"
    for mode, need in more.items():
        assert plan(references, memory=mode, host_room=need).mode == mode
        with pytest.raises(HostMemoryError, match=rf"need {need / 1e6:,.1f} MB more on the host \('{mode}'\)"):
            plan(references, memory=mode, host_room=need - 1)
    for mode, auto in (("keep", "stream"), ("stream", "stream"), ("recompute", "recompute")):
        assert plan(references, memory="auto", host_room=more[mode]).mode == auto
    with pytest.raises(HostMemoryError, match=rf"need {more['recompute'] / 1e6:,.1f} MB more .*'recompute'"):
        plan(references, memory="auto", host_room=more["recompute"] - 1)
    assert plan([HIDDEN], host_room=0).mode == "keep", "without references there is nothing to be left out"


def test_a_plan_cannot_be_changed() -> None:
    found = plan([BARE])
    for frozen in (found, found.peak, BARE, KeepSettings()):
        with pytest.raises(FrozenInstanceError):
            frozen.mode = frozen.host = frozen.stored_in = frozen.keep = 0


# -------------------------------------------------------------------------------------------------------------- keeper


def keeper(*, free: int | None = None, **settings: Any) -> Keeper:
    backend: Any = SimpleNamespace(free_device_memory=lambda: free)
    return Keeper(BUNDLE, backend, KeepSettings(**settings))


@pytest.mark.parametrize(
    ("free", "budget", "known"), [(None, None, True), (None, 100, True), (2**30, None, False), (2**30, 100, True)]
)
def test_only_on_a_device_without_a_budget_a_plan_waits_for_the_graphs(
    free: int | None, budget: int | None, known: bool
) -> None:
    assert keeper(free=free, budget=budget).plans_without_graphs is known


def test_settings_are_read_and_checked() -> None:
    assert KeepSettings() == KeepSettings(0, "auto", None, "exact", False)
    assert KeepSettings.of(None, "auto", None, "exact", False) == KeepSettings()
    assert KeepSettings.of("1kB", "stream", "2kB", "8-bit", True) == KeepSettings(1000, "stream", 2000, "8-bit", True)
    assert [checked_storage(one) for one in ("exact", "8-bit")] == ["exact", "8-bit"]
    with pytest.raises(OptionError, match="memory is 'ram', expected one of auto, keep"):
        KeepSettings.of(None, "ram", None, "exact", False)
    with pytest.raises(OptionError, match="storage is '4-bit', expected one of exact, 8-bit"):
        KeepSettings.of(None, "auto", None, "4-bit", False)
    for keep, budget, said in (("much", None, "keep is 'much'"), (None, -1, "budget is -1")):
        with pytest.raises(OptionError, match=said):
            KeepSettings.of(keep, "auto", budget, "exact", False)


def test_a_keeper_plans_by_its_settings_unless_told_otherwise() -> None:
    mine = keeper(memory="stream", budget=10**9, keep=5120, storage="8-bit")
    found = mine.plan([BARE], steps=10, images=5)
    rows = rows_per_pass(BUNDLE, BARE.tokens, 10, {}, 10**9 // 4)
    assert found == plan([BARE], memory="stream", budget=10**9, storage="8-bit", rows=min(rows, 10))
    other = mine.plan([BARE], steps=10, images=5, memory="recompute", budget=10**8, keys_per_image=True)
    assert (other.mode, other.budget) == ("recompute", 10**8)
    assert mine.plan([IN_MEMORY], steps=10, images=3, keys_per_image=True).modes["stream"].host == (
        plan([IN_MEMORY], memory="stream", storage="8-bit", images=3, at_once=3, keys_per_image=True)
        .modes["stream"]
        .host
    )
    assert keeper(memory="auto", keep=5120).plan([BARE], steps=10, images=1).mode == "keep"
    assert keeper(memory="auto", keep=5119).plan([BARE], steps=10, images=1).mode == "recompute"


def outcome(mine: Keeper, **given: Any) -> Any:
    try:
        return mine.plan([BARE, IN_MEMORY], steps=10, images=5, **given)
    except BudgetError as error:
        return str(error)


@pytest.mark.parametrize("free", [None, 10**9])
@pytest.mark.parametrize("own", [None, 30 * ROW, 10**9])
def test_a_plan_for_a_budget_is_that_of_a_keeper_which_has_it(own: int | None, free: int | None) -> None:
    mine, found = keeper(budget=own, free=free), []
    for mode in MEMORY:
        for budget in (1000, REQUEST + 5 * ROW, 12 * ROW, 30 * ROW, 10**8, 10**9):
            found.append(outcome(mine, memory=mode, budget=budget))
            assert found[-1] == outcome(keeper(memory=mode, budget=budget, free=free)), (mode, budget)
    assert len({one.rows_per_pass for one in found if not isinstance(one, str)}) > 2, "the budget makes passes smaller"
    assert any(isinstance(one, str) for one in found), "some are too small"


def test_a_keeper_counts_on_nine_tenths_of_what_is_free_on_a_device() -> None:
    assert keeper(free=10**9).plan([BARE], steps=10, images=1).budget == 9 * 10**8
    assert keeper(free=10**9).plan([BARE], steps=10, images=1).on_device
    assert keeper(free=10**9, budget=10**8).plan([BARE], steps=10, images=1).budget == 10**8
    assert keeper().plan([BARE], steps=10, images=1).budget is None
    mine = keeper(free=10**9)
    mine.on_device.unused_bytes = lambda wanted: {("a",): 1000, (): 10}[tuple(wanted)]  # type: ignore[method-assign]
    assert mine.plan([BARE], steps=10, images=1).budget == 9 * 10**8 + 10, "what can be freed is free as well"
    assert mine.plan([BARE], steps=10, images=1, content_keys=("a",)).budget == 9 * 10**8 + 1000


@pytest.mark.parametrize(("storage", "need"), [("exact", 10 * 512), ("8-bit", 10 * (2 * 8 * 15 + 2 * 24 * 11))])
def test_keys_have_to_fit_under_a_limit_of_the_process(
    monkeypatch: pytest.MonkeyPatch, storage: Any, need: int
) -> None:
    for left in (None, need, need - 1):
        monkeypatch.setattr("magicface_rt.kept.keeper.available_bytes", lambda left=left: left)
        if left == need - 1:
            with pytest.raises(
                HostMemoryError, match=r"the keys of a reference for 10 steps need 0\.0 MB more on the host"
            ):
                keeper().check_room(BARE.tokens, 10, storage)
        else:
            keeper().check_room(BARE.tokens, 10, storage)


def test_a_keeper_that_is_closed_holds_nothing() -> None:
    mine, closed = keeper(keep=10**6), list[bool]()
    mine.store.get_or_make("a", lambda: KeptReference("a", "", "exact", {}, {}))
    mine.on_device.close = lambda: closed.append(True)  # type: ignore[method-assign]
    mine.close()
    assert (mine.store.content_keys, closed) == ((), [True])


def test_a_pass_takes_a_quarter_of_the_budget_and_512_mib_at_most() -> None:
    assert keeper().rows(BARE.tokens, 10**6, {}) == 512 * KIB * KIB // (ROW + 512)
    assert keeper(budget=40 * (ROW + 512)).rows(BARE.tokens, 100, {}) == 10
    assert keeper(budget=10**12).rows(BARE.tokens, 10**6, {}) == 512 * KIB * KIB // (ROW + 512)
    assert keeper(budget=1).rows(BARE.tokens, 100, {}, 7 * (ROW + 512)) == 7
    whole = PlannedReference({1: 64, 2: 16}, "nowhere", 0)  # 3584 bytes a step
    mine = keeper(budget=40 * (ROW + 512))
    assert mine.rows(whole.tokens, 100, {}) == 9
    for references in ([BARE, whole], [whole, BARE]):
        planned = mine.plan(references, steps=100, images=1, memory="recompute")
        assert planned.rows_per_pass == 10, "of the one of which most go through together"


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
    held, asked = ["b"], list[Any]()
    mine.on_device.holds = lambda key: key in held  # type: ignore[method-assign]
    mine.on_device.forget = asked.append  # type: ignore[method-assign,assignment]
    assert mine.forget(["a"])
    assert mine.store.content_keys == ("b",)
    assert not mine.forget(["a", "b"]), "a request uses it on the device"
    held.clear()
    assert mine.forget(None)
    assert asked == [["a"], ["a", "b"], None]
    type_of = type(mine.on_device)
    mine.on_device.__class__ = type("Busy", (type_of,), {"nbytes": 5})
    assert not mine.forget(None)


def test_what_a_store_has_is_found_and_is_the_newest_then() -> None:
    store, of = KeptStore(10**6), {key: KeptReference(key, "", "exact", {}, {}) for key in "ab"}
    for key, one in of.items():
        assert store.get_or_make(key, lambda one=one: one) is one
    assert store.content_keys == ("a", "b")
    assert store.find("a") is of["a"]
    assert store.content_keys == ("b", "a")
    assert store.get_or_make("b", lambda: of["a"]) is of["b"]
    assert store.content_keys == ("a", "b")
    assert store.find("c") is None


# --------------------------------------------------------------------------------------------------------- preparation


class Graph:
    """`reference_kv`, whose keys say their timestep, their row's place and the token; see `expected`."""

    def __init__(self) -> None:
        self.limits: ShapeRanges = {}
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


@pytest.mark.parametrize(
    ("rows", "at", "which"), [(1, 1, "step 2 of 5"), (2, 1, "steps 3 to 4 of 5"), (2, 2, "step 5 of 5")]
)
def test_the_steps_whose_keys_are_not_finite_are_named(
    monkeypatch: pytest.MonkeyPatch, rows: int, at: int, which: str
) -> None:
    once = Graph.once

    def spoiled(self: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(self.inputs) == at:
            raise NonFiniteError("graph reference_kv: output k_ref_10")
        return once(self, inputs)

    monkeypatch.setattr(Graph, "once", spoiled)
    with pytest.raises(NonFiniteError, match=f"^{which}: graph reference_kv: output k_ref_10"):
        prepared(corner(33), rows)


def test_references_that_were_computed_alike_are_known_as_the_same() -> None:
    ones = np.ones((1, 4, 8, 8), np.float32)
    first, again = (prepared(corner(33), 2)[0] for _ in range(2))
    assert first.identity == again.identity
    assert prepared(corner(33), 2, noise=lambda step: ones)[0].identity != first.identity


# ---------------------------------------------------------------------------------------------------- keys step by step


class Held:
    """As much of a `Binding` as the feed calls: what each input holds now, and from whom."""

    seconds = 0.5

    def __init__(self, largest: Mapping[str, int] | None = None) -> None:
        self.limit = largest or {}
        self.inputs: dict[str, Any] = {}
        self.laid: list[str] = []
        self.links: list[tuple[str, Any, str]] = []
        self.runs = self.checks = 0

    def largest(self, symbol: str) -> int | None:
        return self.limit.get(symbol)

    def set(self, name: str, array: np.ndarray) -> None:
        self.inputs[name] = array

    def lay(self, name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
        self.laid.append(name)
        self.inputs[name] = np.zeros(shape, np.float32)
        lay_on_host(self.inputs[name], pieces)

    def link(self, name: str, source: Any, output: str) -> None:
        self.links.append((name, source, output))

    def read(self, name: str) -> np.ndarray:
        """An output of `reference_kv`: 100 rows that say their place and the timestep."""
        index = int(name.rpartition("_")[2])
        width = next(width for i, _, width in LAYERS if i == index)
        values = np.arange(100.0) / 100 + self.inputs["timestep"][0] + index * 1000
        return np.repeat(values[:, None], width, axis=1).astype(np.float32)

    def run(self) -> None:
        self.runs += 1

    def check(self) -> None:
        self.checks += 1


def stored_keys(first: float, tokens: dict[int, int], **given: Any) -> StoredKeys:
    """Keys that say whose they are, the layer, the step and the token."""
    tensors = {
        f"{kind}_ref_{index}": Exact(
            np.array(
                [
                    [[sign * (first + index + step / 10 + token / 100)] * width for token in range(tokens[factor])]
                    for step in range(2)
                ],
                np.float32,
            ).reshape(2, tokens[factor], width)
        )
        for index, factor, width in LAYERS
        for kind, sign in (("k", 1), ("v", -1))
    }
    return StoredKeys(KeptReference(str(first), f"view {first}", "exact", tokens, tensors), **given)


def laid(source: StoredKeys, name: str, step: int) -> np.ndarray:
    return source.kept.tensors[name].step(step)


def feed(binding: Held, rows: Sequence[Sequence[PlacedKeys]], **given: Any) -> KeyFeed:
    return KeyFeed(BUNDLE, binding, rows, **given)  # type: ignore[arg-type]


def test_keys_lie_end_to_end_and_say_whose_they_are() -> None:
    man, hat, off = (
        stored_keys(first, tokens) for first, tokens in ((100, {1: 3, 2: 2}), (200, {1: 2, 2: 0}), (300, {1: 9, 2: 9}))
    )
    binding = Held()
    both = [PlacedKeys(man, 0, 2.0), PlacedKeys(off, 1, 0.0), PlacedKeys(hat, 2, -1.0)]
    found = feed(binding, [both, [PlacedKeys(hat, 0, 3.0)]])
    assert found.rows == 2
    access = found.access(["rba", "rsa"], ["bias", "scale"])
    assert {name: array.tolist() for name, array in access.items()} == {
        "key_group_1": [[1, 1, 1, 3, 3], [1, 1, -1, -1, -1]],
        "key_bias_1": [[2, 2, 2, -1, -1], [0] * 5],
        "key_scale_1": [[1] * 5, [3, 3, 0, 0, 0]],
        "key_group_2": [[1, 1], [-1, -1]],
        "key_bias_2": [[2, 2], [0, 0]],
        "key_scale_2": [[1, 1], [0, 0]],
    }
    for step in (1, 0):
        binding.laid.clear()
        found.start(step)
        assert binding.laid == ["k_ref_10", "v_ref_10", "k_ref_13", "v_ref_13"]
        for name in ("k_ref_13", "v_ref_13"):
            assert binding.inputs[name].shape == (2, 5, 8)
            np.testing.assert_array_equal(binding.inputs[name][0, :3], laid(man, name, step))
            np.testing.assert_array_equal(binding.inputs[name][0, 3:], laid(hat, name, step))
            np.testing.assert_array_equal(binding.inputs[name][1, :2], laid(hat, name, step))
            assert not binding.inputs[name][1, 2:].any()
        for name in ("k_ref_10", "v_ref_10"):
            assert binding.inputs[name].shape == (2, 2, 24)
            np.testing.assert_array_equal(binding.inputs[name][0], laid(man, name, step))
            assert not binding.inputs[name][1].any()
    found.prepare(1)
    found.check()
    assert found.seconds == 0, "no pass runs beside it"
    one_without = feed(Held(), [[PlacedKeys(man, 0, 1.0)], []])
    for step in range(2):
        one_without.start(step)
        np.testing.assert_array_equal(one_without._binding.inputs["k_ref_10"][0], laid(man, "k_ref_10", step))  # type: ignore[attr-defined]


def test_keys_are_filled_up_to_a_bucket_that_the_graph_takes() -> None:
    rows = [[PlacedKeys(stored_keys(100, {1: 17, 2: 3}), 0, 1.0)]]
    counts = {
        1: [(False, {}, 17), (True, {}, 32), (True, {"M1": 20}, 20), (True, {"M2": 20}, 32)],
        2: [(False, {}, 3), (True, {}, 16), (True, {"M1": 20}, 16), (True, {"M2": 5}, 5)],
    }
    for factor, cases in counts.items():
        for padded, largest, count in cases:
            found = feed(Held(largest), rows, padded=padded)
            assert found.tokens[0][factor].count == count
            assert found.access(["rba"], ["bias"])[f"key_group_{factor}"].shape == (1, count)


def test_without_keys_one_that_nobody_sees_is_laid_once() -> None:
    binding = Held()
    found = feed(binding, [[PlacedKeys(stored_keys(100, {1: 3, 2: 2}), 0, 0.0)]])
    assert (found.access(["rba"], ["bias"])["key_group_2"] == PADDING).all()
    for step in range(2):
        found.start(step)
    assert binding.laid == ["k_ref_10", "v_ref_10", "k_ref_13", "v_ref_13"]
    assert binding.inputs["k_ref_10"].shape == (1, 1, 24)


def test_keys_in_eight_bits_are_computed_once_for_all_rows() -> None:
    class Counted(Exact):
        asked = 0

        def step(self, step: int) -> np.ndarray:
            Counted.asked += 1
            return super().step(step)

    man = stored_keys(100, {1: 3, 2: 2})
    counted = {name: Counted(one.arrays[""]) for name, one in man.kept.tensors.items()}
    man = StoredKeys(replace(man.kept, tensors=counted))
    feed(Held(), [[PlacedKeys(man, 0, weight)] for weight in (1.0, 2.0)]).start(0)
    assert Counted.asked == len(counted)


def test_the_first_stored_keys_that_are_not_finite_are_named() -> None:
    good, bad, other = (stored_keys(first, {1: 3, 2: 2}) for first in (100, 200, 300))
    for one, name, place, value in ((bad, "v_ref_13", (1, 2, slice(5)), np.nan), (other, "k_ref_10", 1, np.inf)):
        array = one.kept.tensors[name].arrays[""]
        array.setflags(write=True)
        array[place] = value
    computed = ComputedKeys(0, {1: 1, 2: 1})
    one = feed(
        Held(),
        [
            [PlacedKeys(good, 0, 1.0), PlacedKeys(computed, 1, 1.0)],
            [PlacedKeys(bad, 0, 1.0), PlacedKeys(other, 1, 1.0)],
        ],
    )
    assert one.non_finite_message(0) == ""
    said = one.non_finite_message(1)
    assert "kept keys v_ref_13 of the reference 'view 200' (200...): 5 of 24 values are NaN" in said
    assert "k_ref_10 of the reference 'view 300' (300...): 48 of 48" in feed(
        Held(), [[PlacedKeys(other, 0, 1.0)]]
    ).non_finite_message(1)


def beside(binding: Held, *sides: int, **given: Any) -> tuple[ReferencePass, list[int]]:
    """The pass of references whose masks are corners, and the steps that it noised."""
    noised: list[int] = []

    def noise(step: int) -> np.ndarray:
        noised.append(step)
        return np.full((len(sides), 4, 8, 8), step, np.float32)

    masks = [corner(side) for side in sides]
    text = np.ones((len(sides), 77, 16), np.float32)
    made = ReferencePass(
        BUNDLE,
        binding,  # type: ignore[arg-type]
        masks=masks,
        text=text,
        noised=noise,
        timesteps=(901, 401),
        **given,
    )
    assert binding.inputs["text"] is text
    return made, noised


def test_a_pass_runs_each_step_with_noise_that_was_made_ahead() -> None:
    binding = Held()
    computing, noised = beside(binding, 33, 17)
    assert computing.references == 2
    assert binding.inputs["kept_1"].tolist() == [0, 1, 2, 8, 9, 10, 16, 17, 18, 64, 65, 72, 73]
    assert binding.inputs["kept_2"].tolist() == [0, 1, 4, 5, 16]
    computing.run(0)
    computing.prepare(1)
    computing.run(1)
    computing.run(0)
    assert noised == [0, 1, 0], "none twice, and none of another step"
    assert binding.inputs["latents"][0, 0, 0, 0] == 0
    assert binding.inputs["timestep"].tolist() == [901, 901]
    assert binding.runs == 3
    assert [(source.number, source.tokens) for source in computing.sources()] == [(0, {1: 9, 2: 4}), (1, {1: 4, 2: 1})]


def test_a_pass_fills_its_tokens_up_to_a_bucket_that_the_graph_takes() -> None:
    binding = Held({"M1": 14})
    computing, _ = beside(binding, 33, 17, padded=True)
    assert binding.inputs["kept_1"].tolist()[12:] == [73, 0]
    assert len(binding.inputs["kept_2"]) == 16
    assert computing.sources()[1].tokens == {1: 4, 2: 1}, "padding is nobody's"


def test_what_a_pass_puts_out_is_read_in_place_where_it_is_all() -> None:
    computing, noised = beside(Held(), 33, 17)
    man, hat = computing.sources()
    binding = Held()
    found = feed(binding, [[PlacedKeys(man, 0, 1.0), PlacedKeys(hat, 1, 2.0)]], computing=computing)
    names = ["k_ref_10", "v_ref_10", "k_ref_13", "v_ref_13"]
    for step in range(2):
        found.start(step)
        assert binding.links == [(name, computing.binding, name) for name in names], "once for all steps"
    assert not binding.laid
    found.prepare(0)
    assert noised == [0, 1, 0]
    found.check()
    assert (found.seconds, computing.binding.checks, computing.binding.runs) == (0.5, 1, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", ["swapped", "part", "rows", "mixed"])
def test_what_a_pass_puts_out_is_laid_where_it_is_not_all_or_in_another_order(order: str) -> None:
    computing, _ = beside(Held(), 33, 17)
    man, hat = (PlacedKeys(source, number, 1.0) for number, source in enumerate(computing.sources()))
    keys = stored_keys(100, {1: 3, 2: 2})
    other = PlacedKeys(keys, 2, 1.0)
    rows = {"swapped": [[hat, man]], "part": [[hat]], "rows": [[man, hat], [hat]], "mixed": [[man, hat, other]]}[order]
    binding = Held()
    found = feed(binding, rows, computing=computing)
    for step in range(2):
        found.start(step)
        assert not binding.links
        out = computing.binding.read("k_ref_13")
        of = {id(man): out[:9], id(hat): out[9:13], id(other): laid(keys, "k_ref_13", step)}
        for row, found_row in zip(rows, binding.inputs["k_ref_13"], strict=True):
            expected = np.concatenate([of[id(placed)] for placed in row])
            np.testing.assert_array_equal(found_row[: len(expected)], expected)
            assert not found_row[len(expected) :].any()


class Brought:
    """As much of a `KeyUploader` as the feed calls: what it brings stays on the host."""

    def __init__(self) -> None:
        self.wanted: list[dict[Any, Any]] = []
        self.uses = 0

    def bring(self, arrays: Mapping[Any, np.ndarray]) -> dict[Any, np.ndarray]:
        self.wanted.append(dict(arrays))
        return {key: array + 0.5 for key, array in arrays.items()}

    def used(self) -> None:
        self.uses += 1


def test_keys_that_are_not_on_the_device_are_brought_there_ahead_and_once() -> None:
    there = stored_keys(300, {1: 1, 2: 1})
    on_device: Any = {(step, name): laid(there, name, step) + 0.25 for step in range(2) for name in there.kept.tensors}
    there = StoredKeys(there.kept, on_device)
    man, hat = stored_keys(100, {1: 3, 2: 2}), stored_keys(200, {1: 2, 2: 0})
    computing, _ = beside(Held(), 17)
    computed = computing.sources()[0]
    placed = {name: PlacedKeys(one, 0, 1.0) for name, one in zip("mhtc", (man, hat, there, computed), strict=True)}
    key_uploader: Any = Brought()
    binding = Held()
    rows = [[placed[name] for name in row] for row in ("mtc", "hmt")]
    found = feed(binding, rows, computing=computing, key_uploader=key_uploader)
    names = ["k_ref_10", "v_ref_10", "k_ref_13", "v_ref_13"]
    wanted = {*((id(man), name) for name in names), *((id(hat), name) for name in names[2:])}
    for step, ahead in ((0, False), (1, True), (0, False)):
        if ahead:
            found.prepare(step)
        before = len(key_uploader.wanted)
        found.start(step)
        assert len(key_uploader.wanted) == before + (not ahead), "what was brought ahead is not brought again"
        assert set(key_uploader.wanted[-1]) == wanted
        keys = binding.inputs["k_ref_13"]
        np.testing.assert_array_equal(keys[0, :3], laid(man, "k_ref_13", step) + 0.5)
        np.testing.assert_array_equal(keys[0, 3:4], laid(there, "k_ref_13", step) + 0.25)
        np.testing.assert_array_equal(keys[0, 4:8], computing.binding.read("k_ref_13")[:4])
        np.testing.assert_array_equal(keys[1, :2], laid(hat, "k_ref_13", step) + 0.5)
        np.testing.assert_array_equal(keys[1, 2:5], laid(man, "k_ref_13", step) + 0.5)
    assert key_uploader.uses == 3
    assert len(key_uploader.wanted) == 3


def test_where_nothing_has_to_be_brought_the_key_uploader_rests() -> None:
    key_uploader: Any = Brought()
    feed(Held(), [[]], key_uploader=key_uploader).start(0)
    assert (key_uploader.wanted, key_uploader.uses) == ([], 1)


# --------------------------------------------------------------------------------------------------------- on a device


class OneDevice:
    """A made-up device, and the references that are brought to it, of two steps."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        self.worker_stream = WorkerStream(Device(0, cuda=self.cuda))
        self.worker_stream.join()
        self.held = OnDevice()
        self.bundle: Any = SmallBundle()
        self.bundle.dtype = "float32"

    def use(self, kept: KeptReference) -> Any:
        return self.held.use(kept, KeyUploader(self.worker_stream, "denoise_step", "reference keys"), self.bundle, 2)

    def bring(self, *references: KeptReference) -> None:
        for kept in references:
            with self.use(kept):
                pass


@pytest.fixture
def device() -> Iterator[OneDevice]:
    made = OneDevice()
    yield made
    made.held.close()
    assert not made.worker_stream.device._reclaims, "what is closed is not asked any more"
    made.worker_stream.leave()
    assert not made.cuda.alive()


MAN_KEYS, HAT_KEYS, CAT_KEYS = (
    stored_keys(first, tokens).kept
    for first, tokens in ((100, {1: 3, 2: 2}), (200, {1: 64, 2: 16}), (300, {1: 5, 2: 0}))
)


def test_keys_of_all_steps_are_on_the_device_while_they_are_used_and_after(device: OneDevice) -> None:
    for kept, tensors in ((MAN_KEYS, 4), (CAT_KEYS, 2)):
        for _ in range(2):
            with device.use(kept) as keys:
                assert len(keys) == 2 * tensors
                for (step, name), array in keys.items():
                    there = device.cuda.view(array.buffer.address + array.offset, array.nbytes)
                    np.testing.assert_array_equal(there.view(np.float32), kept.tensors[name].step(step).reshape(-1))
    assert device.cuda.count("cudaMalloc") == 2, "each came up once"
    assert device.held.nbytes == device.cuda.allocated()
    assert [device.held.has(kept) for kept in (MAN_KEYS, HAT_KEYS, CAT_KEYS)] == [True, False, True]
    assert [device.held.holds(kept.key) for kept in (MAN_KEYS, HAT_KEYS, CAT_KEYS)] == [True, False, True]


def test_what_is_used_is_not_freed_and_what_is_wanted_counts_as_room(device: OneDevice) -> None:
    device.bring(MAN_KEYS)
    small = device.held.nbytes
    with device.use(HAT_KEYS):
        large = device.held.nbytes - small
        assert device.held.unused_bytes([]) == device.held.unused_bytes([MAN_KEYS.key]) == small
        assert device.held.unused_bytes([HAT_KEYS.key]) == small + large
        device.held.free_unused()
        assert device.held.nbytes == device.cuda.allocated() == large
        device.held.forget([HAT_KEYS.key])
        device.held.close()
        assert device.held.nbytes == large
    device.held.forget([MAN_KEYS.key])
    assert device.held.holds(HAT_KEYS.key), "it was not meant"
    device.bring(MAN_KEYS)
    device.held.forget([HAT_KEYS.key, CAT_KEYS.key])
    assert (device.held.nbytes, device.cuda.allocated()) == (small, small)
    device.held.forget()
    assert (device.held.nbytes, device.cuda.allocated()) == (0, 0)


def test_what_was_used_longest_ago_is_freed_first_and_no_more_than_is_needed(device: OneDevice) -> None:
    device.bring(MAN_KEYS, HAT_KEYS, CAT_KEYS, MAN_KEYS)
    sizes = {}
    for kept in (HAT_KEYS, CAT_KEYS, MAN_KEYS):
        before = device.held.nbytes
        assert device.held.reclaim(0) == 0
        sizes[kept.key] = device.held.reclaim(1)
        assert device.held.nbytes == device.cuda.allocated() == before - sizes[kept.key]
        assert not device.held.has(kept)
    device.bring(MAN_KEYS, HAT_KEYS, CAT_KEYS)
    assert device.held.reclaim(sizes[MAN_KEYS.key]) == sizes[MAN_KEYS.key]
    assert device.held.has(HAT_KEYS)
    assert device.held.reclaim(sizes[HAT_KEYS.key] + 1) == sizes[HAT_KEYS.key] + sizes[CAT_KEYS.key]


@pytest.mark.parametrize(("beside", "left"), [(2, "mhc"), (1, "hc"), (0, "h")])
def test_no_more_is_left_beside_what_is_wanted(device: OneDevice, beside: int, left: str) -> None:
    device.bring(MAN_KEYS, HAT_KEYS, CAT_KEYS)
    device.held.trim(sum(_on_device(kept) for kept in (MAN_KEYS, CAT_KEYS)[2 - beside :]), (HAT_KEYS.identity,))
    there = {"m": MAN_KEYS, "h": HAT_KEYS, "c": CAT_KEYS}
    assert "".join(name for name, kept in there.items() if device.held.has(kept)) == left
    assert device.held.nbytes == device.cuda.allocated() == sum(_on_device(there[name]) for name in left)


def _on_device(kept: KeptReference) -> int:
    """Bytes there: each tensor of a step begins at a multiple of 256."""
    return sum(2 * -(-one.step(0).nbytes // 256) * 256 for one in kept.tensors.values())


def test_a_device_that_is_short_gets_what_no_request_uses(device: OneDevice) -> None:
    device.bring(MAN_KEYS)
    device.cuda.total = device.cuda.allocated() + 100
    with device.use(MAN_KEYS), pytest.raises(DeviceMemoryError, match=r"a graph needs 0\.\d MB more"):
        device.worker_stream.device.require(200, "a graph")
    device.worker_stream.device.require(200, "a graph")
    assert device.held.nbytes == 0


def test_what_failed_to_come_up_is_not_there_and_is_tried_again(device: OneDevice) -> None:
    class Failing(Exact):
        def step(self, step: int) -> np.ndarray:
            assert device.held.has(kept), "it is on its way"
            assert device.held.nbytes == MAN_KEYS.nbytes
            raise KeyboardInterrupt

    name = "v_ref_13"
    kept = replace(MAN_KEYS, tensors={**MAN_KEYS.tensors, name: Failing(MAN_KEYS.tensors[name].arrays[""])})
    kept = kept.with_identity(MAN_KEYS.identity)
    with pytest.raises(KeyboardInterrupt), device.use(kept):
        raise AssertionError("it was given")
    assert (device.held.has(kept), device.held.nbytes, device.cuda.allocated()) == (False, 0, 0)
    device.bring(MAN_KEYS)
    assert device.held.has(kept)


def test_what_was_enqueued_is_done_before_keys_may_be_freed(device: OneDevice) -> None:
    done: list[int] = []
    with device.use(MAN_KEYS):
        device.cuda.submit(device.worker_stream.stream.handle, lambda: done.append(1))
    assert done == [1]


@pytest.fixture
def coming(device: OneDevice) -> Iterator[threading.Event]:
    """Another thread brings the keys of `MAN_KEYS` up, until the event is set."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Exact):
        def step(self, step: int) -> np.ndarray:
            begun.set()
            assert go_on.wait(60)
            return super().step(step)

    tensors = {name: Slow(stored.arrays[""]) for name, stored in MAN_KEYS.tensors.items()}
    slow = replace(MAN_KEYS, tensors=tensors).with_identity(MAN_KEYS.identity)

    def bring() -> None:
        worker_stream = WorkerStream(device.worker_stream.device)
        worker_stream.join()
        with device.held.use(slow, KeyUploader(worker_stream, "denoise_step", "reference keys"), device.bundle, 2):
            pass
        worker_stream.leave()

    bringing = threading.Thread(target=bring)
    bringing.start()
    assert begun.wait(60)
    yield go_on
    go_on.set()
    bringing.join(60)


def test_who_waits_for_keys_of_another_is_asked_and_may_go(
    device: OneDevice, coming: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awaited, "WAIT_SECONDS", 0.001)
    asked: list[int] = []

    def waiting() -> None:
        asked.append(len(asked))
        if len(asked) == 3:
            raise KeyboardInterrupt

    used = device.held.use(
        MAN_KEYS, KeyUploader(device.worker_stream, "denoise_step", "reference keys"), device.bundle, 2, waiting
    )
    with pytest.raises(KeyboardInterrupt), used:
        raise AssertionError("it was given")
    assert asked == [0, 1, 2]
    assert device.held.has(MAN_KEYS), "it comes all the same"


def test_who_waits_for_keys_of_another_goes_on_as_soon_as_they_are_there(
    device: OneDevice, coming: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, waits = Awaited.wait, threading.Event()

    def waited(self: Awaited, waiting: Callable[[], object]) -> None:
        waits.set()
        wait(self, waiting)

    def use() -> None:
        worker_stream = WorkerStream(device.worker_stream.device)
        worker_stream.join()
        with device.held.use(
            MAN_KEYS, KeyUploader(worker_stream, "denoise_step", "reference keys"), device.bundle, 2
        ) as keys:
            assert len(keys) == 8
        worker_stream.leave()

    monkeypatch.setattr(awaited, "WAIT_SECONDS", 1000)
    monkeypatch.setattr(Awaited, "wait", waited)
    waiter = threading.Thread(target=use, daemon=True)
    waiter.start()
    assert waits.wait(60)
    time.sleep(0.05)
    coming.set()
    waiter.join(20)
    assert not waiter.is_alive()
    assert device.cuda.count("cudaMalloc") == 1


def test_keys_of_another_size_are_refused_under_the_same_identity(device: OneDevice) -> None:
    other = replace(HAT_KEYS).with_identity(MAN_KEYS.identity)
    with device.use(MAN_KEYS):
        wanted = rf"'100' on the device have {MAN_KEYS.nbytes} bytes, and a request wants {HAT_KEYS.nbytes} bytes"
        with pytest.raises(KeptConceptError, match=wanted), device.use(other):
            raise AssertionError("it was given")
    device.held.free_unused()
    assert device.held.nbytes == 0, "nobody uses it"


# -------------------------------------------------------------------------------------------------- how keys are stored


def test_eight_bits_go_from_the_lowest_value_of_a_channel_to_its_highest() -> None:
    values = np.array([[-1, 10, 0], [0.5, 10, 0.8], [4.1, 10, 2]], np.float32)
    stored = EightBit.empty(2, 3, 3, "float32")
    with np.errstate(all="raise"):
        stored.put(1, values)
    assert stored.levels[1].tolist() == [[0, 0, 0], [75, 0, 102], [255, 0, 255]]
    np.testing.assert_allclose(stored.finite_witness(slice(1, 2))[:, 0], values[[0, 2]], atol=1e-6)
    np.testing.assert_array_equal(stored.step(1)[:, 1], values[:, 1])
    with pytest.raises(
        NonFiniteError, match=r"keys from -3e\+38 to 3e\+38 lie too far apart for 8 bits.*storage='exact'"
    ):
        stored.put(0, np.array([[3e38, 0], [-3e38, 1]], np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_eight_bits_cost_is_that_of_the_worst_tensor_over_all_its_steps(dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensors, errors = {}, []
    for name, spread in (("even", 0.1), ("uneven", 9.0), ("other", 1.0)):
        tensors[name] = EightBit.empty(3, 40, 6, dtype)
        exact = (3 + spread * rng.standard_normal((3, 40, 6)) ** 3).astype(np.float32)
        for step, values in enumerate(exact):
            given = to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)
            exact[step] = from_bfloat16(given) if dtype == "bfloat16" else given
            tensors[name].put(step, given)
        levels, scale, low = (tensors[name].arrays[f".{of}"] for of in ("levels", "scale", "low"))
        errors.append(np.linalg.norm(levels * scale[:, None] + low[:, None] - exact) / np.linalg.norm(exact))
    assert worst_error({**tensors, "exact": Exact(exact)}) == pytest.approx(max(errors), rel=1e-3)
    assert worst_error({"exact": Exact(exact)}) == worst_error({"none": EightBit.empty(2, 0, 6, dtype)}) == 0


def test_bfloat16_is_kept_as_its_bits_however_it_is_given() -> None:
    bits = to_bfloat16(np.array([[1.5, -2.25]], np.float32))
    stored = Exact.empty(2, 1, 2, "bfloat16")
    stored.put(0, bits)
    stored.put(1, bits.view(np.float16))  # as ml_dtypes: two bytes of another kind
    for step in range(2):
        np.testing.assert_array_equal(stored.step(step), bits)


def test_a_reference_is_itself_and_says_nothing_of_its_keys() -> None:
    one = KeptReference("key", "a man", "exact", {1: 1}, {"k_ref_13": Exact(np.full((1, 1, 8), 0.123, np.float32))})
    assert (one.error, one.mapped, one.nbytes) == (0.0, False, 32)
    same = replace(one)
    assert one != same
    assert len({one, same, one.identity, same.identity}) == 4, "a changed one may have other keys"
    assert replace(one.with_identity("that")).identity != "that"
    assert "0.123" not in repr(one)
    assert "that" not in repr(one)
    with pytest.raises(FrozenInstanceError):
        one.key = "other"  # type: ignore[misc]


@pytest.mark.parametrize("storage", ["exact", "8-bit"])
def test_what_lies_in_a_file_is_read_once_and_then_its_own(storage: Any, tmp_path: Path) -> None:
    """What `in_memory` gives outlives the mapping; what is in memory is not copied."""
    tensors = empty_tensors(Origin.of(BUNDLE, 2, 9), {1: 3, 2: 2}, storage)
    for stored in tensors.values():
        for step in range(2):
            stored.put(step, np.random.default_rng(step).random(stored.step(step).shape).astype(np.float16))
    (path := tmp_path / "man.concept").touch()
    file = MappedFile(os.fspath(path), Stamp.of(path.stat()))
    mapped = KeptReference("key", "a man", storage, {1: 3, 2: 2}, tensors, 0.25, file=file).with_identity("that")
    read = mapped.in_memory()
    assert (read.key, read.prompt, read.storage, read.tokens) == ("key", "a man", storage, {1: 3, 2: 2})
    assert (read.error, read.mapped, read.identity, read.nbytes) == (0.25, False, "that", mapped.nbytes)
    assert read.in_memory() is read
    for name, stored in tensors.items():
        expected = stored.step(1).copy()
        for array in stored.arrays.values():
            array.setflags(write=True)
            array[:] = 0
        np.testing.assert_array_equal(read.tensors[name].step(1), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keys_that_are_no_numbers_are_told_whatever_they_are_held_as(dtype: str) -> None:
    values = np.full((2, 3), -3.0, np.float32)
    stored = Exact.empty(2, 2, 3, dtype)
    for step in range(2):
        values[1, :2] = [np.nan, np.inf] if step else 0
        stored.put(step, to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype))
    kept = KeptReference("k" * 20, "a man", "exact", {1: 2}, {"k_ref_13": stored})
    assert kept.non_finite_message(0) == ""
    assert kept.non_finite_message(1).startswith(
        f"kept keys k_ref_13 of the reference 'a man' ({'k' * 16}...): 2 of 6 values are"
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
        ({"layers": [[10, 2, 24], [13, 1]]}, "layers is"),
        ({"layers": [[10, "2", 24]]}, "layers is '2', expected a whole number from 0"),
        ({"layers": [[10, 0, 24], [13, 1, 8]]}, "layers has a factor or a width of 0"),
        ({"layers": [[10, 2, 24], [13, 1, 0]]}, "layers has a factor or a width of 0"),
        ({"layers": [[10, 2, 24], [13, 1, 8], [13, 2, 24]]}, "layers has an index that is not above the one before it"),
        ({"layers": [[index, 1, 8] for index in range(17)]}, "layers has 17 entries, expected at most 16"),
        ({"layers": []}, "layers is"),
        ({"layers": {}}, "layers is"),
        ({"scheduler": {"x": None, "y": 5}}, "scheduler is"),
        ({"timesteps": [1, -1]}, "timesteps is -1"),
        ({"timesteps": []}, "timesteps is empty"),
        ({"timesteps": [1] * 1001}, "timesteps has 1001 entries, expected at most 1000"),
        ({"timesteps": {}}, "timesteps is an object of 0, expected a list of whole numbers"),
        ({"more": 1}, "origin is an object of 10, expected an object with architecture, bundle_hash, "),
        ({"architecture": 5}, "architecture is 5, expected text"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of float32, float16, bfloat16"),
    ],
)
def test_what_is_no_origin_is_refused_by_its_entry(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Origin.from_dict({**WANTED.to_dict(), **changes})


@pytest.mark.parametrize("data", [None, [], "origin", {}])
def test_what_is_no_object_of_an_origins_entries_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"origin is .*, expected an object with architecture, bundle_hash, "):
        Origin.from_dict(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 1},
        {"width": 1},
        {"reference_seed": 2**64 - 1},
        {"layers": [[0, 1, 1], [1, 1, 1]]},
        {"layers": [[index, 1, 8] for index in range(16)]},
        {"timesteps": [0]},
        {"timesteps": [1] * 1000},
        {"scheduler": {"a": "b", "c": True, "d": 5, "e": 0.5}},
        {"dtype": "bfloat16"},
    ],
)
def test_the_smallest_and_largest_of_an_origin(changes: dict[str, Any]) -> None:
    found = Origin.from_dict({**WANTED.to_dict(), **changes}).to_dict()
    assert {name: found[name] for name in changes} == changes


@pytest.mark.parametrize("value", [True, "1", None, -0.5, float("nan"), float("inf"), 10**400])
def test_an_error_is_a_finite_number(value: object) -> None:
    with pytest.raises(ValueError, match=r"error is .*, expected a number from 0"):
        finite_number(value, "error")
    assert [finite_number(good, "error") for good in (0, 2, 0.5)] == [0.0, 2.0, 0.5]


def test_a_content_key_is_the_same_in_every_version() -> None:
    """People and servers hold on to it: ids of concepts are made of it."""
    loaded = LoadedReference(Image.new("RGB", (64, 64), (1, 2, 3)), corner(33), "x")
    assert content_key(WANTED, loaded, "ein M\u00e4dchen", "exact") == (
        "66cd5892304fb9b66d558b07c4c707a758b204239ff95ea8e650319b8cfcfb6e"
    )
