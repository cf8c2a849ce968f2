"""docs/operations.md, SECURITY.md and docs/privacy.md name a test for every promise, or say that none holds it."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest
from locations import ROOT

NAME = re.compile(r"`(test_\w+)`")
NONE = re.compile(r"\b[Nn]o test\b")

DOCUMENTS = ("docs/operations.md", "SECURITY.md", "docs/privacy.md")
OPENLY = DOCUMENTS[1:]
"""Those that may say of a statement that no test holds it. A promise of the first is not made then."""

documents = pytest.mark.parametrize("name", DOCUMENTS)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def there() -> Counter[str]:
    """Every test that there is, with the number of files that have one of its name."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
    return Counter(re.findall(r"^(?:async )?def (test_\w+)\(", sources, re.MULTILINE))


def rows(text: str) -> list[str]:
    """The rows of each table whose last column says by what they are held."""
    tables = re.findall(r"^\|.*\| held by \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


def sections(text: str) -> dict[str, str]:
    """Each section by its heading."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@documents
def test_every_test_that_a_promise_names_is_there_once(name: str) -> None:
    """Of two by that name one could go unseen."""
    named = NAME.findall(text_of(name))
    assert len(named) > 20
    assert not {test: there()[test] for test in named if there()[test] != 1}


@documents
def test_every_promise_names_a_test(name: str) -> None:
    found = rows(text_of(name))
    assert len(found) > 15
    held = [row.rstrip("|").rpartition("|")[2] for row in found]
    bare = [row for row, by in zip(found, held, strict=True) if not NAME.search(by)]
    assert not [row for row in bare if name not in OPENLY or not NONE.search(row)]


@pytest.mark.parametrize("name", OPENLY)
def test_every_section_says_by_what_it_is_held(name: str) -> None:
    """Statements beside the tables as well: what is told in a section without any name would be held by nothing."""
    for heading, text in sections(text_of(name)).items():
        assert heading == "How to report" or NAME.search(text), heading
