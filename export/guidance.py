"""In-graph semantic guidance: how strongly each place of the picture is guided (docs/design.md, step 5)."""

from __future__ import annotations

import torch
from torch import nn

from .segmentation import smoothing_matrix

LOWEST_RATE = 0.8
HIGHEST_RATE = 3.0
HIGHEST_GUIDANCE = 15.0
"""The rate is limited to HIGHEST_GUIDANCE / guidance scale, so rate times scale never exceeds it."""


class SemanticGuidance(nn.Module):
    """eps = eps_u + guidance * rate * (eps_c - eps_u), the rate balancing the regions against the foreground.

    `height`, `width`: the latents' sides.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", smoothing_matrix(height), persistent=False)
        self.register_buffer("columns", smoothing_matrix(width), persistent=False)

    def rate(
        self,
        difference: torch.Tensor,
        token_label: torch.Tensor,
        labelled: torch.Tensor,
        foreground: torch.Tensor,
        guidance: torch.Tensor,
        tokens: int,
    ) -> torch.Tensor:
        """difference [B,4,h,w], token_label int64 [B,h/2,w/2], labelled and foreground bool [B,h/2,w/2],
        guidance [B] -> rate [B,h,w], float32.

        Per cell: mean norm of the difference over the foreground, divided by its mean over the cell's own label
        region; 0 where a cell has no label. Clamped to 0.8..3, then to 15 / guidance, then smoothed.
        """
        norm = torch.linalg.vector_norm(difference, dim=1)  # [B, h, w]
        cells = norm.unflatten(-1, (-1, 2)).sum(-1).unflatten(-2, (-1, 2)).sum(-2)  # [B, h/2, w/2], sums of 2 x 2
        fore = foreground.float()
        # The method adds 1e-8 to each divisor so that an empty region gives 0; a lower bound does the same, and the
        # exporter's optimiser does not take it for adding zero.
        fore_mean = (cells * fore).sum((-1, -2)) / (4 * fore.sum((-1, -2))).clamp(min=1e-8)  # [B]
        token = torch.arange(tokens, device=token_label.device)[:, None]
        member = (token_label.flatten(1)[:, None] == token) & labelled.flatten(1)[:, None]  # [B, 77, cells]
        member = member.float()
        total = torch.matmul(member, cells.flatten(1)[..., None])[..., 0]  # [B, 77]
        region_mean = total / (4 * member.sum(-1)).clamp(min=1e-8)
        ratio = fore_mean[:, None] / region_mean.clamp(min=1e-8)  # [B, 77]
        rate = torch.matmul(ratio[:, None], member)[:, 0].unflatten(-1, token_label.shape[-2:])  # [B, h/2, w/2]
        rate = rate.clamp(LOWEST_RATE, HIGHEST_RATE)
        rate = torch.minimum(rate, (HIGHEST_GUIDANCE / guidance)[:, None, None])
        rate = rate.repeat_interleave(2, -1).repeat_interleave(2, -2)  # [B, h, w]
        return torch.matmul(torch.matmul(self.get_buffer("rows"), rate), self.get_buffer("columns").T)

    def forward(
        self,
        eps_u: torch.Tensor,
        eps_c: torch.Tensor,
        token_label: torch.Tensor,
        labelled: torch.Tensor,
        foreground: torch.Tensor,
        guidance: torch.Tensor,
        switch: torch.Tensor,
        tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return eps [B,4,h,w] and rate [B,h,w], both float32. Where `switch` [B] is 0, the rate is 1."""
        difference = eps_c - eps_u
        rate = self.rate(difference, token_label, labelled, foreground, guidance, tokens)
        rate = torch.where(switch[:, None, None] > 0, rate, torch.ones_like(rate))
        return eps_u + guidance[:, None, None, None] * rate[:, None] * difference, rate
