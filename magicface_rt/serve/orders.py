"""Server side: turns what a client sent into what a Session takes, checking every part and naming the one at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

from PIL import Image

from ..bundle import Bundle
from ..concept import Concept, NamedConcept, Reference, place_concepts
from ..errors import AnswerError, ImageError, MaskError
from ..images import Resample
from ..kept import KeptConcept, Origin
from ..options import Options
from ..preparing import BareReference, load_bare
from ..request import Request, check_concept, check_number, check_request
from ..session import Session
from .concepts import NO_WORD
from .problems import at, refusal
from .schemas import ConceptUse, PictureOrder
from .service import ConceptUpload
from .settings import ServeSettings
from .uploads import from_base64, open_image

__all__ = ["check_named", "parse_order", "pixels_of", "read_upload"]

_OPTIONS = tuple(option.name for option in fields(Options))
_OF_A_CONCEPT = ("weight", "token_index", "name", "word")


def check_named(order: PictureOrder) -> None:
    """Raise AnswerError, 422, for a concept that does not have exactly one of id and references."""
    for k, use in enumerate(order.concepts):
        if (use.id is None) == (use.references is None):
            found = "neither id nor references" if use.id is None else "both id and references"
            raise refusal(422, "concept", f"{found}; expected one of them.", f"concepts[{k}]")


def parse_order(
    order: PictureOrder, kept: Callable[[str], KeptConcept], session: Session, settings: ServeSettings
) -> tuple[Request, int]:
    """Return the request, and the number of pixels that were decoded for it. Blocks: run it in a thread.

    order  one that `check_named` has accepted
    kept   returns a kept concept by its id

    Raises:
        AnswerError: 422, with the field at fault.
        UnknownConceptError: an id that is not kept, with the field.
    """
    bundle, tokenizer = session.bundle, session.tokenizer
    with at("prompt"):
        tokenizer.encode(order.prompt)
    with at("negative_prompt"):
        tokenizer.encode(order.negative_prompt)
    if len(order.concepts) > bundle.limits.concepts:
        raise refusal(
            422,
            "concept",
            f"{len(order.concepts)} concepts were given; the bundle takes at most {bundle.limits.concepts}.",
            "concepts",
        )
    with at("concepts"):  # before any image is decoded: a small file may hold millions of pixels
        check_number(sum(len(use.references or ()) for use in order.concepts), bundle)
    pixels = 0
    concepts: list[NamedConcept] = []
    tokens = tokenizer.tokens(order.prompt)
    for k, use in enumerate(order.concepts):
        concept, decoded = _concept(use, f"concepts[{k}]", kept, settings, tokens)
        pixels += decoded
        concepts.append(concept)
    options = _options(order, concepts, bundle, settings)
    for k, concept in enumerate(concepts):
        field = f"concepts[{k}]"
        with at(f"{field}.word" if concept.token_index is None else f"{field}.token_index"):
            place_concepts(order.prompt, [concept], tokenizer, bundle.limits.concepts)
        origin = Origin.of(bundle, options.steps, options.reference_seed)
        if isinstance(concept, Concept):
            _check_references(concept, field, session, origin)
        else:
            with at(f"{field}.id"):
                check_concept(concept, origin, tokenizer)
        if options.weight_mode == "scale":
            with at(f"{field}.weight"):
                check_request(Request(order.prompt, (concept,), options), bundle, tokenizer)
    request = Request(order.prompt, tuple(concepts), options)
    with at("concepts"):
        check_request(request, bundle, tokenizer)
    return request, pixels


def read_upload(
    upload: ConceptUpload, session: Session, settings: ServeSettings
) -> tuple[Concept, list[BareReference], Origin]:
    """Return the concept, its references as loaded, and the origin that its keys are to be made for. Blocks.

    Raises:
        AnswerError: 422, with the part at fault.
    """
    bundle = session.bundle
    steps = settings.default_steps if upload.steps is None else upload.steps
    with at("", "steps", "reference_seed"):
        options = Options(steps=steps, reference_seed=upload.reference_seed)
    origin = _origin(options, bundle, settings)
    if len(upload.references) > bundle.limits.references:
        raise refusal(
            422,
            "concept",
            f"{len(upload.references)} images were given; the bundle takes at most {bundle.limits.references}.",
            "image",
        )
    references = []
    for number, one in enumerate(upload.references):
        place = f"[{number}]" if len(upload.references) > 1 else ""
        image = _image(one.image, f"image{place}", settings)
        mask = None if one.mask is None else _mask(one.mask, f"mask{place}", settings)
        with at(f"prompt{place}"):
            session.tokenizer.encode(one.prompt)
        with at("", "mask_threshold", "resample"):
            references.append(
                Reference(
                    image,
                    mask=mask,
                    prompt=one.prompt,
                    mask_threshold=upload.mask_threshold,
                    resample=cast(Resample, upload.resample),
                )
            )
    with at("word"):
        concept = Concept(NO_WORD if upload.word is None else upload.word, references=references)
    bare: list[BareReference] = []
    for number, reference in enumerate(references):
        place = f"[{number}]" if len(references) > 1 else ""
        bare += _loaded(concept, reference, session, f"image{place}", f"mask{place}")
    return concept, bare, origin


def pixels_of(concept: Concept) -> int:
    """Return the number of pixels of an upload's decoded images and masks."""
    files = [file for reference in concept.references for file in (reference.image, reference.mask)]
    return sum(file.width * file.height for file in files if isinstance(file, Image.Image))


