"""Kept concepts on the command line: `--kept`, and how a plan is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from magicface_rt import Concept, KeptConcept, MemoryPlan, OptionError
from magicface_rt.concept import NamedConcept
from magicface_rt.kept.keeper import checked_storage
from magicface_rt.kept.reference import Storage

from ._bundle_view import grid, size

_KEYS = ("file", "word", "name", "weight", "token_index")

KeptOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="A prepared concept, man.concept, or file=man.concept,word=person,weight=2 for other settings. Takes the "
        "place of the job's concept of that name. May be given several times.",
    ),
]
StorageOption = Annotated[str, typer.Option(metavar="exact|8-bit", help="How keys are kept; 8-bit is smaller.")]


def storage_of(text: str) -> Storage:
    """Raises OptionError for a storage that there is not."""
    return checked_storage(text)


def load_kept(texts: Sequence[str]) -> list[KeptConcept]:
    """The concepts of `--kept`, under the words and weights given there.

    Raises:
        OptionError: the option cannot be read.
        KeptConceptError: the file cannot be used.
        ConceptError: a weight or token index out of range.
    """
    return [_load(text) for text in texts]


def _load(text: str) -> KeptConcept:
    if not text.startswith("file="):
        return KeptConcept.load(text)
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _KEYS or key in given:
            raise OptionError(
                f"--kept {text!r}: {part!r} is not expected; give file=PATH once, and any of {', '.join(_KEYS[1:])} "
                "as KEY=VALUE, with commas between."
            )
        given[key] = value
    kept = KeptConcept.load(given["file"])
    return kept.renamed(
        given.get("word"),
        name=given.get("name"),
        weight=_number(given, "weight"),
        token_index=_whole(given, "token_index"),
    )


def replace_concepts(concepts: Sequence[NamedConcept], kept: Sequence[KeptConcept]) -> list[NamedConcept]:
    """The concepts of a job with the kept ones in the places of those with their name, and the others behind."""
    by_name: dict[str, KeptConcept] = {}
    for one in kept:
        if one.name in by_name:
            raise OptionError(f"--kept was given twice for the concept {one.name!r}; give one of them another name=.")
        by_name[one.name] = one
    taken: list[NamedConcept] = [by_name.pop(concept.name, concept) for concept in concepts]
    return [*taken, *by_name.values()]


def bare_concepts(concepts: Sequence[NamedConcept]) -> list[Concept]:
    """Those whose references are images."""
    return [concept for concept in concepts if isinstance(concept, Concept)]


def plan_table(plan: MemoryPlan) -> Table:
    """A plan as a table, the chosen mode marked."""
    where = ("host>", "device>") if plan.on_device else ("memory>",)
    table = grid("what the references need, at the peak", "", "mode", *where)
    for mode, use in plan.modes.items():
        amounts = (size(use.host), size(use.device)) if plan.on_device else (size(use.host),)
        table.add_row("->" if mode == plan.mode else "", mode, *amounts)
    return table


def _number(given: dict[str, str], key: str) -> float | None:
    try:
        return float(given[key]) if key in given else None
    except ValueError:
        raise OptionError(f"--kept: {key} is {given[key]!r}, expected a number.") from None


def _whole(given: dict[str, str], key: str) -> int | None:
    try:
        return int(given[key]) if key in given else None
    except ValueError:
        raise OptionError(f"--kept: {key} is {given[key]!r}, expected a whole number.") from None
