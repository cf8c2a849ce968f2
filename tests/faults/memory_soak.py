"""A process of its own that asks and asks, and tells what it held: started by test_faults_slopes.

python memory_soak.py requests BUNDLE FOLDER TURNS    mixed requests on one Session; some fail, some are cancelled
python memory_soak.py cycles BUNDLE FOLDER TURNS      a Session opened, asked once, closed or let go of
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_slopes import anonymous, held
from threads_requests import MAN, STEPS, Mixed, digest

from magicface_rt import Session

FEW = 20
"""So many cycles take the three graphs that a kept concept needs; more take all five, and in turn."""


def requests(bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    mixed = Mixed(bundle, folder)
    # The store is full after the first of each kind: filling it would look like growth.
    with Session(mixed.bundle, backend=mixed.backend, keep="2MiB", workers=2) as session:
        return _watched(turns, len(mixed.kinds), lambda number: mixed.turn(session, number))


def cycles(bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    mixed = Mixed(bundle, folder)

    kinds = [[mixed.man], [MAN]] if turns > FEW else [[mixed.man]]

    def cycle(number: int) -> tuple[str, int, str]:
        session = Session(mixed.bundle, backend="onnxruntime-cpu", threads=2, keep="4MiB")
        outcome = digest(session.generate("a man", kinds[number % len(kinds)], steps=STEPS, seed=1))
        if number % 3:  # every third is let go of without `close`
            session.close()
        return f"cycle {number % len(kinds)}", 1, outcome

    return _watched(turns, len(kinds), cycle)


def _watched(turns: int, kinds: int, turn: Callable[[int], tuple[str, int, str]]) -> dict[str, Any]:
    """Readings after every turn; what was held after each kind came once, and at the end; outcomes by kind and seed."""
    outcomes: dict[str, set[str]] = {}
    readings, begun = [], {}
    for number in range(turns + kinds):
        kind, seed, outcome = turn(number)
        outcomes.setdefault(f"{kind}, seed {seed}", set()).add(outcome)
        if number >= kinds - 1:
            readings.append(anonymous())
        if number == kinds - 1:
            begun = held()
    return {
        "readings": readings,
        "begun": begun,
        "ended": held(),
        "outcomes": {name: sorted(found) for name, found in outcomes.items()},
    }


if __name__ == "__main__":
    _, what, bundle, folder, turns = sys.argv
    print(json.dumps({"requests": requests, "cycles": cycles}[what](Path(bundle), Path(folder), int(turns))))
