"""What was done to a request and may not have been meant: answers have it, whole; the log has its kind alone."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from loopback import PROMPT, Gated, Running, concept, disc, picture, png, running

from magicface_rt import Concept, Reference
from magicface_rt.serve import Warned
from magicface_rt.serve.wire import KeptId, made_of

STRETCHED = Concept(
    "man", Reference(picture(1), mask=disc((5, 10, 40, 45), size=48), prompt="a man"), name="Secretname"
)
SOUND = concept("hat", 2)


@pytest.fixture
def server(session: Gated) -> Iterator[Running]:
    with running(session) as started:
        yield started


def order(**more: Any) -> dict[str, Any]:
    """With a mask of half the image's size."""
    files = {"image": png(picture(1)), "mask": png(disc((5, 10, 40, 45), size=48))}
    inline = {name: base64.b64encode(data).decode() for name, data in files.items()}
    return {"prompt": PROMPT, "concepts": [{"word": "man", "references": [inline]}], "steps": 1, **more}


def told(found: tuple[Warned, ...]) -> list[tuple[str, str | None]]:
    return [(one.kind, one.field) for one in found]


def test_an_upload_says_what_was_done_to_its_mask(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), server.client() as client:
        made, again = client.put_concept(STRETCHED), client.put_concept(STRETCHED)
        assert (made.new, again.new) == (True, False)
        for kept in (made, again):
            assert told(kept.warnings) == [("mask-stretched", "mask")]
            assert "48 x 48, its image 96 x 96" in kept.warnings[0].detail
        assert "warnings" not in client.concept(made.id).info
        assert client.concepts()[0].warnings == ()
        assert client.put_concept(SOUND).warnings == ()
    assert [record.getMessage() for record in caplog.records] == ["a request was warned of: mask-stretched"] * 2


def form(one: Concept) -> dict[str, Any]:
    """A concept as a form that any client may send."""
    (reference,) = one.references
    assert not isinstance(reference.image, (str, bytes))
    files = {"image": png(reference.image), "mask": png(reference.mask)}  # type: ignore[arg-type]
    return {"files": files, "data": {"word": one.word, "prompt": reference.prompt}}


def http(server: Running) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=60)


def test_a_second_upload_under_another_word_is_told_which_word_it_has(server: Running) -> None:
    (reference,) = SOUND.references
    with server.client() as client:
        first = client.put_concept(SOUND)
        second = client.put_concept(Concept("man", reference))
        assert (first.id, first.word, first.warnings) == (second.id, "hat", ())
        assert told(second.warnings) == [("word-kept", "word")]
        assert "with the word 'hat' before" in second.warnings[0].detail
        assert client.put_concept(SOUND).warnings == ()
        with http(server) as sender:
            wordless = {**form(SOUND), "data": {"prompt": reference.prompt, "steps": "3"}}
            assert sender.put("/v1/concepts", **wordless).json()["warnings"] == []
        third = client.put_concept(SOUND, steps=3)
        assert "without a word before" in third.warnings[0].detail


@pytest.mark.parametrize("stream", [False, True], ids=["answer", "events"])
def test_a_picture_says_what_was_done_to_the_masks_of_its_own_references(server: Running, stream: bool) -> None:
    with http(server) as sender:
        answer = sender.post("/v1/images", json=order(response="json", stream=stream))
    content = answer.json() if not stream else last_event(answer.text)
    made = made_of(content)
    assert told(made.warnings) == [("mask-stretched", "concepts[0].references[0].mask")]


def last_event(text: str) -> Any:
    return json.loads(text.rstrip().rpartition("data: ")[2])


def test_where_the_answer_is_a_picture_a_header_has_the_kinds(server: Running) -> None:
    with http(server) as sender:
        answer = sender.post("/v1/images", json=order(response="png"))
        plain = sender.post("/v1/images", json={"prompt": PROMPT, "steps": 1, "response": "png"})
    assert answer.headers["Magicface-Warnings"] == "mask-stretched"
    assert "Magicface-Warnings" not in plain.headers


def test_each_request_has_its_own(server: Running) -> None:
    """However many are decoded and made at the same time."""

    def ask(warned: bool) -> list[str]:
        plain = {"prompt": PROMPT, "steps": 1, "response": "json"}
        with http(server) as sender:
            answer = sender.post("/v1/images", json=order(response="json") if warned else plain)
        return [one["kind"] for one in answer.json()["warnings"]]

    turns = [bool(n % 2) for n in range(8)]
    with ThreadPoolExecutor(len(turns)) as pool:
        assert list(pool.map(ask, turns)) == [["mask-stretched"] if warned else [] for warned in turns]


def test_a_service_that_says_none_is_understood() -> None:
    info = {"id": "0" * 64, "word": None, "steps": 1, "reference_seed": 0, "bytes": 1}
    assert KeptId.of(info).warnings == ()
    for spoiled in (None, {}, [3], [{"kind": 1, "detail": "", "field": None}], [{"kind": "a"}]):
        with pytest.raises((TypeError, LookupError)):
            KeptId.of({**info, "warnings": spoiled})
