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
from magicface_rt.values.shown import one_line, shown

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
    """One `--kept`: the concept from its file, and the settings given beside it."""

    file: KeptConcept
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name that the concept gets, and so of the concept whose place it takes."""
        return str(self.settings.get("name") or self.settings.get("word") or self.file.name)

    def alone(self) -> KeptConcept:
        """Return the kept concept, with the file's settings where none are given."""
        return self.file.renamed(
            self.settings.get("word"),
            weight=self.settings.get("weight"),
            token_index=self.settings.get("token_index"),
            name=self.settings.get("name"),
        )

    def instead_of(self, concept: NamedConcept) -> KeptConcept:
        """Return the kept concept with the settings of the one that it replaces where none are given. If a word is
        given, the token_index of the replaced one is not used.
        """
        token_index = None if "word" in self.settings else concept.token_index
        return self.file.renamed(
            self.settings.get("word", concept.word),
            weight=self.settings.get("weight", concept.weight),
            token_index=self.settings.get("token_index", token_index),
            name=concept.name,
        )


def load_kept(texts: Sequence[str]) -> list[GivenKept]:
    """Load what each `--kept` gives.

    Raises:
        OptionError: an option cannot be read, or two would have the same name.
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
    """Load one `--kept`. Quotes and escapes are those of `--concept`. A text that starts with none of the keys is a
    file's name.
    """
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
    """Return a job's concepts, with each kept one in place of the concept with its name, and the remaining kept ones at
    the end.

    Raises:
        OptionError: several concepts have the name of a kept one.
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
    """Return the concepts whose references are images."""
    return [concept for concept in concepts if isinstance(concept, Concept)]


def plan_table(plan: MemoryPlan) -> Table:
    """Return a plan as a table, with the chosen mode marked."""
    where = ("host>", "device>") if plan.on_device else ("memory>",)
    table = grid("what the references need, at the peak", "", "mode", *where)
    for mode, use in plan.modes.items():
        amounts = (size(use.host), size(use.device)) if plan.on_device else (size(use.host),)
        table.add_row("->" if mode == plan.mode else "", mode, *amounts)
    return table
