"""docs/operations.md names a test for every promise: the tests are there."""

from __future__ import annotations

import re

from locations import ROOT

NAME = re.compile(r"`(test_\w+)`")


def test_every_test_that_a_promise_names_is_there() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
    there = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    named = NAME.findall(text)
    assert len(named) > 30
    assert not sorted(set(named) - there)


def test_every_promise_names_a_test_or_a_folder_of_tests() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| promise \| held by \|\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r"`(test_\w+|tests/\w+/)`", row.split("|")[2])]
