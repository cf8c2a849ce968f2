"""A single-file Stable Diffusion 1.5 checkpoint (`.safetensors` with the names of the original LDM code).

The tensors are renamed by diffusers' own converters, one component at a time. Such a file holds no configs and no
tokenizer; those of this package are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from magicface_rt.errors import CheckpointError

from .architectures import ARCHITECTURES, Architecture
from .block_layout import DISTILLED
from .checkpoint import Checkpoint, State, open_safetensors, read_safetensors, stamps_of
from .tokenizer import build_tokenizer_json, clip_vocabulary

__all__ = ["SingleFileCheckpoint"]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
# Blocks of the original code that hold an attention, in Stable Diffusion 1.
ATTENTION_BLOCKS = {
    *(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)),
    "middle_block.1",
    *(f"output_blocks.{i}.1" for i in range(3, 12)),
}
CONV_IN = f"{UNET}input_blocks.0.0.weight"
TEXT_KEY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


class SingleFileCheckpoint(Checkpoint):
    """A single `.safetensors` file that holds U-Net, VAE and text encoder of Stable Diffusion 1.5.

    `expected`: the architecture that the file must hold; others than SD1.5 are for tests.
    """

    def __init__(self, path: Path, *, expected: Architecture = ARCHITECTURES["sd15"]) -> None:
        self.path = path
        self._expected = expected
        self.configs = {
            "unet": expected.unet,
            "vae": expected.vae,
            "text_encoder": expected.text_encoder,
            "scheduler": expected.scheduler,
        }
        self.stamps = stamps_of(path, self.weight_files)
        with open_safetensors(path, "checkpoint") as stream:
            shapes = {key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118
            metadata = stream.metadata() or {}
        self._check(shapes, metadata)
        self._keys = {
            component: sorted(key for key in shapes if key.startswith(prefix)) for component, prefix in PREFIXES.items()
        }

    @property
    def weight_files(self) -> Sequence[Path]:
        return [self.path]

    @cached_property
    def tokenizer_json(self) -> str:
        return build_tokenizer_json(*clip_vocabulary(), pad_token=self._expected.pad_token)

    @property
    def tokens(self) -> int:
        return len(clip_vocabulary()[0])

    @property
    def pad_token_id(self) -> int:
        return clip_vocabulary()[0][self._expected.pad_token]

    @property
    def max_length(self) -> int:
        return self._expected.max_length

    def _state(self, component: str) -> State:
        stored = read_safetensors(self.path, keys=self._keys[component])
        if component == "unet":
            return dict(convert_ldm_unet_checkpoint(stored, dict(self.configs["unet"])))
        if component == "vae":
            return dict(convert_ldm_vae_checkpoint(stored, dict(self.configs["vae"])))
        text = convert_ldm_clip_checkpoint(stored)
        # Some programs store the projection too, which Stable Diffusion does not use.
        return {name: tensor for name, tensor in text.items() if not name.startswith("text_projection")}

    def _check(self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> None:
        """Raise CheckpointError, naming what the file is, unless it is Stable Diffusion 1.5's layout."""
        where = f"checkpoint {self.path}: "
        hint = "expected a whole single-file Stable Diffusion 1.5 checkpoint"
        if any(key.startswith("conditioner.") for key in shapes):
            raise CheckpointError(f"{where}this is a Stable Diffusion XL checkpoint; {hint}")
        if any(key.startswith("cond_stage_model.model.") for key in shapes):
            raise CheckpointError(
                f"{where}this is a single-file Stable Diffusion 2 checkpoint; give its diffusers folder"
            )
        if any(key.startswith(("lora_", "unet.")) or ".lora" in key for key in shapes):
            raise CheckpointError(f"{where}this is a LoRA, not a checkpoint; {hint}")
        if not any(key.startswith(UNET) for key in shapes):
            raise CheckpointError(f"{where}the component 'unet' is missing (no tensor named {UNET}...); {hint}")
        if "v_pred" in shapes or metadata.get("modelspec.prediction_type", "epsilon") not in ("epsilon", "eps"):
            raise CheckpointError(
                f"{where}it is marked as a v-prediction model; expected one that predicts the noise (epsilon)"
            )
        attentions = {
            key.removeprefix(UNET).removesuffix(".transformer_blocks.0.attn1.to_q.weight")
            for key in shapes
            if key.startswith(UNET) and key.endswith(".attn1.to_q.weight")
        }
        if attentions != ATTENTION_BLOCKS:
            raise CheckpointError(
                f"{where}its U-Net has {len(attentions)} self-attentions, "
                f"not the 16 of Stable Diffusion 1.5 at their places; {hint}"
            )
        if any(key.startswith(UNET) and ".cond_proj." in key for key in shapes):  # diffusers would leave it out
            raise CheckpointError(f"{where}its U-Net {DISTILLED}")
        channels_in = shapes[CONV_IN][1] if len(shapes.get(CONV_IN, ())) == 4 else None
        if channels_in != 4:
            kind = {9: "an inpainting model", 8: "an image-editing model"}.get(channels_in or 0, "of another model")
            raise CheckpointError(f"{where}its U-Net takes {channels_in} channels ({kind}); expected 4 latent channels")
        width = shapes[TEXT_KEY][-1] if shapes.get(TEXT_KEY) else None
        if width != self.text_width:
            raise CheckpointError(f"{where}its U-Net takes text of width {width}; {hint}, of width {self.text_width}")
        for component, prefix in PREFIXES.items():
            if not any(key.startswith(prefix) for key in shapes):
                raise CheckpointError(
                    f"{where}the component {component!r} is missing (no tensor named {prefix}...); {hint}"
                )
