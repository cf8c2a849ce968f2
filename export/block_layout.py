"""What a network must look like to be exported: the block layout of Stable Diffusion 1.5 and 2.1-base, at any width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magicface_rt.errors import CheckpointError
from magicface_rt.values.shown import shown

from .architectures import ARCHITECTURES, DOWN_BLOCKS, UP_BLOCKS

__all__ = ["DISTILLED", "architecture_name", "check_configs", "check_unet"]

DISTILLED = (
    "was distilled to take the guidance scale as an input, as latent consistency models are, and nothing here gives it "
    "one; give the checkpoint that it was distilled from"
)
"""What is wrong with such a U-Net; follows its name."""

_WIDTH = 2**16
# component, key, largest value, whether it may be a list of such values
_NUMBERS = (
    ("unet", "block_out_channels", _WIDTH, True),
    ("unet", "attention_head_dim", _WIDTH, True),
    ("unet", "num_attention_heads", _WIDTH, True),
    ("unet", "cross_attention_dim", _WIDTH, False),
    ("unet", "sample_size", 4096, False),
    ("vae", "block_out_channels", _WIDTH, True),
    ("vae", "layers_per_block", 16, False),
    ("text_encoder", "num_hidden_layers", 128, False),
    ("text_encoder", "hidden_size", _WIDTH, False),
    ("text_encoder", "vocab_size", 2**24, False),
    ("text_encoder", "max_position_embeddings", _WIDTH, False),
)


def check_configs(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse configs that are not of Stable Diffusion 1.5's or 2.1-base's layout, saying what they are.

    Raises CheckpointError.
    """
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    where = f"checkpoint {path}: "
    check_unet(where, unet)
    _check_numbers(where, {"vae": vae, "text_encoder": text})
    scaling = vae.get("scaling_factor", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < 1e6:
        raise CheckpointError(f"{where}scaling_factor of vae is {shown(scaling)}; expected a number above 0")
    if vae.get("_class_name") != "AutoencoderKL" or not 2 <= len(vae.get("block_out_channels", ())) <= 6:
        raise CheckpointError(
            f"{where}the VAE is {shown(vae.get('_class_name'))} of {len(vae.get('block_out_channels', ()))} blocks; "
            "expected AutoencoderKL of 2 to 6 (4 for Stable Diffusion: pixels are 8 times the latents' side)"
        )
    if text.get("vocab_size") is None:
        raise CheckpointError(f"{where}the text encoder's config lacks vocab_size")
    if text.get("num_hidden_layers") is None or text.get("hidden_size") != unet["cross_attention_dim"]:
        raise CheckpointError(
            f"{where}the text encoder's width is {shown(text.get('hidden_size'))}; "
            f"the U-Net expects {unet['cross_attention_dim']}"
        )


def check_unet(where: str, unet: Mapping[str, Any]) -> None:
    """Refuse a U-Net of another layout. where: how messages begin, such as `checkpoint man: `."""
    if unet.get("addition_embed_type") == "text_time":
        raise CheckpointError(f"{where}the U-Net is Stable Diffusion XL's; expected SD1.5's or SD2.1-base's layout")
    channels_in = unet.get("in_channels", 4)
    if channels_in != 4:
        kinds = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model", 7: "an upscaler"}
        kind = kinds.get(channels_in) if isinstance(channels_in, int) else None
        raise CheckpointError(
            f"{where}the U-Net takes {shown(channels_in)} channels ({kind or 'of another model'}); "
            "expected 4 latent channels"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise CheckpointError(
            f"{where}the U-Net's time_cond_proj_dim is {shown(unet['time_cond_proj_dim'])}: it {DISTILLED}"
        )
    expected = {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": list(DOWN_BLOCKS),
        "up_block_types": list(UP_BLOCKS),
        "layers_per_block": 2,
        "out_channels": 4,
    }
    defaults = {
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "transformer_layers_per_block": (1, [1, 1, 1, 1]),
        "reverse_transformer_layers_per_block": (None,),
        "only_cross_attention": (False,),
        "dual_cross_attention": (False,),
        "addition_embed_type": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "class_embeddings_concat": (False,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "attention_type": ("default",),
    }
    for key, value in expected.items():
        if unet.get(key) != value:
            raise CheckpointError(
                f"{where}the U-Net's {key} is {shown(unet.get(key))}; "
                f"expected Stable Diffusion's block layout: {value!r}"
            )
    for key, accepted in defaults.items():
        if unet.get(key, accepted[0]) not in accepted:
            raise CheckpointError(
                f"{where}the U-Net's {key} is {shown(unet[key])}; expected Stable Diffusion's layout: {accepted[0]!r}"
            )
    for key in ("block_out_channels", "attention_head_dim", "cross_attention_dim", "sample_size"):
        if unet.get(key) is None:
            raise CheckpointError(f"{where}the U-Net's config lacks {key}")
    _check_numbers(where, {"unet": unet})
    for key in ("block_out_channels", "attention_head_dim", "num_attention_heads"):
        value = unet.get(key)
        if isinstance(value, list | tuple) and len(value) != len(DOWN_BLOCKS):
            raise CheckpointError(
                f"{where}{key} of the U-Net has {len(value)} numbers; expected {len(DOWN_BLOCKS)}, one for each block"
            )


def _check_numbers(where: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse values that are not whole numbers, or so large that no network would be built in an hour."""
    for component, key, most, several in _NUMBERS:
        value = configs.get(component, {}).get(key)
        if value is None:
            continue
        for number in value if several and isinstance(value, list | tuple) and value else [value]:
            if type(number) is not int or not 1 <= number <= most:
                raise CheckpointError(
                    f"{where}{key} of {component} is {shown(value)}; expected "
                    f"{'whole numbers' if several else 'a whole number'} from 1 to {most}"
                )
    for component in ("unet", "vae"):
        if not isinstance(configs.get(component, {}).get("block_out_channels", []), list | tuple):
            raise CheckpointError(f"{where}block_out_channels of {component} is no list")


def architecture_name(unet: Mapping[str, Any]) -> str:
    """Return the name of the known architecture that has this U-Net's widths, else "custom"."""
    keys = ("block_out_channels", "attention_head_dim", "cross_attention_dim")
    for name, known in ARCHITECTURES.items():
        if all(unet.get(key) == known.unet[key] for key in keys):
            return name
    return "custom"
