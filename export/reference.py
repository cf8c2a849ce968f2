"""MagicFace in PyTorch, written for clarity: the oracle that everything else is compared with.

Reads top to bottom in the order of the method (arXiv 2408.07433, as the authors' code really computes it):

    1. grids          masks and regions on the grid of a layer
    2. attention      who sees which reference keys: reference-aware (RSA) and region-grouped (RBA) attention
    3. segmentation   attention maps -> which prompt token owns which cell
    4. guidance       regions -> the factor on the guidance at every pixel
    5. one step       the U-Net with its 16 self-attentions, and the DDIM step
    6. the loop       from x_T to the last latents

Letters used for shapes: h, w sides of the latents; n = rows*cols tokens of a layer; d channels of a head; R references;
N concepts; T steps; 77 prompt tokens of width D. All masks are explicit and the references are rows of the U-Net's
batch: [unconditional, conditional, reference 1, ..., reference R]. Nothing here is fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from magicface_rt.errors import CheckpointError, InputError
from magicface_rt.schedule import Schedule, is_region_step

Stage = Literal["off", "rsa", "rba"]
WeightMode = Literal["bias", "scale"]

DEFAULT_INJECTION_LAYERS = (10, 11, 12, 13, 14, 15)
# of the 16 self-attentions in execution order: down 0-5, mid 6, up 7-15; the grid of a layer is h/divisor x w/divisor
LAYER_DIVISORS = (1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1)
SEGMENTATION_DIVISORS = (2, 4, 8)  # 5 + 5 + 1 layers
CONSTRAINED_BELOW = 0.9  # with a ca_scale under this, a token owns foreground cells only
RATE_RANGE = (0.8, 3.0)
RATE_CEILING = 15.0  # guidance * rate stays under this, before smoothing
EPSILON = 1e-8


# ---------------------------------------------------------------------------------------------------- 1. grids


def nearest_grid(grid: Tensor, rows: int, cols: int) -> Tensor:
    """Sample [..., H, W] at (floor(H*i/rows), floor(W*j/cols)) -> [..., rows, cols]; up as well as down."""
    height, width = grid.shape[-2:]
    i = torch.arange(rows, device=grid.device) * height // rows  # (rows)
    j = torch.arange(cols, device=grid.device) * width // cols  # (cols)
    return grid[..., i[:, None], j[None, :]]  # (..., rows, cols)


def smoothing_kernel() -> Tensor:
    """The 3x3 kernel: outer([1/e, 1, 1/e]) normalised to sum 1, i.e. exponents -(x / (2 sigma))^2 with sigma 0.5."""
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0]) ** 2))  # (3)
    kernel = line[:, None] * line[None, :]  # (3, 3)
    return kernel / kernel.sum()


def smooth(images: Tensor) -> Tensor:
    """Smooth [C, rows, cols] with the 3x3 kernel and reflect padding, or replicate padding if a side has size 1."""
    kernel = smoothing_kernel().to(images)[None, None]  # (1, 1, 3, 3)
    mode = "reflect" if min(images.shape[-2:]) > 1 else "replicate"
    padded = functional.pad(images[:, None], (1, 1, 1, 1), mode=mode)  # (C, 1, rows+2, cols+2)
    return functional.conv2d(padded, kernel)[:, 0]  # (C, rows, cols)


# ------------------------------------------------------------------------------------------------ 2. attention


def reference_access(
    stage: Stage, regions: Tensor | None, concept_of_reference: Sequence[int], rows: int, cols: int
) -> Tensor:
    """Which token of the conditional row may look at which reference: bool [n, R].

    RSA: every token at every reference. RBA: a token in the region of a concept at that concept's references; a token
    in no region at none. `regions` is bool [N, any, any]; where two regions overlap the later concept wins. A concept
    without a reference takes no token away from another. `concept_of_reference` holds numbers 0..N-1, or -1 for a
    reference that belongs to no concept, which RSA alone uses.
    """
    count = len(concept_of_reference)
    if stage == "off":
        return torch.zeros(rows * cols, count, dtype=torch.bool)
    if stage == "rsa":
        return torch.ones(rows * cols, count, dtype=torch.bool)
    if regions is None:
        raise InputError("stage 'rba' needs the regions of the previous step, found none; the first step is 'rsa'.")
    owner = torch.full((rows, cols), -1, device=regions.device)  # the concept of each token, -1 for none
    for concept, region in enumerate(nearest_grid(regions, rows, cols)):
        if concept in concept_of_reference:
            owner = torch.where(region, concept, owner)  # (rows, cols)
    owner = owner.reshape(-1, 1)  # (n, 1)
    concepts = torch.tensor(list(concept_of_reference), device=regions.device)  # (R)
    return (owner == concepts[None, :]) & (owner >= 0)  # (n, R)


def reference_bias(
    masks: Tensor, weights: Tensor, access: Tensor, rows: int, cols: int, weight_mode: WeightMode = "bias"
) -> tuple[Tensor, Tensor]:
    """What is added to, and multiplied into, the logits of the reference keys: [n, R*n] and [R*n].

    masks bool [R, H, W], weights [R], access bool [n, R]. A key is seen where its reference's mask is set on the
    layer's grid, its weight is not 0 and the token has access; elsewhere -inf. Weight mode "bias" (the authors' code)
    adds the weight to the logit of a seen key, "scale" multiplies the logit by it.
    """
    n, count = access.shape
    layer_masks = nearest_grid(masks, rows, cols).reshape(count, n)  # (R, n)
    usable = layer_masks & (weights != 0)[:, None]  # (R, n)
    seen = access[:, :, None] & usable[None]  # (n, R, n)
    ones = torch.ones_like(weights)
    added = weights if weight_mode == "bias" else 0 * ones  # (R)
    factor = weights if weight_mode == "scale" else ones  # (R)
    bias = torch.where(seen, added[None, :, None], -math.inf).reshape(n, count * n)
    return bias, factor.repeat_interleave(n)  # (n, R*n), (R*n)


def attention_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale): [..., heads, n, d] and [..., heads, m, d] -> [..., heads, n, m]."""
    return (q * scale @ k.transpose(-1, -2)).softmax(dim=-1)


