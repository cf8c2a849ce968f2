"""Client side: what the client sends, and how it reads the answers. Nothing here opens a connection."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..computed import ComputedOnce
from ..concept import Concept, NamedConcept, Reference
from ..errors import (
    AnswerError,
    ConceptError,
    DeadlineError,
    DrainingError,
    ErasedError,
    EraseError,
    ImageError,
    InputError,
    OptionError,
    PromptError,
    QueueFullError,
    ServiceError,
    StoreFullError,
    UnknownConceptError,
    UnreachableError,
)
from ..files.strict_json import read_json
from ..images import MAX_PIXELS, load_alpha_mask, load_image, load_mask
from ..options import Options
from ..request import Progress
from ..results import encode_png
from ..values.plain_numbers import as_float
from ..values.shown import shown

__all__ = [
    "UNREADABLE",
    "EventParser",
    "Given",
    "KeptId",
    "Made",
    "Warned",
    "body_of",
    "error_of",
    "form_of",
    "listed",
    "made_of",
    "order_of",
    "pause",
]

LONGEST_WAIT = 86_400.0
"""Seconds. A service asks for 600 at most; what is between may ask for years, or for more than can be slept."""

MOST_DETAIL, MOST_WORD = 2000, 100
"""The most characters of a problem's texts that an error repeats, whoever sent them."""
MOST_BITS, MOST_DEPTH = 4096, 16
"""Limits on what is sent: bits of an integer, which Python may refuse to print, and depth of nested lists."""
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
MAX_PIXELS_TOGETHER = 4 * MAX_PIXELS
"""The most pixels of all pictures of an answer: a service makes at most four a request unless told otherwise."""
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)
"""What reading an answer may raise if it is not one of the service's."""

T = TypeVar("T")

_OPTIONS = {option.name for option in fields(Options)}
_OF_SERVICE = {"deadline", "alone", "record_regions"}
_KINDS: dict[str, type[ServiceError]] = {
    kind.kind: kind
    for kind in (
        DeadlineError,
        DrainingError,
        EraseError,
        ErasedError,
        QueueFullError,
        StoreFullError,
        UnknownConceptError,
    )
}


@dataclass(frozen=True)
class Warned:
    """Something that the service did to a request and that may not have been meant. `field`: the part of the request,
    or None.
    """

    kind: str
    detail: str
    field: str | None = None

    @classmethod
    def all_of(cls, content: Mapping[str, Any]) -> tuple[Warned, ...]:
        """Return the warnings of an answer; services of earlier releases send none."""
        return tuple(
            cls(
                _typed(str, one["kind"]),
                _typed(str, one["detail"]),
                None if one["field"] is None else _typed(str, one["field"]),
            )
            for one in _typed(list, content.get("warnings", []))
        )


@dataclass(frozen=True)
class KeptId:
    """A concept that a service keeps.

    word    what `use` takes unless told otherwise: that of the `Concept` that was put. Where there was none, it is the
            word under which the service got this content first, or None
    new     whether it was prepared now, rather than kept already
    info    all that the service says about it
    warnings    what was done to the upload that may not have been meant; none unless the concept was just put
    weight, token_index, name   what `use` takes unless told otherwise: those of the `Concept` that was put. The service
            does not keep them, so they are the defaults where the concept comes from the service's list or was asked
            for by its id
    """

    id: str
    word: str | None
    steps: int
    reference_seed: int
    nbytes: int
    new: bool = False
    info: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    weight: float = 3.0
    token_index: tuple[int, ...] | None = None
    name: str | None = None
    warnings: tuple[Warned, ...] = field(default=(), compare=False)

    def use(
        self,
        word: str | None = None,
        *,
        weight: float | None = None,
        token_index: int | Sequence[int] | None = None,
        name: str | None = None,
    ) -> dict[str, Any]:
        """Return the concept as `generate` takes it for a picture."""
        index = token_index
        if index is None and word in (None, self.word):  # another word would have other tokens
            index = self.token_index
        return {
            "id": self.id,
            "word": self.word if word is None else word,
            "weight": self.weight if weight is None else weight,
            "token_index": index if index is None or isinstance(index, (int, np.integer)) else list(index),
            "name": self.name if name is None else name,
        }

    def put_as(self, concept: Concept) -> KeptId:
        """Return a copy whose `use` has this concept's word, weight, token_index and name by default."""
        name = None if concept.name == concept.word else concept.name
        return replace(self, word=concept.word, weight=concept.weight, token_index=concept.token_index, name=name)

    @classmethod
    def of(cls, info: Mapping[str, Any], new: bool = False) -> KeptId:
        """Read a concept from the service's description of it."""
        word = info["word"]
        if word is not None:
            _typed(str, word)
        return cls(
            _typed(str, info["id"]),
            word,
            _typed(int, info["steps"]),
            _typed(int, info["reference_seed"]),
            _typed(int, info["bytes"]),
            new,
            info,
            warnings=Warned.all_of(info),
        )


