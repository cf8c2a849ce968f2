from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from magicface_rt.errors import BundleError, PromptError
from magicface_rt.export.tokenizer import END, START, build_tokenizer_json, clip_vocabulary
from magicface_rt.tokenizer import Tokenizer

TOKENIZER_JSON = build_tokenizer_json(*clip_vocabulary())
CLIP = Tokenizer(tokenizers.Tokenizer.from_str(TOKENIZER_JSON), pad_token_id=49407)


def test_a_prompt_is_start_tokens_end_and_padding() -> None:
    ids = CLIP.encode("a photo of a cat")
    assert ids.dtype == np.int64
    assert ids.tolist() == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71


def test_an_empty_prompt_is_start_end_and_padding() -> None:
    assert CLIP.encode("").tolist() == [49406] + [49407] * 76


def test_padding_is_the_token_that_was_asked_for() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(TOKENIZER_JSON), pad_token_id=0, max_length=10)
    assert tokenizer.encode("a cat").tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0, 0, 0]


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    content = json.loads(TOKENIZER_JSON)
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 5,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json", pad_token_id=49407)
    np.testing.assert_array_equal(tokenizer.encode("a photo of a cat"), CLIP.encode("a photo of a cat"))
    assert tokenizer.find_word("a photo of a cat", "cat") == (5,)


def test_tokens_stand_at_their_positions() -> None:
    assert CLIP.tokens("A man's hat") == (START, "A", "man", "'s", "hat", END)


def test_seventy_five_tokens_fit_and_one_more_does_not() -> None:
    assert CLIP.encode("cat " * 75)[-1] == 49407
    with pytest.raises(PromptError, match="76 tokens, at most 75"):
        CLIP.encode("cat " * 75 + "dog")


def test_the_lost_words_are_named_as_they_stand_in_the_prompt() -> None:
    with pytest.raises(PromptError, match="would be lost: 'Sunhats, Zürich'"):
        CLIP.encode("cat " * 75 + "Sunhats, Zürich")


def test_a_word_of_which_a_part_is_lost_is_lost() -> None:
    assert len(CLIP.tokens("supercalifragilistic")) > 3
    with pytest.raises(PromptError, match="would be lost: 'supercalifragilistic end'"):
        CLIP.encode("cat " * 74 + "supercalifragilistic end")


def test_many_lost_words_are_counted() -> None:
    with pytest.raises(PromptError, match=r"\(and 80 more\)"):
        CLIP.encode("cat " * 175)


@pytest.mark.parametrize(
    ("prompt", "word", "positions"),
    [
        ("a man with a hat wearing a sunglasses", "man", (2,)),
        ("a man with a hat wearing a sunglasses", "sunglasses", (8,)),
        ("a pencil drawing of Elsa", "elsa", (5,)),
        ("a MAN", "Man", (2,)),
        ("a man in a red hat", "red hat", (5, 6)),
        ("a man in a red\n  hat", " red   hat ", (5, 6)),
        ("hats, and a hat.", "hat", (5,)),
        ("the man, the man", "man", (2,)),
        ("a man's hat", "man", (2,)),
        ("a top-hat", "hat", (4,)),
        ("red_hat", "hat", (3,)),
        ("(hat)", "hat", (2,)),
        ("a hat", "a", (1,)),
        ("hat", "hat", (1,)),
    ],
)
def test_words_are_found(prompt: str, word: str, positions: tuple[int, ...]) -> None:
    assert CLIP.find_word(prompt, word) == positions


