"""Server side: reads what a client sent, that is, forms, JSON bodies and the Accept header."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from ..values.shown import shown
from .multipart import Form
from .problems import Problem, refusal
from .schemas import FORM_SCHEMA, MOST_TEXT, MOST_WORD, ConceptUse, InlineReference, PictureOrder
from .service import ConceptUpload, Upload
from .structure import read_body

__all__ = ["FORM_PARTS", "NoOrderError", "read_order", "upload_of", "wants_png"]

FORM_PARTS = tuple(FORM_SCHEMA["properties"])

_FIELDS = {*PictureOrder.model_fields, *ConceptUse.model_fields, *InlineReference.model_fields}
_MOST_ERRORS = 20
_MOST_RANGES = 100  # the most ranges that an Accept header may have; browsers send ten


def upload_of(form: Form) -> ConceptUpload:
    """Read a concept from a form.

    Raises:
        AnswerError: 422, a part is missing, occurs too often, or is no number where one is expected.
    """
    images, masks, prompts = form.files("image"), form.files("mask"), form.texts("prompt")
    if not images:
        raise refusal(422, "form", "the part 'image' is missing; expected a PNG, JPEG or WebP file.", "image")
    if masks and len(masks) != len(images):
        raise refusal(
            422,
            "form",
            f"there are {len(masks)} masks for {len(images)} images; expected one for each or none.",
            "mask",
        )
    if len(prompts) not in (0, 1, len(images)):
        raise refusal(
            422,
            "form",
            f"there are {len(prompts)} prompts for {len(images)} images; expected one for all or one for each.",
            "prompt",
        )
    if len(prompts) < len(images):
        prompts = (prompts or [""]) * len(images)
    word = form.text("word")
    for name, text, most in (("word", word or "", MOST_WORD), *(("prompt", text, MOST_TEXT) for text in prompts)):
        if len(text) > most:
            raise refusal(422, "form", f"{name} has {len(text)} characters; at most {most} are taken.", name)
    return ConceptUpload(
        references=[
            Upload(image, masks[k] if masks else None, prompt)
            for k, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        ],
        word=word,
        steps=_whole(form, "steps"),
        reference_seed=_whole(form, "reference_seed") or 0,
        storage=form.text("storage") or "exact",
        mask_threshold=128 if (threshold := _whole(form, "mask_threshold")) is None else threshold,
        resample=form.text("resample") or "lanczos",
    )


def wants_png(order: PictureOrder, accept: str | None) -> bool:
    """Return whether the answer is to be a PNG; otherwise it is JSON.

    Raises:
        AnswerError: 406, the Accept header allows neither, or is too long; 422, a PNG of several pictures.
    """
    png = order.response == "png"
    if order.response is None and accept is not None and not order.stream:
        if (count := 1 + accept.count(",") + accept.count(";")) > _MOST_RANGES:
            raise refusal(
                406, "not-acceptable", f"Accept has {count:,} parts; at most {_MOST_RANGES} are read.", "Accept"
            )
        for_png, for_json = _quality(accept, "image", "png"), _quality(accept, "application", "json")
        if not for_png and not for_json:
            raise refusal(
                406,
                "not-acceptable",
                f"Accept is {shown(accept)}, expected a range that includes image/png or application/json.",
                "Accept",
            )
        png = for_png > for_json
    if png and order.images > 1 and not order.stream:
        raise refusal(
            422, "option", f"images is {order.images}, and a PNG holds one picture. Ask for response=json.", "images"
        )
    return png


class NoOrderError(Exception):
    """The JSON body is no valid order. problem: what is wrong with it, field by field."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def read_order(content_type: str | None, body: bytes) -> PictureOrder:
    """Read the order from a body. This takes time in proportion to the body: run it in a thread.

    Raises:
        AnswerError: 415, another Content-Type; 400, not JSON; 422, more values than anything here takes, or a key given
            twice.
        NoOrderError: 422, fields of it are not as they should be.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise refusal(415, "content-type", "expected Content-Type: application/json.", "Content-Type")
    if not body:
        raise refusal(422, "body", "the body is empty; expected a JSON object.")
    content = read_body(body)
    del body
    try:
        return PictureOrder.model_validate(content)
    except ValidationError as error:
        raise NoOrderError(_problem(error)) from None


def _problem(error: ValidationError) -> Problem:
    """Make a problem that does not repeat the values that were found: they may be photographs."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_ERRORS]
    errors = tuple((_field(one["loc"], one["type"]), _said(one["type"], str(one["msg"]))) for one in found)
    field, detail = errors[0]
    return Problem(422, "body", f"{field or 'the body'}: {detail}.", field or None, errors=errors)


def _said(kind: str, message: str) -> str:
    return "it is missing; a value is expected" if kind == "missing" else message


def _field(loc: Iterable[int | str], kind: str) -> str:
    """Format a location such as concepts[0].weight, leaving out the names of alternatives that pydantic tried."""
    parts = list(loc)
    text = ""
    for position, part in enumerate(parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif part in _FIELDS or (kind == "extra_forbidden" and position == len(parts) - 1):
            text += f".{part[:80]}" if text else part[:80]
    return text


def _whole(form: Form, name: str) -> int | None:
    text = form.text(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise refusal(422, "form", f"{name} is {text[:80]!a}, expected a whole number.", name)
    return int(text)


def _quality(accept: str, kind: str, subtype: str) -> float:
    """Return how much an Accept header wants a media type: the quality of the most specific range that includes it."""
    best = (-3, 0.0)
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        ranges = (f"{kind}/{subtype}", f"{kind}/*", "*/*")
        if media_range not in ranges:
            continue
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        best = max(best, (-ranges.index(media_range), quality if 0 <= quality <= 1 else 0.0))
    return best[1]
