"""References and prompts before they enter the network: reading, checks against the bundle's grids, encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .concept import Concept
from .errors import MaskError
from .images import LoadedReference, layer_mask, load_reference
from .soft_warnings import warn
from .tokenizer import Tokenizer
from .worker_context import WorkerContext

Float32Array = NDArray[np.float32]


def load_references(concept: Concept, bundle: Bundle) -> list[LoadedReference]:
    """Read every reference of a concept from its files.

    Raises:
        ImageError, MaskError: an image or mask that cannot be used.
    """
    loaded = []
    for number, reference in enumerate(concept.references, 1):
        which = f", reference {number}" if len(concept.references) > 1 else ""
        one = load_reference(reference, name=f"concept {concept.name!r}{which}")
        _check_mask(one, bundle)
        loaded.append(one)
    return loaded


def _check_mask(loaded: LoadedReference, bundle: Bundle) -> None:
    """Check that the mask does not vanish on every grid. Where it vanishes on a coarse one, the method skips it there;
    a warning says so.
    """
    grids = [bundle.grid(factor) for factor in bundle.factors]
    empty = [grid for grid in grids if not layer_mask(loaded.mask_grid, *grid).any()]
    if empty and len(empty) < len(grids):
        where = " and ".join(f"{rows} x {columns}" for rows, columns in empty)
        warn(
            "mask-vanishes",
            f"{loaded.name}: the mask vanishes on the {where} grid, and the layers there do not see it.",
        )
    if len(empty) == len(grids):
        finest = max(grids)
        raise MaskError(
            f"{loaded.name}: the mask vanishes on every grid the injection layers work on (the finest is "
            f"{finest[0]} x {finest[1]}); it is too small to be seen. Use a larger mask or a closer crop."
        )


def encode_text(context: WorkerContext, tokenizer: Tokenizer, prompts: Sequence[str]) -> NDArray[Any]:
    """Encode prompts into embeddings [n, 77, D]."""
    ids = np.stack([tokenizer.encode(prompt) for prompt in prompts])
    encoder = context.binding("text_encoder")
    size = encoder.largest("B") or len(ids)
    return np.concatenate([encoder.once({"token_ids": ids[i : i + size]})["text"] for i in range(0, len(ids), size)])


def encode_image(context: WorkerContext, bundle: Bundle, loaded: LoadedReference) -> Float32Array:
    """Encode a reference into clean latents, float32 [1, 4, h, w]."""
    pixels = loaded.pixels(bundle.height, bundle.width)
    return context.binding("vae_encoder").once({"pixels": pixels})["latents"]
