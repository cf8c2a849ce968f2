"""One small module per graph of a bundle, with the names, dtypes and shapes of its inputs and outputs.

A graph's contract is written beside its forward: `inputs` and `outputs` list (name, dtype, shape), in the order of the
arguments, with symbols for sizes that may differ from call to call:

    B images, R reference rows, K = 1 (reference keys shared by the batch) or B, M1 M2 M4 M8 kept reference tokens on
    the grid of latents side / 1, / 2, / 4, / 8.

Everything that a request sets is an input per image, so requests at different steps can share a batch.
Weights and activations have the bundle's dtype; latents, guidance, segmentation and the DDIM step are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from magicface_rt.bundle import Bundle, Tensor, reference_tensor_names
from magicface_rt.bundle_form import TOKENS

from .attention import (
    AttentionLayer,
    StepReferences,
    attention_layers,
    capture_reference_keys,
    inject_references,
)
from .guidance import SemanticGuidance
from .operators import token_attention
from .segmentation import Segmentation
from .upsampling import without_size_checks


@dataclass(frozen=True)
class Form:
    """What is fixed for all graphs of a bundle. `height`, `width`: pixels; `dtype`: of weights and activations."""

    height: int
    width: int
    vae_factor: int
    dtype: torch.dtype
    text_width: int
    latent_channels: int = 4

    @classmethod
    def of(cls, bundle: Bundle, dtype: torch.dtype) -> Form:
        """The form of an exported bundle, computed in `dtype`."""
        return cls(
            height=bundle.height,
            width=bundle.width,
            vae_factor=bundle.vae_factor,
            dtype=dtype,
            text_width=bundle.text_width,
            latent_channels=bundle.latent_channels,
        )

    @property
    def rows(self) -> int:
        """Height of the latents."""
        return self.height // self.vae_factor

    @property
    def columns(self) -> int:
        """Width of the latents."""
        return self.width // self.vae_factor

    @property
    def dtype_name(self) -> str:
        return {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[self.dtype]


class Graph(nn.Module):
    """A module that knows its graph's name and contract."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def arguments(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Nest `values`, one for each of `inputs`, as `forward` takes them."""
        return tuple(values)


class TextEncoder(Graph):
    """Token ids to text embeddings: the last hidden state after the final norm, as SD1.5 and SD2.1 use it."""

    name = "text_encoder"

    def __init__(self, text_encoder: nn.Module, form: Form) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.inputs = (Tensor("token_ids", "int64", ("B", TOKENS)),)
        self.outputs = (Tensor("text", form.dtype_name, ("B", TOKENS, form.text_width)),)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(input_ids=token_ids, return_dict=True).last_hidden_state