def injected_attention(
    q: Tensor, k: Tensor, v: Tensor, k_ref: Tensor, v_ref: Tensor, *, bias: Tensor, factor: Tensor, scale: float
) -> Tensor:
    """The conditional row over its own keys and the references' keys, in one softmax.

    q, k, v [heads, n, d]; k_ref, v_ref [R, heads, n, d]; bias [n, R*n] and factor [R*n] of `reference_bias`
    -> [heads, n, d]. Own keys have neither bias nor factor, so a token that sees no reference key has plain attention.
    """
    heads, _, d = q.shape
    k_ref = k_ref.transpose(0, 1).reshape(heads, -1, d)  # (heads, R*n, d)
    v_ref = v_ref.transpose(0, 1).reshape(heads, -1, d)  # (heads, R*n, d)
    own = q * scale @ k.transpose(-1, -2)  # (heads, n, n)
    others = q * scale @ k_ref.transpose(-1, -2) * factor + bias  # (heads, n, R*n)
    probabilities = torch.cat([own, others], dim=-1).softmax(dim=-1)  # (heads, n, (1+R)*n)
    return probabilities @ torch.cat([v, v_ref], dim=1)  # (heads, n, d)


# --------------------------------------------------------------------------------------------- 3. segmentation


@dataclass(frozen=True)
class LayerMaps:
    """Head-averaged attention maps of one transformer block, rows [unconditional, conditional], on a rows x cols grid.

    The self-attention map is the plain one (own keys), in injection layers too.
    """

    self_map: Tensor  # (2, n, n)
    cross_map: Tensor  # (2, n, 77)
    rows: int
    cols: int

    def evidence(self, row: int) -> Tensor:
        """(S C + 3 S S C) / 4, [n, 77]. The authors add the second power of S three times and no higher ones."""
        s, c = self.self_map[row], self.cross_map[row]  # (n, n), (n, 77)
        sc = s @ c  # (n, 77)
        return (sc + 3 * (s @ sc)) / 4


@dataclass(frozen=True)
class Segmentation:
    """What the maps of one step say, on the h/2 x w/2 grid."""

    score: Tensor  # (77, h/2, w/2) after ca_scale
    foreground_score: Tensor  # (2, h/2, w/2) background, foreground
    label: Tensor  # (h/2, w/2) int64: argmax of the score, before the foreground constraint; the first on a tie
    owners: Tensor  # (77, h/2, w/2) bool: each token's cells; ties belong to all of the winners; after the constraint
    regions: Tensor  # (N, h/2, w/2) bool: cells owned by one of the concept's tokens
    foreground: Tensor  # (h/2, w/2) bool
    margin: Tensor  # (h/2, w/2) best minus second best score
    fore_margin: Tensor  # (h/2, w/2) |foreground score - background score|


