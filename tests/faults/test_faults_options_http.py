"""Every field that a client may send, changed alone: what arrives at the Session is that, and nothing else changes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import figures
import numpy as np
import pytest

pytest.importorskip("fastapi")

from PIL import Image

from magicface_rt import Concept, KeptConcept, Options, Reference, Request, Session
from magicface_rt.images import load_image, load_mask
from magicface_rt.kept import Origin
from magicface_rt.serve.concepts import StoredConcept
from magicface_rt.serve.job import EngineJob
from magicface_rt.serve.local import LocalService
from magicface_rt.serve.multipart import Form
from magicface_rt.serve.orders import read_upload
from magicface_rt.serve.reading import FORM_PARTS, upload_of
from magicface_rt.serve.schemas import ConceptUse, InlineReference, PictureOrder
from magicface_rt.serve.service import ConceptUpload
from magicface_rt.serve.settings import ServeSettings
from tests.runtime.drawn_backend import Drawn
from tests.runtime.test_session import disc, picture


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


REFERENCE: dict[str, Any] = {
    "image": base64_of(picture(1)),
    "mask": base64_of(disc((10, 20, 80, 90))),
    "prompt": "a man",
    "mask_threshold": 128,
    "resample": "lanczos",
}
USE: dict[str, Any] = {"references": [REFERENCE], "word": "man", "weight": 2.5, "token_index": None, "name": "he"}
ORDER: dict[str, Any] = {"prompt": "a man with a hat", "concepts": [USE], "steps": 4, "seed": 7}


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with Session(tiny_bundle, backend=Drawn(), check_hashes=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def prepared(session: Session) -> KeptConcept:
    return session.prepare(Concept("man", Reference(picture(1), mask=disc((10, 20, 80, 90)))), steps=4)


@pytest.fixture(scope="module")
def another(session: Session) -> KeptConcept:
    return session.prepare(Concept("man", Reference(picture(9), mask=disc((10, 20, 80, 90)))), steps=4)


class Stopped(Exception):  # noqa: N818 - it is what the test waits for
    """A job has arrived."""


class Listening(LocalService):
    """A service that goes no further than the queue. `job`: what would have been put there."""

    def __init__(self, session: Session, kept: Mapping[str, KeptConcept]) -> None:
        engine: Any = SimpleNamespace(sessions=[session], settings=ServeSettings(), draining=False, waiting=0)
        store: Any = SimpleNamespace(get=lambda id: StoredConcept(id, kept[id], 0.0))
        super().__init__(engine, store)

    async def _done(self, job: EngineJob, *_: Any) -> Any:
        self.job = job
        raise Stopped


@pytest.fixture
def arrive(
    session: Session, prepared: KeptConcept, another: KeptConcept
) -> Iterator[Callable[[dict[str, Any]], EngineJob]]:
    """Gives the job that an order becomes."""
    service = Listening(session, {"an id": prepared, "another id": another})

    def job(order: dict[str, Any]) -> EngineJob:
        with pytest.raises(Stopped):
            asyncio.run(service.generate(PictureOrder.model_validate_json(json.dumps(order)), owner="me"))
        return service.job

    yield job
    service._decoders.shutdown()
    service._files.shutdown()


def seen(job: EngineJob) -> dict[str, Any]:
    """Everything that a job says, by name."""
    request = job.work
    assert isinstance(request, Request)
    found: dict[str, Any] = {f"options.{name}": value for name, value in request.options.to_dict().items()}
    found |= {"prompt": request.prompt, "record_regions": request.record_regions, "alone": job.alone}
    assert job.deadline is not None
    found["short of time"] = job.deadline - job.enqueued < 100
    for k, concept in enumerate(request.concepts):
        found |= {f"{k}.{name}": getattr(concept, name) for name in ("word", "weight", "token_index", "name")}
        for j, one in enumerate(concept.references):
            if isinstance(one, Reference):
                assert one.mask is not None
                image, mask = load_image(one.image, name="x"), load_mask(one.mask, image_size=None, name="x")
                found[f"{k}.{j}.image"] = image.tobytes()
                found[f"{k}.{j}.mask"] = mask.tobytes()
                found |= {f"{k}.{j}.{n}": getattr(one, n) for n in ("prompt", "mask_threshold", "resample")}
            else:
                found[f"{k}.{j}.key"] = one.key
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What is new or another, and what is gone as None."""
    return {name: after.get(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


OTHER_FACE, OTHER_MASK = picture(9), disc((0, 0, 40, 40))

OF_ORDER: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": ("a man in the rain", {"prompt": "a man in the rain"}),
    "concepts": ([{**USE, "weight": 1.0}], {"0.weight": 1.0}),
    "negative_prompt": ("rain", {"options.negative_prompt": "rain"}),
    "steps": (5, {"options.steps": 5}),
    "guidance": (5.0, {"options.guidance": 5.0}),
    "alpha": (0.7, {"options.alpha": 0.7}),
    "ca_scale": (0.95, {"options.ca_scale": 0.95}),
    "weight_mode": ("scale", {"options.weight_mode": "scale"}),
    "semantic_guidance": (False, {"options.semantic_guidance": False}),
    "seed": (2**64 - 1, {"options.seed": 2**64 - 1}),
    "images": (2, {"options.images": 2}),
    "reference_seed": (3, {"options.reference_seed": 3}),
    "deadline": (50.0, {"short of time": True}),
    "alone": (True, {"alone": True}),
    "record_regions": (True, {"record_regions": True}),
    # How the answer is given, not what is made.
    "response": ("json", {}),
    "stream": (True, {}),
}
OF_USE: dict[str, tuple[Any, dict[str, Any]]] = {
    "word": ("hat", {"0.word": "hat"}),
    "weight": (-4.0, {"0.weight": -4.0}),
    "token_index": ([5, 2], {"0.token_index": (2, 5)}),
    "name": ("she", {"0.name": "she"}),
    "references": (
        [{**REFERENCE, "prompt": "a boy"}],
        {"0.0.prompt": "a boy"},
    ),
}
OF_REFERENCE: dict[str, tuple[Any, dict[str, Any]]] = {
    "image": (base64_of(OTHER_FACE), {"0.0.image": OTHER_FACE.tobytes()}),
    "mask": (base64_of(OTHER_MASK), {"0.0.mask": (np.asarray(OTHER_MASK) >= 128).tobytes()}),
    "prompt": ("a boy", {"0.0.prompt": "a boy"}),
    "mask_threshold": (255, {"0.0.mask_threshold": 255}),
    "resample": ("nearest", {"0.0.resample": "nearest"}),
}


def test_the_tables_have_every_field() -> None:
    assert OF_ORDER.keys() == PictureOrder.model_fields.keys()
    assert OF_USE.keys() | {"id"} == ConceptUse.model_fields.keys()
    assert OF_REFERENCE.keys() == InlineReference.model_fields.keys()
    assert {field.name for field in fields(Options)} <= OF_ORDER.keys()
    assert OF_FORM.keys() == set(FORM_PARTS)
    assert {field.name for field in fields(ConceptUpload)} <= {*OF_FORM, "references"}


ARRIVED: set[str] = set()


def arrived(field: str, expected: object) -> None:
    """Counts a field that was sent alone and arrived. Those that are not about the picture arrive nowhere here."""
    if expected:
        ARRIVED.add(field)
        figures.tell("numbers", "fields over HTTP, changed alone", f"{len(ARRIVED)} arrive, each alone")


@pytest.mark.parametrize("name", OF_ORDER)
def test_an_order(arrive: Callable[[dict[str, Any]], EngineJob], name: str) -> None:
    value, expected = OF_ORDER[name]
    assert changed(seen(arrive(ORDER)), seen(arrive({**ORDER, name: value}))) == expected
    arrived(f"order.{name}", expected)


@pytest.mark.parametrize("name", OF_USE)
def test_a_concept(arrive: Callable[[dict[str, Any]], EngineJob], name: str) -> None:
    value, expected = OF_USE[name]
    order = {**ORDER, "concepts": [{**USE, name: value}]}
    assert changed(seen(arrive(ORDER)), seen(arrive(order))) == expected
    arrived(f"concept.{name}", expected)


@pytest.mark.parametrize("name", OF_REFERENCE)
def test_a_reference(arrive: Callable[[dict[str, Any]], EngineJob], name: str) -> None:
    value, expected = OF_REFERENCE[name]
    order = {**ORDER, "concepts": [{**USE, "references": [{**REFERENCE, name: value}]}]}
    assert changed(seen(arrive(ORDER)), seen(arrive(order))) == expected
    arrived(f"reference.{name}", expected)


@pytest.mark.parametrize("name", [name for name in OF_USE if name != "references"])
def test_a_kept_concept(arrive: Callable[[dict[str, Any]], EngineJob], prepared: KeptConcept, name: str) -> None:
    value, expected = OF_USE[name]
    use = {"id": "an id", "word": "man", "name": "he"}
    before = seen(arrive({**ORDER, "concepts": [use]}))
    assert before["0.0.key"] == prepared.references[0].key
    assert changed(before, seen(arrive({**ORDER, "concepts": [{**use, name: value}]}))) == expected


def test_an_id(arrive: Callable[[dict[str, Any]], EngineJob], another: KeptConcept) -> None:
    order = {**ORDER, "concepts": [{"id": "an id"}]}
    other = {**ORDER, "concepts": [{"id": "another id"}]}
    expected = {"0.0.key": another.references[0].key}
    assert changed(seen(arrive(order)), seen(arrive(other))) == expected
    arrived("concept.id", expected)


def test_what_is_not_said_is_as_the_kept_concept_has_it(
    arrive: Callable[[dict[str, Any]], EngineJob], session: Session, prepared: KeptConcept
) -> None:
    order = {"prompt": "a man", "concepts": [{"id": "an id"}]}
    found = seen(arrive(order))
    assert (found["options.steps"], found["options.reference_seed"]) == (4, 0)
    assert (found["0.word"], found["0.weight"], found["0.token_index"], found["0.name"]) == ("man", 3.0, None, "man")
    defaults = {f"options.{name}": value for name, value in Options(steps=4).to_dict().items()}
    assert {name: value for name, value in found.items() if name.startswith("options.")} == defaults
    assert seen(arrive({"prompt": "a man"}))["options.steps"] == ServeSettings().default_steps


# ----------------------------------------------------------------------------------------------- concepts that are put

FORM: dict[str, list[bytes]] = {
    "image": [png(picture(1))],
    "mask": [png(disc((10, 20, 80, 90)))],
    "prompt": [b"a man"],
    "word": [b"man"],
    "steps": [b"4"],
}
OF_FORM: dict[str, tuple[list[bytes], set[str]]] = {
    "image": ([png(OTHER_FACE)], {"pixels", "key"}),
    "mask": ([png(OTHER_MASK)], {"mask", "key"}),
    "prompt": ([b"a boy"], {"prompt", "key"}),
    "word": ([b"hat"], {"word"}),
    "steps": ([b"5"], {"steps", "key"}),
    "reference_seed": ([b"18446744073709551615"], {"reference_seed", "key"}),
    "storage": ([b"8-bit"], {"storage", "key"}),
    "mask_threshold": ([b"255"], {"threshold"}),  # the mask is black and white
    "resample": ([b"nearest"], {"resample", "pixels", "key"}),
}


def put(session: Session, form: Mapping[str, list[bytes]]) -> dict[str, Any]:
    """What a form becomes."""
    upload = upload_of(Form(dict(form)))
    concept, (bare,), origin = read_upload(upload, session, ServeSettings())
    assert origin == Origin.of(session.bundle, origin.steps, origin.reference_seed)
    (reference,) = concept.references
    return {
        "word": concept.word,
        "steps": origin.steps,
        "reference_seed": origin.reference_seed,
        "storage": upload.storage,
        "prompt": bare.prompt,
        "threshold": reference.mask_threshold,
        "resample": reference.resample,
        "pixels": bare.loaded.pixels(origin.height, origin.width).tobytes(),
        "mask": bare.loaded.mask_grid.tobytes(),
        "key": bare.key(origin, upload.storage),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", OF_FORM)
def test_a_form(session: Session, name: str) -> None:
    value, expected = OF_FORM[name]
    before, after = put(session, FORM), put(session, {**FORM, name: value})
    assert {part for part in before if before[part] != after[part]} == expected
    text = value[0].decode("latin-1")
    assert name in ("image", "mask") or text in {str(after[part]) for part in expected}
    arrived(f"form.{name}", expected)
