"""Requests of every kind, and in a few letters what became of one: the digest of its bytes, or its error.

An outcome depends on the kind and the seed alone, whoever asks, in whatever order, beside whatever else.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magicface_rt import Concept, KeptConcept, Options, Progress, Reference, Request, Result, Session
from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.bundle import Bundle
from magicface_rt.errors import BackendError

PROMPT = "a man with a hat"
STEPS = 2
SEEDS = 3


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def square(low: int, high: int) -> Image.Image:
    mask = np.zeros((64, 64), np.uint8)
    mask[low:high, low:high] = 255
    return Image.fromarray(mask)


MAN = Concept("man", Reference(picture(1), mask=square(8, 56), prompt="a man"), weight=2.5)
HAT = Concept("hat", Reference(picture(2), mask=square(20, 60), prompt="a hat"), weight=2.0)


class Failing(Backend):
    """ONNX Runtime on one thread of the CPU. In a thread that says so, the next step of the U-Net fails.

    A graph is loaded once, whatever Sessions open and close: to load them all takes longer than a request. `runs`: how
    often each ran.
    """

    name = "onnxruntime-cpu"

    def __init__(self) -> None:
        self.inner = OnnxRuntime("cpu", threads=1)
        self._next = threading.local()
        self.runs: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._loaded: dict[tuple[str, str], GraphRunner] = {}

    def fail_here(self) -> None:
        """In this thread, once."""
        self._next.fails = True

    def load(self, bundle: Bundle, graph: str) -> GraphRunner:
        if (bundle.hash, graph) not in self._loaded:
            self._loaded[bundle.hash, graph] = self._load(bundle, graph)
        return self._loaded[bundle.hash, graph]

    def _load(self, bundle: Bundle, graph: str) -> GraphRunner:
        runner = self.inner.load(bundle, graph)
        run = runner._run

        def failing(*arguments: Any) -> Any:
            with self._counting:
                self.runs[graph] += 1
            if graph == "denoise_step" and getattr(self._next, "fails", False):
                self._next.fails = False
                raise BackendError("graph denoise_step: the runtime failed")
            return run(*arguments)

        runner._run = failing  # type: ignore[method-assign]
        runner.close = lambda: None  # type: ignore[method-assign]
        return runner


def digest(*results: Result) -> str:
    """Of latents, regions and pictures, bit by bit."""
    found = hashlib.sha256()
    for result in results:
        for array in (result.latents, result.regions, *(np.asarray(image) for image in result.images)):
            found.update(repr((array.shape, array.dtype.str)).encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


class Mixed:
    """Kinds of requests on one bundle; `backend` serves it. Kept concepts are prepared once, here."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle = Bundle.open(bundle, check_hashes=False)
        self.backend = Failing()
        with Session(self.bundle, backend=self.backend) as session:
            self.man = session.prepare(MAN, steps=STEPS)
            self.hat = session.prepare(HAT, steps=STEPS)
            self.small = session.prepare(HAT, steps=STEPS, storage="8-bit")
            path = folder / "man.concept"
            self.file = KeptConcept.load(path if path.exists() else self.man.save(path))
        self.kinds: dict[str, Callable[[Session, int], str]] = {
            "no concepts": lambda s, n: self._draw(s, n, []),
            "bare": lambda s, n: self._draw(s, n, [MAN], weight_mode="scale"),
            "two bare": lambda s, n: self._draw(s, n, [MAN, HAT]),
            "kept": lambda s, n: self._draw(s, n, [self.man, self.hat], alpha=0.0),
            "8 bits": lambda s, n: self._draw(s, n, [self.small], guidance=5.0),
            "from a file": lambda s, n: self._draw(s, n, [self.file.renamed(weight=1.0)]),
            "kept and bare": lambda s, n: self._draw(s, n, [self.man, HAT], alpha=1.0),
            "three pictures": lambda s, n: self._draw(s, n, [self.hat], images=3),
            "other steps": lambda s, n: self._draw(s, n, [HAT], steps=1 + n % 3, negative_prompt="rain"),
            "batch": self._batch,
            "prepared": self._prepared,
            "cancelled": lambda s, n: self._draw(s, n, [MAN, HAT], progress=_one_step),
            "refused": lambda s, n: self._draw(s, n, [Concept("dog", *MAN.references)]),
            "failed": self._failed,
            "raised": lambda s, n: self._draw(s, n, [self.man], progress=_raise),
        }

    def ask(self, session: Session, kind: str, seed: int) -> str:
        """The digest, or the error's name and words."""
        try:
            return self.kinds[kind](session, seed)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def turn(self, session: Session, number: int) -> tuple[str, int, str]:
        """Request `number` of an endless row in which all kinds and some seeds take turns: kind, seed, outcome."""
        kinds = list(self.kinds)
        kind, seed = kinds[number % len(kinds)], number // len(kinds) % SEEDS
        return kind, seed, self.ask(session, kind, seed)

    @property
    def turns(self) -> int:
        """After so many the row begins again."""
        return len(self.kinds) * SEEDS

    def _draw(self, session: Session, seed: int, concepts: list[Any], **settings: Any) -> str:
        result = session.generate(PROMPT, concepts, **{"steps": STEPS, "seed": seed, **settings})
        return digest(result)

    def _batch(self, session: Session, seed: int) -> str:
        requests = [
            Request(PROMPT, [self.man, HAT], Options(steps=STEPS, seed=seed)),
            Request("a hat", [self.hat], Options(steps=STEPS, seed=seed + 1, alpha=0.0)),
            Request("a dog", (), Options(steps=STEPS, seed=seed + 2)),
        ]
        return digest(*session.generate_batch(requests))

    def _prepared(self, session: Session, seed: int) -> str:
        """A number of steps and a seed that nobody else has, so that something is computed."""
        kept = session.prepare(HAT, steps=4, reference_seed=seed)
        found = hashlib.sha256()
        for stored in kept.references[0].tensors.values():
            for array in stored.arrays.values():
                found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]

    def _failed(self, session: Session, seed: int) -> str:
        self.backend.fail_here()
        return self._draw(session, seed, [self.hat])


def _one_step(progress: Progress) -> bool:
    """Cancels after the first step, however the references were brought there."""
    return progress.stage == "prepare"


def _raise(_: Progress) -> None:
    raise LookupError("a callback of the caller's failed")