def token_images(maps: LayerMaps, row: int, rows: int, cols: int) -> Tensor:
    """One layer's evidence for each of the 77 tokens, enlarged to [77, rows, cols]."""
    images = maps.evidence(row).T.reshape(1, -1, maps.rows, maps.cols)  # (1, 77, layer rows, layer cols)
    return functional.interpolate(images, (rows, cols), mode="bilinear", align_corners=False)[0]  # (77, rows, cols)


def token_scores(layers: Sequence[LayerMaps], rows: int, cols: int) -> Tensor:
    """Scores of the 77 tokens from the conditional row: smoothed, over their spatial mean, averaged over the layers."""
    total = []
    for maps in layers:
        images = smooth(token_images(maps, 1, rows, cols))  # (77, rows, cols)
        total.append(images / (images.mean(dim=(1, 2), keepdim=True) + EPSILON))
    return torch.stack(total).mean(dim=0)  # (77, rows, cols)


def foreground_scores(layers: Sequence[LayerMaps], rows: int, cols: int) -> Tensor:
    """Background (start token) and foreground (the sum of the others) from the unconditional row: [2, rows, cols]."""
    total = []
    for maps in layers:
        images = token_images(maps, 0, rows, cols)  # (77, rows, cols)
        pair = smooth(torch.stack([images[0], images[1:].sum(dim=0)]))  # (2, rows, cols)
        total.append(pair / pair.mean(dim=(1, 2), keepdim=True))
    return torch.stack(total).mean(dim=0)  # (2, rows, cols)


def segment(
    layers: Sequence[LayerMaps], *, rows: int, cols: int, tokens: Sequence[Sequence[int]], ca_scale: float
) -> Segmentation:
    """The owner of every cell of the rows x cols grid, from the maps of one step.

    `tokens` holds each concept's token positions. Tokens of no concept are multiplied by `ca_scale`, then all 77
    compete. Below a ca_scale of 0.9 a token owns foreground cells only.
    """
    wanted = {token for group in tokens for token in group}
    scores = token_scores(layers, rows, cols)  # (77, rows, cols)
    factors = [1.0 if token in wanted else ca_scale for token in range(scores.shape[0])]
    score = scores * torch.tensor(factors).to(scores)[:, None, None]  # (77, rows, cols)
    two_best = score.topk(2, dim=0).values  # (2, rows, cols)

    pair = foreground_scores(layers, rows, cols)  # (2, rows, cols)
    foreground = pair[1] > pair[0]  # (rows, cols)

    owners = score == score.max(dim=0, keepdim=True).values  # (77, rows, cols)
    if ca_scale < CONSTRAINED_BELOW:
        owners = owners & foreground
    return Segmentation(
        score=score,
        foreground_score=pair,
        label=score.argmax(dim=0),
        owners=owners,
        regions=concept_regions(owners, tokens),
        foreground=foreground,
        margin=two_best[0] - two_best[1],
        fore_margin=(pair[1] - pair[0]).abs(),
    )


