"""Upsampling as a graph needs it: without the size checks that diffusers makes for PyTorch's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn


class Upsampling(nn.Module):
    """Twice the height and width by the nearest pixel, then the convolution of an `Upsample2D`.

    `Upsample2D` copies its input if that has more elements than an old kernel of PyTorch could index. A graph has no
    such kernel, but tracing evaluates the check, and no result holds for every batch: at 768 pixels the decoder's
    changes at 256 / 9 images, which PyTorch cannot even express as a bound.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: torch.Tensor, output_size: None = None) -> torch.Tensor:
        """[B, C, h, w] to [B, C, 2h, 2w]. No graph has sides that need an `output_size`."""
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


def without_size_checks(network: nn.Module) -> None:
    """Replace every `Upsample2D` that does just this by an `Upsampling`; the names of weights stay the same."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is Upsample2D and _only_nearest_and_conv(child):
                setattr(parent, name, Upsampling(child.conv))


def _only_nearest_and_conv(upsample: Upsample2D) -> bool:
    return upsample.use_conv and upsample.interpolate and upsample.norm is None and upsample.name == "conv"
