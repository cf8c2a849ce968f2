"""CLIP's byte-pair tokenizer over the `tokenizers` wheel: prompts to 77 ids, words to token positions."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers

from .bundle_form import TOKENS
from .errors import BundleError, PromptError
from .files.plain_file import read_plain
from .process.interrupts import reraise_if_interrupt

__all__ = ["Tokenizer", "guarded"]

MAX_FILE_BYTES = 1 << 26

_NAMED_WORDS = 20  # so many words are named in a message; the others are counted
_T = TypeVar("_T")


class Tokenizer:
    """The tokenizer of a bundle. Make one with `from_file`; it holds no state and may be shared between threads."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, pad_token_id: int, max_length: int = TOKENS) -> None:
        """Take over `tokenizer`; its own truncation and padding are switched off.

        Raises `BundleError` when it has no start and end token, or when the pad token is not in its vocabulary.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._start, self._end = _frame(tokenizer)
        size = tokenizer.get_vocab_size()
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or not 0 <= pad_token_id < size:
            raise BundleError(
                f"tokenizer: pad_token_id is {pad_token_id!r}, expected a whole number from 0 to {size - 1}."
            )
        if max_length < 3:
            raise BundleError(f"tokenizer: max_length is {max_length}, expected at least 3.")
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, pad_token_id: int, max_length: int = TOKENS) -> Tokenizer:
        """Read a `tokenizer.json`. Raises `BundleError` for a file that is missing or not a tokenizer."""
        name = f"tokenizer {os.fspath(path)!r}"
        try:
            raw = read_plain(path, MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            reraise_if_interrupt(error)
            raise BundleError(f"{name} cannot be read: {error}.") from error
        try:
            return guarded(
                lambda: cls(tokenizers.Tokenizer.from_buffer(raw), pad_token_id=pad_token_id, max_length=max_length)
            )
        except BundleError as error:
            raise BundleError(f"{name}: {str(error).removeprefix('tokenizer: ')}") from error
        except Exception as error:  # the wheel raises plain Exception
            reraise_if_interrupt(error)
            raise BundleError(f"{name} cannot be read: {str(error)[:500]}.") from error

    def encode(self, prompt: str) -> npt.NDArray[np.int64]:
        """Return the ids of a prompt: start, tokens, end, padding; int64 [max_length].

        Raises `PromptError` for a prompt with more tokens than fit, naming the words that would be lost.
        """
        ids = self._encode(prompt).ids
        padding = self.max_length - len(ids) - 2
        return np.array([self._start, *ids, self._end, *[self.pad_token_id] * padding], dtype=np.int64)

    def tokens(self, prompt: str) -> tuple[str, ...]:
        """Return the tokens as text, with start and end token, without padding: `tokens(prompt)[i]` is at position i.

        Raises `PromptError` as `encode`.
        """
        pieces = [prompt[start:end] for start, end in self.spans(prompt)]
        return (self._text(self._start), *pieces, self._text(self._end))

    def spans(self, prompt: str) -> tuple[tuple[int, int], ...]:
        """Return where each token stands in the prompt: its first character, and the one after its last.

        The first entry is of the token at position 1.

        Raises `PromptError` as `encode`.
        """
        return tuple(self._encode(prompt).offsets)

    def find_word(self, prompt: str, word: str) -> tuple[int, ...]:
        """Return the positions of all tokens of a word at its first occurrence; 1 is the first after the start token.

        `word` may be several words, or a word that is split into several tokens. Case and kinds of white space make no
        difference. An occurrence inside another word does not count: "hat" is not in "hats".

        Raises `PromptError` as `encode`, and if the word is not in the prompt; the message lists its words.
        """
        (found,) = self.find_words(prompt, [word])
        if found is not None:
            return found
        held = _excerpt(", ".join(map(repr, _shortened(prompt.split())))) or "none: it is empty"
        raise PromptError(
            f"the word {_excerpt(word)!r} is not in the prompt {_excerpt(prompt)!r}; its words are {held}. "
            "Use one of them, or give token_index."
        )

    def find_words(self, prompt: str, words: Sequence[str]) -> list[tuple[int, ...] | None]:
        """Like `find_word`, for several words, and None for one that is not there. The prompt is encoded once.

        Raises `PromptError` as `encode`.
        """
        encoding = self._encode(prompt)
        return [_find_tokens(prompt, encoding, self._raw_encode(word, "word").ids) for word in words]

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        """Encode a prompt without start and end token; at most max_length - 2 tokens fit, or PromptError is raised."""
        encoding = self._raw_encode(prompt, "prompt")
        room = self.max_length - 2
        if len(encoding.ids) > room:
            kept_to = encoding.offsets[room][0]
            lost = _excerpt(" ".join(_shortened(_words_after(prompt, kept_to))))
            raise PromptError(
                f"the prompt has {len(encoding.ids)} tokens, at most {room} fit (a word can be several). "
                f"These words would be lost: {lost!r}. Shorten the prompt: {_excerpt(prompt)!r}."
            )
        return encoding

    def _raw_encode(self, text: str, what: str) -> tokenizers.Encoding:
        if not isinstance(text, str):
            raise PromptError(f"the {what} is {text!r}, expected text.")
        try:
            return guarded(lambda: self._tokenizer.encode(text, add_special_tokens=False))
        except (TypeError, ValueError) as error:  # lone surrogates have no UTF-8
            raise PromptError(f"the {what} {_excerpt(text)!r} is not valid Unicode text.") from error
        except Exception as error:  # a model without a token for unknown text, for example
            reraise_if_interrupt(error)
            raise BundleError(f"tokenizer: it cannot encode the {what} {_excerpt(text)!r}: {error}.") from error

    def _text(self, token_id: int) -> str:
        return str(self._tokenizer.id_to_token(token_id))


def guarded(make: Callable[[], _T]) -> _T:
    """Return what `make` returns; raise a RuntimeError if the wheel's own code panics, which is not an `Exception`."""
    try:
        return make()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizers library failed: {error}") from error