def concept_regions(owners: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Cells owned by any of a concept's tokens: bool [77, rows, cols] -> bool [N, rows, cols]."""
    regions = [owners[list(group)].any(dim=0) for group in tokens]  # (rows, cols) each
    return torch.stack(regions) if regions else owners[:0]  # (N, rows, cols)


# ------------------------------------------------------------------------------------------------- 4. guidance


def guidance_rate(eps_u: Tensor, eps_c: Tensor, *, owners: Tensor, foreground: Tensor, guidance: float) -> Tensor:
    """Semantic guidance: the factor on the guidance at every pixel, [h, w].

    eps_u, eps_c [1, 4, h, w]; owners bool [77, h/2, w/2]; foreground bool [h/2, w/2].
    With m the norm of eps_c - eps_u at a pixel, F its mean over the foreground and D_j over the region of token j:
    rate = sum of F / D_j over the tokens that own the pixel, clamped to 0.8..3, then to at most 15/guidance, smoothed.
    """
    h, w = eps_u.shape[-2:]
    m = (eps_c - eps_u)[0].norm(dim=0)  # (h, w)
    foreground = nearest_grid(foreground, h, w).to(m)  # (h, w)
    owners = nearest_grid(owners, h, w).to(m)  # (77, h, w)
    in_foreground = (m * foreground).sum() / (foreground.sum() + EPSILON)  # F
    in_region = (m * owners).sum(dim=(1, 2)) / (owners.sum(dim=(1, 2)) + EPSILON)  # D (77)
    ratio = in_foreground / (in_region + EPSILON)  # (77)
    rate = (ratio[:, None, None] * owners).sum(dim=0)  # (h, w)
    rate = rate.clamp(*RATE_RANGE).clamp(max=RATE_CEILING / guidance)
    return smooth(rate[None])[0]  # (h, w)


def guide(eps_u: Tensor, eps_c: Tensor, rate: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance with the rate: eps_u + guidance * rate * (eps_c - eps_u), [1, 4, h, w]."""
    return eps_u + guidance * rate * (eps_c - eps_u)


def ddim_step(latents: Tensor, eps: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The next latents, [1, 4, h, w]; `coefficients` is a row of `Schedule.step_coefficients`."""
    return float(coefficients[0]) * latents + float(coefficients[1]) * eps


# ------------------------------------------------------------------------------------------------- 5. one step


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Everything that one denoising step depends on. All float tensors have one dtype and device."""

    latents: Tensor  # (1, 4, h, w)
    timestep: int
    text: Tensor  # (2, 77, D): negative prompt, prompt
    references: Tensor  # (R, 4, h, w) noised for this step
    reference_text: Tensor  # (R, 77, D)
    reference_masks: Tensor  # (R, 128, 128) bool
    weights: Tensor  # (R)
    concept_of_reference: tuple[int, ...]  # (R) numbers 0..N-1, or -1: of no concept, seen in stage 1 only
    tokens: tuple[tuple[int, ...], ...]  # token positions of each of the N concepts
    stage: Stage
    regions: Tensor | None  # (N, h/2, w/2) bool of the previous step; None before the first
    ca_scale: float
    guidance: float
    coefficients: Sequence[float]  # (2) of the DDIM step
    weight_mode: WeightMode = "bias"
    semantic_guidance: bool = True

    def __post_init__(self) -> None:
        h, w = self.latents.shape[-2:]
        count = self.references.shape[0]
        if h % 8 or w % 8:
            raise InputError(f"latents are {h} x {w}, expected multiples of 8: the U-Net halves them three times.")
        if {len(self.reference_text), len(self.reference_masks), len(self.weights), count} != {
            len(self.concept_of_reference)
        }:
            raise InputError(
                f"{count} reference latents, {len(self.reference_text)} texts, {len(self.reference_masks)} masks, "
                f"{len(self.weights)} weights, {len(self.concept_of_reference)} concepts; expected equal numbers."
            )


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """What one denoising step computes. Regions are used by the attention of the next step, the rate by this one."""

    eps_u: Tensor  # (1, 4, h, w)
    eps_c: Tensor  # (1, 4, h, w)
    eps_guided: Tensor  # (1, 4, h, w)
    latents: Tensor  # (1, 4, h, w) the next ones
    token_label: Tensor  # (h/2, w/2) int64
    regions: Tensor  # (N, h/2, w/2) bool
    foreground: Tensor  # (h/2, w/2) bool
    margin: Tensor  # (h/2, w/2)
    fore_margin: Tensor  # (h/2, w/2)
    rate: Tensor  # (h, w)


@dataclass
class _Pass:
    """What the attention processors share during one pass of the U-Net: the step's inputs, and the maps they store."""

    inputs: StepInputs | None = None
    self_maps: dict[int, Tensor] | None = None
    cross_maps: dict[int, Tensor] | None = None

    def grid(self, layer: int) -> tuple[int, int]:
        h, w = self.inputs.latents.shape[-2:]
        return h // LAYER_DIVISORS[layer], w // LAYER_DIVISORS[layer]


class SelfAttention:
    """Processor of one self-attention: plain for every row, or injected for the conditional row if it `injects`."""

    def __init__(self, shared: _Pass, layer: int, injects: bool) -> None:
        self.shared, self.layer, self.injects = shared, layer, injects

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs = self.shared.inputs
        q, k, v = (split_heads(to(hidden_states), attn.heads) for to in (attn.to_q, attn.to_k, attn.to_v))
        plain = attention_map(q, k, attn.scale)  # (2+R, heads, n, n)
        out = plain @ v  # (2+R, heads, n, d)
        if LAYER_DIVISORS[self.layer] in SEGMENTATION_DIVISORS:
            self.shared.self_maps[self.layer] = plain[:2].mean(dim=1)  # (2, n, n)

        if self.injects and inputs.stage != "off" and len(inputs.weights):
            rows, cols = self.shared.grid(self.layer)
            access = reference_access(inputs.stage, inputs.regions, inputs.concept_of_reference, rows, cols)
            access = access.to(q.device)  # (n, R)
            bias, factor = reference_bias(
                inputs.reference_masks, inputs.weights, access, rows, cols, inputs.weight_mode
            )  # (n, R*n), (R*n)
            conditional = injected_attention(
                q[1], k[1], v[1], k[2:], v[2:], bias=bias, factor=factor, scale=attn.scale
            )  # (heads, n, d)
            out = torch.cat([out[:1], conditional[None], out[2:]])  # (2+R, heads, n, d)
        return attn.to_out[0](join_heads(out))  # (2+R, n, heads*d)


class CrossAttention:
    """Processor of one cross-attention: plain; it stores its map of the two target rows."""

    def __init__(self, shared: _Pass, layer: int) -> None:
        self.shared, self.layer = shared, layer

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        q = split_heads(attn.to_q(hidden_states), attn.heads)  # (2+R, heads, n, d)
        k = split_heads(attn.to_k(encoder_hidden_states), attn.heads)  # (2+R, heads, 77, d)
        v = split_heads(attn.to_v(encoder_hidden_states), attn.heads)  # (2+R, heads, 77, d)
        probabilities = attention_map(q, k, attn.scale)  # (2+R, heads, n, 77)
        if LAYER_DIVISORS[self.layer] in SEGMENTATION_DIVISORS:
            self.shared.cross_maps[self.layer] = probabilities[:2].mean(dim=1)  # (2, n, 77)
        return attn.to_out[0](join_heads(probabilities @ v))  # (2+R, n, heads*d)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, heads*d] -> [B, heads, n, d]."""
    batch, n, channels = x.shape
    return x.reshape(batch, n, heads, channels // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, n, d] -> [B, n, heads*d]."""
    batch, heads, n, d = x.shape
    return x.transpose(1, 2).reshape(batch, n, heads * d)


def transformer_blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The transformer blocks in execution order: down 0-5, mid 6, up 7-15. Raises `CheckpointError` for another layout.

    Each holds a self-attention `attn1` and a cross-attention `attn2`.
    """
    found, divisors = [], []
    parts = [*((2**i, block) for i, block in enumerate(unet.down_blocks)), (8, unet.mid_block)]
    parts += [(8 // 2**i, block) for i, block in enumerate(unet.up_blocks)]
    for divisor, part in parts:
        for attention in getattr(part, "attentions", None) or []:
            found.extend(attention.transformer_blocks)
            divisors.extend([divisor] * len(attention.transformer_blocks))
    if tuple(divisors) != LAYER_DIVISORS:
        raise CheckpointError(
            f"the U-Net has {len(found)} self-attentions on grids 1/{divisors}, expected 16 on "
            f"1/{list(LAYER_DIVISORS)} as in Stable Diffusion 1.5 and 2.1-base. Other architectures are not supported."
        )
    return found


class MagicFaceReference:
    """A U-Net of Stable Diffusion's layout with MagicFace's attention; `step` is one denoising step.

    The U-Net's attention processors are replaced. `injection_layers` are the self-attentions, of 0..15 in execution
    order, in which the conditional row sees the references. The config's `sample_size` does not matter: latents of any
    size that is a multiple of 8 are accepted. A U-Net works only with the last reference made from it. Not thread-safe.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, injection_layers: Sequence[int] = DEFAULT_INJECTION_LAYERS
    ) -> None:
        unknown = [layer for layer in injection_layers if not 0 <= layer < len(LAYER_DIVISORS)]
        if unknown:
            raise InputError(f"injection layers {unknown} do not exist, expected numbers 0..15.")
        self.unet = unet.eval()
        self.injection_layers = tuple(sorted(set(injection_layers)))
        self._pass = _Pass()
        for layer, block in enumerate(transformer_blocks(unet)):
            block.attn1.set_processor(SelfAttention(self._pass, layer, layer in self.injection_layers))
            block.attn2.set_processor(CrossAttention(self._pass, layer))

    @torch.no_grad()
    def step(self, inputs: StepInputs) -> StepOutputs:
        """Compute one denoising step of one image."""
        h, w = inputs.latents.shape[-2:]
        rows, cols = h // 2, w // 2

        batch = torch.cat([inputs.latents, inputs.latents, inputs.references])  # (2+R, 4, h, w)
        text = torch.cat([inputs.text, inputs.reference_text])  # (2+R, 77, D)
        self._pass.inputs, self._pass.self_maps, self._pass.cross_maps = inputs, {}, {}
        eps = self.unet(batch, inputs.timestep, encoder_hidden_states=text).sample  # (2+R, 4, h, w)
        eps_u, eps_c = eps[0:1], eps[1:2]  # (1, 4, h, w) each; the references' predictions are thrown away
        if not self._pass.self_maps:
            raise InputError("the U-Net's attention processors were replaced, expected those of this reference.")

        maps = [
            LayerMaps(self._pass.self_maps[layer], self._pass.cross_maps[layer], *self._pass.grid(layer))
            for layer in sorted(self._pass.self_maps)
        ]
        self._pass.inputs, self._pass.self_maps, self._pass.cross_maps = None, None, None
        regions = segment(maps, rows=rows, cols=cols, tokens=inputs.tokens, ca_scale=inputs.ca_scale)

        if inputs.semantic_guidance:
            rate = guidance_rate(
                eps_u, eps_c, owners=regions.owners, foreground=regions.foreground, guidance=inputs.guidance
            )  # (h, w)
        else:
            rate = torch.ones(h, w).to(eps)  # (h, w)
        eps_guided = guide(eps_u, eps_c, rate, inputs.guidance)  # (1, 4, h, w)
        return StepOutputs(
            eps_u=eps_u,
            eps_c=eps_c,
            eps_guided=eps_guided,
            latents=ddim_step(inputs.latents, eps_guided, inputs.coefficients),
            token_label=regions.label,
            regions=regions.regions,
            foreground=regions.foreground,
            margin=regions.margin,
            fore_margin=regions.fore_margin,
            rate=rate,
        )


# ------------------------------------------------------------------------------------------------- 6. the loop


def stages_of(steps: int, alpha: float) -> tuple[Stage, ...]:
    """The stage of every step: RSA while the step is at most alpha*steps (and at step 0), RBA after."""
    return tuple("rba" if is_region_step(step, steps, alpha) else "rsa" for step in range(steps))


def noise_references(schedule: Schedule, z0: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """sqrt(abar) z0 + sqrt(1 - abar) noise at a timestep, [R, 4, h, w]."""
    noised = schedule.add_noise(z0.cpu().numpy(), noise.cpu().numpy(), timestep)
    return torch.from_numpy(np.ascontiguousarray(noised)).to(z0)


def generate_latents(
    reference: MagicFaceReference,
    *,
    x_T: Tensor,
    text: Tensor,
    z0: Tensor,
    noise: Tensor,
    reference_text: Tensor,
    reference_masks: Tensor,
    weights: Tensor,
    concept_of_reference: Sequence[int],
    tokens: Sequence[Sequence[int]],
    schedule: Schedule,
    ca_scale: float,
    alpha: float = 0.4,
    guidance: float = 7.5,
    weight_mode: WeightMode = "bias",
    semantic_guidance: bool = True,
    stages: Sequence[Stage] | None = None,
) -> Iterator[StepOutputs]:
    """Denoise one image from x_T [1, 4, h, w], yielding the outputs of every step; the last holds the final latents.

    z0 [R, 4, h, w] are clean reference latents, noised afresh at every step with noise[i] of [T, R, 4, h, w]; its first
    axis gives the number of steps. The other arguments are as in `StepInputs`. `stages` overrides `alpha`.
    """
    steps = noise.shape[0]
    stages = stages_of(steps, alpha) if stages is None else stages
    coefficients = schedule.step_coefficients(steps)  # (T, 2)
    latents, regions = x_T, None
    for i, timestep in enumerate(schedule.timesteps(steps).tolist()):
        outputs = reference.step(
            StepInputs(
                latents=latents,
                timestep=timestep,
                text=text,
                references=noise_references(schedule, z0, noise[i], timestep),
                reference_text=reference_text,
                reference_masks=reference_masks,
                weights=weights,
                concept_of_reference=tuple(concept_of_reference),
                tokens=tuple(tuple(group) for group in tokens),
                stage=stages[i],
                regions=regions,
                ca_scale=ca_scale,
                guidance=guidance,
                coefficients=coefficients[i].tolist(),
                weight_mode=weight_mode,
                semantic_guidance=semantic_guidance,
            )
        )
        yield outputs
        latents, regions = outputs.latents, outputs.regions