def test_a_word_of_several_tokens_has_several_positions() -> None:
    positions = CLIP.find_word("a supercalifragilistic hat", "Supercalifragilistic")
    assert positions == tuple(range(2, 2 + len(positions)))
    assert len(positions) > 1
    assert CLIP.find_word("a supercalifragilistic hat", "hat") == (positions[-1] + 1,)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("zürich naïve 日本 🎩 hat", "naïve"),
        ("zürich naïve 日本 🎩 hat", "日本"),
        ("zürich naïve 日本 🎩 hat", "🎩"),
        ("cafe\u0301 hat", "café"),  # decomposed in the prompt, composed in the word
        ("café hat", "cafe\u0301"),
    ],
)
def test_words_beyond_ascii_are_found_with_all_their_tokens(prompt: str, word: str) -> None:
    positions = CLIP.find_word(prompt, word)
    ids = CLIP.encode(prompt)
    alone = CLIP.encode(word)
    assert ids[list(positions)].tolist() == alone[1 : 1 + len(positions)].tolist()
    assert alone[1 + len(positions)] == 49407
    assert CLIP.find_word(prompt, "hat")[0] > positions[-1]


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a man in hats", "hat"),
        ("a woman", "man"),
        ("some supercalifragilistic", "listic"),
        ("a red, hat", "red hat"),
        ("the 4k", "k"),
        ("the 4k", "4"),
        ("cafe\u0301", "cafe"),
        ("", "man"),
        ("a man", ""),
        ("a man", "  "),
        ("hat", "hat hat"),
    ],
)
def test_words_that_are_not_there_are_not_found(prompt: str, word: str) -> None:
    with pytest.raises(PromptError, match="is not in the prompt"):
        CLIP.find_word(prompt, word)


def test_a_token_that_ends_another_word_is_not_that_word() -> None:
    prompt = "supercalifragilistic"
    last = CLIP.tokens(prompt)[-2]
    assert CLIP.encode(last)[1] == CLIP.encode(prompt)[len(CLIP.tokens(prompt)) - 2]
    with pytest.raises(PromptError, match="is not in the prompt"):
        CLIP.find_word(prompt, last)


def test_a_missing_word_is_answered_with_the_words_there_are() -> None:
    with pytest.raises(
        PromptError, match="'cat' is not in the prompt 'a man, a hat'; its words are 'a', 'man,', 'a', 'hat'"
    ):
        CLIP.find_word("a man, a hat", "cat")


@given(
    words=st.lists(
        st.sampled_from(["man", "hat", "woman", "sunglasses", "red", "zürich", "日本", "4k", "supercali"]),
        min_size=1,
        max_size=8,
    )
)
def test_every_word_of_a_prompt_is_found_where_it_first_stands(words: list[str]) -> None:
    prompt = " ".join(words)
    for word in words:
        first = len(CLIP.tokens(" ".join(words[: words.index(word)]))) - 1
        assert CLIP.find_word(prompt, word) == tuple(range(first, first + len(CLIP.tokens(word)) - 2))


@given(prompt=st.text(max_size=300), word=st.text(max_size=20))
def test_any_text_is_encoded_or_refused(prompt: str, word: str) -> None:
    try:
        ids = CLIP.encode(prompt)
        assert ids.shape == (77,)
        assert len(CLIP.tokens(prompt)) <= 77
        positions = CLIP.find_word(prompt, word)
        assert all(1 <= p <= 75 for p in positions)
    except PromptError:
        pass


@pytest.mark.parametrize("prompt", [None, 3, b"a man", "a \ud800 man"])
def test_what_is_no_text_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match=r"expected text|valid Unicode"):
        CLIP.encode(prompt)


def test_files_that_are_no_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "none.json", pad_token_id=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", pad_token_id=0)


def test_start_and_end_are_found_by_name_without_a_post_processor() -> None:
    content = json.loads(TOKENIZER_JSON)
    content["post_processor"] = None
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), pad_token_id=49407)
    assert tokenizer.encode("a cat").tolist() == CLIP.encode("a cat").tolist()


def test_start_and_end_are_what_the_post_processor_says() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[S]": 1, "[E]": 2}, unk_token="a"))
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[S] $A [E]", special_tokens=[("[S]", 1), ("[E]", 2)]
    )
    assert Tokenizer(words, pad_token_id=0, max_length=5).encode("a").tolist() == [1, 0, 2, 0, 0]


def test_a_tokenizer_without_start_and_end_is_refused() -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(BundleError, match="no start and end token"):
        Tokenizer(plain, pad_token_id=0)


@pytest.mark.parametrize("pad_token_id", [-1, 49408, True, None])
def test_a_pad_token_outside_the_vocabulary_is_refused(pad_token_id: Any) -> None:
    with pytest.raises(BundleError, match="pad_token_id"):
        Tokenizer(tokenizers.Tokenizer.from_str(TOKENIZER_JSON), pad_token_id=pad_token_id)
