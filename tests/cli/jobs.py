"""A job file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_job(folder: Path, name: str = "job.json", **changes: Any) -> Path:
    """With two concepts, and these changes; None leaves a key out."""
    concepts = [{"word": n, "image": f"{n}.png", "prompt": f"a {n}", "weight": 2.5} for n in ("man", "hat")]
    content = {"prompt": "a man with a hat", "concepts": concepts, "steps": 2, "seed": 3, **changes}
    path = folder / name
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path
