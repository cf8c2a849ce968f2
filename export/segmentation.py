"""In-graph segmentation of the picture by its own attention maps (docs/design.md, step 4).

Per layer the cross-attention C [n, 77] is spread by the self-attention S [n, n]: A = (S C + 3 S (S C)) / 4; S S is
never formed. Each A is enlarged bilinearly to half the latents' side, smoothed and divided by its spatial mean, and
the layers are averaged. Enlarging and smoothing are linear along each axis, so both are one small matrix on each side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn


def attention_evidence(self_map: torch.Tensor, cross_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's evidence from head-averaged maps S [2B, n, n] and C [2B, n, 77], float32.

    Returns the conditional rows' A [B, n, 77], and the unconditional rows' A [B, n, 2] for token 0 and the sum of the
    other tokens: the foreground is decided by the negative prompt's row.
    """
    s_u, s_c = self_map.unflatten(0, (2, -1))
    c_u, c_c = cross_map.unflatten(0, (2, -1))
    c_u = torch.stack([c_u[..., 0], c_u[..., 1:].sum(-1)], -1)  # [B, n, 2]
    return _spread(s_c, c_c), _spread(s_u, c_u)


def _spread(s: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    sc = torch.matmul(s, c)
    return (sc + 3 * torch.matmul(s, sc)) / 4


def smoothing_matrix(side: int) -> torch.Tensor:
    """[side, side] float32: the kernel (1/e, 1, 1/e), normalised, with reflect padding, along one axis.

    The recorded kernel is outer([1/e, 1, 1/e]) normalised to sum 1, which is separable.
    """
    if side < 2:
        return torch.ones(1, 1)  # reflect padding is undefined on one cell, and there is nothing to smooth
    kernel = torch.tensor([math.exp(-1), 1.0, math.exp(-1)], dtype=torch.float64)
    kernel = kernel / kernel.sum()
    matrix = torch.zeros(side, side, dtype=torch.float64)
    for i in range(side):
        for offset, weight in zip((-1, 0, 1), kernel, strict=True):
            j = abs(i + offset)
            j = 2 * (side - 1) - j if j >= side else j
            matrix[i, j] += weight
    return matrix.float()


def enlarging_matrix(side: int, factor: int) -> torch.Tensor:
    """[side * factor, side] float32: bilinear interpolation with half-pixel centres along one axis."""
    matrix = torch.zeros(side * factor, side, dtype=torch.float64)
    for i in range(side * factor):
        position = max((i + 0.5) / factor - 0.5, 0.0)
        low = min(int(position), side - 1)
        high = min(low + 1, side - 1)
        matrix[i, low] += 1 - (position - low)
        matrix[i, high] += position - low
    return matrix.float()


# onnxscript's optimiser takes an added constant of 1e-8 for zero and drops it (seen with 0.7.2), but the method's 1e-8
# matters where a token is quiet. So the maps and the constant are multiplied by a power of two, which is exact.
_MAP_SCALE = 2.0**13
_EPSILON = 1e-8 * _MAP_SCALE


class Segmentation(nn.Module):
    """Label map and foreground from the layers' evidence.

    `height`, `width`: the latents' sides. The grids are those of factor 2, 4 and 8; labels are at factor 2.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height // 2, width // 2
        self.factors = (2, 4, 8)
        for factor in self.factors:
            for axis, side in (("rows", height), ("columns", width)):
                matrix = smoothing_matrix(side // 2) @ enlarging_matrix(side // factor, factor // 2)
                matrix = matrix * _MAP_SCALE if axis == "rows" else matrix
                self.register_buffer(f"{axis}_{factor}", matrix, persistent=False)

    def forward(
        self,
        evidence: Mapping[int, Sequence[tuple[torch.Tensor, torch.Tensor]]],
        token_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """evidence per factor, `token_scale` [B, 77] -> (token label int64, token margin, foreground margin float32).

        All three [B, h/2, w/2]. The label is the arg max over the 77 tokens of the scaled score, the first on an
        exact tie; its margin is the best scaled score minus the second best. The foreground margin is, in the
        unconditional row, the score of all other tokens minus that of the start token: foreground where it is positive.
        """
        layers = sum(len(evidence[factor]) for factor in self.factors)
        score = ground = 0.0
        for factor in self.factors:
            tokens = torch.stack([a for a, _ in evidence[factor]], 1)  # [B, layers, n, 77]
            grounds = torch.stack([a for _, a in evidence[factor]], 1)  # [B, layers, n, 2]
            tokens = self._enlarge(tokens, factor)  # [B, layers, 77, h/2, w/2]
            grounds = self._enlarge(grounds, factor)
            score = score + (tokens / (tokens.mean((-1, -2), keepdim=True) + _EPSILON)).sum(1)
            ground = ground + (grounds / grounds.mean((-1, -2), keepdim=True)).sum(1)
        score = score / layers * token_scale[:, :, None, None]  # [B, 77, h/2, w/2]
        best = torch.topk(score, 2, dim=1).values
        return score.argmax(1), best[:, 0] - best[:, 1], (ground[:, 1] - ground[:, 0]) / layers

    def _enlarge(self, maps: torch.Tensor, factor: int) -> torch.Tensor:
        side = 2 * self.height // factor
        images = maps.transpose(-1, -2).unflatten(-1, (side, -1))  # [B, layers, tokens, rows, columns]
        rows, columns = self.get_buffer(f"rows_{factor}"), self.get_buffer(f"columns_{factor}")
        return torch.matmul(torch.matmul(rows, images), columns.T)