def _concept(
    use: ConceptUse, field: str, kept: Callable[[str], KeptConcept], settings: ServeSettings, tokens: Sequence[str]
) -> tuple[NamedConcept, int]:
    index: Any = use.token_index
    if use.id is not None:
        with at(f"{field}.id"):
            known = kept(use.id)
        word, name = known.word if use.word is None else use.word, use.name
        if word == NO_WORD and use.word is None:
            if index is None:
                raise refusal(
                    422, "concept", "the concept was put without a word; say which word it is.", f"{field}.word"
                )
            word, name = _standing_at(index, tokens), name or "concept"
        with at(field, *_OF_A_CONCEPT):
            return known.renamed(word, weight=use.weight, token_index=index, name=name), 0
    if use.word is None:
        raise refusal(422, "concept", "word is missing; expected a word of the prompt.", f"{field}.word")
    references, pixels = [], 0
    for j, one in enumerate(use.references or ()):
        place = f"{field}.references[{j}]"
        with at(f"{place}.image"):
            image = _image(from_base64(one.image, name="the image", error=ImageError), f"{place}.image", settings)
        pixels += image.width * image.height
        mask = None
        if one.mask is not None:
            with at(f"{place}.mask"):
                mask = _mask(from_base64(one.mask, name="the mask", error=MaskError), f"{place}.mask", settings)
            pixels += mask.width * mask.height
        with at(place, "mask_threshold", "resample", "prompt"):
            references.append(
                Reference(image, mask=mask, prompt=one.prompt, mask_threshold=one.mask_threshold, resample=one.resample)
            )
    with at(field, *_OF_A_CONCEPT):
        return Concept(use.word, references=references, weight=use.weight, token_index=index, name=use.name), pixels


def _standing_at(index: int | Sequence[int], tokens: Sequence[str]) -> str:
    """Return the prompt's text at the tokens that a concept without a word stands for."""
    positions = [index] if isinstance(index, int) else index
    return " ".join(tokens[k] for k in positions if 0 < k < len(tokens) - 1) or "concept"


def _options(order: PictureOrder, concepts: Sequence[NamedConcept], bundle: Bundle, settings: ServeSettings) -> Options:
    """Return the order's settings; missing steps and reference_seed come from the kept concepts or the defaults."""
    kept = [concept for concept in concepts if isinstance(concept, KeptConcept)]
    steps, seed = order.steps, order.reference_seed
    if steps is None:
        steps = kept[0].steps if kept else settings.default_steps
    if seed is None:
        seed = kept[0].reference_seed if kept else 0
    given = order.model_dump(include=set(_OPTIONS))
    with at("", *_OPTIONS):
        options = Options(**{**given, "steps": steps, "reference_seed": seed})
    if options.images > settings.images:
        raise refusal(
            422, "option", f"images is {options.images}; this service makes at most {settings.images}.", "images"
        )
    _origin(options, bundle, settings)
    return options


def _origin(options: Options, bundle: Bundle, settings: ServeSettings) -> Origin:
    if options.steps > settings.steps:
        raise refusal(422, "option", f"steps is {options.steps}; this service takes at most {settings.steps}.", "steps")
    with at("steps"):
        return Origin.of(bundle, options.steps, options.reference_seed)


def _check_references(concept: Concept, field: str, session: Session, origin: Origin) -> None:
    for j, reference in enumerate(concept.references):
        place = f"{field}.references[{j}]"
        with at(f"{place}.prompt"):
            session.tokenizer.encode(reference.prompt)
        if concept.weight != 0:
            _loaded(concept, reference, session, f"{place}.image", f"{place}.mask")


def _loaded(concept: Concept, reference: Reference, session: Session, image: str, mask: str) -> list[BareReference]:
    """Load and check a reference; an error names the image or the mask."""
    one = Concept(concept.word, reference, name=concept.name)
    try:
        with at(mask):
            return load_bare(one, session.bundle)
    except AnswerError as error:
        if error.kind == "image":
            error.field = image
        raise


def _image(data: bytes, field: str, settings: ServeSettings) -> Image.Image:
    with at(field):
        return open_image(data, pixels=settings.pixels, name="the image", error=ImageError)


def _mask(data: bytes, field: str, settings: ServeSettings) -> Image.Image:
    with at(field):
        return open_image(data, pixels=settings.pixels, name="the mask", error=MaskError)