class _VaeAttention:
    """The VAE's attention over [B, C, h, w], with TokenAttention as its core."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> torch.Tensor:
        residual = hidden_states
        rows = hidden_states.shape[2]
        x = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)  # [B, n, C]
        out = token_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.heads, attn.scale)
        out = attn.to_out[0](out).transpose(1, 2).unflatten(-1, (rows, -1))
        # The sum has the layout of its first operand. `out` is channels-last, and there PyTorch's GroupNorm is inexact
        # over the long groups that follow: in a batch of three, 1e-5 at 256 pixels and 1.5e-4 at 768.
        return (residual + out) / attn.rescale_output_factor


class VaeEncoder(Graph):
    """Pixels in -1..1 to latents: the mean of the posterior, times the scaling factor. No random draw."""

    name = "vae_encoder"

    def __init__(self, vae: AutoencoderKL, form: Form) -> None:
        super().__init__()
        vae.set_attn_processor(_VaeAttention())
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)
        self.dtype = form.dtype
        self.channels = form.latent_channels
        self.inputs = (Tensor("pixels", "float32", ("R", 3, form.height, form.width)),)
        self.outputs = (Tensor("latents", "float32", ("R", form.latent_channels, form.rows, form.columns)),)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        moments = self.encoder(pixels.to(self.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments[:, : self.channels].float() * self.scaling_factor


class VaeDecoder(Graph):
    """Latents to pixels in about -1..1 (not clipped)."""

    name = "vae_decoder"

    def __init__(self, vae: AutoencoderKL, form: Form) -> None:
        super().__init__()
        vae.set_attn_processor(_VaeAttention())
        without_size_checks(vae.decoder)
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)
        self.dtype = form.dtype
        self.inputs = (Tensor("latents", "float32", ("B", form.latent_channels, form.rows, form.columns)),)
        self.outputs = (Tensor("pixels", "float32", ("B", 3, form.height, form.width)),)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        x = (latents / self.scaling_factor).to(self.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self.decoder(x).float()


def injected(unet: UNet2DConditionModel, injection_layers: Sequence[int]) -> list[AttentionLayer]:
    """The chosen self-attentions, in execution order."""
    return [x for x in attention_layers(unet) if not x.is_cross and x.index in injection_layers]


def injected_factors(unet: UNet2DConditionModel, injection_layers: Sequence[int]) -> list[int]:
    """The factors of the chosen layers' grids, finest first: 1 for the latents' side, 2 for half of it, ..."""
    return sorted({layer.factor for layer in injected(unet, injection_layers)})


class ReferenceKV(Graph):
    """Noised reference latents to the keys and values of the kept tokens, for each injection layer.

    Every row has its own timestep, so rows of many steps can share one pass.
    """

    name = "reference_kv"

    def __init__(self, unet: UNet2DConditionModel, form: Form, injection_layers: Sequence[int]) -> None:
        super().__init__()
        without_size_checks(unet)
        self.unet = unet
        self.dtype = form.dtype
        self.layers = injected(unet, injection_layers)
        self.factors = injected_factors(unet, injection_layers)
        self.state = capture_reference_keys(unet, injection_layers)
        self.inputs = (
            Tensor("latents", "float32", ("R", form.latent_channels, form.rows, form.columns)),
            Tensor("timestep", "int64", ("R",)),
            Tensor("text", form.dtype_name, ("R", TOKENS, form.text_width)),
            *(Tensor(f"kept_{f}", "int64", (f"M{f}",)) for f in self.factors),
        )
        self.outputs = tuple(
            Tensor(name, form.dtype_name, (f"M{layer.factor}", layer.width))
            for layer in self.layers
            for name in reference_tensor_names(layer.index)
        )

    def arguments(self, values: Sequence[Any]) -> tuple[Any, ...]:
        return (*values[:3], list(values[3:]))

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, kept: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """`kept`: for each factor int64 [M], indices into the tokens of all rows laid end to end, row-major in each."""
        self.state.captured = captured = {}
        # What comes after the last injection layer's keys has no use here; the exporter drops it from the graph.
        self.unet(latents.to(self.dtype), timestep, text, return_dict=False)
        self.state.captured = None
        indices = dict(zip(self.factors, kept, strict=True))
        return tuple(
            tensor.flatten(0, 1).index_select(0, indices[layer.factor])  # [M, C]
            for layer in self.layers
            for tensor in captured[layer.index]
        )


class DenoiseStep(Graph):
    """One step: U-Net with reference attention, segmentation, semantic guidance and DDIM.

    The stage is data. RSA: every cell and every visible key has group 1. RBA: a cell has the group of the concept that
    owns it (0 for none), a key that of its concept. Injection off: every cell has group 0.
    """

    name = "denoise_step"

    def __init__(self, unet: UNet2DConditionModel, form: Form, injection_layers: Sequence[int]) -> None:
        super().__init__()
        without_size_checks(unet)
        self.unet = unet
        self.dtype = form.dtype
        self.layers = injected(unet, injection_layers)
        self.factors = injected_factors(unet, injection_layers)
        self.state = inject_references(unet, injection_layers)
        self.segmentation = Segmentation(form.rows, form.columns)
        self.guidance = SemanticGuidance(form.rows, form.columns)
        latents = ("B", form.latent_channels, form.rows, form.columns)
        cells = ("B", form.rows // 2, form.columns // 2)
        self.inputs = (
            Tensor("latents", "float32", latents),
            Tensor("timestep", "int64", ("B",)),
            Tensor("text", form.dtype_name, (2, "B", TOKENS, form.text_width)),
            Tensor("region_label", "int64", cells),
            *(
                Tensor(name, form.dtype_name, ("K", f"M{layer.factor}", layer.width))
                for layer in self.layers
                for name in reference_tensor_names(layer.index)
            ),
            *(
                Tensor(f"key_{what}_{f}", dtype, ("K", f"M{f}"))
                for f in self.factors
                for what, dtype in (("group", "int64"), ("bias", "float32"), ("scale", "float32"))
            ),
            Tensor("token_scale", "float32", ("B", TOKENS)),
            Tensor("token_group", "int64", ("B", TOKENS)),
            Tensor("foreground_only", "float32", ("B",)),
            Tensor("semantic_guidance", "float32", ("B",)),
            Tensor("guidance", "float32", ("B",)),
            Tensor("ddim", "float32", ("B", 2)),
        )
        self.outputs = (
            Tensor("latents_out", "float32", latents),
            Tensor("region_label_out", "int64", cells),
            Tensor("eps", "float32", (2, *latents)),
            Tensor("token_label", "int64", cells),
            Tensor("token_margin", "float32", cells),
            Tensor("foreground_margin", "float32", cells),
            Tensor("rate", "float32", ("B", form.rows, form.columns)),
        )

    def arguments(self, values: Sequence[Any]) -> tuple[Any, ...]:
        keys = 4 + 2 * len(self.layers)
        data = keys + 3 * len(self.factors)
        return (*values[:4], list(values[4:keys]), list(values[keys:data]), *values[data:])

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        region_label: torch.Tensor,
        reference_kv: list[torch.Tensor],
        key_data: list[torch.Tensor],
        token_scale: torch.Tensor,
        token_group: torch.Tensor,
        foreground_only: torch.Tensor,
        semantic_guidance: torch.Tensor,
        guidance: torch.Tensor,
        ddim: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        references = self._references(region_label, reference_kv, key_data)
        self.state.references = references
        rows = torch.cat([latents, latents]).to(self.dtype)  # [2B, 4, h, w]: unconditional, then conditional
        eps = self.unet(rows, torch.cat([timestep, timestep]), text.flatten(0, 1), return_dict=False)[0].float()
        self.state.references = None  # a traced tensor left on the module would break the exporter
        eps = eps.unflatten(0, (2, -1))  # [2, B, 4, h, w]

        token_label, token_margin, foreground_margin = self.segmentation(references.evidence, token_scale)
        foreground = foreground_margin > 0
        labelled = foreground | (foreground_only[:, None, None] == 0)
        group = torch.gather(token_group, 1, token_label.flatten(1)).unflatten(1, token_label.shape[1:])
        region = torch.where(labelled, group, 0)

        guided, rate = self.guidance(
            eps[0], eps[1], token_label, labelled, foreground, guidance, semantic_guidance, TOKENS
        )
        step = ddim[:, :, None, None, None]
        latents_out = step[:, 0] * latents + step[:, 1] * guided
        return latents_out, region, eps, token_label, token_margin, foreground_margin, rate

    def _references(
        self, region_label: torch.Tensor, reference_kv: list[torch.Tensor], key_data: list[torch.Tensor]
    ) -> StepReferences:
        per_factor = dict(zip(self.factors, zip(*[iter(key_data)] * 3, strict=True), strict=True))
        return StepReferences(
            keys={x.index: (reference_kv[2 * i], reference_kv[2 * i + 1]) for i, x in enumerate(self.layers)},
            query_group={f: _regrid(region_label, f).flatten(1) for f in self.factors},
            key_group={f: group for f, (group, _, _) in per_factor.items()},
            key_bias={f: bias for f, (_, bias, _) in per_factor.items()},
            key_scale={f: scale for f, (_, _, scale) in per_factor.items()},
        )


def _regrid(label: torch.Tensor, factor: int) -> torch.Tensor:
    """Labels [B, h/2, w/2] on the grid of latents side / factor, nearest."""
    if factor == 1:
        return label.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return label[:, :: factor // 2, :: factor // 2]
