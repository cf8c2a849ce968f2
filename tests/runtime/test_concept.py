from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt.concept import Concept, PlacedConcept, Reference, place_concepts
from magicface_rt.errors import ConceptError, ImageError, InputError, OptionError, PromptError

MAN = Reference("man.jpg", mask="man-mask.png", prompt="a man")
HAT = Reference("hat.png")


class WordTokenizer:
    """One token for each word, two for words with a plus."""

    def tokens(self, prompt: str) -> tuple[str, ...]:
        return ("<start>", *prompt.replace("+", " ").split(), "<end>")

    def find_word(self, prompt: str, word: str) -> tuple[int, ...]:
        tokens, parts = self.tokens(prompt), word.replace("+", " ").split()
        for first in range(1, len(tokens) - len(parts)):
            if list(tokens[first : first + len(parts)]) == parts:
                return tuple(range(first, first + len(parts)))
        raise PromptError(f"the word {word!r} is not in the prompt")


def place(prompt: str, *concepts: Concept, limit: int = 6) -> tuple[PlacedConcept, ...]:
    return place_concepts(prompt, concepts, WordTokenizer(), limit)


def test_a_concept_is_made_as_the_documentation_shows() -> None:
    man = Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man"), weight=2.5)
    assert (man.word, man.weight, man.token_index, man.name) == ("man", 2.5, None, "man")
    assert man.references[0].prompt == "a man"
    assert man.references[0].mask_threshold == 128
    assert man.references[0].resample == "lanczos"


def test_a_concept_has_weight_three_unless_told() -> None:
    assert Concept("man", MAN).weight == 3.0


def test_several_references_by_position_or_by_name() -> None:
    assert Concept("man", MAN, HAT).references == (MAN, HAT)
    assert Concept("man", references=[MAN, HAT]).references == (MAN, HAT)


def test_one_token_index_or_several() -> None:
    assert Concept("man", MAN, token_index=5).token_index == (5,)
    assert Concept("man", MAN, token_index=[6, 5, 6]).token_index == (5, 6)
    assert Concept("man", MAN, token_index=np.int64(5)).token_index == (5,)


def test_concepts_are_frozen_copied_replaced_and_pickled() -> None:
    concept = Concept("man", MAN, weight=2.0, token_index=4, name="the man")
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.weight = 3.0  # type: ignore[misc]
    changed = dataclasses.replace(concept, weight=4.0)
    assert (changed.weight, changed.references, changed.token_index, changed.name) == (4.0, (MAN,), (4,), "the man")
    assert copy.deepcopy(concept).name == "the man"
    assert pickle.loads(pickle.dumps(concept)).weight == 2.0
    assert "the man" in repr(concept)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 100.5, -101, 10**400, "3", None, True])
def test_impossible_weights_are_refused(weight: Any) -> None:
    with pytest.raises(ConceptError, match=r"concept 'man': weight is .*, expected a"):
        Concept("man", MAN, weight=weight)


@pytest.mark.parametrize("weight", [0, -100, 100, np.float32(2.5)])
def test_the_ends_of_the_range_are_weights(weight: Any) -> None:
    assert isinstance(Concept("man", MAN, weight=weight).weight, float)


@pytest.mark.parametrize("index", [0, -1, [2, 0], [], "5", 1.0, [True], True])
def test_impossible_token_indices_are_refused(index: Any) -> None:
    with pytest.raises(ConceptError, match="token_index"):
        Concept("man", MAN, token_index=index)


@pytest.mark.parametrize("word", ["", "  ", None, 3])
def test_a_concept_needs_a_word(word: Any) -> None:
    with pytest.raises(ConceptError, match="word is"):
        Concept(word, MAN)


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(ConceptError, match="name is"):
        Concept("man", MAN, name=name)


@pytest.mark.parametrize(("word", "name"), [("man", "a\0"), ("man", "a\0b"), ("man\0", None)])
def test_a_name_is_one_that_regions_can_hold(word: str, name: str | None) -> None:
    with pytest.raises(ConceptError, match=r"name is '.*\\x00b?', expected text without NUL"):
        Concept(word, MAN, name=name)
    assert Concept("man\0", MAN, name="man").name == "man"


def test_a_concept_needs_references() -> None:
    with pytest.raises(ConceptError, match="'man' has no reference"):
        Concept("man")
    with pytest.raises(ConceptError, match=r"reference 2 is a str.*Wrap"):
        Concept("man", MAN, "hat.png")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"image": None}, ImageError, "image is None"),
        ({"image": "a.png", "prompt": None}, PromptError, "prompt is None"),
        ({"image": 3}, ImageError, "image is 3"),
        ({"image": b"\x89PNG"}, ImageError, r"image is b'\\x89PNG'"),
        ({"image": "a.png", "mask_threshold": 0}, OptionError, "mask_threshold is 0"),
        ({"image": "a.png", "mask_threshold": 256}, OptionError, "mask_threshold is 256"),
        ({"image": "a.png", "mask_threshold": True}, OptionError, "mask_threshold is True"),
        ({"image": "a.png", "mask_threshold": 128.0}, OptionError, "mask_threshold is 128.0"),
        ({"image": "a.png", "resample": "cubic"}, OptionError, "resample is 'cubic'"),
        ({"image": "a.png", "resample": np.array(["lanczos", "nearest"])}, OptionError, r"resample is array\(\["),
        ({"image": "a.png", "resample": np.array(["lanczos"])}, OptionError, r"resample is array\(\["),
    ],
)
def test_fields_of_a_reference_are_checked(fields: dict[str, Any], error: type[InputError], named: str) -> None:
    with pytest.raises(error, match=named):
        Reference(**fields)


