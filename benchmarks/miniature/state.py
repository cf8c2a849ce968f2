"""Training state on disk: a folder of safetensors pieces, replaced as a whole.

Pieces stay under 16 MiB, so a run can be carried from machine to machine. A reader finds either the former state or the
new one, never a mixture.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PIECE_BYTES = 15 << 20


def write_state(folder: Path, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
    """Replace the state in `folder` by this one."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    pieces: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if used and used + tensor.nbytes > PIECE_BYTES:
            pieces.append({})
            used = 0
        pieces[-1][name] = tensor
        used += tensor.nbytes
    for number, piece in enumerate(pieces):
        save_file(piece, new / f"part-{number:03d}.safetensors")
    (new / "counters.json").write_text(json.dumps({**counters, "pieces": len(pieces)}, indent=2), encoding="utf-8")
    for file in new.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the state in `folder`, or the former one if a writer was killed between its two renames, or return None."""
    for place in (folder, folder.with_name(folder.name + ".old")):
        if (place / "counters.json").is_file():
            counters = json.loads((place / "counters.json").read_text(encoding="utf-8"))
            tensors: dict[str, Tensor] = {}
            for number in range(counters["pieces"]):
                tensors.update(load_file(place / f"part-{number:03d}.safetensors"))
            return tensors, counters
    return None


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts, named by parameter number."""
    state = optimiser.state_dict()["state"]
    return {f"{number}/{key}": value for number, entry in state.items() for key, value in entry.items()}


def load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimiser_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/")
        state.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            entry = optimiser.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):  # the fused step needs the parameter's own strides (channels last)
                entry[key] = torch.empty_like(parameter).copy_(entry[key])
