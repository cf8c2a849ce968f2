"""A checkpoint as diffusers lays it out: a folder for each component, with a config and safetensors in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from magicface_rt.bundle_form import TOKENS
from magicface_rt.errors import CheckpointError
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.tokenizer import guarded
from magicface_rt.values.shown import shown

from .added_tokens import Added, check_added_tokens, read_added_tokens
from .block_layout import check_configs
from .checkpoint import PICKLES, Checkpoint, State, read_config, read_safetensors, read_text, stamps_of
from .tokenizer import END, build_tokenizer_json

__all__ = ["FolderCheckpoint", "find_weights"]

MOST_TOKENS = 1_000_000
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class FolderCheckpoint(Checkpoint):
    """A diffusers folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not any((path / name).is_dir() for name in COMPONENTS):
            raise CheckpointError(
                f"checkpoint {path}: not a diffusers folder; expected the folders {', '.join(COMPONENTS)}"
            )
        for component in COMPONENTS:
            if not (path / component).is_dir():
                raise CheckpointError(
                    f"checkpoint {path}: the component {component!r} is missing; expected a folder of it"
                )
        self.configs = {
            "unet": read_config(path / "unet" / "config.json"),
            "vae": read_config(path / "vae" / "config.json"),
            "text_encoder": read_config(path / "text_encoder" / "config.json"),
            "scheduler": read_config(path / "scheduler" / "scheduler_config.json"),
        }
        check_configs(path, self.configs)
        self._weights = {
            "unet": find_weights(path / "unet", "diffusion_pytorch_model"),
            "vae": find_weights(path / "vae", "diffusion_pytorch_model"),
            "text_encoder": find_weights(path / "text_encoder", "model"),
        }
        self.stamps = stamps_of(path, self.weight_files)
        for files in self._weights.values():
            for file in files:
                read_safetensors(file, keys=())
        _ = self.schedule, self.tokenizer_json, self.pad_token_id, self.max_length
        self._check_tokens()

    @property
    def weight_files(self) -> Sequence[Path]:
        return [file for component in sorted(self._weights) for file in self._weights[component]]

    def _state(self, component: str) -> State:
        state: State = {}
        for file in self._weights[component]:
            state.update(read_safetensors(file))
        return state

    @cached_property
    def tokenizer_json(self) -> str:
        folder = self.path / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            return read_text(folder / "tokenizer.json")
        vocabulary = self._vocabulary
        lines = read_text(folder / "merges.txt").splitlines()
        pairs = [line.split() for line in lines if line and not line.startswith("#version")]
        added = [one.token for one in self._added]
        try:
            merges = [(left, right) for left, right in pairs]
            return guarded(lambda: build_tokenizer_json(vocabulary, merges, pad_token=self._pad_token, added=added))
        except Exception as error:  # the tokenizers wheel raises plain Exception
            reraise_if_interrupt(error)
            raise CheckpointError(
                f"tokenizer {folder}: vocab.json and merges.txt do not fit together: "
                f"{type(error).__name__}: {str(error)[:500]}"
            ) from error

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        """What vocab.json says, where there is no tokenizer.json."""
        folder = self.path / "tokenizer"
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"tokenizer {folder}: {name} is missing; expected tokenizer.json, or vocab.json and merges.txt"
                )
        vocabulary = read_config(folder / "vocab.json")
        for token, number in vocabulary.items():
            # The tokenizers library ends the process if it has no memory for a list of all numbers in between.
            if type(number) is not int or not 0 <= number < MOST_TOKENS:
                raise CheckpointError(
                    f"tokenizer {folder}: vocab.json gives {shown(token)} the number {shown(number)}; expected a whole "
                    f"number from 0 to {MOST_TOKENS - 1}"
                )
        return vocabulary

    @cached_property
    def _added(self) -> list[Added]:
        return read_added_tokens(self.path / "tokenizer")

    @cached_property
    def _pad_token(self) -> str:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            file = self.path / "tokenizer" / name
            token = read_config(file).get("pad_token") if file.is_file() else None
            if isinstance(token, dict):
                token = token.get("content")
            if token:
                if not isinstance(token, str):
                    raise CheckpointError(f"tokenizer file {file}: pad_token is no text")
                return token
        return END

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        text = self.tokenizer_json
        try:
            return guarded(lambda: Tokenizer.from_str(text))
        except Exception as error:  # the tokenizers wheel raises plain Exception
            reraise_if_interrupt(error)
            raise CheckpointError(
                f"tokenizer {self.path / 'tokenizer'}: tokenizer.json cannot be read: {str(error)[:500]}"
            ) from error

    @property
    def tokens(self) -> int:
        return max(self._tokenizer.get_vocab().values(), default=0) + 1

    def _check_tokens(self) -> None:
        """Refuse a text encoder with too few tokens or positions for what the tokenizer makes of a prompt."""
        folder, text = self.path / "tokenizer", self.configs["text_encoder"]
        vocabulary = None if (folder / "tokenizer.json").is_file() else self._vocabulary
        check_added_tokens(folder, self._added, self._tokenizer, vocabulary)
        last = self.tokens - 1
        if last >= text["vocab_size"]:
            raise CheckpointError(
                f"checkpoint {self.path}: its tokenizer has a token of number {last}, and vocab_size of text_encoder "
                f"is {text['vocab_size']}; expected more than {last}"
            )
        positions = text.get("max_position_embeddings", TOKENS)
        if positions is None or self.max_length > positions:
            raise CheckpointError(
                f"checkpoint {self.path}: prompts have {self.max_length} tokens, and max_position_embeddings of "
                f"text_encoder is {positions}; expected at least {self.max_length}"
            )

    @cached_property
    def pad_token_id(self) -> int:
        try:
            number = self._tokenizer.token_to_id(self._pad_token)
        except UnicodeEncodeError:  # half of a pair of surrogates, which no vocabulary has
            number = None
        if number is None:
            folder, token = self.path / "tokenizer", self._pad_token[:100]
            raise CheckpointError(f"tokenizer {folder}: its padding token {token!r} is not in its vocabulary")
        return int(number)

    @property
    def max_length(self) -> int:
        file = self.path / "tokenizer" / "tokenizer_config.json"
        stored = read_config(file).get("model_max_length", TOKENS) if file.is_file() else TOKENS
        # Where there is no limit, transformers writes 1e30, as a whole number.
        if isinstance(stored, bool) or not isinstance(stored, (int, float)) or not stored >= TOKENS:
            raise CheckpointError(
                f"tokenizer file {file}: model_max_length is {shown(stored)}, expected a number from {TOKENS}: the "
                "graphs take prompts of that many tokens."
            )
        return TOKENS


