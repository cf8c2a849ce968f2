"""Baseline (b): the same pictures by the best eager PyTorch that we know. Baseline (c) is torch.compile of it.

Conditional reference rows only, 2 + R of them. scaled_dot_product_attention wherever no map is read; the maps of the
segmentation for the target's rows only, and S (S C) instead of S S. The injected row sees the kept tokens alone; in
stage 2 each region is gathered and attends once, over its own and its concept's keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from magicface_rt.export.reference import (
    LAYER_DIVISORS,
    SEGMENTATION_DIVISORS,
    Segmentation,
    StepInputs,
    join_heads,
    nearest_grid,
    reference_access,
    segment,
    split_heads,
    transformer_blocks,
)

from .step import Baseline, Pass

UNCONDITIONAL, CONDITIONAL, REFERENCES = 0, 1, 2


class Strong(Baseline):
    """Rows: unconditional and conditional target, then the references under their own prompts."""

    def install(self) -> None:
        for layer, block in enumerate(transformer_blocks(self.unet)):
            block.attn1.set_processor(_SelfAttention(self.state, layer, layer in self.injection_layers))
            block.attn2.set_processor(_CrossAttention(self.state, layer))

    def batch(self, inputs: StepInputs) -> tuple[Tensor, Tensor, int]:
        latents = torch.cat([inputs.latents, inputs.latents, inputs.references])
        return latents, torch.cat([inputs.text, inputs.reference_text]), CONDITIONAL

    def segment(self, inputs: StepInputs) -> Segmentation:
        h, w = inputs.latents.shape[-2:]
        layers = self.state.layers()
        return segment(layers, rows=h // 2, cols=w // 2, tokens=inputs.tokens, ca_scale=inputs.ca_scale)


class Compiled(Strong):
    """The same under torch.compile."""

    def install(self) -> None:
        super().install()
        self.compiled = torch.compile(self.unet)

    def predict(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        # A tensor, because a number would be compiled in, step after step.
        return self.compiled(latents, torch.tensor(timestep), encoder_hidden_states=text).sample


class _SelfAttention:
    def __init__(self, state: Pass, layer: int, injects: bool) -> None:
        self.state, self.layer, self.injects = state, layer, injects

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (split_heads(to(hidden_states), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        injects = self.injects and self.state.step.stage != "off" and len(self.state.step.weights) > 0
        out = torch.empty_like(q)
        out[REFERENCES:] = _attend(q[REFERENCES:], k[REFERENCES:], v[REFERENCES:], attn.scale)
        if LAYER_DIVISORS[self.layer] in SEGMENTATION_DIVISORS:
            out[:REFERENCES] = _attend_with_map(q, k, v, attn.scale, self.state.self_maps, self.layer)
        else:
            plain = slice(0, CONDITIONAL if injects else REFERENCES)
            out[plain] = _attend(q[plain], k[plain], v[plain], attn.scale)
        if injects:
            out[CONDITIONAL] = self._injected(q, k, v, attn.scale)
        return attn.to_out[0](join_heads(out))

    def _injected(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[heads, n, d] of the conditional row: tokens that see the same references attend together."""
        inputs = self.state.step
        rows, cols = self.state.grid(self.layer)
        masks = nearest_grid(inputs.reference_masks.bool(), rows, cols).flatten(1)  # (R, n)
        usable = masks & (inputs.weights != 0)[:, None]
        kept = [mask.nonzero()[:, 0] for mask in usable]
        access = reference_access(inputs.stage, inputs.regions, inputs.concept_of_reference, rows, cols)  # (n, R)
        patterns, pattern_of_token = access.unique(dim=0, return_inverse=True)
        out = torch.empty_like(q[CONDITIONAL])
        for number, pattern in enumerate(patterns):
            here = (pattern_of_token == number).nonzero()[:, 0]
            seen = [r for r in range(len(kept)) if pattern[r] and len(kept[r])]
            keys = torch.cat([k[CONDITIONAL], *(_scaled(k, r, kept[r], inputs) for r in seen)], 1)
            values = torch.cat([v[CONDITIONAL], *(v[REFERENCES + r][:, kept[r]] for r in seen)], 1)
            bias = None
            if seen and inputs.weight_mode == "bias":
                added = [inputs.weights[r].expand(len(kept[r])) for r in seen]
                bias = torch.cat([q.new_zeros(q.shape[2]), *added])  # (n + M)
                bias = bias.expand(len(here), -1)
            out[:, here] = _attend(q[CONDITIONAL][:, here], keys, values, scale, bias)
        return out


def _scaled(k: Tensor, reference: int, kept: Tensor, inputs: StepInputs) -> Tensor:
    """A reference's kept keys; weight mode "scale" multiplies their logits, so the keys."""
    factor = inputs.weights[reference] if inputs.weight_mode == "scale" else 1.0
    return k[REFERENCES + reference][:, kept] * factor


class _CrossAttention:
    def __init__(self, state: Pass, layer: int) -> None:
        self.state, self.layer = state, layer

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q = split_heads(attn.to_q(hidden_states), attn.heads)
        k, v = (split_heads(to(encoder_hidden_states), attn.heads) for to in (attn.to_k, attn.to_v))
        if LAYER_DIVISORS[self.layer] in SEGMENTATION_DIVISORS:
            target = _attend_with_map(q, k, v, attn.scale, self.state.cross_maps, self.layer)
            rest = _attend(q[REFERENCES:], k[REFERENCES:], v[REFERENCES:], attn.scale)
            out = torch.cat([target, rest])
        else:
            out = _attend(q, k, v, attn.scale)
        return attn.to_out[0](join_heads(out))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    if not q.shape[0]:
        return q
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _attend_with_map(q: Tensor, k: Tensor, v: Tensor, scale: float, maps: dict[int, Tensor], layer: int) -> Tensor:
    """The target's two rows, [2, heads, n, d], leaving their head-averaged map."""
    probabilities = (q[:REFERENCES] * scale @ k[:REFERENCES].transpose(-1, -2)).softmax(-1)
    maps[layer] = probabilities.mean(1)
    return probabilities @ v[:REFERENCES]