@dataclass(frozen=True, eq=False)
class Made:
    """The pictures of a request.

    pngs      their files, byte for byte
    regions   int64 [B,h/2,w/2]: 0 where no concept is, k where `region_names[k - 1]` is
    timings   seconds by stage, of the batch that the request was made in, and `queued`
    batch     pictures that were made together
    settings  what run.json of a saved result holds
    regions_per_step    uint8 [T,B,h/2,w/2] after every step; None if `record_regions` was not asked for
    warnings  what was done to the request that may not have been meant
    """

    pngs: tuple[bytes, ...] = field(repr=False)
    regions: NDArray[np.int64] = field(repr=False)
    region_names: tuple[str, ...]
    timings: Mapping[str, Any]
    batch: int
    settings: Mapping[str, Any] = field(repr=False)
    regions_per_step: NDArray[np.uint8] | None = field(default=None, repr=False)
    warnings: tuple[Warned, ...] = ()

    @ComputedOnce
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures, RGB; the text in a PNG is in the picture's `info`.

        Raises:
            AnswerError: a picture is no PNG, is damaged, or has more pixels than are read.
        """
        try:
            opened = tuple(Image.open(io.BytesIO(png), formats=["PNG"]) for png in self.pngs)
            _check_pixels([image.width * image.height for image in opened])
            for image in opened:
                image.load()
        except (OSError, ValueError, SyntaxError, *_BOMBS) as error:
            raise AnswerError(
                f"a picture that came is no PNG that can be read ({type(error).__name__}: {error}). Ask for it again; "
                "if that does not help, look at what is between, such as a proxy.",
                status=200,
                kind="no-picture",
            ) from error
        return opened


def _check_pixels(pixels: Sequence[int]) -> None:
    """Raise ValueError if one picture, or all together, have more pixels than are read."""
    if max(pixels, default=0) > MAX_PIXELS:
        raise ValueError(f"it has {max(pixels):,} pixels, more than the {MAX_PIXELS:,} that are read")
    if sum(pixels) > MAX_PIXELS_TOGETHER:
        raise ValueError(
            f"all have {sum(pixels):,} pixels, more than the {MAX_PIXELS_TOGETHER:,} that are read at once"
        )


Given = Concept | KeptId | Mapping[str, Any] | str
"""A concept of a request in any form that the client takes."""


def _typed(kind: type[T], value: Any) -> T:
    """Return the value. Raises TypeError if it is not exactly of this type."""
    if type(value) is not kind:  # not isinstance: to Python, True is an int
        raise TypeError(f"{type(value).__name__}, expected {kind.__name__}")
    return value


def listed(concepts: Iterable[Given]) -> tuple[Given, ...]:
    """Return the concepts of a request as they are now, so later changes to the caller's objects do not matter.

    Raises:
        ConceptError: a single concept, or something that holds none.
    """
    if isinstance(concepts, (NamedConcept, KeptId, Mapping, str)):
        raise ConceptError("concepts is one concept, expected a list of concepts: [concept].")
    if not isinstance(concepts, Iterable):
        raise ConceptError(f"concepts is a {type(concepts).__name__}, expected a list of concepts.")
    return tuple(dict(one) if isinstance(one, Mapping) else one for one in concepts)


def order_of(prompt: str, concepts: Sequence[Given], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Build the content of POST /v1/images. Settings that are None are left to the service; numpy's numbers are sent as
    plain ones.

    Raises:
        OptionError: a setting that is not known, or that JSON cannot hold.
        PromptError: a prompt that JSON cannot hold.
        ConceptError, ImageError, MaskError: a concept that cannot be sent.
    """
    unknown = sorted(set(settings) - _OPTIONS - _OF_SERVICE)
    if unknown:
        known = ", ".join(sorted(_OPTIONS | _OF_SERVICE))
        raise OptionError(f"setting {unknown[0]!r} is not known. There are {known}.")
    given = {name: value for name, value in settings.items() if value is not None}
    order = {"prompt": prompt, "concepts": [_use(one) for one in concepts], **given, "response": "json"}
    errors = {"prompt": PromptError, "concepts": ConceptError}
    return {name: _plain(value, name, errors.get(name, OptionError)) for name, value in order.items()}