def find_weights(folder: Path, stem: str) -> tuple[Path, ...]:
    """Return the safetensors files of a component: one file, or the shards that an index names.

    `.fp16` variants are taken if only they exist.

    Raises CheckpointError if there are none, naming pickles if those are all there is.
    """
    for variant in ("", ".fp16"):
        file = folder / f"{stem}{variant}.safetensors"
        if file.is_file():
            return (file,)
        for index in (
            folder / f"{stem}.safetensors.index{variant}.json",
            folder / f"{stem}{variant}.safetensors.index.json",
        ):
            if index.is_file():
                return _shards(folder, index)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"checkpoint component {folder}: its weights exist only as pickles ({', '.join(pickles)}), "
            f"which run code when they are read, and are refused; expected {stem}.safetensors"
        )
    raise CheckpointError(f"checkpoint component {folder}: no weights; expected {stem}.safetensors")


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    named = read_config(index).get("weight_map", {})
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"checkpoint index {index}: weight_map is no object of file names")
    names = sorted(set(named.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"checkpoint index {index}: shard {name[:100]!r} is not a plain file name")
        try:
            there = (folder / name).is_file()
        except OSError as error:  # no file can have such a name
            reraise_if_interrupt(error)
            raise CheckpointError(
                f"checkpoint index {index}: shard {name[:100]!r} cannot be read: {error.strerror}"
            ) from error
        if not there:
            raise CheckpointError(f"checkpoint index {index}: shard {name[:100]} is missing")
    if not names:
        raise CheckpointError(f"checkpoint index {index}: it names no shards; expected a weight_map")
    return tuple(folder / name for name in names)
