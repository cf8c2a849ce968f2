from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.jobs import write_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job for two steps, and its images beside it."""
    for name, value in (("man", 90), ("hat", 200)):
        pixels = np.random.default_rng(value).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8:40] = 255
        Image.fromarray(np.dstack([pixels, mask])).save(tmp_path / f"{name}.png")
    return write_job(tmp_path)
