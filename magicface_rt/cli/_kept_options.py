"""Kept concepts on the command line: `--kept`, where keys are kept, and how a plan is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.table import Table

from magicface_rt import Concept, ConceptError, InputError, KeptConcept, MemoryPlan, OptionError
from magicface_rt.concept import NamedConcept
from magicface_rt.jobs import option_value, split_option
from magicface_rt.shown import one_line, shown

from ._bundle_view import grid, size

_KEYS = ("file", "word", "name", "weight", "token_index")

KeptOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="A prepared concept, man.concept, or file=man.concept,word=person,weight=2 for other settings. Takes the "
        "place of the job's concept of that name, with that concept's settings. May be given several times.",
    ),
]
StorageOption = Annotated[str, typer.Option(metavar="exact|8-bit", help="How keys are kept; 8-bit is smaller.")]
KeepOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory that prepared references may stay in, such as 4GiB; else in none."),
]
MemoryOption = Annotated[
    str, typer.Option(metavar="auto|keep|stream|recompute", help="Where the references' keys are, see `plan`; auto.")
]
BudgetOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What the references may need at the peak, such as 2GiB; on a GPU what is free."),
]


@dataclass(frozen=True)
class GivenKept:
    """A `--kept`: the file's concept, and the settings that stand beside it."""

    file: KeptConcept
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What it is called, and so whose place it takes."""
        return str(self.settings.get("name") or self.settings.get("word") or self.file.name)

    def alone(self) -> KeptConcept:
        """With the file's settings where none are given."""
        return self.file.renamed(
            self.settings.get("word"),
            weight=self.settings.get("weight"),
            token_index=self.settings.get("token_index"),
            name=self.settings.get("name"),
        )

    def instead_of(self, concept: NamedConcept) -> KeptConcept:
        """With that concept's settings where none are given. A word that is given leaves its token_index behind."""
        token_index = None if "word" in self.settings else concept.token_index
        return self.file.renamed(
            self.settings.get("word", concept.word),
            weight=self.settings.get("weight", concept.weight),
            token_index=self.settings.get("token_index", token_index),
            name=concept.name,
        )


def load_kept(texts: Sequence[str]) -> list[GivenKept]:
    """What each `--kept` gives.

    Raises:
        OptionError: an option cannot be read, or two would have one name.
        KeptConceptError: the file cannot be used.
        ConceptError: a weight or token index out of range.
    """
    found: dict[str, GivenKept] = {}
    for text in texts:
        given = _load(text)
        if given.name in found:
            raise OptionError(
                f"--kept was given twice for the concept {shown(given.name)}; give one of them another name=."
            )
        found[given.name] = given
    return list(found.values())


def _load(text: str) -> GivenKept:
    """Quotes and escapes are those of `--concept`. A text that starts with none of the keys is a file's name."""
    if text.partition("=")[0].strip() not in _KEYS or "=" not in text:
        return GivenKept(KeptConcept.load(text), {})
    settings: dict[str, Any] = {}
    try:
        for key, value in split_option(text):
            if key not in _KEYS or key in settings:
                found = one_line(f"{key}={value}"[:200])
                raise OptionError(f"{found} is not expected; give file= once, and any of {', '.join(_KEYS[1:])}.")
            settings[key] = option_value(key, value)
        if "file" not in settings:
            raise OptionError("file= is missing.")
    except InputError as error:
        raise OptionError(f"--kept {shown(text)}: {error}") from error
    given = GivenKept(KeptConcept.load(settings.pop("file")), settings)
    try:
        given.alone()  # weight and token_index are refused before anything else is looked at
    except ConceptError as error:
        raise ConceptError(f"--kept {shown(text)}: {error}") from error
    return given


def replace_concepts(concepts: Sequence[NamedConcept], kept: Sequence[GivenKept]) -> list[NamedConcept]:
    """The concepts of a job with the kept ones in the places of those with their name, and the others behind.

    Raises:
        OptionError: several have the name of a kept one.
    """
    names = [concept.name for concept in concepts]
    for name in (one.name for one in kept):
        if names.count(name) > 1:
            raise OptionError(
                f"--kept is for the concept {name!r}, and {names.count(name)} concepts have that name, "
                "expected one. Give each of them a name of its own, and the file the name= of the one that it is for."
            )
    by_name = {given.name: given for given in kept}
    taken: list[NamedConcept] = []
    for concept in concepts:
        given = by_name.pop(concept.name, None)
        taken.append(concept if given is None else given.instead_of(concept))
    return [*taken, *(given.alone() for given in by_name.values())]


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