def _frame(tokenizer: tokenizers.Tokenizer) -> tuple[int, int]:
    """Return the ids of the start and end token: what the post-processor puts around an empty text, or CLIP's names."""
    framed = tokenizer.encode("").ids
    if len(framed) == 2:
        return framed[0], framed[1]
    start, end = tokenizer.token_to_id("<|startoftext|>"), tokenizer.token_to_id("<|endoftext|>")
    if start is None or end is None:
        raise BundleError("tokenizer: no start and end token found, expected <|startoftext|> and <|endoftext|>.")
    return start, end


def _find_tokens(prompt: str, encoding: tokenizers.Encoding, wanted: Sequence[int]) -> tuple[int, ...] | None:
    """Return the positions of the first tokens with these ids that are not part of a longer word, or None."""
    ids = encoding.ids
    for first in range(len(ids) - len(wanted) + 1) if wanted else ():
        after = first + len(wanted)
        if ids[first:after] == wanted and not _inside_word(prompt, encoding.offsets, first, after):
            return tuple(range(first + 1, after + 1))
    return None


def _inside_word(prompt: str, offsets: Sequence[tuple[int, int]], first: int, after: int) -> bool:
    """Whether the tokens first..after-1 are only a part of a word of the prompt."""
    # a token that was added to a checkpoint's tokenizer may take the white space beside it along
    start = offsets[first][0]
    if start > 0 and not prompt[start].isspace() and _joins(prompt[start - 1]):
        return True
    if after == len(offsets):
        return False
    end, following = offsets[after - 1][1], offsets[after][0]
    # what stands between two tokens is white space, or a combining mark that became one with the letter before it
    return not any(character.isspace() for character in prompt[end - 1 : following + 1]) and _joins(prompt[following])


def _joins(neighbour: str) -> bool:
    """Whether a character beside a word makes it part of a longer word."""
    return neighbour.isalnum() or unicodedata.category(neighbour).startswith("M")


def _words_after(prompt: str, offset: int) -> list[str]:
    """Return the words of the prompt that end after `offset`, including the one that it cuts."""
    start = offset
    while start > 0 and not prompt[start - 1].isspace():
        start -= 1
    return prompt[start:].split()


def _shortened(words: list[str]) -> list[str]:
    if len(words) <= _NAMED_WORDS:
        return words
    return [*words[:_NAMED_WORDS], f"(and {len(words) - _NAMED_WORDS} more)"]


def _excerpt(prompt: str) -> str:
    return prompt if len(prompt) <= 400 else prompt[:400] + "..."
