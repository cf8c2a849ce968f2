"""The U-Net's attention processors in their exported form.

Two families, one for each U-Net graph: `capture_reference_keys` collects the keys and values that a reference leaves in
the injection layers; `inject_references` lets the picture see them and collects the maps for the segmentation.
Both replace diffusers' processors; the weights stay the U-Net's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from .operators import region_attention, token_attention
from .segmentation import attention_evidence

SELF_ATTENTIONS = 16
"""Self-attentions of Stable Diffusion 1.5 and 2.1: down 0..5, mid 6, up 7..15, in execution order."""

DEFAULT_INJECTION_LAYERS = tuple(range(10, 16))


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of the U-Net. `factor`: the layer works on a grid of latents side / factor."""

    name: str
    index: int
    is_cross: bool
    factor: int
    num_heads: int
    width: int


def attention_layers(unet: UNet2DConditionModel) -> list[AttentionLayer]:
    """All attentions in execution order, the self-attentions numbered 0..15."""
    depth = len(unet.config.down_block_types)
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    names = sorted(unet.attn_processors, key=lambda name: stage[name.split(".")[0]])  # stable: keeps the order inside
    layers = []
    index = -1
    for name in names:
        block = name.split(".")
        attention = unet.get_submodule(name.removesuffix(".processor"))
        is_cross = "attn2" in block
        index += not is_cross
        if block[0] == "mid_block":
            level = depth - 1
        else:
            level = int(block[1]) if block[0] == "down_blocks" else depth - 1 - int(block[1])
        layers.append(AttentionLayer(name, index, is_cross, 2**level, attention.heads, attention.to_k.out_features))
    return layers


@dataclass
class StepReferences:
    """What one `denoise_step` reads and collects on its way through the layers; used for one forward pass."""

    keys: dict[int, tuple[torch.Tensor, torch.Tensor]]
    """By injection layer: k and v, each [K, M, C]."""
    query_group: dict[int, torch.Tensor]
    """By factor: int64 [B, n]."""
    key_group: dict[int, torch.Tensor]
    """By factor: int64 [K, M]."""
    key_bias: dict[int, torch.Tensor]
    """By factor: float32 [K, M]."""
    key_scale: dict[int, torch.Tensor]
    """By factor: float32 [K, M]."""
    evidence: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    """By factor: one result of `attention_evidence` per layer."""


class _Processor:
    """The base of both families. It looks up the state of the current pass when it is called."""

    def __init__(self, layer: AttentionLayer, state: _State) -> None:
        self.layer = layer
        self.state = state


class _State:
    """The slot through which a graph's forward hands its tensors to the processors."""

    references: StepReferences | None = None
    captured: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None


class _CaptureProcessor(_Processor):
    def __init__(self, layer: AttentionLayer, state: _State, *, capture: bool) -> None:
        super().__init__(layer, state)
        self.capture = capture

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        k, v = attn.to_k(context), attn.to_v(context)  # [R, n, C]
        if self.capture:
            assert self.state.captured is not None
            self.state.captured[self.layer.index] = (k, v)
        out = token_attention(attn.to_q(hidden_states), k, v, attn.heads, attn.scale)
        return attn.to_out[0](out)


