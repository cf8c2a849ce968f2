"""tokenizer.json, spoiled by who knows the format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from corruptions import places, texts_of
from outcomes import inputs, judged, little_memory, loop
from single_files import BY_NAME, small_tokenizer

from magicface_rt.errors import BundleError
from magicface_rt.tokenizer import MAX_FILE_BYTES, Tokenizer

READ = BY_NAME["tokenizer"].read


def tree() -> Any:
    return json.loads(small_tokenizer())


@inputs
def test_any_other_value(inputs: int, tmp_path: Path) -> None:
    path, sound = tmp_path / "tokenizer.json", tree()
    # Few of the many entries of the vocabulary, which are all alike.
    where = [at for at in places(sound) if at[:2] != ("model", "vocab") or at[-1] in ("vocab", "a", "hat</w>")]

    def check(content: bytes) -> None:
        path.write_bytes(content)
        judged("tokenizer, edited", lambda: READ(path), names=path)

    loop(inputs, texts_of(sound, where), check)


def test_a_model_that_does_not_know_every_word(tmp_path: Path) -> None:
    """The wheel raises a plain Exception, and only when a prompt has such a word."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[S]": 1, "[E]": 2}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[S] $A [E]", special_tokens=[("[S]", 1), ("[E]", 2)]
    )
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    tokenizer = Tokenizer.from_file(path, pad_token_id=0)
    assert tokenizer.encode("a a")[1:3].tolist() == [0, 0]
    with pytest.raises(BundleError, match="cannot encode the prompt 'a zebra'"):
        tokenizer.encode("a zebra")


def test_a_tokenizer_larger_than_any_is(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(small_tokenizer().encode())
    with path.open("r+b") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with little_memory(), pytest.raises(BundleError, match=r"tokenizer\.json.*larger than"):
        Tokenizer.from_file(path, pad_token_id=0)


@pytest.mark.parametrize("pad", [-1, 10**9, 2**64, None, "3", True])
def test_a_padding_token_that_is_none_names_the_file(pad: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(small_tokenizer())
    assert judged("tokenizer, edited", lambda: Tokenizer.from_file(path, pad_token_id=pad), names=path) is None


@pytest.mark.parametrize(
    "text",
    ["a" * 1_000_000, "a " * 500_000, " " * 1_000_000, "\u0301" * 300_000, "\U0001f600" * 200_000, "a\ud800" * 1000],
)
def test_a_prompt_of_a_megabyte_is_refused_in_few_words(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(small_tokenizer())
    tokenizer = Tokenizer.from_file(path, pad_token_id=0)
    uses = [
        (tokenizer.encode, "the prompt"),
        (tokenizer.tokens, "the prompt"),
        (lambda text: tokenizer.find_word(text, "hat"), "the prompt"),
        (lambda text: tokenizer.find_word("a hat", text), "the word"),
    ]
    for number, (use, name) in enumerate(uses):
        found = judged("prompt", lambda use=use: use(text), names=name)  # type: ignore[misc]
        nothing = not text.strip() and number < 2  # blanks are no tokens, however many there are
        assert (found is not None) == nothing
