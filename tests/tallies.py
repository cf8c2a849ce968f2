"""What became of the inputs that tests gave to parsers, told when the tests have ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

TALLY: dict[str, Counter[str]] = defaultdict(Counter)
"""By parser: how many inputs were `tried`, `accepted`, and refused by which error."""


def add(tally: Mapping[str, Mapping[str, int]]) -> None:
    """Adds what another process counted."""
    for parser, counts in tally.items():
        TALLY[parser].update(counts)


def plain() -> dict[str, dict[str, int]]:
    """The tally as JSON can hold it."""
    return {parser: dict(counts) for parser, counts in TALLY.items()}


def lines() -> list[str]:
    """The tally as lines of text."""
    told = []
    for parser, counts in sorted(TALLY.items()):
        refused = {kind: n for kind, n in counts.items() if kind not in ("tried", "accepted")}
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(refused.items()))
        line = f"{counts['tried']:8,} tried {counts['accepted']:8,} accepted {sum(refused.values()):8,} refused"
        told.append(f"{parser:28} {line}{f'  ({kinds})' if kinds else ''}")
    return told