class _InjectProcessor(_Processor):
    """Rows are [2 B, n, C]: B unconditional, then B conditional."""

    def __init__(self, layer: AttentionLayer, state: _State, *, inject: bool) -> None:
        super().__init__(layer, state)
        self.inject = inject
        self.mapped = layer.factor >= 2
        self.self_map: torch.Tensor | None = None
        self.self_attention: _InjectProcessor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        heads, scale = attn.heads, attn.scale
        probabilities = self._probabilities(q, k, heads, scale).to(v.dtype) if self.mapped else None  # [2B, H, n, m]
        if probabilities is not None:
            self._collect(probabilities)
        if self.inject:
            out = torch.cat([self._unconditional(q, k, v, probabilities, heads, scale), self._injected(q, k, v, attn)])
        elif probabilities is not None:
            out = _weighted_values(probabilities, v, heads)
        else:
            out = token_attention(q, k, v, heads, scale)
        return attn.to_out[0](out)

    def _probabilities(self, q: torch.Tensor, k: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
        # These logits are stored, so q is scaled before the product: SD2.1's unscaled logits overflow float16.
        q = (q * scale).unflatten(-1, (heads, -1)).transpose(1, 2)
        k = k.unflatten(-1, (heads, -1)).transpose(1, 2)
        return torch.softmax(torch.matmul(q, k.transpose(-1, -2)).float(), -1)  # [2B, H, n, m] float32

    def _collect(self, probabilities: torch.Tensor) -> None:
        # The mean is taken of what the values are weighted with, in the bundle's dtype, and not of the float32 softmax:
        # TensorRT puts the mean off to the end of the step, and would keep every layer's float32 maps until then.
        mean = probabilities.float().mean(1)  # [2B, n, m] float32
        if not self.layer.is_cross:
            self.self_map = mean
            return
        assert self.self_attention is not None
        assert self.self_attention.self_map is not None
        assert self.state.references is not None
        evidence = self.state.references.evidence.setdefault(self.layer.factor, [])
        evidence.append(attention_evidence(self.self_attention.self_map, mean))
        self.self_attention.self_map = None

    def _unconditional(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        probabilities: torch.Tensor | None,
        heads: int,
        scale: float,
    ) -> torch.Tensor:
        q, k, v = (_row(t, 0) for t in (q, k, v))
        if probabilities is None:
            return token_attention(q, k, v, heads, scale)
        return _weighted_values(_row(probabilities, 0), v, heads)

    def _injected(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn: Attention) -> torch.Tensor:
        references = self.state.references
        assert references is not None
        factor = self.layer.factor
        k_ref, v_ref = references.keys[self.layer.index]  # [K, M, C]
        # weight_mode "scale" multiplies the logits of a reference's keys, which is the same as scaling its keys
        k_ref = k_ref * references.key_scale[factor][:, :, None].to(k_ref.dtype)
        return region_attention(
            _row(q, 1),
            _row(k, 1),
            _row(v, 1),
            k_ref,
            v_ref,
            references.query_group[factor],
            references.key_group[factor],
            references.key_bias[factor],
            attn.heads,
            attn.scale,
        )


def _row(tensor: torch.Tensor, row: int) -> torch.Tensor:
    """The unconditional (0) or the conditional (1) half of [2 B, ...]."""
    return tensor.unflatten(0, (2, -1))[row]


def _weighted_values(probabilities: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    values = v.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, H, m, d]
    return torch.matmul(probabilities, values).transpose(1, 2).flatten(2)  # [B, n, C]


def capture_reference_keys(unet: UNet2DConditionModel, injection_layers: Sequence[int]) -> _State:
    """Install the processors of `reference_kv`. The returned state's `captured` is filled by a forward pass."""
    state = _State()
    unet.set_attn_processor(
        {
            layer.name: _CaptureProcessor(layer, state, capture=not layer.is_cross and layer.index in injection_layers)
            for layer in attention_layers(unet)
        }
    )
    return state


def inject_references(unet: UNet2DConditionModel, injection_layers: Sequence[int]) -> _State:
    """Install the processors of `denoise_step`. The returned state's `references` must be set before each pass."""
    state = _State()
    processors: dict[str, _InjectProcessor] = {}
    previous: _InjectProcessor | None = None
    for layer in attention_layers(unet):
        inject = not layer.is_cross and layer.index in injection_layers
        processor = _InjectProcessor(layer, state, inject=inject)
        if layer.is_cross:  # every transformer block is a self-attention followed by its cross-attention
            processor.self_attention = previous
        processors[layer.name] = previous = processor
    unet.set_attn_processor(processors)
    return state
