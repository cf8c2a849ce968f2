"""Opening a checkpoint: a diffusers folder (Stable Diffusion 1.5 or 2.1-base layout) or a single-file SD1.5 checkpoint.

`Checkpoint.open` loads no weights: it reads configs and the headers of the weight files and refuses what this package
cannot run. Each component is then loaded by itself, so no more than one need be in memory. Only safetensors are read,
never a pickle, never the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel

from magicface_rt.errors import CheckpointError
from magicface_rt.files.plain_file import read_plain
from magicface_rt.files.stamps import Stamp
from magicface_rt.files.strict_json import read_json
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.schedule import Schedule

from .block_layout import architecture_name

__all__ = [
    "PICKLES",
    "Checkpoint",
    "State",
    "open_safetensors",
    "read_config",
    "read_safetensors",
    "read_text",
    "stamps_of",
]

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")
MAX_TEXT_BYTES = 1 << 26

State = dict[str, torch.Tensor]


class Checkpoint(ABC):
    """A checkpoint on disk whose configs have been checked and whose weights have not been read.

    `path` is what was opened; `configs` are the diffusers configs by component; `stamps` are those of the weight files
    when it was opened. Weights are read by path, when they are needed, so `check_unchanged` compares the stamps.
    """

    path: Path
    configs: Mapping[str, Mapping[str, Any]]
    stamps: Mapping[Path, Stamp]

    @staticmethod
    def open(path: str | Path) -> Checkpoint:
        """Open a diffusers folder or a single `.safetensors` file.

        Raises CheckpointError: nothing there, a pickled or truncated file, a component missing, a network that is not
        of Stable Diffusion's block layout (SDXL, inpainting, ...), a scheduler that does not predict the noise.
        """
        path = Path(path)
        try:
            there, folder = path.exists(), path.is_dir()
        except OSError as error:
            reraise_if_interrupt(error)
            raise CheckpointError(f"checkpoint {path}: cannot be read: {error}") from error
        if not there:
            raise CheckpointError(
                f"checkpoint {path}: nothing there; "
                "expected a diffusers folder or a single-file .safetensors checkpoint"
            )
        if folder:
            from .diffusers_folder import FolderCheckpoint

            return FolderCheckpoint(path)
        if path.suffix.lower() in PICKLES:
            raise CheckpointError(
                f"checkpoint {path}: {path.suffix} files are pickles, which run code when they are read, "
                "and are refused; get or make a .safetensors version"
            )
        if path.suffix.lower() != ".safetensors":
            raise CheckpointError(
                f"checkpoint {path}: found a file named {path.name!r}, "
                "expected a diffusers folder or a .safetensors file"
            )
        from .single_file import SingleFileCheckpoint

        return SingleFileCheckpoint(path)

    @property
    @abstractmethod
    def weight_files(self) -> Sequence[Path]:
        """The files that hold weights, in a fixed order."""

    @abstractmethod
    def _state(self, component: str) -> State:
        """Read one component's weights, named as diffusers and the published checkpoints name them."""

    @property
    @abstractmethod
    def tokenizer_json(self) -> str:
        """The text of a tokenizer.json (format of the `tokenizers` wheel), without padding or truncation settings."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Number of tokens that the tokenizer has: its highest number, plus 1."""

    @property
    @abstractmethod
    def pad_token_id(self) -> int:
        """The token that prompts are padded with: SD1.5 <|endoftext|>, SD2.1 "!"."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Number of tokens of an encoded prompt, start and end included."""

    @cached_property
    def schedule(self) -> Schedule:
        """The checkpoint's noise schedule; sampling is DDIM whatever scheduler class is named.

        Its `steps_offset` is 1 whatever the checkpoint says: the Stable Diffusion pipeline of diffusers makes every
        other value 1, so nobody's pictures were made with the 0 that schedulers write which have that default.
        """
        try:
            return replace(Schedule.from_config(dict(self.configs["scheduler"])), steps_offset=1)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self.path}: {str(error)[:500]}") from error

    @property
    def vae_scaling_factor(self) -> float:
        """Latents are the encoder's mean times this."""
        return float(self.configs["vae"].get("scaling_factor", 0.18215))

    @property
    def vae_factor(self) -> int:
        """Pixels of a picture for each latent cell, along a side: the VAE halves between its blocks."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))

    @property
    def text_width(self) -> int:
        """Width D of the text embeddings [B, 77, D]."""
        return int(self.configs["unet"]["cross_attention_dim"])

    @property
    def architecture(self) -> dict[str, Any]:
        """A summary for bundles and reports: kind of checkpoint, channels, heads, text width, native latent side."""
        unet = self.configs["unet"]
        heads = unet.get("num_attention_heads") or unet["attention_head_dim"]  # diffusers' name for the number of heads
        channels = [int(width) for width in unet["block_out_channels"]]
        return {
            "name": architecture_name(unet),
            "channels": channels,
            "heads": [int(h) for h in heads] if isinstance(heads, list | tuple) else [int(heads)] * len(channels),
            "text_width": self.text_width,
            "latent_side": int(unet["sample_size"]),
            "vae_channels": [int(width) for width in self.configs["vae"]["block_out_channels"]],
            "text_layers": int(self.configs["text_encoder"]["num_hidden_layers"]),
        }

    def content_hash(self) -> str:
        """SHA-256, as hex, over the names and bytes of the weight files."""
        digest = hashlib.sha256()
        root = self.path if self.path.is_dir() else self.path.parent
        for file in self.weight_files:
            name = file.relative_to(root).as_posix() if self.path.is_dir() else "single-file"
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Check that the weight files are still those that were opened. Takes microseconds, as nothing is read.

        Raises CheckpointError, which names the file, if one was replaced, written to or removed since.
        """
        for file, opened in self.stamps.items():
            try:
                found = Stamp.of(os.stat(file))
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"checkpoint {self.path}: {file} was removed since the checkpoint was opened. Put it back and open "
                    "the checkpoint again."
                ) from error
            except OSError as error:
                reraise_if_interrupt(error)
                raise CheckpointError(f"checkpoint {self.path}: {file} cannot be read: {error}.") from error
            if found != opened:
                raise CheckpointError(
                    f"checkpoint {self.path}: {file} was replaced or written to since the checkpoint was opened: "
                    f"{found}, expected {opened}. Wait until nothing changes it, then open the checkpoint again."
                )

    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """Load the U-Net in evaluation mode, on the CPU.

        Raises CheckpointError if weights are missing, unknown or of other shapes than the config says, or if a weight
        file changed since the checkpoint was opened.
        """
        return self._load("unet", lambda config: UNet2DConditionModel.from_config(config), dtype)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        """Load the VAE in evaluation mode, on the CPU. Raises as `load_unet`."""
        return self._load("vae", lambda config: AutoencoderKL.from_config(config), dtype)

    def load_text_encoder(self, dtype: torch.dtype = torch.float32) -> CLIPTextModel:
        """Load the text encoder in evaluation mode, on the CPU. Raises as `load_unet`."""
        return self._load("text_encoder", lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)), dtype)

    def _load(self, component: str, build: Callable[[dict[str, Any]], Any], dtype: torch.dtype) -> Any:
        """Build a component on the meta device and assign the stored tensors, so the weights are in memory once."""
        try:
            with torch.device("meta"):
                model = build(dict(self.configs[component]))
        except Exception as error:  # what a config says can be wrong in more ways than the libraries check
            reraise_if_interrupt(error)
            raise CheckpointError(
                f"checkpoint {self.path}: the config of {component} makes no network "
                f"({type(error).__name__}: {str(error)[:500]})"
            ) from error
        state = _as_module_names(self._state_as_opened(component), model.state_dict().keys())
        _check_state(self.path, component, state, model.state_dict())
        for name in list(state):
            state[name] = self._cast(component, name, state[name], dtype)
        model.load_state_dict(state, strict=True, assign=True)
        for module in model.modules():
            if "position_ids" in module._buffers:  # not stored in checkpoints
                length = module._buffers["position_ids"].shape[-1]
                module._buffers["position_ids"] = torch.arange(length)[None]
        return model.requires_grad_(False).eval()

    def _state_as_opened(self, component: str) -> State:
        """Read one component's weights. Raises CheckpointError also if a weight file changed since it was opened."""
        try:
            state = self._state(component)
        except CheckpointError:
            self.check_unchanged()  # raises if the reason is that the file is being replaced
            raise
        self.check_unchanged()
        return state

    def _cast(self, component: str, name: str, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        where = f"checkpoint {self.path}: {component} {name}"
        if not stored.is_floating_point():
            raise CheckpointError(f"{where} is {stored.dtype}; expected floating-point numbers")
        cast = stored.to(dtype)
        if not torch.isfinite(cast).all():
            was = "" if torch.isfinite(stored.float()).all() else "holds NaN or infinity"
            raise CheckpointError(f"{where} {was or f'has values beyond the range of {dtype}; take another dtype'}")
        return cast


def stamps_of(path: Path, files: Sequence[Path]) -> dict[Path, Stamp]:
    """Return the stamps of a checkpoint's weight files; links are followed. Raises CheckpointError."""
    stamps = {}
    for file in files:
        try:
            stamps[file] = Stamp.of(os.stat(file))
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            reraise_if_interrupt(error)
            raise CheckpointError(f"checkpoint {path}: {file} cannot be read: {error}.") from error
    return stamps


@contextlib.contextmanager
def open_safetensors(file: Path, what: str) -> Iterator[Any]:
    """Open a safetensors file and read its header. Raises CheckpointError, whose message begins with `what`."""
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{what} {file}: it is missing, or not a file")
        try:
            opened = safe_open(file, framework="pt")
        except MemoryError:
            size = file.stat().st_size
            raise CheckpointError(
                f"{what} {file}: cannot be opened: its {size:,} bytes are more than this process may map. Is it "
                "another file? Else allow more addresses (ulimit -v)."
            ) from None  # it is the file that is at fault, and no shortage
        with opened as stream:
            yield stream
    except (SafetensorError, OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise CheckpointError(
            f"{what} {file}: not a complete safetensors file ({str(error)[:500]}); it may be truncated: fetch it again"
        ) from error


def read_safetensors(file: Path, keys: Sequence[str] | None = None) -> State:
    """Read tensors of a file: all of them, or those named. Raises CheckpointError for a truncated or damaged file."""
    with open_safetensors(file, "weights") as stream:
        return {key: stream.get_tensor(key) for key in (stream.keys() if keys is None else keys)}


def read_text(file: Path) -> str:
    """Read the text of a config or a vocabulary. Raises CheckpointError: missing, not a file, too large, not UTF-8."""
    try:
        return read_plain(file, MAX_TEXT_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        reraise_if_interrupt(error)
        raise CheckpointError(f"checkpoint file {file}: cannot be read as UTF-8 text: {error}") from error


def read_config(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises CheckpointError."""
    text = read_text(file)
    try:
        content = read_json(text)
    except ValueError as error:
        reraise_if_interrupt(error)
        raise CheckpointError(f"checkpoint file {file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint file {file}: expected a JSON object, found {type(content).__name__}")
    return content


def _check_state(path: Path, component: str, state: State, wanted: Mapping[str, torch.Tensor]) -> None:
    missing = sorted(set(wanted) - set(state))
    unknown = sorted(set(state) - set(wanted))
    if missing or unknown:
        which, names = ("lack", missing) if missing else ("have the unknown", unknown)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"checkpoint {path}: the weights of {component} {which} {', '.join(n[:100] for n in names[:3])}{more}"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"checkpoint {path}: {component} {name} has shape {list(state[name].shape)}; "
                f"its config says {list(tensor.shape)}"
            )


def _as_module_names(state: State, wanted: Any) -> State:
    """Rename tensors to the names that the installed libraries use; shapes and values stay."""
    attentions = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    nested = any(name.startswith("text_model.") for name in wanted)
    renamed: State = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):
            continue
        bare = name.removeprefix("text_model.")
        new = f"text_model.{bare}" if nested else bare
        for old_part, new_part in attentions.items():  # published VAEs still have the names of old diffusers
            new = new.replace(old_part, new_part)
        renamed[new] = tensor
    return renamed
