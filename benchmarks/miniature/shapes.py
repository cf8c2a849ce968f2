"""Signed distances and anti-aliased patterns, vectorised over pictures.

The canvas is -1..1 in x (right) and y (down). Parameters have the shape [n,1,1], grids [size,size], distances
[n,size,size]. A distance is negative inside, and in canvas units near the outline, so one formula gives the coverage of
a pixel at every size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FAR = 9.0  # the distance of a shape that is not in the picture


def canvas(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, each [size,size]."""
    line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def ellipse(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Distance to an ellipse: exact for circles, first order near the outline otherwise."""
    u, v = (x - cx) / rx, (y - cy) / ry
    k = (u * u + v * v).sqrt_()
    slope = ((u / rx).square_() + (v / ry).square_()).sqrt_().clamp_(min=1e-3)
    return k * (k - 1.0) / slope


def box(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, hx: Tensor | float, hy: Tensor | float, r: float) -> Tensor:
    """Distance to a box with half sides hx and hy and corners of radius r."""
    qx, qy = (x - cx).abs() - hx + r, (y - cy).abs() - hy + r
    outside = (qx.clamp(min=0).square_() + qy.clamp(min=0).square_()).sqrt_()
    return outside + torch.maximum(qx, qy).clamp_(max=0) - r


def capsule(x: Tensor, y: Tensor, ax: Tensor, ay: Tensor, bx: Tensor, by: Tensor, r: Tensor | float) -> Tensor:
    """Distance to a line from a to b of half width r with round ends."""
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp_(0, 1)
    return ((x - ax - t * dx).square_() + (y - ay - t * dy).square_()).sqrt_() - r


def arc(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, half: Tensor | float, rise: Tensor, thick: Tensor) -> Tensor:
    """Distance to a parabola of half width `half` whose middle lies `rise` below its ends, drawn `thick` wide."""
    u = (x - cx) / half
    slope = (2.0 * rise / half) * u
    across = (y - cy - rise * (1.0 - u * u)).abs() / (1.0 + slope * slope).sqrt_() - thick / 2
    return torch.maximum(across, (x - cx).abs() - half)


def triangle_wave(u: Tensor) -> Tensor:
    """A wave of period 1, from 0 at whole numbers to 1 halfway between them."""
    return 1.0 - (2.0 * (u - u.floor()) - 1.0).abs()


def present(distance: Tensor, flag: Tensor) -> Tensor:
    """`distance` where `flag` [n,1,1] is set, far away elsewhere."""
    return torch.where(flag, distance, FAR)


def coverage(distance: Tensor, pixel: Tensor | float) -> Tensor:
    """Share of a pixel that lies inside, 0..1; `pixel` is the width over which the edge goes from 0 to 1."""
    return (0.5 - distance / pixel).clamp_(0, 1)


def _square_wave(u: Tensor, period: Tensor, pixel: float) -> Tensor:
    """Anti-aliased 0/1 stripes of equal width along u."""
    from_edge = (triangle_wave(u / period) - 0.5) * period / 2
    return (0.5 + from_edge / pixel).clamp_(0, 1)


PATTERNS = ("plain", "stripes", "bands", "dots", "checks")


def pattern(x: Tensor, y: Tensor, kind: Tensor, period: Tensor, phase: Tensor, pixel: float) -> Tensor:
    """Share of the second colour [n,size,size]; kind [n,1,1] indexes PATTERNS, phase 0..1 shifts the pattern."""
    u, v = x + phase * period, y + phase * 1.7 * period
    stripes, bands = _square_wave(u, period, pixel), _square_wave(v, period, pixel)
    step = period * 0.9
    row = (v / step).floor()
    du = torch.remainder(u + (row % 2) * step / 2, step) - step / 2
    dv = v - (row + 0.5) * step
    dots = coverage((du.square_() + dv.square_()).sqrt_() - 0.33 * step, pixel)
    checks = stripes + bands - 2 * stripes * bands
    share = torch.where(kind == 1, stripes, torch.where(kind == 2, bands, torch.where(kind == 3, dots, checks)))
    return torch.where(kind == 0, 0.0, share)


def angle(x: Tensor, y: Tensor) -> Tensor:
    """Angle around the origin in turns, 0..1."""
    return torch.atan2(y, x) / (2 * math.pi) + 0.5