def body_of(order: Mapping[str, Any]) -> bytes:
    """Encode an order from `order_of` as it is sent."""
    return json.dumps(order, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def form_of(
    concept: Concept, steps: int | None, reference_seed: int, storage: str
) -> tuple[dict[str, Any], list[tuple[str, tuple[str, bytes, str]]]]:
    """Build the texts and the files of PUT /v1/concepts.

    Raises:
        ConceptError, ImageError, MaskError: a concept that cannot be sent.
    """
    if not isinstance(concept, Concept):
        raise ConceptError(f"concept is a {type(concept).__name__}, expected a Concept.")
    resample = {reference.resample for reference in concept.references}
    if len(resample) > 1:
        raise ConceptError(f"concept {concept.name!r}: its references differ in resample; put them one by one.")
    files = []
    for number, reference in enumerate(concept.references, 1):
        name = f"concept {concept.name!r}, reference {number}"
        files.append(("image", ("image", _image_bytes(reference, name), "application/octet-stream")))
        files.append(("mask", ("mask", _mask_bytes(reference, name, explicit=True), "image/png")))
    texts: dict[str, Any] = {
        "prompt": [_text(reference.prompt, "prompt", ConceptError) for reference in concept.references],
        "word": _text(concept.word, "word", ConceptError),
        "reference_seed": _number(reference_seed, "reference_seed"),
        "storage": _text(storage, "storage", OptionError),
        "resample": resample.pop(),
    }
    if steps is not None:
        texts["steps"] = _number(steps, "steps")
    return texts, files


def made_of(content: Mapping[str, Any]) -> Made:
    """Read the pictures from a JSON answer."""
    steps = content.get("regions_per_step")
    return Made(
        pngs=tuple(base64.b64decode(text) for text in content["pictures"]),
        regions=np.array(content["regions"], np.int64),
        region_names=tuple(_typed(str, name) for name in content["region_names"]),
        timings=_typed(dict, content["timings"]),
        batch=_typed(int, content["batch"]),
        settings=_typed(dict, content["settings"]),
        regions_per_step=None if steps is None else np.array(steps, np.uint8),
        warnings=Warned.all_of(content),
    )


def error_of(status: int, body: bytes | bytearray, retry_after: str | None = None) -> ServiceError:
    """Make the error for an answer that reports a failure. `retry_after`: the header; without it, the body's counts."""
    try:
        found = read_json(body)
    except ValueError:
        found = None
    # Keep only texts, as in our problems: something on the way may have answered in place of the service.
    problem = {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}
    kind, field = problem.get("kind", "no-problem-details")[:MOST_WORD], problem.get("field", "")[:MOST_WORD]
    where = f"{field}: " if field else ""
    said = problem.get("detail", "").strip() or (
        f"the service answered {status}, and nothing of what is wrong. Look at what is between, such as a proxy."
    )
    detail = f"{where}{said}"[:MOST_DETAIL]
    seconds = None if retry_after is None else _seconds(retry_after)
    if seconds is None and isinstance(found, dict) and type(asked := found.get("retry_after")) is int:
        seconds = float(min(max(0, asked), 2**31))  # the header's form is whole seconds as well
    if kind in _KINDS and _KINDS[kind].status == status:
        return _KINDS[kind](detail, field=field or None, retry_after=seconds)
    return AnswerError(detail, status=status, kind=kind, field=field or None, retry_after=seconds)


def pause(error: ServiceError, attempt: int, retries: int, most: float = math.inf) -> float | None:
    """Return the seconds to wait before the request is sent again, or None if it is not.

    attempt  0 for the first
    most     if the service asks for a longer wait, the request is not sent again: it would be refused before that. A
             wait of more than `LONGEST_WAIT` seconds is none that a service asks for
    """
    if attempt >= retries:
        return None
    if isinstance(error, UnreachableError):
        return min(8.0, 0.25 * 2.0**attempt)
    if error.status in (429, 503) and error.retry_after is not None:
        return error.retry_after if error.retry_after <= min(most, LONGEST_WAIT) else None
    return None


def _seconds(retry_after: str) -> float:
    """Parse a Retry-After header, which has seconds or a date (RFC 9110); 1 second if it has neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except (ValueError, TypeError, OverflowError):
            return 1.0
        date = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 1.0


class EventParser:
    """Reads server-sent events line by line. `content`: what the last event, `pictures`, held, once it has arrived."""

    def __init__(self) -> None:
        self.content: Mapping[str, Any] | None = None
        self._name = ""
        self._data: list[str] = []

    def line(self, line: str) -> Progress | None:
        """Take a line without its line end. Returns a step's progress if the line ends such an event.

        Raises:
            ServiceError: the request failed.
            one of UNREADABLE: it is nothing that the service sends.
        """
        if line.startswith("event:"):
            self._name = line[6:].strip()
        elif line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
        elif line and not line.startswith((":", "id:", "retry:")):
            raise ValueError("a line of no event")
        elif not line and self._data:
            name, text = self._name, "\n".join(self._data)
            self._name, self._data = "", []
            if name == "problem":
                raise error_of(int(read_json(text)["status"]), text.encode())
            content = read_json(text)
            if name == "pictures":
                self.content = content
            elif name == "progress":
                step = Progress(**content)
                for count in (step.step, step.steps, step.batch, step.batches):
                    _typed(int, count)
                _typed(str, step.stage)
                return step
        return None

    def made(self) -> Made:
        """Return the pictures.

        Raises:
            UnreachableError: the events ended before the pictures came.
        """
        if self.content is None:
            raise UnreachableError(
                "the connection ended before the pictures came; expected an event `pictures` at its end."
            )
        return made_of(self.content)


def _plain(value: Any, name: str, error: type[InputError], depth: int = 0) -> Any:
    """Return the value with numpy's numbers, which JSON cannot hold, replaced by plain ones.

    Raises `error` for anything else that JSON cannot hold.
    """
    if isinstance(value, np.generic):
        value = as_float(value) if isinstance(value, np.floating) else value.item()
    if isinstance(value, str):
        return _text(value, name, error)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= MOST_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth < MOST_DEPTH and isinstance(value, dict) and all(isinstance(one, str) for one in value):
        return {
            _text(key, name, error): _plain(one, f"{name}.{key[:MOST_WORD]}", error, depth + 1)
            for key, one in value.items()
        }
    if depth < MOST_DEPTH and isinstance(value, (list, tuple)):
        return [_plain(one, f"{name}[{k}]", error, depth + 1) for k, one in enumerate(value)]
    raise error(f"{name} is {_kind(value)}, which cannot be sent; expected finite numbers, texts, lists of them.")


def _kind(value: Any) -> str:
    number = isinstance(value, (int, float))
    return shown(value) if number else f"a {type(value).__name__}"


def _text(value: Any, name: str, error: type[InputError]) -> str:
    """Return the text. Raises `error` if it is no text, or has what UTF-8 cannot encode, such as half of a surrogate
    pair.
    """
    if not isinstance(value, str):
        raise error(f"{name} is a {type(value).__name__}, expected a text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise error(f"{name} has {value[cause.start]!a} at {cause.start}, which UTF-8 cannot hold.") from cause
    return value


def _number(value: Any, name: str) -> str:
    """Format a number for a part of a form. Whether it is a number, and in range, is for the service to check."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise OptionError(f"{name} is {shown(value)}, more than any service takes.")
    return _text(str(value), name, OptionError)


def _use(one: Given) -> dict[str, Any]:
    if isinstance(one, str):
        return {"id": one}
    if isinstance(one, KeptId):
        return one.use()
    if isinstance(one, Mapping):
        return dict(one)
    if not isinstance(one, Concept):
        raise ConceptError(
            f"a concept is a {type(one).__name__}; expected a Concept, what put_concept gave, or an id. A KeptConcept "
            "stays on this machine: put its Concept."
        )
    references = []
    for number, reference in enumerate(one.references, 1):
        name = f"concept {one.name!r}, reference {number}"
        mask = None if reference.mask is None else _mask_bytes(reference, name, explicit=False)
        references.append(
            {
                "image": base64.b64encode(_image_bytes(reference, name)).decode("ascii"),
                "mask": None if mask is None else base64.b64encode(mask).decode("ascii"),
                "prompt": reference.prompt,
                "mask_threshold": 128 if mask is not None else int(reference.mask_threshold),
                "resample": reference.resample,
            }
        )
    return {
        "references": references,
        "word": one.word,
        "weight": one.weight,
        "token_index": None if one.token_index is None else list(one.token_index),
        "name": one.name,
    }


def _image_bytes(reference: Reference, name: str) -> bytes:
    """Return the image's file unchanged if the service reads its format; otherwise a PNG of its pixels."""
    source = reference.image
    if isinstance(source, (str, os.PathLike)):
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: image {os.fspath(source)!r} cannot be read: {error}.") from error
        if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
            return data
    return encode_png(load_image(source, name=f"{name}: image"))


def _mask_bytes(reference: Reference, name: str, *, explicit: bool) -> bytes:
    """Return the mask, or the alpha channel if there is none, thresholded here, as a PNG of 0 and 255."""
    threshold = reference.mask_threshold
    if reference.mask is None:
        mask = load_alpha_mask(reference.image, threshold=threshold, name=name)
    else:
        mask = load_mask(reference.mask, image_size=None, threshold=threshold, name=f"{name}: mask")
    return encode_png(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)))
