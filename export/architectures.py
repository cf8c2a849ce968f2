"""The configurations, in diffusers' form, of the architectures that this package can write and convert.

`tiny` has Stable Diffusion's exact block layout at a width that runs anywhere; `sd15` and `sd21-base` are the
published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from magicface_rt.errors import OptionError

__all__ = [
    "ARCHITECTURES",
    "DOWN_BLOCKS",
    "UP_BLOCKS",
    "Architecture",
    "architecture",
]

Config = Mapping[str, Any]

DOWN_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP_BLOCKS = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
LAYERS_PER_BLOCK = 2


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything in a checkpoint that is not a weight: one config per component, as their JSON files hold them.

    `pad_token`: the token with which the tokenizer pads a prompt to 77 tokens.
    """

    name: str
    summary: str
    unet: Config
    vae: Config
    text_encoder: Config
    scheduler: Config
    pad_token: str
    max_length: int = 77


def architecture(name: str) -> Architecture:
    """Return the architecture of that name; OptionError lists the names that exist."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise OptionError(f"architecture: got {name!r}, expected one of {known}") from None


def _unet(
    *, channels: tuple[int, ...], heads: int | list[int], text_width: int, groups: int, side: int, linear: bool
) -> Config:
    """Return a U-Net's config, in which `attention_head_dim` is, for historical reasons, the number of heads."""
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": list(channels),
        "center_input_sample": False,
        "cross_attention_dim": text_width,
        "down_block_types": list(DOWN_BLOCKS),
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": LAYERS_PER_BLOCK,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": groups,
        "out_channels": 4,
        "sample_size": side,
        "up_block_types": list(UP_BLOCKS),
        "use_linear_projection": linear,
    }


def _vae(*, channels: tuple[int, ...], groups: int, size: int, layers: int) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "out_channels": 3,
        "sample_size": size,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def _text_encoder(*, width: int, layers: int, heads: int, activation: str, projection: int) -> Config:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": 49408,
    }


_SCHEDULER: Config = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "tiny": Architecture(
        name="tiny",
        summary="Stable Diffusion's block layout at a twentieth of its width, 256 x 256 pixels",
        unet=_unet(channels=(16, 32, 48, 48), heads=4, text_width=32, groups=8, side=32, linear=False),
        vae=_vae(channels=(16, 16, 32, 32), groups=8, size=256, layers=1),
        text_encoder=_text_encoder(width=32, layers=2, heads=4, activation="quick_gelu", projection=32),
        scheduler=_SCHEDULER,
        pad_token="<|endoftext|>",
    ),
    "sd15": Architecture(
        name="sd15",
        summary="Stable Diffusion 1.5, 512 x 512 pixels",
        unet=_unet(channels=(320, 640, 1280, 1280), heads=8, text_width=768, groups=32, side=64, linear=False),
        vae=_vae(channels=(128, 256, 512, 512), groups=32, size=512, layers=2),
        text_encoder=_text_encoder(width=768, layers=12, heads=12, activation="quick_gelu", projection=768),
        scheduler=_SCHEDULER,
        pad_token="<|endoftext|>",
    ),
    "sd21-base": Architecture(
        name="sd21-base",
        summary="Stable Diffusion 2.1 base, 512 x 512 pixels",
        unet=_unet(
            channels=(320, 640, 1280, 1280), heads=[5, 10, 20, 20], text_width=1024, groups=32, side=64, linear=True
        ),
        vae=_vae(channels=(128, 256, 512, 512), groups=32, size=768, layers=2),
        text_encoder=_text_encoder(width=1024, layers=23, heads=16, activation="gelu", projection=512),
        scheduler=_SCHEDULER,
        pad_token="!",
    ),
}
