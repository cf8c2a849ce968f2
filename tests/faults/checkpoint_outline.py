"""A checkpoint as far as it is looked at before its weights are: for tests of its configs, indexes and vocabularies."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from corruptions import packed
from outcomes import judged
from shares import Share
from single_files import small_tokenizer

from magicface_rt.bundle_form import TOKENS
from magicface_rt.errors import CheckpointError, OptionError
from magicface_rt.export.architectures import ARCHITECTURES
from magicface_rt.export.checkpoint import Checkpoint

TINY = ARCHITECTURES["tiny"]
EMPTY = packed({})
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXTS: dict[str, Any] = {
    "unet/config.json": TINY.unet,
    "vae/config.json": TINY.vae,
    "text_encoder/config.json": TINY.text_encoder,
    "scheduler/scheduler_config.json": TINY.scheduler,
    "tokenizer/tokenizer_config.json": {"model_max_length": 77, "pad_token": {"content": "<|endoftext|>"}},
    "tokenizer/special_tokens_map.json": {"pad_token": "<|endoftext|>"},
}
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


SHARDS: dict[str, Any] = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3, "b": 4, "ab": 5, "ab</w>": 6, "b</w>": 7}
ADDED = {"<cat-toy>": 8, "Wort": 9}
DECODER = {
    "0": {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "special": True},
    "8": {"content": "<cat-toy>", "lstrip": False, "rstrip": True, "single_word": False, "normalized": False},
}
MERGES = "#version: 0.2\na b\na b</w>\n"


def outline(folder: Path) -> Path:
    """A checkpoint as far as it is looked at before its weights are: it has none."""
    for name, content in TEXTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for name in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        (folder / name).write_bytes(EMPTY)
    (folder / "tokenizer" / "tokenizer.json").write_text(small_tokenizer())
    return folder


def outline_in_shards(folder: Path) -> Path:
    """One whose U-Net is in two files, of which an index says what is where."""
    (outline(folder) / UNET).unlink()
    for name in set(SHARDS["weight_map"].values()):
        (folder / "unet" / name).write_bytes(EMPTY)
    (folder / INDEX).write_text(json.dumps(SHARDS))
    return folder


def outline_with_vocabulary(folder: Path) -> Path:
    """One whose tokenizer is in the two files of older checkpoints."""
    (outline(folder) / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/merges.txt").write_text(MERGES)
    (folder / "tokenizer/vocab.json").write_text(json.dumps(VOCABULARY))
    return folder


def outline_with_added_tokens(folder: Path) -> Path:
    """One whose tokenizer was given tokens beside its vocabulary; both files that tell of them are there."""
    tokenizer = outline_with_vocabulary(folder) / "tokenizer"
    (tokenizer / "added_tokens.json").write_text(json.dumps(ADDED))
    config = TEXTS["tokenizer/tokenizer_config.json"] | {"added_tokens_decoder": DECODER}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


NETWORKS = Share(20, subject="checkpoints", what="networks were built")
"""Building them takes a while."""


def is_sound(checkpoint: Checkpoint) -> bool:
    """What an accepted checkpoint has to be: configs, tokenizer and schedule that fit each other, so that what a prompt
    is encoded to, and what a picture is denoised by, is there. Networks are built, or refused with an error of ours.
    """
    text, shape = checkpoint.configs["text_encoder"], checkpoint.architecture
    numbers = [*shape["channels"], *shape["heads"], *shape["vae_channels"], shape["text_width"], shape["latent_side"]]
    assert all(type(number) is int and 1 <= number <= 2**16 for number in numbers)
    assert len(shape["channels"]) == len(shape["heads"]) == 4
    ids = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json).get_vocab().values()
    assert max(ids) < text["vocab_size"]
    assert checkpoint.max_length <= text.get("max_position_embeddings", TOKENS)
    schedule = checkpoint.schedule
    for steps in (1, min(20, schedule.num_train_timesteps)):
        with contextlib.suppress(OptionError):  # which says how many can be made
            timesteps = schedule.timesteps(steps)
            assert (np.diff(timesteps) < 0).all()
            assert 0 <= timesteps.min() <= timesteps.max() < schedule.num_train_timesteps
    assert ((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod < 1)).all()
    if NETWORKS.takes((checkpoint.configs, checkpoint.tokenizer_json)):
        for load in (checkpoint.load_unet, checkpoint.load_vae, checkpoint.load_text_encoder):
            with contextlib.suppress(CheckpointError):  # of weights there are none
                load()
    return True


def opened(folder: Path) -> Checkpoint | None:
    def use() -> Checkpoint:
        checkpoint = Checkpoint.open(folder)
        json.dumps(checkpoint.architecture)
        assert checkpoint.schedule.timesteps(1).shape == (1,)
        assert checkpoint.text_width > 0
        assert checkpoint.vae_scaling_factor > 0
        assert checkpoint.max_length == 77
        assert checkpoint.pad_token_id >= 0
        assert len(checkpoint.content_hash()) == 64
        assert is_sound(checkpoint)
        return checkpoint

    return judged("checkpoint folder", use, names=folder)
