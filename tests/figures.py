"""What a test counted or measured, told when the tests have ended: docs/operations.md gives these figures."""

from __future__ import annotations

FIGURES: dict[str, dict[str, str]] = {}
"""By subject ("kills"), then by what it was counted of ("prepare")."""


def tell(subject: str, of: str, figure: str) -> None:
    """Adds a figure: `tell("kills", "prepare", "200 kills, 31 whole, 169 nothing, 0 half-written")`."""
    FIGURES.setdefault(subject, {})[of] = figure


def lines() -> list[str]:
    """All figures as lines of text."""
    return [
        f"{subject:12} {of:36} {figure}"
        for subject, figures in sorted(FIGURES.items())
        for of, figure in sorted(figures.items())
    ]
