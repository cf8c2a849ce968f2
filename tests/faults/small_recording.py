"""A recording as far as it is read: of one concept, one reference, two steps and 8 x 8 latents, and no weights."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from corruptions import packed
from outcomes import judged

from magicface_rt.export.architectures import ARCHITECTURES
from magicface_rt.export.recordings import Recording

STEPS, SIDE = 2, 8
HALF = SIDE // 2
WIDTH = ARCHITECTURES["tiny"].unet["cross_attention_dim"]
CASE: dict[str, Any] = {
    "name": "small",
    "model": "model",
    "steps": STEPS,
    "inject_step": 0,
    "guidance_scale": 3.0,
    "layer_idx": [10, 15],
    "ref_index": [4],
    "mask_weights": [3.0],
    "ca_scale": 0.6,
    "use_rate": True,
    "n_refs": 1,
    "start_step": 0,
    "end_step": STEPS,
    "latent_size": [SIDE, SIDE],
    "mask_size": [HALF, HALF],
    "scheduler": {
        "type": "DDIM",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "tolerance": {"eps_u": 2.5e-05, "eps_c": 3.3e-05, "latents": 8.2e-05},
    "free_run": True,
    "free_run_latents": 0.00014,
    "recorded_steps": STEPS,
}
INPUTS = {
    "x_T": np.zeros((1, 4, SIDE, SIDE), np.float32),
    "neg_embeds": np.zeros((1, 77, WIDTH), np.float16),
    "target_embeds": np.zeros((1, 77, WIDTH), np.float16),
    "ref_embeds": np.zeros((1, 77, WIDTH), np.float16),
    "ref_z0": np.zeros((1, 4, SIDE, SIDE), np.float32),
    "ref_noise": np.zeros((STEPS, 1, 4, SIDE, SIDE), np.float32),
    "ref_masks": np.ones((1, 128, 128), np.uint8),
}
_LATENTS = np.zeros((STEPS, 1, 4, SIDE, SIDE), np.float32)
_CELLS = np.zeros((STEPS, HALF, HALF), np.float32)
RECORDED = {
    "timesteps": np.array([501, 1]),
    **dict.fromkeys(("latents_in", "eps_u", "eps_c", "eps_guided", "latents_out"), _LATENTS),
    "label": np.zeros((STEPS, HALF, HALF), np.int64),
    "concept_mask": np.zeros((STEPS, 1, HALF, HALF), bool),
    "fore_mask": np.zeros((STEPS, HALF, HALF), bool),
    "margin": _CELLS,
    "fore_margin": _CELLS,
    "rate": np.zeros((STEPS, SIDE, SIDE), np.float32),
}


def npz(arrays: dict[str, Any]) -> bytes:
    """As NumPy writes it, compressed."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(array: Any) -> bytes:
    """One array as NumPy writes it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_of(members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of members whose content may be anything; its checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def recording(folder: Path) -> Path:
    """The whole of it, in a folder that is made."""
    (folder / "model").mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps(CASE))
    (folder / "inputs.npz").write_bytes(npz(INPUTS))
    (folder / "steps.npz").write_bytes(npz(RECORDED))
    (folder / "model" / "config.json").write_text(json.dumps(ARCHITECTURES["tiny"].unet))
    (folder / "model" / "diffusion_pytorch_model.safetensors").write_bytes(packed({}))
    return folder


def loaded(folder: Path, *, memory: int = 256 << 20) -> Recording | None:
    """What becomes of it, with what a replay first looks at."""

    def use() -> Recording:
        found = Recording.load(folder)
        assert len(found.stages) == found.steps
        assert 1 <= found.recorded_steps <= found.steps
        assert len(found.concept_of_reference) == len(found.weights) == len(found.inputs.ref_masks)
        assert found.schedule.timesteps(found.steps).shape == (found.steps,)
        for arrays in (found.inputs, found.recorded):
            for array in vars(arrays).values():
                assert array.dtype in (np.float32, np.int64, np.bool_)
                assert np.isfinite(array).all()
        return found

    return judged("recording", use, names=folder, memory=memory)
