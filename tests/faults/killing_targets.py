"""The writers that are killed and put on bad disks, each with its command, its place, and how to see what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from killing import Ended, Forks, leftovers
from killing_checks import bundle_at, concept_at, concepts_at, plan_at, result_at

from magicface_rt import KeptConcept
from magicface_rt.bundle import Bundle

GetForks = Callable[[str], Forks]
"""By the library that is loaded."""


@dataclass
class Target:
    """A command that writes to `below`.

    library    what must be loaded for it, see `killing.Forks`
    place      where what it makes appears
    standing   whether that is there; fails where it is half there
    refuses    whether the same command refuses what is there already
    """

    library: str
    work: str
    arguments: list[Any]
    below: Path
    place: Path
    standing: Callable[[], bool]
    refuses: bool

    def run(self, forks: Forks, **more: Any) -> Ended:
        return forks.run(self.work, self.arguments, self.below, **more)

    def again(self, forks: Forks) -> None:
        """The same command simply works, and afterwards nothing temporary is there; then the place is empty again."""
        there = self.standing()
        ended = self.run(forks)
        if there and self.refuses:
            assert ended.code == 2, ended.said
            assert "exists already" in ended.said or " exists. " in ended.said
            self.clear()
            ended = self.run(forks)
        assert ended.code == 0, ended.said
        assert "waiting" not in ended.said
        assert self.standing()
        assert leftovers(self.below) == []
        self.clear()

    def clear(self) -> None:
        clear(self.place)


def clear(place: Path) -> None:
    """Remove what stands there."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def result(below: Path) -> Target:
    place = below / "run"
    return Target("cli", "result", [os.fspath(place), 7, False], below, place, lambda: result_at(place) == 7, True)


def concept(below: Path, source: Path) -> Target:
    place, kept = below / "man.concept", KeptConcept.load(source)
    arguments = [os.fspath(source), os.fspath(place), 7, False]
    return Target("cli", "concept", arguments, below, place, lambda: concept_at(place, kept) == 7, True)


def prepare(below: Path, bundle: Path, job: Path, source: Path) -> Target:
    """`source`: what the same command wrote at another time."""
    place, kept = below / "man.concept", KeptConcept.load(source)
    arguments = [prepare_arguments(bundle, job, below)]
    return Target("cli", "cli", arguments, below, place, lambda: concept_at(place, kept) is not None, True)


PAIR = ["hat.concept", "man.concept"]
"""The files that `prepare` writes for a job of two concepts, the second one first."""


def prepare_pair(below: Path, bundle: Path, job: Path, sources: Path) -> Target:
    """Of two concepts, of which the first may stand alone. `sources`: the folder that the same command wrote before."""
    place = below / "kept"
    arguments = [prepare_arguments(bundle, job, place)]
    return Target("cli", "cli", arguments, below, place, lambda: concepts_at(place, sources) == PAIR, False)


def prepare_arguments(bundle: Path, job: Path, out: Path) -> list[str]:
    arguments = ["prepare", bundle, "--job", job, "--out", out]
    return [*map(os.fspath, arguments), "--threads", "1", "--backend", "onnxruntime-cpu"]


def build(below: Path, bundle: Path) -> Target:
    place = below / "store"
    return Target("build", "cli", [build_arguments(bundle, place)], below, place, lambda: plan_at(place), False)


def build_arguments(bundle: Path, store: Path) -> list[str]:
    """One graph, which takes a second."""
    arguments = ["build", bundle, "--store", store, "--graph", "text_encoder", "--target", "rtx-portable"]
    return [*map(os.fspath, arguments)]


def export(below: Path, bundle: Path, checkpoint: Path, like: Bundle) -> Target:
    """With the computing left out. `like`: what it wrote at another time."""
    place = below / "bundle"
    arguments = [export_arguments(checkpoint, place, bundle), os.fspath(bundle)]
    return Target("export", "export", arguments, below, place, lambda: bundle_at(place, like), True)


def export_arguments(checkpoint: Path, place: Path, bundle: Path) -> list[str]:
    """For the size of a bundle that is there."""
    side = Bundle.open(bundle, check_hashes=False)
    size = ["--height", str(side.height), "--width", str(side.width)]
    return ["export", os.fspath(checkpoint), "--out", os.fspath(place), *size]
