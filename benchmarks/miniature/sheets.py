"""Contact sheets: pictures of the world with their masks, reconstructions, samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .world import Pictures

# In the order of PARTS.
_COLOURS = (
    (40, 40, 40),
    (255, 190, 140),
    (150, 75, 0),
    (90, 40, 10),
    (0, 200, 255),
    (255, 40, 40),
    (60, 180, 75),
    (255, 225, 25),
)


def grid(images: Tensor, *, columns: int) -> Tensor:
    """Arrange [n,3,h,w] as one picture [3, rows*h, columns*w]; missing ones are grey."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    images = torch.cat([images, images.new_zeros(rows * columns - n, c, h, w)])
    return images.view(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def eight_bits(image: Tensor) -> NDArray[np.uint8]:
    """An image [3,h,w] in -1..1, clipped to that range, as uint8 [h,w,3]."""
    pixels = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)


def tile(image: Tensor, side: int) -> Image.Image:
    """An image [3,h,w] in -1..1 as a square of `side` pixels, without smoothing."""
    return Image.fromarray(eight_bits(image)).resize((side, side), Image.Resampling.NEAREST)


def save(images: Tensor, path: Path, *, columns: int, enlarge: int = 1) -> None:
    """Write images [n,3,h,w] in -1..1 as one PNG."""
    pixels = eight_bits(grid(images, columns=columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(
        (pixels.shape[1] * enlarge, pixels.shape[0] * enlarge), Image.Resampling.NEAREST
    ).save(path)


def coloured(labels: Tensor) -> Tensor:
    """Labels int64 [n,h,w] (indices into PARTS; -1 for none, which is black) in fixed colours, [n,3,h,w]."""
    table = torch.tensor([*_COLOURS, (0, 0, 0)], dtype=torch.float32, device=labels.device) / 127.5 - 1
    return table[labels].permute(0, 3, 1, 2)


def overlay(pictures: Pictures) -> Tensor:
    """The visible parts in fixed colours over the pictures, [n,3,size,size]."""
    return 0.3 * pictures.images + 0.7 * coloured(pictures.labels.long())
