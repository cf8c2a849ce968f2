"""What is asked of a Session, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .bundle import Bundle
from .concept import Concept, NamedConcept, PlacedConcept, place_concepts
from .errors import ConceptError
from .kept import KeptConcept, Origin
from .options import Options
from .regions import Stage
from .tokenizer import Tokenizer

MAX_SCALE_WEIGHT = 10.0
"""Forbidden keys stand 1000 below the others on the logits; a factor of 100 could lift them over that."""


@dataclass(frozen=True)
class Progress:
    """Where a request stands: `step` of `steps` is done, in batch `batch` of `batches`.

    stage: "rsa" or "rba" for denoising steps; "prepare" while references are prepared, step by step of each.
    """

    step: int
    steps: int
    stage: Stage | Literal["prepare"]
    batch: int
    batches: int


ProgressCallback = Callable[[Progress], object]
"""Called after every step; return False to cancel."""


@dataclass(frozen=True, eq=False)
class Request:
    """One request of a batch: what `Session.generate` takes."""

    prompt: str
    concepts: Sequence[NamedConcept] = ()
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose concepts have their places in the prompt."""

    prompt: str
    options: Options
    placed: tuple[PlacedConcept, ...]

    @property
    def concepts(self) -> list[NamedConcept]:
        return [placed.concept for placed in self.placed]


def check_request(request: Request, bundle: Bundle, tokenizer: Tokenizer) -> CheckedRequest:
    """What would otherwise be refused only after minutes of work.

    Raises:
        InputError: a prompt, concept or setting that cannot be used.
    """
    options = request.options
    placed = place_concepts(request.prompt, tuple(request.concepts), tokenizer, bundle.limits.concepts)
    origin = Origin.of(bundle, options.steps, options.reference_seed)
    tokenizer.encode(options.negative_prompt)
    for one in placed:
        check_concept(one.concept, origin, tokenizer)
        weight = one.concept.weight
        if options.weight_mode == "scale" and abs(weight) > MAX_SCALE_WEIGHT:
            raise ConceptError(
                f"concept {one.concept.name!r}: weight is {weight:g}; with weight_mode='scale' it multiplies "
                f"logits, and is expected from -{MAX_SCALE_WEIGHT:g} to {MAX_SCALE_WEIGHT:g}."
            )
    references = [
        r for one in placed if isinstance(one.concept, (Concept, KeptConcept)) for r in one.concept.references
    ]
    check_number(len(references), bundle)
    return CheckedRequest(request.prompt, options, placed)


def check_concept(concept: NamedConcept, origin: Origin, tokenizer: Tokenizer) -> None:
    """Raises InputError for a kept concept of another origin, and for a reference prompt that is too long."""
    if isinstance(concept, KeptConcept):
        concept.origin.check(origin, concept.name)
    elif isinstance(concept, Concept):
        for reference in concept.references:
            tokenizer.encode(reference.prompt)
    else:
        raise ConceptError(f"concept {concept.name!r} is a {type(concept).__name__}, expected a Concept.")


def check_number(references: int, bundle: Bundle) -> None:
    """Raises ConceptError for more references than the bundle takes."""
    if references > bundle.limits.references:
        raise ConceptError(
            f"{references} references were given; the bundle takes at most {bundle.limits.references}. "
            "Leave some out, or export a bundle for more references."
        )
