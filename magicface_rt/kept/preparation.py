"""Runs references through the network once for all steps, with rows of many steps in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Arrays
from ..backends.binding import Binding
from ..bundle import Bundle
from ..errors import NonFiniteError
from ..images import LoadedReference, layer_mask
from ..schedule import reference_noise
from .origin import Origin
from .reference import KeptReference, Storage, empty_tensors, worst_error

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EncodedReference:
    """A reference as the network takes it.

    latents: float32 [1, 4, h, w], clean; text: [1, 77, D], its prompt in the bundle's dtype.
    """

    loaded: LoadedReference
    prompt: str
    latents: Float32Array
    text: NDArray[Any]


def inside(loaded: LoadedReference, bundle: Bundle) -> dict[int, NDArray[np.int64]]:
    """Return the tokens inside the mask, by factor: positions on the grid laid out row by row, ascending."""
    return {
        factor: np.flatnonzero(layer_mask(loaded.mask_grid, *bundle.grid(factor))).astype(np.int64)
        for factor in bundle.factors
    }


def token_counts(loaded: LoadedReference, bundle: Bundle) -> dict[int, int]:
    """Return the number of a reference's kept tokens, by factor."""
    return {factor: len(tokens) for factor, tokens in inside(loaded, bundle).items()}


def prepare_reference(
    bundle: Bundle,
    reference_kv: Binding,
    encoded: EncodedReference,
    origin: Origin,
    key: str,
    *,
    storage: Storage,
    rows: int,
    report: Callable[[int], object] = lambda done: None,
    noise: Callable[[int], Float32Array] | None = None,
) -> KeptReference:
    """Compute a reference's keys for all steps.

    rows: steps in one pass; report: called after each pass with the number of steps done; noise: a function from a step
    to the noise that is put on the reference, float32 [1, 4, h, w]; by the origin's seed, unless given.

    Raises:
        BackendError, NonFiniteError: the graph failed, or gave what is not finite.
        whatever `report` raises; nothing is kept then.
    """
    tokens = inside(encoded.loaded, bundle)
    counts = {factor: len(found) for factor, found in tokens.items()}
    tensors = empty_tensors(origin, counts, storage)
    drawn = noise or (lambda step: reference_noise(origin.reference_seed, step, encoded.latents.shape))
    for first in range(0, origin.steps, rows):
        steps = range(first, min(first + rows, origin.steps))
        added = np.concatenate([drawn(step) for step in steps])
        timesteps = np.array([origin.timesteps[step] for step in steps], np.int64)
        inputs: Arrays = {
            "latents": bundle.schedule.add_noise(np.repeat(encoded.latents, len(steps), axis=0), added, timesteps),
            "timestep": timesteps,
            "text": np.repeat(encoded.text, len(steps), axis=0),
            **_indices(tokens, len(steps), bundle),
        }
        try:
            found = reference_kv.once(inputs)
            for name, (factor, width) in origin.widths.items():
                if counts[factor]:
                    by_step = found[name].reshape(len(steps), counts[factor], width)
                    for row, step in enumerate(steps):
                        tensors[name].put(step, by_step[row])
        except NonFiniteError as error:
            which = f"step {steps.stop}" if len(steps) == 1 else f"steps {first + 1} to {steps.stop}"
            raise NonFiniteError(f"{which} of {origin.steps}: {error}") from error
        report(steps.stop)
    kept = KeptReference(key, encoded.prompt, storage, counts, tensors, worst_error(tensors))
    # Whatever is computed here for the same content key has the same keys. Other noise is not part of the key.
    return kept if noise is not None else kept.with_identity(("computed", key))


def _indices(tokens: Mapping[int, NDArray[np.int64]], rows: int, bundle: Bundle) -> dict[str, NDArray[np.int64]]:
    """Return `reference_kv`'s inputs kept_<factor>: the tokens of all rows laid end to end; one stands in for none."""
    indices = {}
    for factor, found in tokens.items():
        height, width = bundle.grid(factor)
        starts = np.arange(rows, dtype=np.int64)[:, None] * (height * width)
        indices[f"kept_{factor}"] = (starts + found).reshape(-1) if len(found) else np.zeros(1, np.int64)
    return indices
