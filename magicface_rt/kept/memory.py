"""The memory that the reference keys of a request need, known before anything is computed.

This counts the keys, the inputs in which they are laid together, the references' pass through the network, and the
request's own pictures. It does not count the network itself, its weights and the work of the target's rows, which a
request without concepts needs as well.

Units are bytes. On a CPU backend there is no device: all is host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..backends.host import host_dtype
from ..bundle import Bundle
from ..errors import BudgetError, OptionError
from ..shortage import foreseen
from .reference import Storage

MemoryMode = Literal["keep", "stream", "recompute"]
MODES: tuple[MemoryMode, ...] = ("keep", "stream", "recompute")
MEMORY = ("auto", *MODES)

WORKSPACE = 512 * 2**20
"""Bytes that the passes that prepare a reference may use, unless a budget says otherwise."""

ROW_TENSORS = 60
"""The memory for one row of the reference pass, in tensors as large as an injection layer's largest; see
docs/kept-concepts.md."""

FREE_SHARE = 0.9
"""The share of a device's free memory that a request without a budget may use."""


@dataclass(frozen=True)
class Tokens:
    """A reference as the plan sees it: its kept tokens by factor, and where its keys are already.

    held: "no", "memory", or "file"; nbytes: the size of its keys as they are stored; used: whether its weight is not 0.
    """

    tokens: Mapping[int, int]
    held: Literal["no", "memory", "file"]
    nbytes: int
    used: bool = True


@dataclass(frozen=True)
class MemoryUse:
    """Memory at the peak, in bytes."""

    host: int
    device: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a request needs in each mode, and the mode that it would be run in.

    keep        keys of all steps on the device (on a CPU backend: in memory)
    stream      keys of all steps on the host (those of a file stay in it), uploaded step by step, ahead of need
    recompute   references run beside the target at each step; nothing is kept

    modes           MemoryUse by mode
    mode            the mode that `memory` and the budget lead to
    bytes_kept      the keys as they are stored, all steps, on the host or in files
    bytes_per_step  the keys of one step in the bundle's dtype, without padding
    tokens          kept tokens by factor, all references together
    rows_per_pass   rows of the network in one pass when references are prepared
    """

    modes: Mapping[MemoryMode, MemoryUse]
    mode: MemoryMode
    budget: int | None
    on_device: bool
    steps: int
    images: int
    bytes_kept: int
    bytes_per_step: int
    tokens: Mapping[int, int]
    rows_per_pass: int

    @property
    def peak(self) -> MemoryUse:
        """The peak of the chosen mode."""
        return self.modes[self.mode]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, as JSON can hold it."""
        return {
            "mode": self.mode,
            "budget": self.budget,
            "on_device": self.on_device,
            "steps": self.steps,
            "images": self.images,
            "modes": {mode: {"host": use.host, "device": use.device} for mode, use in self.modes.items()},
            "bytes_kept": self.bytes_kept,
            "bytes_per_step": self.bytes_per_step,
            "tokens": {str(factor): count for factor, count in self.tokens.items()},
            "rows_per_pass": self.rows_per_pass,
        }


def step_bytes(bundle: Bundle, tokens: Mapping[int, int]) -> int:
    """Return the bytes of the keys and values of one step in the bundle's dtype."""
    itemsize = host_dtype(bundle.dtype).itemsize
    return sum(2 * tokens[layer.factor] * layer.width * itemsize for layer in bundle.injection_layers)


def stored_bytes(bundle: Bundle, tokens: Mapping[int, int], steps: int, storage: Storage) -> int:
    """Return the bytes of the keys and values of all steps as they are stored."""
    if storage == "exact":
        return steps * step_bytes(bundle, tokens)
    return steps * sum(2 * layer.width * (tokens[layer.factor] + 8) for layer in bundle.injection_layers)


def row_bytes(bundle: Bundle) -> int:
    """Return about how many bytes one row of the reference pass takes while it is computed."""
    largest = max(
        bundle.grid(layer.factor)[0] * bundle.grid(layer.factor)[1] * layer.width for layer in bundle.injection_layers
    )
    return ROW_TENSORS * largest * host_dtype(bundle.dtype).itemsize


