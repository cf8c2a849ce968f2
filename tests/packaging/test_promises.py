"""docs/operations.md, SECURITY.md and docs/privacy.md name a test for every promise, or say that none holds it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import cache

import pytest
from locations import ROOT

NAME = re.compile(r"`(test_\w+)`")
NONE = re.compile(r"\b[Nn]o test\b")

DOCUMENTS = ("docs/operations.md", "SECURITY.md", "docs/privacy.md")
OPENLY = DOCUMENTS[1:]
"""Those that may say of a statement that no test holds it. A promise of the first is not made then."""

PROMISING = {"docs/operations.md": ("Promises",)}
"""The sections of a document that promise something, where these are not all of them."""

PLAIN = {
    "docs/operations.md": (),
    "SECURITY.md": ("Before you let others reach the service,",),
    "docs/privacy.md": (
        "A kept concept is derived from the photograph.",
        "This was measured on the",
        "- **The picture comes back**",
        "Anyone who offers a service",
    ),
}
"""How the paragraphs begin that promise nothing: advice, and a measurement of which the last paragraph of its section
says what is held by a test.
"""

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


def paragraphs(name: str) -> list[str]:
    """What a document says beside its tables, in the sections that promise something; a list with what leads to it."""
    found: list[str] = []
    for heading, text in sections(text_of(name)).items():
        if heading == "How to report" or heading not in PROMISING.get(name, (heading,)):
            continue
        leads = False
        for block in re.split(r"\n{2,}", text.strip()):
            if leads and not block.startswith("|"):
                found[-1] += f"\n{block}"
            elif not block.startswith(("|", "#", "![")):
                found.append(block)
            elif leads:
                found.pop()  # it led to a table, whose rows are looked at
            leads = block.endswith(":") and not block.startswith("|")
    return found


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


@documents
def test_every_paragraph_beside_the_tables_names_a_test_or_says_that_there_is_none(name: str) -> None:
    found = paragraphs(name)
    assert len(found) >= 5
    plain = [one for one in found if one.startswith(PLAIN[name])]
    assert len(plain) == len(PLAIN[name]), "a paragraph that is left out is not there any more"
    assert not [one for one in found if one not in plain and not NAME.search(one) and not NONE.search(one)]


def test_a_paragraph_without_a_test_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "All of:\n\n| a |\n|---|\n| b |"
    text = f"# A\n\n## B\n\nIt holds.\n\nThese:\n\n- one\n- two (`test_of_two`)\n\n{table}\n\n### C\n\nLast."
    monkeypatch.setattr(sys.modules[__name__], "text_of", lambda name: text)
    assert paragraphs("SECURITY.md") == ["It holds.", "These:\n- one\n- two (`test_of_two`)", "Last."]
