"""Baseline (a): the authors' algorithm in eager PyTorch, with all the work that their code does.

A step has 2 (1 + R) U-Net rows: the references run under the negative prompt as well, although nothing reads the
results. Attention is written out in every layer and row, with logits and probabilities both kept until its end; the
heads' mean of every map is taken for all rows, of which two are used. Stage 1 attends for the unconditional target
twice. Stage 2 computes each region by gathering its tokens with a boolean mask, after all tokens have been computed
without references. Every step forms S S, the square of each self-attention map, three times. docs/design.md, "The
algorithm", describes what the authors' code computes; the code here is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from magicface_rt.errors import OptionError
from magicface_rt.export.reference import (
    LAYER_DIVISORS,
    SEGMENTATION_DIVISORS,
    LayerMaps,
    Segmentation,
    StepInputs,
    join_heads,
    nearest_grid,
    segment,
    split_heads,
    transformer_blocks,
)

from .step import Baseline, Pass


class Authors(Baseline):
    """Rows: target and references under the negative prompt, then target and references under their own prompts."""

    def install(self) -> None:
        for layer, block in enumerate(transformer_blocks(self.unet)):
            block.attn1.set_processor(_SelfAttention(self.state, layer, layer in self.injection_layers))
            block.attn2.set_processor(_CrossAttention(self.state, layer))

    def batch(self, inputs: StepInputs) -> tuple[Tensor, Tensor, int]:
        rows = torch.cat([inputs.latents, inputs.references])  # (1+R, 4, h, w)
        negative = inputs.text[:1].expand(len(rows), -1, -1)
        text = torch.cat([negative, inputs.text[1:], inputs.reference_text])  # (2+2R, 77, D)
        return torch.cat([rows, rows]), text, len(rows)

    def segment(self, inputs: StepInputs) -> Segmentation:
        h, w = inputs.latents.shape[-2:]
        layers = [_Squared(x.self_map, x.cross_map, x.rows, x.cols) for x in self.state.layers()]
        return segment(layers, rows=h // 2, cols=w // 2, tokens=inputs.tokens, ca_scale=inputs.ca_scale)


class _Squared(LayerMaps):
    """Maps whose evidence is computed by forming S S."""

    def evidence(self, row: int) -> Tensor:
        s = self.self_map[row]  # (n, n)
        total = s.clone()
        for _ in range(3):
            total += s @ s  # the same product each time, as theirs is
        return total / 4 @ self.cross_map[row]  # (n, 77)


class _SelfAttention:
    def __init__(self, state: Pass, layer: int, injects: bool) -> None:
        self.state, self.layer, self.injects = state, layer, injects

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = (split_heads(to(hidden_states), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        logits = q @ k.transpose(-1, -2) * attn.scale  # (2+2R, heads, n, n), held to the end
        probabilities = logits.softmax(-1)
        conditional = len(q) // 2
        mean = probabilities.mean(1)[[0, conditional]]  # (2, n, n)
        if LAYER_DIVISORS[self.layer] in SEGMENTATION_DIVISORS:
            self.state.self_maps[self.layer] = mean
        out = probabilities @ v  # (2+2R, heads, n, d)
        if self.injects and self.state.step.stage != "off" and len(self.state.step.weights):
            if self.state.step.stage == "rsa":
                out[0] = (q[0] @ k[0].transpose(-1, -2) * attn.scale).softmax(-1) @ v[0]
            out[conditional] = self._injected(q, k, v, out[conditional], conditional, attn.scale)
        return attn.to_out[0](join_heads(out))

    def _injected(self, q: Tensor, k: Tensor, v: Tensor, plain: Tensor, row: int, scale: float) -> Tensor:
        """The injected attention of the conditional target, [heads, n, d]."""
        inputs = self.state.step
        rows, cols = self.state.grid(self.layer)
        masks = nearest_grid(inputs.reference_masks.bool(), rows, cols).flatten(1)  # (R, n)
        usable = masks & (inputs.weights != 0)[:, None]
        bias = torch.where(usable, inputs.weights[:, None], -torch.inf)  # (R, n)
        if inputs.weight_mode != "bias":
            raise OptionError(
                f"weight_mode is {inputs.weight_mode!r}, expected 'bias': the authors' code adds weights to logits."
            )
        q_c, references = q[row], range(row + 1, len(q))
        if inputs.stage == "rsa":
            keys = torch.cat([k[row], *(k[r] for r in references)], 1)  # (heads, (1+R)n, d)
            values = torch.cat([v[row], *(v[r] for r in references)], 1)
            own = torch.zeros_like(bias[:1])
            logits = q_c @ keys.transpose(-1, -2) * scale + torch.cat([own, bias]).flatten()
            return logits.softmax(-1) @ values
        assert inputs.regions is not None
        out = plain.clone()
        regions = nearest_grid(inputs.regions, rows, cols).flatten(1)  # (N, n)
        for concept, region in enumerate(regions):
            mine = [i for i, owner in enumerate(inputs.concept_of_reference) if owner == concept]
            if not mine or not region.any():
                continue
            keys = torch.cat([k[row], *(k[row + 1 + i] for i in mine)], 1)
            values = torch.cat([v[row], *(v[row + 1 + i] for i in mine)], 1)
            added = torch.cat([torch.zeros_like(bias[0]), *(bias[i] for i in mine)])
            logits = q_c[:, region] @ keys.transpose(-1, -2) * scale + added
            out[:, region] = logits.softmax(-1) @ values
        return out


class _CrossAttention:
    def __init__(self, state: Pass, layer: int) -> None:
        self.state, self.layer = state, layer

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q = split_heads(attn.to_q(hidden_states), attn.heads)
        k, v = (split_heads(to(encoder_hidden_states), attn.heads) for to in (attn.to_k, attn.to_v))
        logits = q @ k.transpose(-1, -2) * attn.scale  # (2+2R, heads, n, 77)
        probabilities = logits.softmax(-1)
        mean = probabilities.mean(1)[[0, len(q) // 2]]  # (2, n, 77)
        if LAYER_DIVISORS[self.layer] in SEGMENTATION_DIVISORS:
            self.state.cross_maps[self.layer] = mean
        return attn.to_out[0](join_heads(probabilities @ v))
