"""CLIP's byte-pair tokenizer, built from the vocabulary beside this file (see NOTICE) or from a checkpoint's.

The vocabulary has 49408 entries in OpenAI's order: 256 bytes, the same 256 closing a word (`</w>`), 48894 merges, and
the two special tokens. It needs the `tokenizers` wheel only.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

__all__ = ["END", "START", "build_tokenizer_json", "clip_vocabulary", "merges_text", "vocabulary_text"]

START = "<|startoftext|>"
END = "<|endoftext|>"
VOCABULARY_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
VOCABULARY_SIZE = 49408
WORD_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (vocabulary: token -> id, 49408 of them; merges in order of rank, 48894 of them)."""
    lines = gzip.decompress(VOCABULARY_FILE.read_bytes()).decode("utf-8").split("\n")
    merges = [_pair(line) for line in lines[1 : VOCABULARY_SIZE - 512 - 2 + 1]]
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def build_tokenizer_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    pad_token: str = END,
    added: Sequence[AddedToken] = (),
) -> str:
    """Return a tokenizer.json that splits as CLIP does: lower case, NFC, byte-level BPE, start and end tokens.

    `merges` are in order of rank. No truncation and no padding are set in it: both belong to the caller. The padding
    token is special, as it is to transformers: with Stable Diffusion 2.1's "!" every "!" of a prompt is that token.

    added   tokens beside the vocabulary; those that it lacks get the numbers that follow its last, in this order
    """
    tokenizer = Tokenizer(
        BPE(
            vocab=dict(vocabulary),
            merges=list(merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=END,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys((START, END, pad_token))
    known = [token for token in special if token in vocabulary]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    tokenizer.add_tokens([token for token in added if token.content not in known])
    missing = [token for token in special if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer.to_str()


def vocabulary_text(vocabulary: Mapping[str, int]) -> str:
    """Return the text of a vocab.json."""
    return json.dumps(dict(vocabulary), ensure_ascii=False)


def merges_text(merges: Sequence[tuple[str, str]]) -> str:
    """Return the text of a merges.txt."""
    return "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges)]) + "\n"


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split()
    return left, right


def _byte_characters() -> list[str]:
    """One printable character for each byte, in CLIP's order: the printable ones, then stand-ins from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]
