"""Baseline (d): plain Stable Diffusion by diffusers in eager PyTorch, no concepts: the floor that a user knows."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from magicface_rt.schedule import Schedule


class Plain:
    """Steps of classifier-free guidance with diffusers' own attention and scheduler. `rows_run`: U-Net rows so far."""

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, steps: int) -> None:
        self.unet = unet.eval()
        self.scheduler = DDIMScheduler.from_config(schedule.to_config())
        self.scheduler.set_timesteps(steps)
        self.rows_run = 0

    @torch.no_grad()
    def step(self, index: int, latents: Tensor, text: Tensor, guidance: float) -> Tensor:
        """Return the latents [B, 4, h, w] after step `index`. text [2, 77, D]: negative prompt, prompt."""
        timestep = self.scheduler.timesteps[index]
        both = text.repeat_interleave(len(latents), 0)
        eps_u, eps_c = self.unet(torch.cat([latents, latents]), timestep, both).sample.chunk(2)
        self.rows_run += 2 * len(latents)
        return self.scheduler.step(eps_u + guidance * (eps_c - eps_u), timestep, latents).prev_sample
