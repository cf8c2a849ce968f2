"""The miniature's networks, in three sizes: Stable Diffusion 1.5's block layout, narrow enough to train on two cores.

A `Miniature` holds the four parts of a diffusers folder; `write_checkpoint` writes that folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .vocabulary import MAX_LENGTH, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the model; `factor` is how many pixels a latent spans."""

    name: str
    pixels: int
    unet: tuple[int, int, int, int]
    vae: tuple[int, ...]
    text_width: int
    text_layers: int
    heads: int = 4
    groups: int = 8

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vae) - 1)

    @property
    def side(self) -> int:
        """The latents' side S."""
        return self.pixels // self.factor


SIZES = {
    size.name: size
    for size in (
        Size(name="test", pixels=64, unet=(8, 8, 8, 8), vae=(4, 4, 4), text_width=8, text_layers=1, heads=2, groups=4),
        Size(name="small", pixels=64, unet=(64, 96, 128, 128), vae=(32, 64, 64), text_width=96, text_layers=2),
        Size(name="full", pixels=128, unet=(64, 128, 160, 160), vae=(32, 64, 96), text_width=96, text_layers=3),
    )
}

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, sampled by DDIM."""
    return DDIMScheduler(**SCHEDULER)


@torch.no_grad()
def _quiet(network: nn.Module) -> None:
    """Make every residual branch return 0 at first: the autoencoder then learns colours some five times sooner."""
    for name, module in network.named_modules():
        if name.endswith((".conv2", ".proj_out")) or (
            name.endswith(".to_out.0") and ".transformer_blocks." not in name
        ):
            module.weight.zero_()
            module.bias.zero_()


def build_autoencoder(size: Size) -> AutoencoderKL:
    """A fresh autoencoder; `scaling_factor` is measured at the end of its training."""
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(size.vae),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae),
        block_out_channels=size.vae,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=size.groups,
        sample_size=size.pixels,
        scaling_factor=1.0,
    )
    _quiet(network)
    with torch.no_grad():
        network.quant_conv.bias[4:] = -5.0  # little noise on the latents at first
    return network.to(memory_format=torch.channels_last)


def build_unet(size: Size) -> UNet2DConditionModel:
    """A fresh U-Net; `attention_head_dim` is, for historical reasons, the number of heads."""
    network = UNet2DConditionModel(
        sample_size=size.side,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=size.unet,
        layers_per_block=2,
        norm_num_groups=size.groups,
        cross_attention_dim=size.text_width,
        attention_head_dim=size.heads,
    )
    _quiet(network)
    return network.to(memory_format=torch.channels_last)


def build_text_encoder(size: Size, vocabulary: Vocabulary) -> CLIPTextModel:
    """A fresh causal CLIP text encoder without dropout."""
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.heads,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=size.text_width,
        bos_token_id=vocabulary.start,
        eos_token_id=vocabulary.end,
        pad_token_id=vocabulary.end,
    )
    return CLIPTextModel(config)


@dataclass(frozen=True)
class Miniature:
    """A whole model."""

    size: Size
    vocabulary: Vocabulary
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @torch.no_grad()
    def sample(self, captions: list[str], *, seed: int, steps: int = 30, guidance: float = 3.0) -> Tensor:
        """Pictures float32 [n,3,H,W] in -1..1 by plain DDIM with guidance."""
        n, ddim = len(captions), scheduler()
        ddim.set_timesteps(steps)
        text = self.text_encoder(self.vocabulary.encode([""] * n + captions).to(self.device)).last_hidden_state
        noise = torch.randn(n, 4, self.size.side, self.size.side, generator=torch.Generator().manual_seed(seed))
        latents = noise.to(self.device)
        for t in ddim.timesteps:
            unconditional, conditional = self.unet(torch.cat([latents, latents]), t, text).sample.chunk(2)
            eps = unconditional + guidance * (conditional - unconditional)
            latents = ddim.step(eps, t, latents).prev_sample
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample.float().clamp(-1, 1)


def write_checkpoint(model: Miniature, folder: Path, *, provenance: dict[str, object]) -> int:
    """Write a diffusers folder with weights in fp16; return its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.vae.half().save_pretrained(folder / "vae", safe_serialization=True)
    model.unet.half().save_pretrained(folder / "unet", safe_serialization=True)
    model.text_encoder.half().save_pretrained(folder / "text_encoder", safe_serialization=True)
    scheduler().save_pretrained(folder / "scheduler")
    model.vocabulary.write(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    return sum(file.stat().st_size for file in files)
