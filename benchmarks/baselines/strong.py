"""Baseline (b): the same pictures by the best eager PyTorch that we know. Baseline (c) is torch.compile of it.

The references have conditional rows only, so a step has 2 + R rows. scaled_dot_product_attention is used wherever no
map is read; the segmentation's maps are formed for the target's rows only, and S (S C) replaces S S. The injected row
sees only kept tokens of the references; in stage 2 each region is gathered and attends once, over the row's own keys
and its concept's.
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

    def prepare(self, inputs: StepInputs) -> None:
        """Find which tokens are kept and who sees them, once a step: it is the same for all layers of a grid."""
        self.state.tokens.clear()
        if inputs.stage == "off" or not len(inputs.weights):
            return
        for grid in {self.state.grid(layer) for layer in self.injection_layers}:
            masks = nearest_grid(inputs.reference_masks.bool(), *grid).flatten(1)  # (R, n)
            usable = masks & (inputs.weights != 0)[:, None]
            access = reference_access(inputs.stage, inputs.regions, inputs.concept_of_reference, *grid)  # (n, R)
            self.state.tokens[grid] = usable, access

    def segment(self, inputs: StepInputs) -> Segmentation:
        h, w = inputs.latents.shape[-2:]
        layers = self.state.layers()
        return segment(layers, rows=h // 2, cols=w // 2, tokens=inputs.tokens, ca_scale=inputs.ca_scale)


class Compiled(Strong):
    """`Strong` under torch.compile: the whole U-Net as one graph, for both stages.

    How many tokens a region has is known only at run time, and the compiler breaks its graph where Python asks for such
    a number. So the injected row's attention is a single operator to it (`injected_attention`), as a kernel would be.
    """

    def install(self) -> None:
        super().install()
        self.compiled = torch.compile(self.unet, fullgraph=True)

    def predict(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        # A tensor, because a number would be compiled in, step after step.
        return self.compiled(latents, torch.tensor(timestep), encoder_hidden_states=text).sample


class _SelfAttention:
    def __init__(self, state: Pass, layer: int, injects: bool) -> None:
        self.state, self.layer, self.injects = state, layer, injects

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (split_heads(to(hidden_states), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        injects = self.injects and bool(self.state.tokens)
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
        """The injected attention of the conditional row, [heads, n, d]."""
        inputs = self.state.step
        usable, access = self.state.tokens[self.state.grid(self.layer)]
        attend = injected_attention if torch.compiler.is_compiling() else _injected_attention
        return attend(q, k, v, usable, access, inputs.weights, inputs.weight_mode == "bias", scale)


def _injected_attention(
    q: Tensor, k: Tensor, v: Tensor, usable: Tensor, access: Tensor, weights: Tensor, adds: bool, scale: float
) -> Tensor:
    """The injected attention of the conditional row, [heads, n, d]; tokens that see the same references go together.

    q, k, v  [2 + R, heads, n, d]
    usable   bool [R, n]: a reference's tokens that may be seen
    access   bool [n, R]: the references that a token of the target sees
    weights  float32 [R]: added to the logits of a reference (adds), or their factor
    """
    kept = [tokens.nonzero()[:, 0] for tokens in usable]
    patterns, pattern_of_token = access.unique(dim=0, return_inverse=True)
    out = torch.empty_like(q[CONDITIONAL])
    for number, pattern in enumerate(patterns):
        here = (pattern_of_token == number).nonzero()[:, 0]
        seen = [r for r in range(len(kept)) if pattern[r] and len(kept[r])]
        factors = [1.0 if adds else weights[r] for r in seen]
        reference_keys = [k[REFERENCES + r][:, kept[r]] * f for r, f in zip(seen, factors, strict=True)]
        keys = torch.cat([k[CONDITIONAL], *reference_keys], 1)
        values = torch.cat([v[CONDITIONAL], *(v[REFERENCES + r][:, kept[r]] for r in seen)], 1)
        bias = None
        if seen and adds:
            added = [weights[r].expand(len(kept[r])) for r in seen]
            bias = torch.cat([q.new_zeros(q.shape[2]), *added])  # (n + M)
            bias = bias.expand(len(here), -1)
        # With a batch axis: the fused kernels take four dimensions, and fewer dimensions use written-out logits.
        out[:, here] = _attend(q[CONDITIONAL, None][:, :, here], keys[None], values[None], scale, bias)[0]
    return out


injected_attention = torch.library.custom_op(
    "magicface_benchmarks::injected_attention", _injected_attention, mutates_args=()
)


@injected_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q[CONDITIONAL])


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
    """Attend for the target's two rows, [2, heads, n, d], and store their head-averaged map."""
    probabilities = (q[:REFERENCES] * scale @ k[:REFERENCES].transpose(-1, -2)).softmax(-1)
    maps[layer] = probabilities.mean(1)
    return probabilities @ v[:REFERENCES]
