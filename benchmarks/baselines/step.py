"""The parts of a step that both PyTorch baselines share, and that cost next to nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from magicface_rt.export.reference import (
    DEFAULT_INJECTION_LAYERS,
    LAYER_DIVISORS,
    LayerMaps,
    Segmentation,
    StepInputs,
    StepOutputs,
    ddim_step,
    guidance_rate,
    guide,
)


class Pass:
    """What the attention processors share during one pass of the U-Net."""

    inputs: StepInputs | None = None
    size: tuple[int, int] = (0, 0)  # of the latents; plain numbers, since a compiler would guard the tensor itself

    def __init__(self) -> None:
        self.self_maps: dict[int, Tensor] = {}
        self.cross_maps: dict[int, Tensor] = {}
        self.tokens: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def step(self) -> StepInputs:
        assert self.inputs is not None
        return self.inputs

    def grid(self, layer: int) -> tuple[int, int]:
        """Rows and columns of a self-attention's tokens."""
        h, w = self.size
        return h // LAYER_DIVISORS[layer], w // LAYER_DIVISORS[layer]

    def layers(self) -> list[LayerMaps]:
        """The maps that the processors stored, in execution order."""
        return [LayerMaps(self.self_maps[i], self.cross_maps[i], *self.grid(i)) for i in sorted(self.self_maps)]


class Baseline(ABC):
    """A U-Net with the baseline's attention. `step` is one denoising step of one image; not thread-safe.

    `rows_run`: U-Net rows that were computed so far.
    """

    def __init__(
        self, unet: UNet2DConditionModel, *, injection_layers: Sequence[int] = DEFAULT_INJECTION_LAYERS
    ) -> None:
        self.unet = unet.eval()
        self.injection_layers = tuple(sorted(set(injection_layers)))
        self.state = Pass()
        self.rows_run = 0
        self.install()

    @abstractmethod
    def install(self) -> None:
        """Install the attention processors in the U-Net."""

    @abstractmethod
    def batch(self, inputs: StepInputs) -> tuple[Tensor, Tensor, int]:
        """Latents and text of all rows, and the row of the conditional target; the unconditional one is row 0."""

    def prepare(self, inputs: StepInputs) -> None:  # noqa: B027 - not every baseline has something to prepare
        """Compute what is the same for all layers of a step."""

    @abstractmethod
    def segment(self, inputs: StepInputs) -> Segmentation:
        """Compute the regions from the maps that the pass stored."""

    def predict(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        """The U-Net's noise predictions for all rows."""
        return self.unet(latents, timestep, encoder_hidden_states=text).sample

    @torch.no_grad()
    def step(self, inputs: StepInputs) -> StepOutputs:
        """Compute one denoising step of one image."""
        latents, text, conditional = self.batch(inputs)
        self.state.inputs, self.state.size = inputs, (inputs.latents.shape[-2], inputs.latents.shape[-1])
        self.state.self_maps.clear()
        self.state.cross_maps.clear()
        self.prepare(inputs)
        eps = self.predict(latents, inputs.timestep, text)
        self.rows_run += len(latents)
        eps_u, eps_c = eps[0:1], eps[conditional : conditional + 1]
        found = self.segment(inputs)
        self.state.inputs = None
        rate = torch.ones(inputs.latents.shape[-2:]).to(eps)
        if inputs.semantic_guidance:
            rate = guidance_rate(
                eps_u, eps_c, owners=found.owners, foreground=found.foreground, guidance=inputs.guidance
            )
        guided = guide(eps_u, eps_c, rate, inputs.guidance)
        return StepOutputs(
            eps_u=eps_u,
            eps_c=eps_c,
            eps_guided=guided,
            latents=ddim_step(inputs.latents, guided, inputs.coefficients),
            token_label=found.label,
            regions=found.regions,
            foreground=found.foreground,
            margin=found.margin,
            fore_margin=found.fore_margin,
            rate=rate,
        )
