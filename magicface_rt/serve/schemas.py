"""The bodies of requests and answers, as the server checks and documents them. Ranges that depend on the bundle or the
service are checked where these are known.

Types are strict: no text for a number, no true for 1, no NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..bundle_form import TOKENS
from ..soft_warnings import MagicFaceWarning
from .concepts import NO_WORD, StoredConcept

MOST_TEXT = 2000
MOST_WORD = 200
MOST_REFERENCES = 64
MOST_CONCEPTS = 64
SEED_LIMIT = 2**64 - 1

_A_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_AN_ID = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Word = Annotated[str, Field(min_length=1, max_length=MOST_WORD)]
Seed = Annotated[int, Field(ge=0, le=SEED_LIMIT)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class InlineReference(_Body):
    """One image of a concept, its mask, and its own prompt. It is used for this request and not kept."""

    image: str = Field(description="Base64 of a PNG, JPEG or WebP file, or a data URL of it.", examples=[_A_PNG])
    mask: str | None = Field(
        None, description="The same of a mask; white is the concept. Null: the image's alpha channel.", examples=[None]
    )
    prompt: Text = Field("", description="What the image shows.", examples=["a man"])
    mask_threshold: int = Field(128, ge=1, le=255, description="Mask values from here up belong to the concept.")
    resample: Literal["lanczos", "nearest"] = "lanczos"


class ConceptUse(_Body):
    """A concept in a picture: one that is kept, by its id, or references of this request's own."""

    id: str | None = Field(None, max_length=MOST_WORD, description="Of a kept concept.", examples=[_AN_ID])
    references: list[InlineReference] | None = Field(
        None, min_length=1, max_length=MOST_REFERENCES, description="In place of an id."
    )
    word: Word | None = Field(
        None, description="Word or words of the prompt. Null: the word that the concept was put with.", examples=["man"]
    )
    weight: Number = Field(3.0, description="Strength, -100 to 100; 0 hides the references.", examples=[2.5])
    token_index: int | Annotated[list[int], Field(min_length=1, max_length=TOKENS)] | None = Field(
        None, description="Token positions in the prompt instead of looking for the word; 1 is the first."
    )
    name: Word | None = Field(None, description="What regions and messages call it; the word, unless given.")


