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
from ..bundle_form import TOKENS
from ..errors import BudgetError
from ..process.host_memory import host_memory_error
from ..values.sizes import megabytes
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
class PlannedReference:
    """A reference in the planner's terms: its token count per factor, and where its keys are stored now.

    nbytes: the size of its keys as they are stored, 0 if that is not known; used: whether its weight is not 0.
    """

    tokens: Mapping[int, int]
    stored_in: Literal["nowhere", "memory", "file"]
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
    references: Sequence[PlannedReference],
    *,
    steps: int,
    images: int,
    at_once: int,
    keys_per_image: bool,
    storage: Storage,
    memory: str,
    budget: int | None,
    store_limit: int,
    on_device: bool,
    rows: int,
    host_room: int | None = None,
) -> MemoryPlan:
    """Make the plan of a request.

    at_once: images in one batch; keys_per_image: whether each image of a batch has its own keys, as images of different
    requests have; memory: one of `MEMORY`; budget: bytes that the peak may reach, on the device if there is one, None
    for no limit; store_limit: bytes that the Session's store may hold; rows: the rows of a pass that prepares;
    host_room: bytes of the host that the process may still take, None for no limit.

    Raises:
        BudgetError: not even the mode that needs least fits.
        HostMemoryError: no mode that fits the budget has room on the host.
    """
    demand = _demand(
        bundle,
        references,
        steps=steps,
        images=images,
        rows_of_keys=at_once if keys_per_image else 1,
        storage=storage,
        rows=rows,
    )
    modes = _device_modes(demand) if on_device else _host_modes(demand)
    used = [r for r in references if r.used]
    bare = any(r.stored_in == "nowhere" for r in used)
    # Without references there is nothing that a budget could hold down.
    allowed, room = (budget, host_room) if used else (None, None)
    batches = -(-images // at_once)
    # Preparing pays where the keys serve again: in a later request, or in a later batch of this one.
    worth_preparing = batches > 1 or demand.stored_nowhere <= store_limit
    order = _order(memory, on_device, bare, worth_preparing, bool(demand.stored_in_file))
    return MemoryPlan(
        modes,
        _first_that_fits(modes, order, on_device, allowed, room, demand.stored_in_memory),
        budget,
        on_device,
        steps,
        images,
        demand.stored,
        demand.one_step,
        {factor: sum(r.tokens[factor] for r in used) for factor in bundle.factors},
        rows if bare else 0,
    )


@dataclass(frozen=True)
class _Demand:
    """What a request's references take, in bytes, by what it is for."""

    stored_nowhere: int
    """The keys of all steps of the bare references, as they would be stored: only if they are prepared."""
    stored_in_memory: int
    """Keys that are in memory already, in every mode, also those of weight 0."""
    stored_in_file: int
    """Keys in mapped files, which count where they are read whole, or page by page on their way to a device."""
    one_step: int
    """The keys of one step in the bundle's dtype, as they are staged on their way to a device."""
    input_bytes: int
    """The inputs of `denoise_step` for one step, in which keys are laid together, with their padding."""
    device_key_bytes: int
    """The keys of all steps in the bundle's dtype, since a device holds no 8-bit keys."""
    prepared_rows_bytes: int
    """The keys that a pass that prepares gives, in the bundle's dtype, since they are read back from a device."""
    preparation_bytes: int
    """A pass that prepares, with the keys that it gives. References are prepared one after the other."""
    recompute_bytes: int
    """The pass of one step in which all bare references run together, with the keys that it gives."""
    request_arrays: int
    """The request's own pictures, latents and texts."""
    decode_bytes: int
    """Keys that are not laid from where they were computed: 8-bit ones are decoded, others are read, step by step."""

    @property
    def stored(self) -> int:
        """The keys of all steps as they are stored, wherever that is."""
        return self.stored_nowhere + self.stored_in_memory + self.stored_in_file


def _demand(
    bundle: Bundle,
    references: Sequence[PlannedReference],
    *,
    steps: int,
    images: int,
    rows_of_keys: int,
    storage: Storage,
    rows: int,
) -> _Demand:
    """Count what a request's references take. `rows_of_keys`: rows in a batch's input, 1 if all images share one."""

    def stored_in(place: str) -> int:
        return sum(
            r.nbytes or stored_bytes(bundle, r.tokens, steps, storage)
            for r in references
            if r.stored_in == place and (r.used or place != "nowhere")
        )

    used = [r for r in references if r.used]
    bare = [step_bytes(bundle, r.tokens) for r in used if r.stored_in == "nowhere"]
    one_step = sum(step_bytes(bundle, r.tokens) for r in used)
    largest_bare_step = max(bare, default=0)
    in_memory, in_file = stored_in("memory"), stored_in("file")
    return _Demand(
        stored_nowhere=stored_in("nowhere"),
        stored_in_memory=in_memory,
        stored_in_file=in_file,
        one_step=one_step,
        input_bytes=_padded(one_step) * rows_of_keys,
        device_key_bytes=steps * one_step,
        prepared_rows_bytes=rows * largest_bare_step,
        # The keys twice, here and below: those of the last pass are held until those of the next one are there.
        preparation_bytes=rows * (row_bytes(bundle) + 2 * largest_bare_step) if bare else 0,
        recompute_bytes=len(bare) * row_bytes(bundle) + 2 * sum(bare),
        request_arrays=request_bytes(bundle, images, len(bare)),
        decode_bytes=_padded(one_step) if storage == "8-bit" or in_memory or in_file else 0,
    )


def _device_modes(d: _Demand) -> dict[MemoryMode, MemoryUse]:
    """Return what each mode takes where keys are on a device.

    Streamed keys are on the device three times: in the inputs of the step that runs, and in `key_uploader.DEPTH` = 2
    buffers, for that step and for the one that is being uploaded. Each of the two has page-locked memory of its size on
    the host. `recompute` streams what is stored, and so takes the same for keys.
    """
    streamed_on_device, streamed_on_host = 3 * d.input_bytes, 2 * d.input_bytes
    return {
        "keep": MemoryUse(
            d.stored + d.prepared_rows_bytes + d.one_step + d.request_arrays,
            d.device_key_bytes + d.input_bytes + d.preparation_bytes,
        ),
        "stream": MemoryUse(
            d.stored + d.prepared_rows_bytes + streamed_on_host + d.request_arrays,
            streamed_on_device + d.preparation_bytes,
        ),
        "recompute": MemoryUse(
            d.stored_in_memory + d.stored_in_file + streamed_on_host + d.request_arrays,
            streamed_on_device + d.recompute_bytes,
        ),
    }


def _host_modes(d: _Demand) -> dict[MemoryMode, MemoryUse]:
    """Return what each mode takes where all is host memory. What stays in a mapped file is the system's cache."""
    of_every_mode = d.stored_in_memory + d.decode_bytes + d.request_arrays
    prepared = of_every_mode + d.stored_nowhere + d.input_bytes + d.preparation_bytes
    return {
        "keep": MemoryUse(prepared + d.stored_in_file, 0),
        "stream": MemoryUse(prepared, 0),
        # The inputs twice, which is a bound: where rows change their lengths, new inputs are made beside the old ones.
        "recompute": MemoryUse(of_every_mode + 2 * d.input_bytes + d.recompute_bytes, 0),
    }


def request_bytes(bundle: Bundle, images: int, references: int) -> int:
    """Return the bytes of the request's own arrays: pictures, latents, texts."""
    pixels = bundle.height * bundle.width * 3
    latents = bundle.latent_channels * bundle.rows * bundle.columns * 4
    text = TOKENS * bundle.text_width * 4
    return pixels * (20 + 2 * images) + (images + references) * (8 * latents + 8 * text) + 2**20


def _order(memory: str, on_device: bool, bare: bool, worth_preparing: bool, from_files: bool) -> tuple[MemoryMode, ...]:
    """Return the modes that `memory` allows, the best first."""
    if memory != "auto":
        return tuple(mode for mode in MODES if mode == memory)
    # On a CPU a step reads a mapped file as fast as memory, so nothing is gained by copying it.
    ready: tuple[MemoryMode, ...] = ("keep", "stream") if on_device or not from_files else ("stream", "keep")
    if not bare:
        return ready
    return (*ready, "recompute") if worth_preparing else ("recompute", *ready)


def _first_that_fits(
    modes: Mapping[MemoryMode, MemoryUse],
    order: Sequence[MemoryMode],
    on_device: bool,
    budget: int | None,
    host_room: int | None,
    already_taken: int,
) -> MemoryMode:
    """Return the first mode that keeps to the budget and has room on the host, of which `already_taken` bytes are part.

    Raises:
        BudgetError, HostMemoryError: as `make_plan`.
    """

    def need(mode: MemoryMode) -> int:
        return modes[mode].device if on_device else modes[mode].host

    allowed = [mode for mode in order if budget is None or need(mode) <= budget]
    more = {mode: modes[mode].host - already_taken for mode in allowed}
    for mode in allowed:
        if host_room is None or more[mode] <= host_room:
            return mode
    if allowed:
        least = min(allowed, key=lambda mode: more[mode])
        raise host_memory_error(
            f"the references of this request need {megabytes(more[least])} more on the host ({least!r})"
        )
    least = min(order, key=need)
    where = "device" if on_device else "host"
    raise BudgetError(
        f"the references of this request need at least {megabytes(need(least))} on the {where} (memory={least!r}), "
        f"and the budget is {megabytes(budget or 0)}. Allow more, use smaller masks or fewer references, or a smaller "
        "bundle; see session.plan(...)."
    )


def _padded(nbytes: int) -> int:
    """Add the keys that fill up a bucket."""
    return nbytes + nbytes // 4
