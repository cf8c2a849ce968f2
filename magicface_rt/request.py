"""Requests to a Session, and their checks before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .bundle import Bundle
from .concept import Concept, NamedConcept, PlacedConcept, place_concepts
from .errors import ConceptError, OptionError, PromptError
from .kept import KeptConcept, Origin
from .options import Options
from .regions import Stage
from .soft_warnings import warn
from .tokenizer import Tokenizer
from .values.shown import shown

MAX_SCALE_WEIGHT = 10.0
"""The largest weight in weight_mode="scale". The logits of forbidden keys are 1000 below the others, which a factor of
100 could make up for."""


@dataclass(frozen=True)
class Progress:
    """Where a request stands: `step` of `steps` is done, in batch `batch` of `batches`.

    stage: "rsa" or "rba" for denoising steps; "prepare" while references are prepared, step by step of each.

    While a request waits for others, where it stands is reported again from time to time.
    """

    step: int
    steps: int
    stage: Stage | Literal["prepare"]
    batch: int
    batches: int


ProgressCallback = Callable[[Progress], object]
"""Called after every step; return False to cancel."""


def check_progress(progress: object) -> None:
    """Raise OptionError for a progress callback that cannot be called, or whose answer would come too late."""
    if progress is None:
        return
    if not callable(progress):
        raise OptionError(f"progress is {shown(progress)}, expected a function of one argument, or None.")
    if inspect.iscoroutinefunction(progress) or inspect.iscoroutinefunction(type(progress).__call__):
        raise OptionError(
            f"progress is the coroutine function {shown(progress)}, whose answer nobody awaits, so that it could not "
            "cancel; expected a plain function, such as one that calls loop.call_soon_threadsafe."
        )


def declined(answer: object) -> bool:
    """Whether a progress callback returned False: Python's, or numpy's, which a comparison with an array gives."""
    return isinstance(answer, (bool, np.bool_)) and not answer


@dataclass(frozen=True, eq=False)
class Request:
    """One request of a batch: what `Session.generate` takes.

    concepts: any iterable; it is copied at once, so later changes to it have no effect.
    record_regions: whether the result holds the regions after every step, `Result.regions_per_step`.

    Raises `ConceptError` if `concepts` is anything but a collection of concepts.
    """

    prompt: str
    concepts: Sequence[NamedConcept] = ()
    options: Options = field(default_factory=Options)
    record_regions: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", check_concepts(self.concepts))


@dataclass(frozen=True)
class CheckedRequest:
    """A request that has been checked, with its concepts placed in the prompt."""

    prompt: str
    options: Options
    placed: tuple[PlacedConcept, ...]
    record_regions: bool = False

    @property
    def concepts(self) -> list[NamedConcept]:
        return [placed.concept for placed in self.placed]


def check_concepts(concepts: object) -> tuple[NamedConcept, ...]:
    """Check the concepts of a request and return them as a tuple.

    Raises:
        ConceptError: `concepts` is a single concept or no collection, or one of its entries is not a concept.
    """
    if isinstance(concepts, NamedConcept):
        raise ConceptError(f"concepts is the concept {concepts.name!r}, expected a list of concepts: [concept].")
    if isinstance(concepts, (str, bytes)) or not isinstance(concepts, Iterable):
        raise ConceptError(f"concepts is a {type(concepts).__name__}, expected a list of concepts.")
    found = tuple(concepts)
    for position, concept in enumerate(found):
        if not isinstance(concept, (Concept, KeptConcept)):
            raise ConceptError(
                f"concepts[{position}] is a {type(concept).__name__}, expected a Concept or a KeptConcept."
            )
    return found


def check_batch(requests: object) -> tuple[Request, ...]:
    """Check the requests of a batch and return them as a tuple.

    Raises:
        OptionError: there are none; one is not a `Request` or has no `Options`; they differ in `steps`; record_regions
            is neither True nor False.
    """
    if isinstance(requests, (str, bytes)) or not isinstance(requests, Iterable):
        raise OptionError(f"requests is a {type(requests).__name__}, expected a list of Request objects.")
    found = tuple(requests)
    if not found:
        raise OptionError("requests is empty, expected at least one Request.")
    for position, request in enumerate(found):
        if not isinstance(request, Request):
            raise OptionError(f"requests[{position}] is a {type(request).__name__}, expected a Request.")
        if not isinstance(request.options, Options):
            raise OptionError(
                f"requests[{position}].options is a {type(request.options).__name__}, expected an Options object."
            )
        if not isinstance(request.record_regions, bool):
            raise OptionError(f"record_regions is {shown(request.record_regions)}, expected True or False.")
    steps = sorted({request.options.steps for request in found})
    if len(steps) > 1:
        raise OptionError(
            f"the requests of a batch have {' and '.join(map(str, steps))} steps, expected one number. Make a "
            "batch for each."
        )
    return found


def check_request(request: Request, bundle: Bundle, tokenizer: Tokenizer) -> CheckedRequest:
    """Refuse what would otherwise be refused only after minutes of work, and place the request's concepts.

    Warns `MagicFaceWarning` if words other than a concept's stand at its token_index.

    Raises:
        InputError: a prompt, concept or setting that cannot be used.
    """
    options = request.options
    placed = place_concepts(request.prompt, request.concepts, tokenizer, bundle.limits.concepts)
    origin = Origin.of(bundle, options.steps, options.reference_seed)
    tokenizer.encode(options.negative_prompt)
    for one in placed:
        check_concept(one.concept, origin, tokenizer)
        _warn_of_other_words(request.prompt, one, tokenizer)
        weight = one.concept.weight
        if options.weight_mode == "scale" and abs(weight) > MAX_SCALE_WEIGHT:
            raise ConceptError(
                f"concept {one.concept.name!r}: weight is {weight:g}; with weight_mode='scale' it multiplies "
                f"logits, and is expected from -{MAX_SCALE_WEIGHT:g} to {MAX_SCALE_WEIGHT:g}."
            )
    check_number(sum(len(one.concept.references) for one in placed), bundle)
    return CheckedRequest(request.prompt, options, placed, request.record_regions)


def _warn_of_other_words(prompt: str, placed: PlacedConcept, tokenizer: Tokenizer) -> None:
    """Warn if a concept's token_index points at other words: the index stays with the concept in other prompts. It may
    be meant, for a pronoun or synonym, so it is no error.
    """
    concept = placed.concept
    if concept.token_index is None:
        return
    tokens = [token.casefold() for token in tokenizer.tokens(prompt)]
    found = [tokens[position] for position in placed.tokens]
    try:
        word = [token.casefold() for token in tokenizer.tokens(concept.word)[1:-1]]
    except PromptError:  # too long for any prompt
        word = []
    if not (word and set(word) <= set(found)) and not set(found) <= set(word):
        warn(
            "token-index",
            f"concept {concept.name!r}: by its token_index it stands on {' '.join(found)!r}, and its word is "
            f"{concept.word!r}. If the index is of another prompt, leave it out (of a kept concept, "
            "`renamed` with the word does); if it is meant, give the word that stands there.",
        )


def check_concept(concept: NamedConcept, origin: Origin, tokenizer: Tokenizer) -> None:
    """Raise InputError for a kept concept of another origin or of a file that was written to since it was loaded, or
    for a reference prompt that is too long.
    """
    if isinstance(concept, KeptConcept):
        concept.check_not_modified()
        concept.origin.check(origin, concept.name)
        return
    for reference in concept.references:
        tokenizer.encode(reference.prompt)


def check_number(references: int, bundle: Bundle) -> None:
    """Raise ConceptError for more references than the bundle takes."""
    if references > bundle.limits.references:
        raise ConceptError(
            f"{references} references were given; the bundle takes at most {bundle.limits.references}. "
            "Leave some out, or export a bundle for more references."
        )
