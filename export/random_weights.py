"""Random-weight checkpoints in diffusers' layout, for tests and benchmarks. They make no likeness.

Plain random weights are useless for testing this method: attention is nearly uniform, so no regions form, and the
denoiser's output is unrelated to the noise, so the latents diverge. Therefore the query and key projections are
enlarged, and each last convolution is fitted by ridge regression: the U-Net's as a poor noise predictor, the VAE
decoder's as a poor inverse of the encoder. Every weight is representable in float16: both dtypes give the same model.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from magicface_rt.errors import OptionError, OutputError
from magicface_rt.files import atomic_files
from magicface_rt.process.host_memory import as_host_memory_error
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.schedule import Schedule

from .architectures import Architecture, architecture
from .threads import single_torch_thread
from .tokenizer import (
    END,
    START,
    build_tokenizer_json,
    clip_vocabulary,
    merges_text,
    vocabulary_text,
)

__all__ = ["write_checkpoint"]

# Applied to q and to k, so its square applies to the logits. Default weights give logits of standard deviation 1/3,
# nearly uniform. At a factor of 2 self-attention still has 97 % of the entropy of a uniform one, at 3 85 %.
QUERY_KEY_SCALE = 3.0
# The padding tokens must be alike, or each wins as many cells as a word does.
POSITION_SCALE = 0.2
# The first convolution feeds the last block's skip connection: the noise must still be found in what `conv_out` sees.
# Latents of `tiny` after 50 steps at guidance 7.5: rms 8.5 without it, 5.6 with it; of `sd15`, 11.9 at 3.
INPUT_SCALE = {"tiny": 3.0, "sd15": 8.0, "sd21-base": 3.0}
FIT_TIMESTEPS = (1, 61, 161, 261, 381, 501, 621, 741, 861, 981)
FIT_PROMPTS = 4
FIT_SIDE = 32
RIDGE = 1e-3

README = """# Random weights: {name}

The weights in this folder are RANDOM. It is a checkpoint of the architecture "{name}" ({summary}) in the layout that
diffusers reads, made for tests and benchmarks. It was trained on nothing, makes no likeness of anybody or anything, and
its pictures are coloured noise. To make pictures, use a real checkpoint.