class PictureOrder(_Body):
    """What to make. The settings are those of `magicface_rt.Options`."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "prompt": "a man in the rain",
                    "concepts": [{"id": _AN_ID, "word": "man", "weight": 2.5}],
                    "seed": 7,
                },
                {"prompt": "a house by the sea", "steps": 20, "images": 2, "response": "json"},
            ]
        },
    )

    prompt: Text = Field(description="What to make a picture of.")
    concepts: list[ConceptUse] = Field(default_factory=list, max_length=MOST_CONCEPTS)
    negative_prompt: Text = ""
    steps: int | None = Field(
        None, ge=1, le=1000, description="Null: as the kept concepts have it, else the service's default."
    )
    guidance: Number = Field(7.5, gt=0, le=1000)
    alpha: Number = Field(0.4, ge=0, le=1)
    ca_scale: Annotated[Number, Field(gt=0, le=2)] | None = None
    weight_mode: Literal["bias", "scale"] = "bias"
    semantic_guidance: bool = True
    seed: Seed = 0
    images: int = Field(1, ge=1, le=1024)
    reference_seed: Seed | None = Field(None, description="Null: as the kept concepts have it, else 0.")
    deadline: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Seconds in which the picture is wanted, the wait included; at most the service's limit."
    )
    alone: bool = Field(
        False, description="Never together with other requests; see docs/serving.md on what batches may change."
    )
    response: Literal["png", "json"] | None = Field(None, description="Null: by the Accept header.")
    record_regions: bool = Field(
        False, description="Give the regions after every step as well, in a JSON answer or the last event."
    )
    stream: bool = Field(False, description="Progress as server-sent events, and the JSON answer as the last of them.")


class ReferenceInfo(BaseModel):
    """A reference of a kept concept. `error`: what 8 bits cost, relative; 0 for exact storage."""

    key: str
    prompt: str
    storage: str
    tokens: dict[str, int]
    error: float


class ConceptInfo(BaseModel):
    """A kept concept. `word`: null where it was put without one. `created`: seconds since 1970."""

    id: str = Field(examples=[_AN_ID])
    word: str | None = Field(examples=["man"])
    steps: int = Field(examples=[20])
    reference_seed: int = Field(examples=[0])
    bytes: int = Field(examples=[27_262_976])
    bundle: str = Field(description="Hash of the bundle that it is good for.")
    references: list[ReferenceInfo]
    created: float = Field(examples=[1767225600.0])

    @classmethod
    def of(cls, stored: StoredConcept) -> ConceptInfo:
        """Describe a concept from a store."""
        concept = stored.concept
        return cls(
            id=stored.id,
            word=None if concept.word == NO_WORD else concept.word,
            steps=concept.steps,
            reference_seed=concept.reference_seed,
            bytes=concept.nbytes,
            bundle=concept.origin.bundle_hash,
            references=[
                ReferenceInfo(
                    key=reference.key,
                    prompt=reference.prompt,
                    storage=reference.storage,
                    tokens={str(factor): count for factor, count in reference.tokens.items()},
                    error=reference.error,
                )
                for reference in concept.references
            ],
            created=stored.created,
        )


class Warned(BaseModel):
    """Something that was done and may not have been meant. `field`: the part of the request, null where it is none."""

    kind: str = Field(examples=["mask-stretched"])
    field: str | None = Field(examples=["mask"])
    detail: str = Field(
        examples=["concept 'man': mask is 32 x 32, its image 64 x 64: the mask is stretched over the image."]
    )

    @classmethod
    def all_of(cls, warnings: Iterable[MagicFaceWarning]) -> list[Warned]:
        """Convert collected warnings."""
        return [cls(kind=one.kind, field=one.field, detail=str(one)) for one in warnings]


class ConceptPut(ConceptInfo):
    """A kept concept, and what its upload was warned of."""

    warnings: list[Warned]


class ConceptList(BaseModel):
    """All kept concepts, the oldest first."""

    concepts: list[ConceptInfo]
    bytes: int


class Erasure(BaseModel):
    """What was erased: `files` on disk, `stopped` requests that used it. It was looked for afterwards and is gone."""

    id: str = Field(examples=[_AN_ID])
    erased: bool = True
    files: int
    stopped: int


class Pictures(BaseModel):
    """The pictures and everything that made them."""

    pictures: list[str] = Field(description="Base64 of PNG files.", examples=[[_A_PNG]])
    regions: list[list[list[int]]] = Field(
        description="For each picture its cells, h/2 x w/2 of the latents: 0, or k for the k-th of region_names."
    )
    region_names: list[str]
    regions_per_step: list[list[list[list[int]]]] | None = Field(
        None, description="With record_regions, for each step the same as `regions` after it; else it is not there."
    )
    timings: dict[str, Any] = Field(description="Seconds by stage, of the batch that it was made in; and `queued`.")
    batch: int = Field(description="Pictures that were made together.")
    settings: dict[str, Any] = Field(description="What run.json of a saved result holds.")
    warnings: list[Warned]


class BundleLimits(BaseModel):
    """What a request may have, by the bundle and the service."""

    concepts: int
    references: int
    images: int
    steps: int
    pixels: int
    body_bytes: int
    deadline: float
    queue: int


class BundleInfo(BaseModel):
    """The bundle that is served, and on what."""

    hash: str
    architecture: str
    dtype: str
    height: int
    width: int
    backend: str
    software: str
    default_steps: int
    limits: BundleLimits


class FieldError(BaseModel):
    """A part of the request at fault."""

    field: str
    detail: str


class ProblemBody(BaseModel):
    """Problem details, RFC 9457."""

    type: str = Field(examples=["urn:magicface-rt:problem:prompt"])
    title: str = Field(examples=["The request cannot be used"])
    status: int = Field(examples=[422])
    kind: str = Field(examples=["prompt"])
    detail: str = Field(
        examples=["concept 'hat': the word 'hat' is not in the prompt 'a man'; its words are 'a', 'man'."]
    )
    field: str | None = Field(None, examples=["concepts[0].word"])
    retry_after: int | None = Field(None, ge=1, description="Seconds, as in the header.")
    errors: list[FieldError] | None = None


class Status(BaseModel):
    """A sign of life."""

    status: str = Field(examples=["ok"])


FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "format": "binary"},
            "description": "A PNG, JPEG or WebP file; several for several references.",
        },
        "mask": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "As many as images, or none: then the images' alpha channels are the masks.",
        },
        "prompt": {
            "type": "array",
            "items": {"type": "string", "maxLength": MOST_TEXT},
            "description": "What the images show: one for all, or one for each.",
        },
        "word": {"type": "string", "maxLength": MOST_WORD, "description": "What requests use unless they say so."},
        "steps": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "The steps that it will serve."},
        "reference_seed": {"type": "integer", "minimum": 0, "maximum": SEED_LIMIT},
        "storage": {"type": "string", "enum": ["exact", "8-bit"]},
        "mask_threshold": {"type": "integer", "minimum": 1, "maximum": 255},
        "resample": {"type": "string", "enum": ["lanczos", "nearest"]},
    },
}
"""The schema of the parts of PUT /v1/concepts."""