def rows_per_pass(
    bundle: Bundle, tokens: Mapping[int, int], steps: int, largest: Mapping[str, int | None], workspace: int
) -> int:
    """Return how many rows of one reference go through `reference_kv` together, one row per step.

    largest: by symbol, what the graph takes at most; None for no limit.
    """
    rows = [steps, max(1, workspace // (row_bytes(bundle) + step_bytes(bundle, tokens)))]
    for symbol, tokens_a_row in (("R", 1), *((f"M{factor}", count) for factor, count in tokens.items())):
        most = largest.get(symbol)
        if most is not None and tokens_a_row:
            rows.append(max(1, most // tokens_a_row))
    return min(rows)


def make_plan(
    bundle: Bundle,
    references: Sequence[Tokens],
    *,
    steps: int,
    images: int,
    at_once: int,
    own_keys: bool,
    storage: Storage,
    memory: str,
    budget: int | None,
    store_limit: int,
    on_device: bool,
    rows: int,
    host_room: int | None = None,
) -> MemoryPlan:
    """Make the plan of a request.

    at_once: images in one batch; own_keys: whether each image of a batch has its own keys, as images of different
    requests have; budget: bytes that the peak may reach, on the device if there is one, None for no limit; rows: the
    rows of a pass that prepares; host_room: bytes of the host that the process may still take, None for no limit.

    Raises:
        BudgetError: not even the mode that needs least fits.
        HostMemoryError: no mode that fits the budget has room on the host.
    """
    used = [r for r in references if r.used]
    tokens = {factor: sum(r.tokens[factor] for r in used) for factor in bundle.factors}
    one_step = sum(step_bytes(bundle, r.tokens) for r in used)
    slot = _padded(one_step) * (at_once if own_keys else 1)
    exact = steps * one_step
    stored = {
        held: sum(
            r.nbytes or stored_bytes(bundle, r.tokens, steps, storage)
            for r in references
            if r.held == held and (r.used or held != "no")
        )
        for held in ("no", "memory", "file")
    }
    bare = [r for r in used if r.held == "no"]
    widest = max((step_bytes(bundle, r.tokens) for r in bare), default=0)
    preparing = rows * (row_bytes(bundle) + 2 * widest) if bare else 0
    beside = len(bare) * row_bytes(bundle) + 2 * sum(step_bytes(bundle, r.tokens) for r in bare)
    other = request_bytes(bundle, images, len(bare))
    spread = _padded(one_step) if storage == "8-bit" or stored["memory"] or stored["file"] else 0
    if on_device:
        modes: dict[MemoryMode, MemoryUse] = {
            "keep": MemoryUse(sum(stored.values()) + rows * widest + one_step + other, exact + slot + preparing),
            "stream": MemoryUse(sum(stored.values()) + rows * widest + 2 * slot + other, 3 * slot + preparing),
            "recompute": MemoryUse(stored["memory"] + stored["file"] + 2 * slot + other, 3 * slot + beside),
        }
    else:
        in_memory = stored["no"] + stored["memory"]
        modes = {
            "keep": MemoryUse(in_memory + stored["file"] + slot + spread + preparing + other, 0),
            "stream": MemoryUse(in_memory + slot + spread + preparing + other, 0),
            "recompute": MemoryUse(stored["memory"] + 2 * slot + spread + beside + other, 0),
        }
    batches = -(-images // at_once)
    # Without references there is nothing that a budget could hold down.
    allowed, room = (budget, host_room) if used else (None, None)
    mode = _choose(modes, memory, allowed, room, on_device, bare, stored, store_limit, batches)
    return MemoryPlan(
        modes, mode, budget, on_device, steps, images, sum(stored.values()), one_step, tokens, rows if bare else 0
    )


def request_bytes(bundle: Bundle, images: int, references: int) -> int:
    """Return the bytes of the request's own arrays: pictures, latents, texts."""
    pixels = bundle.height * bundle.width * 3
    latents = bundle.latent_channels * bundle.rows * bundle.columns * 4
    text = 77 * bundle.text_width * 4
    return pixels * (20 + 2 * images) + (images + references) * (8 * latents + 8 * text) + 2**20


def _choose(
    modes: Mapping[MemoryMode, MemoryUse],
    memory: str,
    budget: int | None,
    host_room: int | None,
    on_device: bool,
    bare: Sequence[Tokens],
    stored: Mapping[str, int],
    store_limit: int,
    batches: int,
) -> MemoryMode:
    where = "device" if on_device else "host"

    def need(mode: MemoryMode) -> int:
        return modes[mode].device if on_device else modes[mode].host

    if memory == "auto":
        # Preparing pays where the keys serve again: in a later request, or in a later batch of this one.
        worth = not bare or batches > 1 or stored["no"] <= store_limit
        # On a CPU a step reads a mapped file as fast as memory, so nothing is gained by copying it.
        ready: tuple[MemoryMode, ...] = ("keep", "stream") if on_device or not stored["file"] else ("stream", "keep")
        order: tuple[MemoryMode, ...] = (*ready, "recompute") if worth else ("recompute", *ready)
        order = tuple(mode for mode in order if bare or mode != "recompute")
    else:
        order = tuple(mode for mode in MODES if mode == memory)
        if not order:
            raise OptionError(f"memory is {memory!r}, expected one of {', '.join(MEMORY)}.")
    allowed = [mode for mode in order if budget is None or need(mode) <= budget]
    more = {mode: modes[mode].host - stored["memory"] for mode in allowed}  # those in memory take no more
    for mode in allowed:
        if host_room is None or more[mode] <= host_room:
            return mode
    if allowed:
        least = min(allowed, key=lambda mode: more[mode])
        raise foreseen(f"the references of this request need {_megabytes(more[least])} more on the host ({least!r})")
    least = min(order, key=need)
    raise BudgetError(
        f"the references of this request need at least {_megabytes(need(least))} on the {where} (memory={least!r}), "
        f"and the budget is {_megabytes(budget or 0)}. Allow more, use smaller masks or fewer references, or a smaller "
        "bundle; see session.plan(...)."
    )


def _padded(nbytes: int) -> int:
    """Add the keys that fill up a bucket."""
    return nbytes + nbytes // 4


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"