Written by `magicface-rt checkpoint {name} --seed {seed}`, dtype {dtype}. The query and key weights are enlarged so that
attention is peaked and regions form; the last convolution of the U-Net is fitted as a poor noise predictor, so that
latents stay bounded, and that of the VAE decoder as a poor inverse of its encoder.
The tokenizer is CLIP's (MIT licence, OpenAI).
"""


@as_host_memory_error()
def write_checkpoint(
    architecture_name: str, out: str | Path, *, seed: int, dtype: Literal["float32", "float16"] = "float32"
) -> Path:
    """Write a random-weight checkpoint of `tiny`, `sd15` or `sd21-base` as a diffusers folder, and return its path.

    The same seed gives the same bytes, with one version of torch on one kind of processor. The folder appears complete
    or not at all. The full-size ones take a minute or two and 4.2 GB of memory (5.5 GB in float16).
    Raises OptionError (unknown architecture or dtype, negative seed) and OutputError (`out` exists or cannot be
    written).
    """
    chosen = architecture(architecture_name)
    if dtype not in ("float32", "float16"):
        raise OptionError(f"dtype: got {dtype!r}, expected 'float32' or 'float16'")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed: got {seed}, expected an integer from 0 to 2**63 - 1")
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise OutputError(f"checkpoint folder {out}: it exists already; give a new path or remove it")
    try:
        atomic_files.make_folder(out.absolute().parent)
        with atomic_files.temporary_sibling(out, folder=True) as scratch:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), single_torch_thread():
                _write_components(chosen, scratch, seed=seed, dtype=getattr(torch, dtype))
            readme = README.format(name=chosen.name, summary=chosen.summary, seed=seed, dtype=dtype)
            (scratch / "README.md").write_text(readme, encoding="utf-8")
            _write_json(scratch / "model_index.json", _model_index())
            atomic_files.replace_into_place(scratch, out, overwrite=False)
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(
            f"checkpoint folder {out}: cannot be written: {atomic_files.explain_os_error(error)}"
        ) from error
    return out


def _write_components(chosen: Architecture, folder: Path, *, seed: int, dtype: torch.dtype) -> None:
    """Make and write one component at a time, so only one is in memory."""
    write_tokenizer(chosen, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", chosen.scheduler)

    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(CLIPTextConfig(**chosen.text_encoder)).eval()
    for name, parameter in text_encoder.named_parameters():
        if name.endswith("position_embedding.weight"):
            parameter.mul_(POSITION_SCALE)
    _round_to_float16(text_encoder)
    embeddings = text_encoder(_random_prompts(chosen)).last_hidden_state
    _save(text_encoder, chosen.text_encoder, folder / "text_encoder", "model.safetensors", dtype, _published_text_key)
    del text_encoder

    torch.manual_seed(seed + 1)
    vae = AutoencoderKL.from_config(dict(chosen.vae)).eval()
    _fit_vae(vae)
    _save(vae, chosen.vae, folder / "vae", "diffusion_pytorch_model.safetensors", dtype)
    del vae
    gc.collect()

    torch.manual_seed(seed + 2)
    unet = UNet2DConditionModel.from_config(dict(chosen.unet)).eval()
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.mul_(QUERY_KEY_SCALE)
    unet.conv_in.weight.mul_(INPUT_SCALE[chosen.name])
    _round_to_float16(unet)
    _fit_noise_predictor(unet, embeddings, Schedule.from_config(dict(chosen.scheduler)))
    _save(unet, chosen.unet, folder / "unet", "diffusion_pytorch_model.safetensors", dtype)


def write_tokenizer(chosen: Architecture, folder: Path) -> None:
    """Write CLIP's tokenizer as transformers lays it out: vocabulary, merges, tokenizer.json and two configs."""
    folder.mkdir()
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(vocabulary_text(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(merges_text(merges), encoding="utf-8")
    text = build_tokenizer_json(vocabulary, merges, pad_token=chosen.pad_token)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": chosen.pad_token, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "model_max_length": chosen.max_length,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def _random_prompts(chosen: Architecture) -> torch.Tensor:
    """Token ids [FIT_PROMPTS, 77]: the empty prompt, then random words, padded."""
    vocabulary, _ = clip_vocabulary()
    ids = torch.full((FIT_PROMPTS, chosen.max_length), vocabulary[chosen.pad_token])
    for row in range(FIT_PROMPTS):
        words = 4 * row
        ids[row, 0] = vocabulary[START]
        ids[row, 1 : 1 + words] = torch.randint(512, vocabulary[START], (words,))
        ids[row, 1 + words] = vocabulary[END]
    return ids


def _fit_noise_predictor(unet: Any, embeddings: torch.Tensor, schedule: Schedule) -> None:
    """Fit `conv_out` so that the U-Net predicts, poorly, n from sqrt(a) z + sqrt(1 - a) n, z smooth and random."""
    fit = _Ridge(unet.conv_out)
    for index, timestep in enumerate(FIT_TIMESTEPS):
        a = float(schedule.alphas_cumprod[timestep])
        z = _smooth_fields(1, 4, FIT_SIDE, FIT_SIDE)
        noise = torch.randn_like(z)
        text = embeddings[index % FIT_PROMPTS][None]  # (1, 77, D)
        unet(a**0.5 * z + (1 - a) ** 0.5 * noise, timestep, text)
        fit.add(noise)
    fit.solve()


def _fit_vae(vae: Any) -> None:
    """Give the encoder's mean the scale that `scaling_factor` undoes, and fit the decoder's last convolution."""
    _round_to_float16(vae)
    pictures = _smooth_fields(2, 3, 128, 128).mul_(0.6).clamp_(-1, 1)
    mean = vae.encode(pictures).latent_dist.mean  # (2, 4, 16, 16)
    latent_channels = mean.shape[1]
    scale = 1 / (vae.config.scaling_factor * mean.std(dim=(0, 2, 3)))
    convolution = vae.quant_conv
    convolution.bias[:latent_channels] -= mean.mean(dim=(0, 2, 3))
    convolution.bias[:latent_channels] *= scale
    convolution.weight[:latent_channels] *= scale[:, None, None, None]
    _round_to_float16(vae)
    fit = _Ridge(vae.decoder.conv_out)
    for picture in pictures:
        vae.decode(vae.encode(picture[None]).latent_dist.mean)
        fit.add(picture[None])
    fit.solve()


class _Ridge:
    """Least squares for one 3 x 3 convolution, from what enters it in forward passes and what should leave it.

    Accumulates the normal equations in float64, (9 C + 1) x (9 C + 1), so no rows are kept.
    """

    def __init__(self, convolution: Any) -> None:
        self._convolution = convolution
        self._features = torch.empty(0)
        self._handle = convolution.register_forward_pre_hook(self._remember)
        size = convolution.weight[0].numel() + 1
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._moment = torch.zeros(size, convolution.out_channels, dtype=torch.float64)
        self._rows = 0

    def _remember(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self._features = inputs[0]

    def add(self, target: torch.Tensor) -> None:
        """Take the last forward pass as examples; target [B, out, H, W]."""
        patches = functional.unfold(self._features, 3, padding=1).transpose(1, 2)  # (B, H W, 9 C)
        rows = patches.reshape(-1, patches.shape[-1])
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
        wanted = target.flatten(2).transpose(1, 2).reshape(len(rows), -1).double()
        self._gram += rows.T @ rows
        self._moment += rows.T @ wanted
        self._rows += len(rows)

    def solve(self) -> None:
        """Write the solution, rounded to float16, into the convolution."""
        self._handle.remove()
        penalty = RIDGE * self._gram.diagonal().mean() * torch.eye(len(self._gram), dtype=torch.float64)
        solution = torch.linalg.solve(self._gram + penalty, self._moment).T.float()  # (out, 9 C + 1)
        self._convolution.weight.copy_(solution[:, :-1].reshape(self._convolution.weight.shape))
        self._convolution.bias.copy_(solution[:, -1])
        _round_to_float16(self._convolution)


def _smooth_fields(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Random fields [B, C, H, W] of unit variance that change over an eighth of the side, with a little fine grain."""
    coarse = torch.randn(batch, channels, 9, 9)
    smooth = functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    fields = smooth + 0.2 * torch.randn(batch, channels, height, width)
    return fields / fields.std()


def _round_to_float16(module: Any) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.half())


def _published_text_key(name: str) -> str:
    """Add the level `text_model`, which every published checkpoint has but recent transformers have dropped."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def _save(
    model: Any,
    config: Mapping[str, Any],
    folder: Path,
    file_name: str,
    dtype: torch.dtype,
    rename: Callable[[str], str] = str,
) -> None:
    folder.mkdir()
    weights = {rename(name): tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, folder / file_name, metadata={"format": "pt"})
    except SafetensorError as error:  # such as on a full disk
        raise OSError(f"{file_name}: {error}") from error
    _write_json(folder / "config.json", config)


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
