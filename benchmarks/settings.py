"""What a benchmark runs: which contenders, on which cases, how often. Frozen, checked, and written into its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from magicface_rt.errors import OptionError
from magicface_rt.process.cores import MOST_THREADS
from magicface_rt.regions import MAX_CONCEPTS

TORCH_KINDS = ("authors", "strong", "compiled", "plain")
OURS_KINDS = ("bare", "kept")
ORACLES = ("auto", "reference", "strong", "bare")
TITLES = {
    "authors": "(a) authors' algorithm, eager",
    "strong": "(b) strong eager",
    "compiled": "(c) torch.compile of (b)",
    "plain": "(d) plain Stable Diffusion",
    "bare": "SDK, reference pass each step",
    "kept": "SDK, kept keys and values",
}


@dataclass(frozen=True)
class Contender:
    """What is timed: a kind and, for the SDK, the backend it runs on."""

    kind: str
    backend: str = ""

    def __str__(self) -> str:
        return f"{self.kind}@{self.backend}" if self.backend else self.kind

    @property
    def ours(self) -> bool:
        return self.kind in OURS_KINDS

    @property
    def title(self) -> str:
        """A name for people, with the backend unless that is the CPU's."""
        shown = "" if self.backend in ("", "onnxruntime-cpu") else f", {self.backend}"
        return TITLES[self.kind] + shown