def test_words_are_placed_in_the_order_of_the_concepts() -> None:
    placed = place("a man with a sun+hat", Concept("sun+hat", HAT), Concept("man", MAN))
    assert [(p.concept.word, p.tokens) for p in placed] == [("sun+hat", (5, 6)), ("man", (2,))]


def test_no_concepts_are_placed_as_none() -> None:
    assert place("a man") == ()


def test_a_token_index_replaces_the_search() -> None:
    placed = place("a man and a man", Concept("man", MAN), Concept("man", MAN, token_index=5, name="other"))
    assert [p.tokens for p in placed] == [(2,), (5,)]
    assert place("a man", Concept("person", MAN, token_index=2))[0].tokens == (2,)


def test_a_missing_word_names_the_concept() -> None:
    with pytest.raises(PromptError, match="concept 'my cat': the word 'cat' is not in the prompt"):
        place("a man", Concept("cat", MAN, name="my cat"))


def test_two_concepts_on_one_token_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConceptError) as caught:
        place("a man and a man", Concept("man", MAN, name="first"), Concept("man", HAT, name="second"))
    message = str(caught.value)
    for part in ("'first'", "'second'", "token 2", "'man'", "token_index", "5 'man'"):
        assert part in message


def test_words_that_share_one_of_their_tokens_are_refused() -> None:
    with pytest.raises(ConceptError, match="both stand on token 3"):
        place("a red hat", Concept("red+hat", HAT), Concept("hat", HAT))


@pytest.mark.parametrize("index", [3, 76])
def test_a_token_index_outside_the_prompt_is_refused(index: int) -> None:
    with pytest.raises(
        ConceptError, match=rf"'man': token_index {index} .* expected 1..2: the tokens are 1 'a', 2 'man'"
    ):
        place("a man", Concept("man", MAN, token_index=index))
    with pytest.raises(ConceptError, match=r"expected nothing: the prompt is empty\.$"):
        place("", Concept("man", MAN, token_index=index))


def test_too_many_concepts_are_refused_by_name() -> None:
    with pytest.raises(ConceptError, match=r"2 concepts .*'man', 'hat'.* at most 1"):
        place("a man hat", Concept("man", MAN), Concept("hat", HAT), limit=1)


def test_the_ends_of_the_range_are_thresholds_and_token_indices() -> None:
    assert [Reference("a.png", mask_threshold=threshold).mask_threshold for threshold in (1, 255)] == [1, 255]
    assert Concept("man", MAN, token_index=1).token_index == (1,)
    assert place("a man", Concept("man", MAN, token_index=1))[0].tokens == (1,)


def test_images_are_brought_to_size_in_either_way() -> None:
    assert [Reference("a.png", resample=one).resample for one in ("lanczos", "nearest")] == ["lanczos", "nearest"]  # type: ignore[arg-type]


def test_a_prompt_of_a_reference_is_empty_unless_told() -> None:
    assert (HAT.prompt, HAT.mask) == ("", None)


def test_as_many_concepts_as_the_bundle_takes_are_placed() -> None:
    assert len(place("a man hat", Concept("man", MAN), Concept("hat", HAT), limit=2)) == 2


def test_references_and_concepts_are_themselves_and_no_others() -> None:
    """They hold arrays, which have no one answer to ==; sets and dicts take them."""
    pixels = np.zeros((2, 2, 4), np.uint8)
    references = [Reference(pixels), Reference(pixels)]
    assert len(set(references)) == 2
    assert len({Concept("man", reference) for reference in [*references, references[0]]}) == 3
    for frozen in (MAN, Concept("man", MAN), PlacedConcept(Concept("man", MAN), (2,))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.tokens = frozen.prompt = ()  # type: ignore[union-attr, misc]


def test_a_reference_is_described_by_all_that_it_says() -> None:
    """As run.json has it: by these names a picture is made again."""
    reference = Reference("man.jpg", Path("man-mask.png"), "a man", mask_threshold=np.uint8(7), resample="nearest")
    assert json.loads(json.dumps(reference.describe())) == {
        "image": "man.jpg",
        "mask": "man-mask.png",
        "prompt": "a man",
        "mask_threshold": 7,
        "resample": "nearest",
    }
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    described = Reference(pixels, pixels[..., 0]).describe()
    for name, of in (("image", pixels), ("mask", pixels[..., 0])):
        assert described[name] == {"shape": list(of.shape), "sha256": hashlib.sha256(of.tobytes()).hexdigest()}
    assert HAT.describe()["mask"] is None


def sha256(image: Image.Image) -> str:
    return str(Reference(image).describe()["image"]["sha256"])


def test_an_image_is_described_by_what_it_looks_like() -> None:
    rgb = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert sha256(rgb) == hashlib.sha256(rgb.tobytes()).hexdigest()
    grey = rgb.convert("L")
    assert Reference(grey).describe()["image"] == {
        "shape": [4, 4],
        "sha256": hashlib.sha256(grey.tobytes()).hexdigest(),
    }
    red, green, seen_through, named = (Image.new("P", (4, 4)) for _ in range(4))
    for image in (red, seen_through, named):
        image.putpalette([255, 0, 0])
    green.putpalette([0, 255, 0])
    seen_through.info["transparency"] = 0
    clear, upright, turned = (rgb.copy() for _ in range(3))
    clear.info["transparency"] = (0, 1, 2)
    turned.getexif()[0x0112] = 6
    different = [red, green, seen_through, rgb, clear, turned]
    assert len({sha256(image) for image in different}) == len(different)
    assert (sha256(red), sha256(rgb)) == (sha256(named), sha256(upright))
