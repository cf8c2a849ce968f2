"""Single steps of a bundle's two U-Net graphs on host arrays, for comparisons and measurements.

`Session` does not use them: it runs a `magicface_rt.denoiser.DenoisingLoop`, which leaves everything where the backend
computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Arrays, GraphRunner
from .backends.host import host_dtype
from .bundle import Bundle, reference_tensor_names
from .denoiser import STATE, Float32Array, Guidance
from .regions import KeptTokens, MaskedReference, Stage, cell_groups, kept_tokens, key_access

__all__ = ["Denoiser", "ReferenceSet", "padding_keys"]


@dataclass(frozen=True)
class ReferenceSet:
    """The references of a request: R rows for `reference_kv`, and which of their tokens are kept on each grid."""

    masked: tuple[MaskedReference, ...]
    kept: Mapping[int, KeptTokens]

    @property
    def arrays(self) -> Arrays:
        """The `reference_kv` inputs that do not change from step to step, except the text."""
        return {f"kept_{factor}": tokens.index for factor, tokens in self.kept.items()}

    @classmethod
    def of(cls, bundle: Bundle, masked: Sequence[MaskedReference]) -> ReferenceSet:
        """Compute the kept tokens on the grids of the bundle's injection layers."""
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
        """Compute the keys and values [1, M, C] of the kept tokens, by `denoise_step` input name.

        latents: noised, float32 [R, 4, h, w]; text: [R, 77, D].
        """
        inputs: Arrays = {
            "latents": latents,
            "timestep": np.full(len(references.masked), timestep, np.int64),
            "text": text,
            **references.arrays,
        }
        return {name: array[None] for name, array in self._reference_kv.run(inputs).items()}

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
        """Run one step of `denoise_step`; see its contract for the outputs.

        latents: float32 [B, 4, h, w]; coefficients: the schedule's row for this step, float32 [2]; region_label:
        int64 [B, h/2, w/2] from the previous step, used in the RBA stage only.
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


def padding_keys(bundle: Bundle) -> Arrays:
    """Return keys and values for a request without references, by `denoise_step` input name.

    They are one padding key for each injection layer, zeros of the bundle's dtype [1, 1, C], which no cell sees.
    """
    return {
        name: np.zeros((1, 1, layer.width), host_dtype(bundle.dtype))
        for layer in bundle.injection_layers
        for name in reference_tensor_names(layer.index)
    }