@dataclass(frozen=True)
class Case:
    """The shape of a request. `mask_share`: part of each reference that its mask covers, above 0, up to 1."""

    concepts: int
    mask_share: float
    images: int
    steps: int

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        return f"N = {self.concepts}, masks {self.mask_share:.0%}, {images}, {self.steps} steps"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is run: all combinations of the tuples, for each bundle; or variations of one thing at a time.

    one_at_a_time   each tuple is gone through with the first value of all others; so are the bundles
    bundles         folders; one for each size, as a bundle has one
    checkpoint      what they were exported from; without it there is nothing of PyTorch's to compare with
    backends        for the SDK's kinds
    step_rounds     single steps, of each stage, by each contender in turn
    request_rounds  whole requests by each contender in turn, after the first; 0: no requests at all
    parity_steps    length of the run that is compared before anything is reported: one RSA step, then RBA
    oracle          what parity is judged by: "reference" (PyTorch written for clarity), "strong" (less memory; replays
                    the recordings as well), "bare" (the SDK itself, if there is no checkpoint)
    alone           kinds that run when the others have ended, because they need the memory
    alone_rounds    rounds for those
    alpha           part of the steps that a request spends in RSA
    threads         of each contender; 0 for its own choice
    limit           seconds that a contender may take for one step, request or compared run
    torch_device    "cpu", "cuda", or "auto": cuda where torch finds it
    seed            of drawn inputs and of the bootstrap

    Raises `OptionError`, naming the setting.
    """

    bundles: tuple[str, ...]
    checkpoint: str | None = None
    kinds: tuple[str, ...] = ("authors", "strong", "plain", "bare", "kept")
    backends: tuple[str, ...] = ("onnxruntime-cpu",)
    concepts: tuple[int, ...] = (0, 1, 2, 3, 4)
    mask_shares: tuple[float, ...] = (0.3,)
    images: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (50,)
    step_rounds: int = 5
    request_rounds: int = 2
    parity_steps: int = 3
    oracle: str = "auto"
    alone: tuple[str, ...] = ()
    alone_rounds: int = 1
    alpha: float = 0.4
    threads: int = 0
    limit: float = 3600.0
    torch_device: str = "auto"
    store: str | None = None
    seed: int = 0
    one_at_a_time: bool = False
    confidence: float = field(default=0.95)

    def __post_init__(self) -> None:
        if not self.bundles:
            raise OptionError("no bundle was named, expected at least one.")
        _known("kinds", self.kinds, (*TORCH_KINDS, *OURS_KINDS))
        _known("alone", self.alone, (*TORCH_KINDS, *OURS_KINDS))
        _known("oracle", (self.oracle,), ORACLES)
        _known("torch_device", (self.torch_device,), ("auto", "cpu", "cuda"))
        _between("concepts", self.concepts, 0, MAX_CONCEPTS)
        _between("mask_shares", self.mask_shares, 0.01, 1.0)
        _between("images", self.images, 1, 64)
        _between("steps", self.steps, 1, 1000)
        _between("step_rounds", (self.step_rounds,), 1, 10_000)
        _between("request_rounds", (self.request_rounds,), 0, 10_000)
        _between("parity_steps", (self.parity_steps,), 2, 50)
        _between("alone_rounds", (self.alone_rounds,), 1, 10_000)
        _between("alpha", (self.alpha,), 0.0, 1.0)
        _between("threads", (self.threads,), 0, MOST_THREADS)
        _between("limit", (self.limit,), 1.0, 1e6)
        strangers = [kind for kind in self.alone if kind not in self.kinds]
        if strangers:
            raise OptionError(f"alone: {', '.join(strangers)} takes no part; the kinds are {', '.join(self.kinds)}.")
        if self.judge == "bare" and self.checkpoint is not None and "plain" in self.kinds:
            raise OptionError(
                "oracle is 'bare', and plain Stable Diffusion takes part: the SDK cannot judge it. Name the oracle "
                "'reference' or 'strong', or leave out 'plain'."
            )
        if self.checkpoint is None:
            named = [kind for kind in self.kinds if kind in TORCH_KINDS]
            if named or self.oracle in ("reference", "strong"):
                raise OptionError(
                    f"{', '.join(named) or self.oracle} needs the checkpoint that the bundle was made from, and none "
                    "was named. Name it, or run the SDK's kinds alone: bare, kept."
                )

    @property
    def judge(self) -> str:
        """The oracle, "auto" resolved."""
        if self.oracle != "auto":
            return self.oracle
        return "bare" if self.checkpoint is None else "reference"

    def cases(self) -> list[Case]:
        """The cases in order, each once; without concepts the mask's share means nothing."""
        axes = (self.concepts, self.mask_shares, self.images, self.steps)
        combinations = list(product(*axes))
        if self.one_at_a_time:
            base = tuple(axis[0] for axis in axes)
            combinations = [c for c in combinations if sum(x != y for x, y in zip(c, base, strict=True)) <= 1]
        found = []
        for count, share, images, steps in combinations:
            case = Case(count, share if count else self.mask_shares[0], images, steps)
            if case not in found:
                found.append(case)
        return found

    def cases_of(self, bundle: str) -> list[Case]:
        """The cases that a bundle is measured in; with one thing at a time, another bundle is already that thing."""
        every = self.cases()
        return every[:1] if self.one_at_a_time and bundle != self.bundles[0] else every

    def contenders(self, case: Case) -> list[Contender]:
        """The contenders in a case. Without concepts there is nothing to keep, and the two forms of ours are one."""
        found = [Contender(kind) for kind in TORCH_KINDS if kind in self.kinds]
        ours = [kind for kind in OURS_KINDS if kind in self.kinds]
        if not case.concepts:
            ours = ours[-1:]
        return found + [Contender(kind, backend) for backend in self.backends for kind in ours]

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    for value in values:
        if value not in known:
            raise OptionError(f"{name}: {value!r} is not known; there are {', '.join(known)}.")
    if len(set(values)) != len(values):
        raise OptionError(f"{name}: {', '.join(values)} names one twice.")


def _between(name: str, values: Sequence[float], low: float, high: float) -> None:
    if not values:
        raise OptionError(f"{name}: nothing was given, expected at least one value.")
    for value in values:
        if not low <= value <= high:
            raise OptionError(f"{name} is {value!r}, expected from {low:g} to {high:g}.")
