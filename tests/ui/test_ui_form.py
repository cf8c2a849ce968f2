"""From the page's fields to an order, and from an order to the calls that the page shows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example as tried
from hypothesis import given
from hypothesis import strategies as st
from paging import Held, bridged, disc, photograph, png
from PIL import Image

import magicface_rt
from magicface_rt import OptionError
from magicface_rt.images import region_overlay
from magicface_rt.serve.schemas import MOST_TEXT
from magicface_rt.serve.service import Outcome
from magicface_rt.serve.wire import Warned
from magicface_rt.tokenizer import Tokenizer
from magicface_rt.ui import saying
from magicface_rt.ui.examples import EXAMPLES, thumbnail
from magicface_rt.ui.examples import bridged as example_bridged
from magicface_rt.ui.form import Form, FormConcept, Photograph, photographs
from magicface_rt.ui.result import COLOURS
from magicface_rt.ui.words import chosen, words_of

SETTINGS = {"steps": 3, "alpha": 0.4, "seed": 1, "guidance": 7.5, "negative_prompt": ""}
DEMO = Path(__file__).parents[2] / "demo" / "photograph"


def form(*concepts: FormConcept, prompt: str = "a man with a hat") -> Form:
    return Form(prompt, concepts, SETTINGS)


def filled(slot: int, word: str, name: str = "man.jpg") -> FormConcept:
    return FormConcept(Photograph(slot, "aGVsbG8=", "aGVsbG8=", name), word, 2.5, "a man")


def test_every_word_of_the_prompt_is_offered_with_its_tokens(session: Held) -> None:
    prompt = "a man's t-shirt, and a man with sunglasses"
    words = {word.label: word for word in words_of(session.tokenizer, prompt)}
    assert {"t-shirt", "and", "with", "sunglasses"} < set(words)
    tokens = session.tokenizer.tokens(prompt)
    for word in words.values():
        assert "".join(tokens[k] for k in word.tokens).replace(" ", "") == word.text
        if word.first:
            assert session.tokenizer.find_word(prompt, word.text) == word.tokens


def test_a_word_that_stands_twice_can_be_told_apart(session: Held) -> None:
    words = words_of(session.tokenizer, "a man beside a man")
    assert [word.label for word in words] == ["a", "man", "beside", "a (2)", "man (2)"]
    assert chosen(words, "man") == ("man", None)
    assert chosen(words, "man (2)") == ("man", [5])
    assert chosen(words, " red hat ") == ("red hat", None)


def test_a_prompt_that_is_too_long_offers_nothing(session: Held) -> None:
    assert words_of(session.tokenizer, "man " * 90) == []


def test_words_with_letters_of_several_tokens_are_offered(session: Held) -> None:
    prompt = "a Straße, don’t, 日本 and _-"  # what stands alone and never does here by itself is passed over
    words = {word.label: word for word in words_of(session.tokenizer, prompt)}
    assert {"Straße", "don’t", "日本"} < set(words)
    assert all(word.first for word in words.values())


def test_a_prompt_is_encoded_once_whatever_the_number_of_its_words(
    session: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    real = Tokenizer._raw_encode

    def noted(self: Tokenizer, text: str, what: str) -> object:
        encoded.append(text)
        return real(self, text, what)

    monkeypatch.setattr(Tokenizer, "_raw_encode", noted)
    prompt = " " * 1000 + " ".join(f"w{k}" for k in range(25))
    assert len(words_of(session.tokenizer, prompt)) == 25
    assert sum(map(len, encoded)) < 4 * len(prompt)
    encoded.clear()
    assert words_of(session.tokenizer, " " * MOST_TEXT + "man") == []
    with pytest.raises(OptionError, match=f"^prompt: .*{MOST_TEXT}"):
        form(filled(1, "man"), prompt=" " * MOST_TEXT + "man").order(session.tokenizer)
    assert not encoded, "it is refused first"


def test_the_order_has_what_stands_on_the_page(session: Held) -> None:
    order = form(filled(2, "man"), filled(4, "hat")).order(session.tokenizer)
    assert order.record_regions
    assert (order.steps, order.alpha, order.seed) == (3, 0.4, 1)
    assert [use.word for use in order.concepts] == ["man", "hat"]
    assert order.concepts[0].weight == 2.5
    assert order.concepts[0].references[0].prompt == "a man"  # type: ignore[index]


def test_a_concept_that_nobody_began_is_none_and_messages_keep_the_pages_numbers(session: Held) -> None:
    empty = FormConcept(Photograph(1), "", 3.0, "")
    both = form(empty, filled(3, "man"))
    assert len(both.order(session.tokenizer).concepts) == 1
    assert both.field_label("concepts[0].references[0].mask") == "Concept 3, mask"
    assert both.field_label("concepts[0].references[0].image") == "Concept 3, photograph"
    assert both.field_label("concepts[0].word") == "Concept 3, word"
    assert both.field_label("negative_prompt") == "Negative prompt"
    assert both.field_label(None) == ""


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("seed", None), ("steps", 2.5), ("alpha", 2.0)])
def test_a_field_out_of_range_is_named(session: Held, name: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"^{name}: "):
        Form("a man", (), {**SETTINGS, name: value}).order(session.tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        "nonsense",
        '[{"slot": 1}]',
        '[{"slot": 1, "image": 2, "mask": null, "name": ""}]',
        "[[]]",
        '[{"slot": 1, "image": "", "image": "eA==", "mask": null, "name": ""}]',
    ],
)
def test_what_the_script_does_not_send_is_refused(text: str) -> None:
    if text == "{}":
        assert photographs(text.encode()) == []
        return
    with pytest.raises(OptionError, match="Load it again"):
        photographs(text.encode())


def test_what_the_script_could_not_send_is_said() -> None:
    with pytest.raises(OptionError, match="too many"):
        photographs(json.dumps({"problem": "too many bytes"}).encode())


def names_of(*names: str) -> list[tuple[str, str]]:
    """The files of concepts 1, 2, ... in the calls."""
    return form(*(filled(slot, "man", name) for slot, name in enumerate(names, 1))).files()


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("IMG_1234.JPG", "IMG_1234-mask.png"),
        ("my man's photo.jpg", "my man's photo-mask.png"),
        ("Foto Jürgen (1).jpeg", "Foto Jürgen (1)-mask.png"),
        ("фото.jpg", "фото-mask.png"),
        ("Screenshot at 3.04.05\u202fPM.png", "Screenshot at 3.04.05\u202fPM-mask.png"),
        ("$(id);`x`, a,b.png", "$(id);`x`, a,b-mask.png"),
        ('what? "a".jpg', "what- -a-mask.png"),
        ("???.jpg", "photograph-1-mask.png"),
        ("photograph", "photograph-mask.png"),
    ],
)
def test_a_photograph_keeps_its_name_and_its_mask_one_that_a_browser_saves(name: str, mask: str) -> None:
    assert names_of(name) == [(name, mask)]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("", "photograph-1.png"),
        ("-o.jpg", "o.jpg"),
        (".hidden.JPG", "hidden.jpg"),
        ("..", "photograph-1.png"),
        ("../../etc/passwd.png", "etc-passwd.png"),
        ("..\\a\\b.png", "a-b.png"),
        ("two\nlines.jpg", "two-lines.jpg"),
        ("turned\u202egpj.exe", "turned-gpj.exe"),
        ("half\ud800.jpg", "half.jpg"),
        (" at the ends.jpg ", "at-the-ends.jpg"),
        ("é" * 110 + ".jpg", "photograph-1.jpg"),
        ("a" * 300, "a" * 100 + ".png"),
    ],
)
def test_a_name_that_is_none_is_made_plain(name: str, plain: str) -> None:
    ((image, mask),) = names_of(name)
    assert (image, mask) == (plain, plain.rpartition(".")[0] + "-mask.png")


def test_photographs_of_one_name_are_told_apart() -> None:
    assert names_of("my photo.JPG", "my photo.png", "") == [
        ("my photo.JPG", "my photo-mask.png"),
        ("my photo-2.png", "my photo-2-mask.png"),
        ("photograph-3.png", "photograph-3-mask.png"),
    ]


NAMES = st.text(alphabet='aA23-._ pngmsk"?;/\\ü\n', max_size=8) | st.sampled_from(
    [
        "a.png",
        "A.png",
        "a-3.png",
        "a-2.png",
        "a-mask.png",
        "a.jpg",
        "man.png",
        "man-mask.png",
        "out.png",
        "",
        "photograph-2",
    ]
)


@given(st.lists(NAMES, min_size=1, max_size=6))
@tried(["a-3.png", "a.png", "a.png"])
@tried(["man.png", "man-mask.png"])
@tried(["man-mask.png", "man.png"])
@tried(["A.png", "a.png"])
@tried(["out.png"])
@tried(["a.png", "a-2.png", "a-2-2.png", "a.png", "a-4.png"])
def test_the_calls_name_each_file_once_whatever_the_photographs_are_called(names: list[str]) -> None:
    found = names_of(*names)
    files = [name for pair in found for name in pair]
    assert len({name.lower() for name in (*files, "out.png")}) == 2 * len(names) + 1, files
    assert all(re.fullmatch(r"[^-./\\\n][^/\\\n]*", name) for name in files), files
    assert all(name == name.strip() for name in files), files
    assert all(re.search(r'["*:<>?|~]', mask) is None for _, mask in found), files
    # What the script sends are names that were made by the same rules: they stay.
    assert names_of(*(image for image, _ in found)) == found


def test_of_a_painted_mask_nobody_is_told_that_the_photograph_was_turned(session: Held) -> None:
    def told(painted: bool, kind: str = "image-turned", field: str = "concepts[1].references[0].mask") -> bool:
        second = replace(filled(3, "hat"), photograph=Photograph(3, "aGVsbG8=", "aGVsbG8=", "a.jpg", painted))
        warning = Warned(kind, "it was turned", field)
        outcome = Outcome((), np.zeros((1, 2, 2), np.int64), (), {"total": 1.0}, 1, {}, None, [warning])
        return "it was turned" in saying.done(outcome, form(filled(1, "man"), second).without_files())

    assert told(painted=False)
    assert not told(painted=True)
    assert told(painted=True, kind="mask-by-alpha")
    assert told(painted=True, field="concepts[0].references[0].mask"), "the first concept's mask was not painted"


def test_the_script_says_whether_a_mask_was_painted() -> None:
    one = {"slot": 1, "image": "eA==", "mask": "eA==", "name": "a.jpg"}
    (without,), (painted,) = (photographs(json.dumps([sent]).encode()) for sent in (one, {**one, "painted": True}))
    assert (without.painted, painted.painted) == (False, True)
    with pytest.raises(OptionError, match="Load it again"):
        photographs(json.dumps([{**one, "painted": 1}]).encode())


def test_the_examples_are_whole_and_those_of_the_demo(session: Held) -> None:
    for example in EXAMPLES:
        labels = [word.label for word in words_of(session.tokenizer, example.prompt)]
        assert all(one.word in labels for one in example.concepts)
        assert [one.slot for one in photographs(example_bridged(example).encode())] == list(
            range(1, len(example.concepts) + 1)
        )
        assert thumbnail(example).startswith("data:image/jpeg;base64,")
    here = Path(magicface_rt.__file__).parent / "ui" / "pictures"
    for name in ("woman", "hat"):
        assert (here / f"{name}.jpg").read_bytes() == (DEMO / "image" / f"{name}.jpg").read_bytes()
        assert (here / f"{name}-mask.png").read_bytes() == (DEMO / "mask" / f"{name}.png").read_bytes()


def test_regions_have_the_colours_of_the_sdks_overlays() -> None:
    picture = Image.new("RGB", (384, 384))
    for k, colour in enumerate(COLOURS, 1):
        drawn = region_overlay(picture, np.full((4, 4), k), [str(n) for n in range(len(COLOURS))]).getpixel((50, 50))
        assert drawn == tuple(round(0.45 * int(part, 16)) for part in re.findall("..", colour[1:]))


def test_bridged_photographs_are_read_back() -> None:
    image, mask = png(photograph(1)), png(disc())
    (one,) = photographs(bridged((2, image, mask)).encode())
    assert (one.slot, one.name) == (2, "p 2.png")
    assert one.image
    assert one.mask
