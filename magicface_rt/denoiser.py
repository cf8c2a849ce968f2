"""The two U-Net graphs of a bundle, driven with the quantities of the method instead of raw arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Arrays, GraphRunner
from .bundle import Bundle
from .regions import KeptTokens, MaskedReference, Stage, WeightMode, cell_groups, kept_tokens, key_access, token_arrays

Float32Array = NDArray[np.float32]

STATE = ("latents_out", "region_label_out")
"""The outputs that the next step needs; the others exist to be compared."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What is the same for every step of a request of B images.

    text: [2, B, 77, D], negative prompt and prompt, in the bundle's dtype; tokens: positions per concept.
    """

    text: NDArray[Any]
    tokens: Sequence[Sequence[int]]
    ca_scale: float
    scale: float
    semantic: bool
    weight_mode: WeightMode

    @cached_property
    def arrays(self) -> Arrays:
        """The `denoise_step` inputs that do not change from step to step."""
        images = self.text.shape[1]
        return {
            "text": self.text,
            **token_arrays(self.tokens, self.ca_scale, images),
            "semantic_guidance": np.full(images, float(self.semantic), np.float32),
            "guidance": np.full(images, self.scale, np.float32),
        }


@dataclass(frozen=True)
class ReferenceSet:
    """The references of a request: R rows for `reference_kv`, and which of their tokens are kept on each grid."""

    masked: tuple[MaskedReference, ...]
    kept: Mapping[int, KeptTokens]

    @classmethod
    def of(cls, bundle: Bundle, masked: Sequence[MaskedReference]) -> ReferenceSet:
        """The kept tokens on the grids of the bundle's injection layers."""
        return cls(tuple(masked), {factor: kept_tokens(masked, *bundle.grid(factor)) for factor in bundle.factors})


class Denoiser:
    """`reference_kv` and `denoise_step` of one bundle. Holds no state between calls."""

    def __init__(self, bundle: Bundle, reference_kv: GraphRunner, denoise_step: GraphRunner) -> None:
        self.bundle = bundle
        self._reference_kv = reference_kv
        self._denoise_step = denoise_step

    def reference_kv(
        self, references: ReferenceSet, latents: Float32Array, timestep: int, text: NDArray[Any]
    ) -> Arrays:
        """Keys and values [1, M, C] of the kept tokens, by `denoise_step` input name.

        latents: noised, float32 [R, 4, h, w]; text: [R, 77, D].
        """
        rows = len(references.masked)
        kept = {f"kept_{factor}": tokens.index for factor, tokens in references.kept.items()}
        inputs: Arrays = {"latents": latents, "timestep": np.full(rows, timestep, np.int64), "text": text, **kept}
        return {name: array[None] for name, array in self._reference_kv.run(inputs).items()}

    def no_references(self) -> Arrays:
        """The stand-in of `reference_kv` for a request without references: one padding key a layer."""
        dtype = np.dtype(self.bundle.dtype)
        return {
            f"{kind}_ref_{layer.index}": np.zeros((1, 1, layer.width), dtype)
            for layer in self.bundle.injection_layers
            for kind in "kv"
        }

    def step(
        self,
        latents: Float32Array,
        timestep: int,
        coefficients: Float32Array,
        *,
        stage: Stage,
        region_label: NDArray[np.int64],
        references: ReferenceSet,
        reference_kv: Arrays,
        guidance: Guidance,
        outputs: Sequence[str] = STATE,
    ) -> Arrays:
        """One step of `denoise_step`; see its contract for the outputs.

        latents: float32 [B, 4, h, w]; coefficients: the schedule's row for this step, float32 [2]; region_label:
        int64 [B, h/2, w/2] of the step before, used in the RBA stage only.
        """
        images = len(latents)
        inputs = {
            **guidance.arrays,
            **reference_kv,
            **key_access(references.kept, stage, guidance.weight_mode),
            "latents": latents,
            "timestep": np.full(images, timestep, np.int64),
            "region_label": cell_groups(stage, region_label),
            "ddim": np.tile(coefficients, (images, 1)),
        }
        return self._denoise_step.run(inputs, outputs)
