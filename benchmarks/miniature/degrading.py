"""Make drawn pictures look like generated ones: pass them through an autoencoder, blur, recolour, add noise."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from magicface_rt.errors import InputError
from magicface_rt.process.host_memory import as_host_memory_error
from magicface_rt.process.interrupts import reraise_if_interrupt


class Autoencoder:
    """A checkpoint's autoencoder in float32."""

    def __init__(self, network: AutoencoderKL) -> None:
        self._network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, checkpoint: Path) -> Autoencoder:
        """Load the autoencoder of a diffusers folder. Raises InputError if there is none."""
        try:
            with as_host_memory_error():
                return cls(
                    AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32, local_files_only=True)
                )
        except (OSError, ValueError) as error:
            reraise_if_interrupt(error)
            raise InputError(
                f"checkpoint {checkpoint}: its autoencoder cannot be read ({error}); expected a diffusers folder."
            ) from error

    @torch.no_grad()
    def pass_through(self, images: Tensor, generator: torch.Generator, *, noise: float = 0.35) -> Tensor:
        """Encode and decode images, float32 [n,3,h,w] in -1..1.

        Latents get normal noise of 0 to `noise` times their unit deviation, with another factor for each picture.
        """
        made = []
        for some in images.split(32):
            latents = self._network.encode(some.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            share = noise * torch.rand(len(some), 1, 1, 1, generator=generator) / self._network.config.scaling_factor
            latents = latents + share * torch.randn(latents.shape, generator=generator)
            made.append(self._network.decode(latents).sample.clamp(-1, 1))
        return torch.cat(made)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, recolour and add noise to images, float32 [n,3,h,w] in -1..1, each of these with a chance of its own."""
    n = len(images)

    def chance(probability: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < probability).float()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *(shape or (1, 1, 1)), generator=generator)

    soft = _blurred(images)
    images = torch.lerp(images, torch.where(chance(0.4) > 0, _blurred(soft), soft), chance(0.4) * uniform(0.3, 1.0))
    mixing = torch.eye(3).expand(n, 3, 3) + uniform(-0.15, 0.15, 3, 3)
    recoloured = torch.einsum("nij,njhw->nihw", mixing, images) * uniform(0.75, 1.15) + uniform(-0.15, 0.15)
    images = torch.lerp(images, recoloured, chance(0.5))
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.12)
    return (images + noise * chance(0.4)).clamp(-1, 1)


def _blurred(images: Tensor) -> Tensor:
    """Smooth with the binomial 3 x 3 kernel."""
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line)[None, None].expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
