"""A process of its own that asks and asks, and tells what it held: started by test_faults_slopes.

python memory_soak.py requests BUNDLE FOLDER TURNS    mixed requests on one Session; some fail, some are cancelled
python memory_soak.py cycles BUNDLE FOLDER TURNS      a Session opened, asked once, closed or let go of
python memory_soak.py plain BUNDLE FOLDER TURNS       the graphs of such a cycle opened, run and let go of by ONNX
                                                      Runtime alone: what its share of a cycle is

In the environment `memory_slopes.EXACT` the readings of what is allocated are exact. The slopes are written to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from memory_slopes import allocated, anonymous, held, make_room_for_names, slope_of
from threads_requests import MAN, STEPS, Mixed, digest

from magicface_rt import Session
from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.bundle import Bundle

LET_GO = 3
"""Every so many cycles the Session is let go of without `close`. Its graphs' working memory stays until the next one is
closed.
"""

FEW = 20
"""So many cycles take the three graphs that a kept concept needs; more take all five, and in turn."""


def requests(bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    mixed = Mixed(bundle, folder)
    # The store is full after the first of each kind: filling it would look like growth.
    with Session(mixed.bundle, backend=mixed.backend, keep="2MiB", workers=2) as session:
        return _watched(folder, turns, len(mixed.kinds), lambda number: mixed.turn(session, number))


def cycles(bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    mixed = Mixed(bundle, folder)

    kinds = [[mixed.man], [MAN]] if turns > FEW else [[mixed.man]]

    def cycle(number: int) -> tuple[str, int, str]:
        session = Session(mixed.bundle, backend="onnxruntime-cpu", threads=2, keep="4MiB")
        outcome = digest(session.generate("a man", kinds[number % len(kinds)], steps=STEPS, seed=1))
        if number % LET_GO:
            session.close()
        return f"cycle {number % len(kinds)}", 1, outcome

    return _watched(folder, turns, len(kinds) * LET_GO, cycle)


class _Listening(Backend):
    """ONNX Runtime on the CPU, which notes the file of every graph and what each run of it was given and asked for."""

    name = "onnxruntime-cpu"

    def __init__(self) -> None:
        self._inner = OnnxRuntime("cpu", threads=2)
        self.runs: list[tuple[str, dict[str, Any], list[str]]] = []

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        runner = self._inner.load(bundle, graph)
        run, path = runner._run, str(bundle.path / bundle.graph(graph).files["onnxruntime"])

        def listening(inputs: Any, outputs: Any) -> Any:
            self.runs.append((path, {name: np.array(array) for name, array in inputs.items()}, list(outputs)))
            return run(inputs, outputs)

        runner._run = listening  # type: ignore[method-assign]
        return runner

    def close(self) -> None:
        self._inner.close()


def plain(bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    """As `cycles` with more than `FEW` turns, but without a Session: in turn with three graphs and with all five."""
    import onnxruntime

    mixed, requests = Mixed(bundle, folder), []
    for concept in (mixed.man, MAN):
        backend = _Listening()
        with Session(mixed.bundle, backend=backend) as session:
            session.generate("a man", [concept], steps=STEPS, seed=1)
        requests.append(backend.runs)

    def cycle(number: int) -> tuple[str, int, str]:
        kind, opened = number % len(requests), {}
        for path, inputs, outputs in requests[kind]:
            if path not in opened:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                options.intra_op_num_threads = 2
                opened[path] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            opened[path].run(outputs, inputs)
        return f"cycle {kind}", 1, ""

    return _watched(folder, turns, len(requests), cycle)


def _watched(folder: Path, turns: int, kinds: int, turn: Callable[[int], tuple[str, int, str]]) -> dict[str, Any]:
    """Readings whenever each of the kinds has come once more; what was held after the first of each kind, and at the
    end; outcomes by kind and seed.

    Between those moments the readings rise and fall with what the turns leave in the store and in buffers.
    """
    rows = turns // kinds
    make_room_for_names()
    # What is noted must not grow itself: the readings have their place beforehand, and outcomes go to a file.
    readings = {"allocated": np.zeros(rows + 1, np.int64), "anonymous": np.zeros(rows + 1, np.int64)}
    begun: dict[str, list[str]] = {}
    with (folder / "outcomes").open("w+", encoding="utf-8") as noted:
        for row in range(rows + 1):
            for number in range(row * kinds, (row + 1) * kinds):
                kind, seed, outcome = turn(number)
                noted.write(json.dumps([f"{kind}, seed {seed}", outcome]) + "\n")
            readings["anonymous"][row] = anonymous()
            readings["allocated"][row] = allocated() or 0
            if not row:
                begun = held()
        ended = held()
        noted.seek(0)
        outcomes: dict[str, set[str]] = {}
        for name, outcome in map(json.loads, noted):
            outcomes.setdefault(name, set()).add(outcome)
    return {
        "readings": {name: found.tolist() for name, found in readings.items() if found.any()},
        "every": kinds,
        "begun": begun,
        "ended": ended,
        "outcomes": {name: sorted(found) for name, found in outcomes.items()},
    }


if __name__ == "__main__":
    _, what, bundle, folder, turns = sys.argv
    soaks = {"requests": requests, "cycles": cycles, "plain": plain}
    found = soaks[what](Path(bundle), Path(folder), int(turns))
    for name, row in found["readings"].items():
        print(f"{what}, {name}, a turn: {slope_of(row, found['every'])}", file=sys.stderr)
    print(json.dumps(found))
