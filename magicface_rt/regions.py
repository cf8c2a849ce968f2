"""Turn masks, weights and tokens into the arrays that tell the graphs who sees whom.

Grids: a layer works on latents side / factor. Masks live on a 128 x 128 grid and are brought to a layer's by nearest.
Groups: concept k (counted from 0) has group k + 1; 0 is a cell of no concept, PADDING a key that nobody sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .bundle_form import TOKENS
from .errors import ConceptError
from .images import layer_mask
from .options import WeightMode
from .values.plain_numbers import as_float

Stage = Literal["rsa", "rba", "off"]

PADDING = -1
MAX_CONCEPTS = 6


@dataclass(frozen=True)
class MaskedReference:
    """One reference as the graphs see it. `mask_grid`: uint8 [128, 128]; `concept`: its concept's number, from 0."""

    mask_grid: NDArray[np.uint8]
    concept: int
    weight: float


@dataclass(frozen=True)
class KeptTokens:
    """The reference tokens inside the masks on one grid, M >= 1.

    index: int64 [M], into the tokens of all references laid end to end, row-major in each (`reference_kv`'s input);
    concept: int64 [M], PADDING for a key that nobody sees; weight: float32 [M].
    """

    index: NDArray[np.int64]
    concept: NDArray[np.int64]
    weight: NDArray[np.float32]

    @property
    def count(self) -> int:
        """The number of tokens, M."""
        return len(self.index)

    def padded(self, count: int) -> KeptTokens:
        """Return the tokens followed by padding keys that nobody sees, `count` in all; itself if there are enough."""
        more = count - self.count
        if more <= 0:
            return self
        return KeptTokens(
            np.concatenate([self.index, np.zeros(more, np.int64)]),
            np.concatenate([self.concept, np.full(more, PADDING)]),
            np.concatenate([self.weight, np.zeros(more, np.float32)]),
        )


def kept_tokens(references: Sequence[MaskedReference], rows: int, columns: int) -> KeptTokens:
    """Return the kept tokens of all references on a grid.

    A reference of weight 0 keeps none, since the method switches it off. If no token is left at all, one padding key
    stands in, because the graphs take at least one.
    """
    index, concept, weight = [], [], []
    for number, reference in enumerate(references):
        if reference.weight == 0:
            continue
        inside = np.flatnonzero(layer_mask(reference.mask_grid, rows, columns))
        index.append(inside + number * rows * columns)
        concept.append(np.full(len(inside), reference.concept))
        weight.append(np.full(len(inside), reference.weight))
    if not sum(map(len, index)):
        return KeptTokens(np.zeros(1, np.int64), np.full(1, PADDING), np.zeros(1, np.float32))
    return KeptTokens(
        np.concatenate(index).astype(np.int64),
        np.concatenate(concept).astype(np.int64),
        np.concatenate(weight).astype(np.float32),
    )


def bucket(count: int, largest: int | None = None) -> int:
    """Return the number of keys that `count` is padded to, so that few shapes serve all masks.

    There are four sizes per octave, from 16. The result is at most a quarter more than `count`, or 15 more if that is
    larger, and not above `largest`, unless `count` is.
    """
    step = max(16, 1 << max(0, count.bit_length() - 3))
    padded = -(-count // step) * step
    return padded if largest is None else max(count, min(padded, largest))


def key_access(kept: Mapping[int, KeptTokens], stage: Stage, weight_mode: WeightMode) -> dict[str, NDArray[Any]]:
    """Return the `denoise_step` inputs key_group, key_bias, key_scale [1, M] for each factor.

    RSA: every key has group 1, as every cell has, but those that only pad. RBA: a key has its concept's group.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for factor, tokens in kept.items():
        seen = tokens.concept != PADDING
        group = np.where(seen, 1 if stage == "rsa" else tokens.concept + 1, PADDING)
        ones, zeros = np.ones_like(tokens.weight), np.zeros_like(tokens.weight)
        arrays[f"key_group_{factor}"] = group[None].astype(np.int64)
        arrays[f"key_bias_{factor}"] = (tokens.weight if weight_mode == "bias" else zeros)[None]
        arrays[f"key_scale_{factor}"] = (tokens.weight if weight_mode == "scale" else ones)[None]
    return arrays


def cell_groups(stage: Stage, region_label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the `denoise_step` input region_label: whom each cell [B, h/2, w/2] may look at in this stage."""
    if stage == "rba":
        return region_label
    return np.full_like(region_label, 1 if stage == "rsa" else 0)


def token_arrays(
    tokens_of_concepts: Sequence[Sequence[int]], ca_scale: float, images: int
) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """Return the `denoise_step` inputs token_scale, token_group [B, 77] and foreground_only [B].

    Tokens of no concept compete with their score times ca_scale. Below 0.9 a label counts on the foreground only. If
    two concepts name the same token, the later one gets it.

    Raises:
        ConceptError: there are more concepts than the graphs have groups; a cell of an extra group would see every
            reference.
    """
    if len(tokens_of_concepts) > MAX_CONCEPTS:
        raise ConceptError(f"{len(tokens_of_concepts)} concepts were given; the graphs hold at most {MAX_CONCEPTS}.")
    scale = np.full((images, TOKENS), ca_scale, np.float32)
    group = np.zeros((images, TOKENS), np.int64)
    for concept, tokens in enumerate(tokens_of_concepts):
        scale[:, list(tokens)] = 1.0
        group[:, list(tokens)] = concept + 1
    return {
        "token_scale": scale,
        "token_group": group,
        "foreground_only": np.full(images, float(as_float(ca_scale) < 0.9), np.float32),
    }
