"""A job file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_job(folder: Path, name: str = "job.json", **changes: Any) -> Path:
    """With two concepts, and these changes; None leaves a key out."""
    concepts = [{"word": n, "image": f"{n}.png", "prompt": f"a {n}", "weight": 2.5} for n in ("man", "hat")]
    content = {"prompt": "a man with a hat", "concepts": concepts, "steps": 2, "seed": 3, **changes}
    path = folder / name
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def write_images(folder: Path) -> None:
    """The images that such a job names."""
    for name, value in (("man", 90), ("hat", 200)):
        pixels = np.random.default_rng(value).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8:40] = 255
        Image.fromarray(np.dstack([pixels, mask])).save(folder / f"{name}.png")
