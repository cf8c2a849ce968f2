"""The words of a prompt that a concept can stand for, found among its tokens."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from ..errors import PromptError
from ..tokenizer import Tokenizer

__all__ = ["Word", "chosen", "words_of"]

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word at one place of a prompt.

    label   what the page offers: the word, with a number where it has stood in the prompt before, "man (2)"
    tokens  its positions; 1 is the first token of the prompt
    first   whether it is the one that the SDK finds by the word alone
    """

    label: str
    text: str
    tokens: tuple[int, ...]
    first: bool


def words_of(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """Every word of the prompt, in its order; none where it is too long for the text encoder."""
    found: list[Word] = []
    seen: Counter[str] = Counter()
    try:
        tokenizer.encode(prompt)
    except PromptError:
        return []
    for match in _WORD.finditer(prompt):
        text = match.group()
        before = len(tokenizer.tokens(prompt[: match.start()])) - 2  # without start and end token
        through = tokenizer.tokens(prompt[: match.end()])[1:-1]
        if "".join(through[before:]).strip().lower() != text.lower():
            continue  # cut here, the prompt has other tokens than as a whole
        seen[text.lower()] += 1
        place = seen[text.lower()]
        label = text if place == 1 else f"{text} ({place})"
        tokens = tuple(range(before + 1, len(through) + 1))
        found.append(Word(label, text, tokens, tokenizer.find_word(prompt, text) == tokens))
    return found


def chosen(words: list[Word], label: str) -> tuple[str, list[int] | None]:
    """What a request says for a choice: the word, and its tokens where it is not the first of its kind.

    What is no choice is taken as words of the prompt; whether they stand there is the SDK's to say.
    """
    for word in words:
        if word.label == label and not word.first:
            return word.text, list(word.tokens)
    return label.strip(), None
