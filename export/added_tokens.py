"""Tokens that were added to a checkpoint's tokenizer beside its vocabulary, as textual inversion adds "<cat-toy>".

transformers writes them into `added_tokens.json` and, since release 4.34, with flags into `added_tokens_decoder` of
`tokenizer_config.json`. Both are read here; one that only the older file has is a token too, though transformers, where
it finds the newer list, does not look there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from magicface_rt.errors import CheckpointError
from magicface_rt.values.shown import shown

from .checkpoint import read_config

__all__ = ["Added", "check_added_tokens", "read_added_tokens"]

OLDER = "added_tokens.json"
NEWER = "tokenizer_config.json"
MOST_NUMBER = 999_999_999
MOST_ADDED = 10_000  # the tokenizers library compares each with all others, so a million would take hours
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Added:
    """A token, its number, and the name of the file that says so."""

    token: AddedToken
    number: int
    file: str

    @property
    def text(self) -> str:
        return str(self.token.content)


def read_added_tokens(folder: Path) -> list[Added]:
    """Return the added tokens of a tokenizer's folder in order of their numbers.

    Raises CheckpointError, which names the file, for an entry that is none, and for two that contradict each other.
    """
    configs = {
        name: read_config(folder / name) for name in (NEWER, "special_tokens_map.json") if (folder / name).is_file()
    }
    by_text: dict[str, Added] = {}
    by_number: dict[int, Added] = {}
    for one in (*_with_flags(folder, configs.get(NEWER, {})), *_without_flags(folder, configs)):
        other = by_text.get(one.text) or by_number.get(one.number)
        if other is None:
            by_text[one.text] = by_number[one.number] = one
        elif (other.text, other.number) != (one.text, one.number):
            raise CheckpointError(
                f"tokenizer {folder}: {other.file} gives {shown(other.text)} the number {other.number}, and {one.file} "
                f"gives {shown(one.text)} the number {one.number}; expected one number for each token"
            )
    if len(by_number) > MOST_ADDED:
        raise CheckpointError(
            f"tokenizer {folder}: {OLDER} and {NEWER} add {len(by_number)} tokens; expected at most {MOST_ADDED}"
        )
    return [by_number[number] for number in sorted(by_number)]


def check_added_tokens(
    folder: Path, added: list[Added], tokenizer: Tokenizer, vocabulary: Mapping[str, int] | None
) -> None:
    """Refuse an added token that `tokenizer` has not, or has with another number.

    vocabulary   of vocab.json, if the tokenizer was built from it; None: it is that of tokenizer.json
    """
    words = {number: word for word, number in (vocabulary or {}).items()}
    for one in added:
        found = tokenizer.token_to_id(one.text)
        says = f"tokenizer {folder}: {one.file} gives {shown(one.text)} the number {one.number}"
        if words.get(one.number, one.text) != one.text:
            raise CheckpointError(
                f"{says}, which {shown(words[one.number])} has in vocab.json; expected a number of its own"
            )
        if found == one.number:
            continue
        if vocabulary is None:
            has = "lacks it" if found is None else f"has it with the number {found}"
            raise CheckpointError(
                f"{says}, and tokenizer.json {has}; remove tokenizer.json if it is older, and vocab.json and "
                "merges.txt are read instead"
            )
        if one.text in vocabulary:
            raise CheckpointError(f"{says}, and vocab.json {vocabulary[one.text]}; expected the same")
        raise CheckpointError(
            f"{says}, and it can only get {found}; expected numbers that go on from vocab.json's {len(vocabulary)} "
            "tokens without gaps"
        )


def _with_flags(folder: Path, config: Mapping[str, Any]) -> Iterator[Added]:
    entries = config.get("added_tokens_decoder")
    where = f"tokenizer file {folder / NEWER}: added_tokens_decoder"
    if entries is None:
        return
    if not isinstance(entries, dict):
        raise CheckpointError(f"{where} is {shown(entries)}; expected an object of tokens by number")
    for key, entry in entries.items():
        if not (key.isascii() and key.isdigit() and len(key) <= len(str(MOST_NUMBER))):
            raise CheckpointError(f"{where} has a token of number {shown(key)}; expected 0 to {MOST_NUMBER}")
        text = entry.get("content") if isinstance(entry, dict) else None
        flags = {name: entry[name] for name in FLAGS if name in entry} if isinstance(entry, dict) else {}
        if not _is_token(text) or not all(isinstance(flag, bool) for flag in flags.values()):
            raise CheckpointError(
                f"{where} has {shown(entry)} as token {int(key)}; expected an object with its content and with flags "
                "that are true or false"
            )
        yield Added(AddedToken(text, **flags), int(key), NEWER)


def _without_flags(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[Added]:
    if not (folder / OLDER).is_file():
        return
    special = {text for config in configs.values() for text in _special(config)}
    for text, number in read_config(folder / OLDER).items():
        if not _is_token(text) or type(number) is not int or not 0 <= number <= MOST_NUMBER:
            raise CheckpointError(
                f"tokenizer file {folder / OLDER}: it gives {shown(text)} the number {shown(number)}; expected a text "
                f"and a whole number from 0 to {MOST_NUMBER}"
            )
        # As in transformers: one that has no part of its own is found in the lower-case text, as words are.
        yield Added(AddedToken(text, special=text in special, normalized=text not in special), number, OLDER)


def _special(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tokens that a config names as special."""
    listed = [one for name in LISTED for one in (config.get(name) if isinstance(config.get(name), list) else ())]
    for token in (*(config.get(name) for name in NAMED), *listed):
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            yield text


def _is_token(text: object) -> bool:
    """Whether it is a text that is not empty and can be written as UTF-8: without half of a pair of surrogates."""
    return isinstance(text, str) and bool(text) and not any("\ud800" <= character <= "\udfff" for character in text)
