"""Finds the words of a prompt that a concept can stand for, among the prompt's tokens."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from ..errors import PromptError
from ..serve.schemas import MOST_TEXT
from ..tokenizer import Tokenizer

__all__ = ["Word", "chosen", "words_of"]

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Word:
    """A word at one place of a prompt.

    label   what the page offers: the word, with a number if it occurs earlier in the prompt, "man (2)"
    tokens  its positions; 1 is the first token of the prompt
    first   whether it is the one that the SDK finds by the word alone
    """

    label: str
    text: str
    tokens: tuple[int, ...]
    first: bool


def words_of(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """Return every word of the prompt, in order; none if the prompt is longer than a request may have, or than the text
    encoder takes.
    """
    if len(prompt) > MOST_TEXT:
        return []
    matches = list(_WORD.finditer(prompt))
    try:
        spans = tokenizer.spans(prompt)
        firsts = tokenizer.find_words(prompt, [match.group() for match in matches])
    except PromptError:
        return []
    found: list[Word] = []
    seen: Counter[str] = Counter()
    for match, first in zip(matches, firsts, strict=True):
        text = match.group()
        tokens = tuple(k for k, (start, end) in enumerate(spans, 1) if start < match.end() and end > match.start())
        if not tokens or prompt[spans[tokens[0] - 1][0] : spans[tokens[-1] - 1][1]].strip() != text:
            continue  # one of its tokens extends into the text beside it
        seen[text.lower()] += 1
        place = seen[text.lower()]
        label = text if place == 1 else f"{text} ({place})"
        found.append(Word(label, text, tokens, first == tokens))
    return found


def chosen(words: list[Word], label: str) -> tuple[str, list[int] | None]:
    """Return what a request says for a choice: the word, and its tokens if it is not the first of its kind.

    A label that is not among the choices is taken as words of the prompt; the SDK checks whether they occur in it.
    """
    for word in words:
        if word.label == label and not word.first:
            return word.text, list(word.tokens)
    return label.strip(), None
