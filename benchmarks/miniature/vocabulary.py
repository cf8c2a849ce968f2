"""The miniature's tokenizer: CLIP's byte-level BPE, with a vocabulary just large enough for the world's captions.

Every word of a caption is one token; any other text falls apart into smaller pieces, bytes at worst, so nothing is
refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from magicface_rt.export.tokenizer import (
    END,
    START,
    build_tokenizer_json,
    clip_vocabulary,
    merges_text,
    vocabulary_text,
)

MAX_LENGTH = 77
BYTES = 512  # 256 bytes, and the same closing a word

# Appended to, never reordered: a word's number is its place.
WORDS = (
    *("a", "of", "with", "and", "wearing", "waving", "picture", "sketch", "pastel", "dark", "portrait", "photo"),
    *("man", "woman", "face", "bald", "short", "long", "curly", "hair", "beard", "hand"),
    *("hat", "cap", "beanie", "crown", "glasses", "shirt"),
    *("neutral", "smiling", "sad", "surprised"),
)


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """The merges that each word in turn still needs after those of earlier words.

    Ranks grow with the words, so a later merge never comes before an earlier word is whole.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                best = pairs[0]
                ranks[best] = len(ranks)
            place = pairs.index(best)
            symbols[place : place + 2] = ["".join(best)]
    return list(ranks)


@dataclass(frozen=True)
class Vocabulary:
    """Encodes captions as token numbers."""

    words: tuple[str, ...] = WORDS

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        return _merges(self.words)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Token to number: bytes, merges, start, end."""
        symbols = [token for token, number in clip_vocabulary()[0].items() if number < BYTES]
        tokens = [*symbols, *("".join(pair) for pair in self.merges), START, END]
        return {token: number for number, token in enumerate(tokens)}

    @cached_property
    def text(self) -> str:
        """The tokenizer.json."""
        return build_tokenizer_json(self.numbers, self.merges)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.text)
        tokenizer.enable_padding(length=MAX_LENGTH, pad_id=self.end, pad_token=END)
        tokenizer.enable_truncation(MAX_LENGTH)
        return tokenizer

    @property
    def start(self) -> int:
        return self.numbers[START]

    @property
    def end(self) -> int:
        """The end token; prompts are padded with it, as Stable Diffusion 1.5's are."""
        return self.numbers[END]

    def __len__(self) -> int:
        return len(self.numbers)

    def word(self, word: str) -> int:
        """The number of a whole word."""
        return self.numbers[word + "</w>"]

    def encode(self, captions: list[str]) -> Tensor:
        """Encode as int64 [n,77]: start, words, end, padded with end."""
        return torch.tensor([encoding.ids for encoding in self._tokenizer.encode_batch(captions)])

    def write(self, folder: Path) -> None:
        """Write the files of a CLIPTokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
        config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True}
        for name, text in {
            "tokenizer.json": self.text,
            "vocab.json": vocabulary_text(self.numbers),
            "merges.txt": merges_text(self.merges),
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }.items():
            (folder / name).write_text(text, encoding="utf-8")
