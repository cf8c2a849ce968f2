"""Image and text encoders from the user's own folders, for CLIP-T, CLIP-I, DINO and face similarity.

A folder is one that transformers can load: config.json, safetensors weights, preprocessor_config.json, and for CLIP a
tokenizer. Nothing is downloaded. Pictures are prepared here (shorter side to size, centre, mean and standard
deviation), because transformers' own processors need torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from magicface_rt.errors import InputError
from magicface_rt.process.host_memory import as_host_memory_error
from magicface_rt.process.interrupts import reraise_if_interrupt

COLUMNS = {"clip_t": "clip", "clip_i": "clip", "dino": "dino", "face": "face"}
"""Columns of an ablation's table that need an encoder, and which one."""


class Encoder:
    """An image encoder; `text` works for CLIP only.

    It returns unit vectors [D]: image features if the model has them (CLIP), else its pooled output, else the state of
    its first token (the class token), else the mean over its grid.

    Raises InputError for a folder that transformers cannot load, or that lacks weights.
    """

    def __init__(self, folder: str | Path) -> None:
        import transformers

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise InputError(f"encoder {path}: there is no config.json; expected a folder that transformers can load.")
        try:
            with as_host_memory_error():
                model, found = transformers.AutoModel.from_pretrained(
                    path, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
            prepared = path / "preprocessor_config.json"
            self.preparing = json.loads(prepared.read_text()) if prepared.is_file() else {}
        except (OSError, ValueError) as error:
            reraise_if_interrupt(error)
            raise InputError(f"encoder {path}: transformers cannot load it: {error}") from error
        # transformers fills in random weights for what a folder lacks. DINO's, and face embeddings that were trained
        # as classifiers, lack the pooler only; then the first token's state is what they were trained for.
        lacking = {name for name in found["missing_keys"] if not name.endswith("mask_token")}  # for training only
        poolers = {name for name in lacking if "pooler" in name.split(".") and not hasattr(model, "get_image_features")}
        if others := sorted(lacking - poolers):
            raise InputError(
                f"encoder {path}: it lacks weights ({', '.join(others[:3])}, {len(others)} in all), expected all that "
                "its config.json speaks of."
            )
        self.model = model.float().eval()
        self.path = path
        self._pooled = not poolers
        self._tokenizer: Any = None

    @torch.no_grad()
    def image(self, image: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(prepared_pixels(image, self.preparing)[None])
        if hasattr(self.model, "get_image_features"):
            return _unit(self._vector(self.model.get_image_features(pixel_values=pixels)))
        return _unit(self._vector(self.model(pixel_values=pixels)))

    @torch.no_grad()
    def text(self, text: str) -> np.ndarray:
        import transformers

        if not hasattr(self.model, "get_text_features"):
            raise InputError(f"encoder {self.path}: it has no text encoder; expected a CLIP model.")
        if self._tokenizer is None:
            if not any((self.path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
                # transformers would make one that knows no word
                raise InputError(
                    f"encoder {self.path}: there is no tokenizer.json and no vocab.json for its tokenizer."
                )
            try:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            except (OSError, ValueError) as error:
                reraise_if_interrupt(error)
                raise InputError(f"encoder {self.path}: its tokenizer cannot be loaded: {error}") from error
        tokens = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=77)
        return _unit(self._vector(self.model.get_text_features(**tokens)))

    def _vector(self, output: Any) -> np.ndarray:
        """The vector [D] in whatever a model returns."""
        if isinstance(output, torch.Tensor):
            return output[0].numpy()
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self._pooled:
            return pooled[0].flatten().numpy()
        last = getattr(output, "last_hidden_state", None)
        if last is None:
            raise InputError(
                f"encoder {self.path}: {type(self.model).__name__} returns {', '.join(output.keys())}; expected "
                "image features, pooler_output or last_hidden_state."
            )
        return (last[0].mean((1, 2)) if last.ndim == 4 else last[0, 0]).numpy()  # [1, D, h, w], or [1, n, D]


def prepared_pixels(image: Image.Image, config: Mapping[str, Any]) -> np.ndarray:
    """Prepare a picture as float32 [3, s, s] by a preprocessor_config.json; defaults are 224 and ImageNet's mean."""
    size, crop = config.get("size", 224), config.get("crop_size")
    shortest = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height") or 224
    side = shortest if crop is None else crop if isinstance(crop, int) else crop["height"]
    scale = max(shortest, side) / min(image.size)
    wide, high = (max(side, round(length * scale)) for length in image.size)
    resized = image.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
    mean = np.asarray(config.get("image_mean", (0.485, 0.456, 0.406)), np.float32)
    deviation = np.asarray(config.get("image_std", (0.229, 0.224, 0.225)), np.float32)
    return np.ascontiguousarray(((pixels - mean) / deviation).transpose(2, 0, 1), np.float32)


class Encoders:
    """The encoders that the user named. `missing`: the columns that cannot be filled."""

    def __init__(self, folders: Mapping[str, str | Path | None]) -> None:
        self.by_name = {name: Encoder(folder) for name, folder in folders.items() if folder is not None}

    @property
    def missing(self) -> list[str]:
        return [column for column, name in COLUMNS.items() if name not in self.by_name]

    def scores(
        self,
        picture: Image.Image,
        prompt: str,
        regions: Mapping[str, Image.Image],
        references: Mapping[str, Image.Image],
    ) -> dict[str, dict[str, float]]:
        """Cosines by concept and column.

        CLIP-T compares the picture with its prompt and is the same for all concepts. The others compare a concept's
        part of the picture with its reference's masked part, for concepts that have a region. regions and references:
        cut-outs by concept's name.
        """
        whole: dict[str, float] = {}
        if "clip" in self.by_name:
            whole["clip_t"] = float(self.by_name["clip"].image(picture) @ self.by_name["clip"].text(prompt))
        found = {name: dict(whole) for name in references}
        for column in ("clip_i", "dino", "face"):
            encoder = self.by_name.get(COLUMNS[column])
            for name in found if encoder is not None else ():
                if name in regions:
                    found[name][column] = float(encoder.image(regions[name]) @ encoder.image(references[name]))
        return found


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
