"""Watch the PyTorch reference: how much attention goes to each reference, and how near the features come.

Attention goes to references in the layers that inject, whichever they are. Features are always compared in the same
layers, `DISTANCE_LAYERS`, so their distance can be compared between sets of injection layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from magicface_rt.export.reference import (
    DEFAULT_INJECTION_LAYERS,
    MagicFaceReference,
    SelfAttention,
    StepInputs,
    StepOutputs,
    nearest_grid,
    reference_access,
    reference_bias,
    split_heads,
    transformer_blocks,
)

DISTANCE_LAYERS = DEFAULT_INJECTION_LAYERS


@dataclass
class Seen:
    """What was seen in one step: a list for each layer, with a value for each reference.

    mass: attention on the reference's keys, of the tokens in its concept's region; mass_everywhere: of all tokens; both
    in the layers that inject. distance: of the features of the tokens in the region from the nearest feature in the
    reference's mask, as 1 minus the cosine; in `DISTANCE_LAYERS`. A value is None if the concept had no region there,
    or, for distance, if the mask is empty there.
    """

    mass: list[list[float | None]] = field(default_factory=list)
    mass_everywhere: list[list[float]] = field(default_factory=list)
    distance: list[list[float | None]] = field(default_factory=list)


class WatchedReference(MagicFaceReference):
    """Computes what `MagicFaceReference` computes; `seen` holds what was seen inside the last step.

    The regions of a step are those that its attention used, from the step before; in the first step there are none.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, injection_layers: Sequence[int] = DEFAULT_INJECTION_LAYERS
    ) -> None:
        super().__init__(unet, injection_layers=injection_layers)
        self.seen = Seen()
        self._regions: Tensor | None = None
        for layer, block in enumerate(transformer_blocks(unet)):
            if layer in (*self.injection_layers, *DISTANCE_LAYERS):
                block.attn1.set_processor(_Watching(self, layer, layer in self.injection_layers))

    def step(self, inputs: StepInputs) -> StepOutputs:
        self.seen = Seen()
        outputs = super().step(inputs)
        self._regions = outputs.regions
        return outputs

    def restart(self) -> None:
        """Forget the regions of the previous run."""
        self._regions = None

    @torch.no_grad()
    def look(self, attn: nn.Module, layer: int, hidden: Tensor) -> None:
        """Add a layer's values to `seen`. hidden [2+R, n, C]: what enters the layer's self-attention."""
        inputs = self._pass.inputs
        if inputs is None or not len(inputs.weights) or inputs.stage == "off":
            return
        regions = [self._region(concept, *self._pass.grid(layer)) for concept in inputs.concept_of_reference]
        if layer in self.injection_layers:
            mass = self._mass(attn, hidden, inputs, *self._pass.grid(layer))  # (n, R)
            self.seen.mass_everywhere.append(mass.mean(0).tolist())
            self.seen.mass.append([None if x is None else float(mass[x, r].mean()) for r, x in enumerate(regions)])
        if layer in DISTANCE_LAYERS:
            masks = nearest_grid(inputs.reference_masks, *self._pass.grid(layer)).flatten(1)  # (R, n)
            self.seen.distance.append(
                [
                    None if x is None or not mask.any() else _nearest(hidden[1][x], hidden[2 + r][mask])
                    for r, (x, mask) in enumerate(zip(regions, masks, strict=True))
                ]
            )

    def _region(self, concept: int, rows: int, cols: int) -> Tensor | None:
        """A concept's region on a layer's grid, bool [n]; None if it is empty."""
        if self._regions is None or concept < 0:
            return None
        region = nearest_grid(self._regions, rows, cols)[concept].flatten()
        return region if region.any() else None

    def _mass(self, attn: nn.Module, hidden: Tensor, inputs: StepInputs, rows: int, cols: int) -> Tensor:
        """The conditional row's attention on each reference, averaged over the heads: [n, R]."""
        n, count = rows * cols, len(inputs.weights)
        q, k = split_heads(attn.to_q(hidden[1:2]), attn.heads)[0], split_heads(attn.to_k(hidden[1:]), attn.heads)
        access = reference_access(inputs.stage, inputs.regions, inputs.concept_of_reference, rows, cols).to(q.device)
        bias, factor = reference_bias(
            inputs.reference_masks, inputs.weights, access, rows, cols, inputs.weight_mode
        )  # (n, R*n), (R*n)
        total = torch.zeros(n, count, dtype=q.dtype, device=q.device)
        for head in range(attn.heads):  # one at a time: all of them at once are gigabytes at full size
            own = q[head] * attn.scale @ k[0, head].T  # (n, n)
            others = q[head] * attn.scale @ k[1:, head].reshape(count * n, -1).T * factor + bias  # (n, R*n)
            probabilities = torch.cat([own, others], 1).softmax(1)[:, n:]
            total += probabilities.reshape(n, count, n).sum(2)
        return total / attn.heads


class _Watching(SelfAttention):
    def __init__(self, watched: WatchedReference, layer: int, injects: bool) -> None:
        super().__init__(watched._pass, layer, injects)
        self.watched = watched

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.watched.look(attn, self.layer, hidden_states)
        return super().__call__(attn, hidden_states, *args, **kwargs)


def _nearest(mine: Tensor, theirs: Tensor) -> float:
    """Mean over `mine` [a, C] of 1 - the largest cosine with any of `theirs` [b, C]."""
    mine, theirs = nn.functional.normalize(mine, dim=1), nn.functional.normalize(theirs, dim=1)
    return float((1 - (mine @ theirs.T).amax(1)).mean())
