"""What kept concepts save: first and second request, plain Stable Diffusion of the same bundle, and PyTorch.

    .venv/bin/python -m benchmarks.kept_concepts BUNDLE [--checkpoint DIR] [--steps 4] [--rounds 3] [--concepts 1 2 3]

For each number N of concepts, in turn and round after round, so whatever else the machine does affects all of them:

    first      a Session that knows none of the N concepts: references prepared, then the picture
    second     the same request again: everything about the references is kept
    beside     the request without keeping: references run beside the target at each step
    plain      the same bundle without concepts: Stable Diffusion
    8-bit      the second request with keys in 8 bits
    diffusers  with --checkpoint: plain Stable Diffusion by diffusers, eager
    authors    with --checkpoint: the authors' algorithm in eager PyTorch (benchmarks/baselines). It runs when the
               others have ended, since it needs 20 GB at full size with N = 3; --authors-steps and --authors-rounds
               say how long. `magicface-rt bench` has it with parity checked first

PyTorch computes in float32, at the bundle's size and with its injection layers; a checkpoint that the bundle was not
made from is refused.

All ways of making one request, except `8-bit`, must give the same latents as the first of them, or nothing is timed;
`plain`, `diffusers` and `authors` make other pictures than those, and are compared with nothing here.

Seconds a step are those of the steps divided by their number, including the preparation of references but not encoding
and decoding; ours are given for whole requests as well. Graphs are loaded before. Peaks are of the process during that
very request. Before `second`, `plain` and `8-bit` the graphs that only preparing needs are unloaded, as in a service
that has its concepts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from magicface_rt import Bundle
from magicface_rt.errors import InputError, MagicFaceError

from .bootstrap import MIN_SAMPLES, figures, ratio_of_medians
from .judging import END_TO_END
from .machine import peak_host_bytes, reset_peak_host_bytes

WORDS = ("man", "hat", "dog", "car", "tree", "house")
OURS = ("first", "second", "beside", "plain", "8-bit")
PREPARING = ("vae_encoder", "reference_kv")
RATIOS = (
    ("first", "second"),
    ("second", "plain"),
    ("beside", "second"),
    ("diffusers", "second"),
    ("authors", "second"),
)

ALONE = ("authors",)
"""Contenders that run when the others have ended."""


@dataclass
class Told:
    """What was measured of one request.

    seconds: of a step; request: of the whole request; peak: bytes of host memory; error: how far its latents are from
    those that the first way made, None if they are of another picture, so there is nothing to compare them with;
    notes: further figures by name.
    """

    seconds: float
    request: float | None = None
    peak: int = 0
    error: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


Measure = Callable[[str, int], Told]


def ours(pipe: Connection, bundle_path: str, numbers: list[int], steps: int, share: float) -> None:
    from magicface_rt import Concept, Reference, Session

    rng = np.random.default_rng(0)
    mask = np.zeros((128, 128), bool)
    mask[: round(128 * share)] = True
    concepts = [
        Concept(word, Reference(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8), mask=mask, prompt=f"a {word}"))
        for word in WORDS[: max(numbers)]
    ]
    prompt = "a " + " and a ".join(WORDS[: max(numbers)])
    bundle = Bundle.open(bundle_path, check_hashes=False)
    with Session(bundle, backend="onnxruntime-cpu", keep="64GiB") as session:
        keeper = session._keeper
        settings = {"exact": keeper.settings, "8-bit": type(keeper.settings)(keep=2**36, storage="8-bit")}
        settings["beside"] = type(keeper.settings)(memory="recompute")
        exact: dict[int, Any] = {}

        def measure(what: str, n: int) -> Told:
            keeper.settings = settings.get(what, settings["exact"])
            if what == "first":
                keeper.store.forget()
            if what in ("first", "beside", "8-bit"):
                for graph in PREPARING:
                    session.runner(graph)
            kept = []
            if what == "8-bit":
                kept = [session.prepare(one, steps=steps, storage="8-bit") for one in concepts[:n]]
            if what in ("second", "plain", "8-bit"):
                session.unload(*PREPARING)
            reset_peak_host_bytes()
            result = session.generate(prompt, [] if what == "plain" else concepts[:n], steps=steps, seed=7)
            timings = result.timings
            told = Told((timings.denoising + timings.reference_pass) / steps, timings.total, peak_host_bytes() or 0)
            if what == "second":
                told.notes["bytes kept for a concept"] = f"{keeper.store.nbytes / n:,.0f}"
            if what == "plain":
                return told
            expected = exact.setdefault(n, result.latents)  # those of the first way that made them
            told.error = float(np.linalg.norm(result.latents - expected) / np.linalg.norm(expected))
            if kept:
                told.notes["error of the keys"] = f"{max(one.error for one in kept):.1e}"
                told.notes["of the latents"] = f"{told.error:.1e}"
            return told

        session.warm_up(prompt, concepts[:1], steps=1)
        _serve(pipe, measure)


def authors(pipe: Connection, checkpoint_path: str, bundle_path: str, steps: int, share: float) -> None:
    import torch

    from magicface_rt.export.checkpoint import Checkpoint
    from magicface_rt.export.reference import generate_latents

    from .baselines.authors import Authors

    checkpoint, bundle = Checkpoint.open(checkpoint_path), Bundle.open(bundle_path, check_hashes=False)
    layers = [layer.index for layer in bundle.injection_layers]
    network = Authors(checkpoint.load_unet(torch.float32), injection_layers=layers)
    size = (bundle.latent_channels, bundle.rows, bundle.columns)
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[: round(128 * share)] = True

    def measure(what: str, n: int) -> Told:
        torch.manual_seed(0)
        text = torch.randn(2, 77, checkpoint.text_width)
        reset_peak_host_bytes()
        start = time.perf_counter()
        with torch.no_grad():
            for _ in generate_latents(
                network,
                x_T=torch.randn(1, *size),
                text=text,
                z0=torch.randn(n, *size),
                noise=torch.randn(steps, n, *size),
                reference_text=torch.randn(n, 77, checkpoint.text_width),
                reference_masks=mask[None].repeat(n, 1, 1),
                weights=torch.full((n,), 3.0),
                concept_of_reference=range(n),
                tokens=[(2 * k + 2,) for k in range(n)],
                schedule=checkpoint.schedule,
                ca_scale=0.9 if n == 1 else 0.6,
            ):
                pass
        return Told((time.perf_counter() - start) / steps, peak=peak_host_bytes() or 0)

    _serve(pipe, measure)


def diffusers(pipe: Connection, checkpoint_path: str, bundle_path: str, steps: int) -> None:
    import torch
    from diffusers import DDIMScheduler

    from magicface_rt.export.checkpoint import Checkpoint

    checkpoint, bundle = Checkpoint.open(checkpoint_path), Bundle.open(bundle_path, check_hashes=False)
    unet = checkpoint.load_unet(torch.float32)
    scheduler = DDIMScheduler.from_config(checkpoint.schedule.to_config())
    scheduler.set_timesteps(steps)
    size = (bundle.latent_channels, bundle.rows, bundle.columns)

    def measure(what: str, n: int) -> Told:
        latents, text = torch.randn(1, *size), torch.randn(2, 77, checkpoint.text_width)
        reset_peak_host_bytes()
        start = time.perf_counter()
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                u, c = unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
                latents = scheduler.step(u + 7.5 * (c - u), timestep, latents).prev_sample
        return Told((time.perf_counter() - start) / steps, peak=peak_host_bytes() or 0)

    _serve(pipe, measure)


def _serve(pipe: Connection, measure: Measure) -> None:
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(measure(*asked))


class Contender:
    """A function that runs in a process of its own."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=target, args=(far, *arguments), daemon=True)
        self._process.start()
        far.close()
        self._pipe.recv()

    def measure(self, what: str, n: int) -> Told:
        self._pipe.send((what, n))
        told: Told = self._pipe.recv()
        return told

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def opened(bundle_path: str, checkpoint_path: str | None) -> Bundle:
    """Open the bundle, before anything is measured.

    Raises:
        BundleError, CheckpointError: one of the two cannot be read.
        InputError: the bundle was not made from the checkpoint, so their figures are of different networks.
    """
    bundle = Bundle.open(bundle_path, check_hashes=False)
    if checkpoint_path is not None:
        from magicface_rt.export.checkpoint import Checkpoint
        from magicface_rt.export.made_from import why_not_made_from

        if reason := why_not_made_from(bundle, Checkpoint.open(checkpoint_path)):
            raise InputError(f"{reason}: they are different networks. Name the one that it was made from.")
    return bundle


def described(bundle: Bundle) -> str:
    """What was measured: the bundle's name, size and dtype."""
    return f"{bundle.path.name}, {bundle.width} x {bundle.height}, {bundle.dtype}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--checkpoint", help="of the bundle, to measure PyTorch as well")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--mask-share", type=float, default=0.3)
    parser.add_argument("--authors-steps", type=int, default=2)
    parser.add_argument("--authors-rounds", type=int, default=3, help="0 leaves the authors' algorithm out")
    a = parser.parse_args()

    try:
        bundle = opened(a.bundle, a.checkpoint)
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    found: dict[tuple[str, int], list[Told]] = {}

    def take(contender: Contender, what: str, n: int, turn: int) -> None:
        told = contender.measure(what, n)
        if what != "8-bit" and told.error is not None and not told.error <= END_TO_END:
            sys.exit(f"{what}, N = {n}: latents are {told.error:.1e} from the first way's: another picture, not timed.")
        found.setdefault((what, n), []).append(told)
        print(f"round {turn + 1}, N = {n}, {what}: {told.seconds:.3f} s a step", flush=True)

    print(f"load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores", flush=True)
    together = dict.fromkeys(OURS, Contender(ours, a.bundle, a.concepts, a.steps, a.mask_share))
    if a.checkpoint:
        together["diffusers"] = Contender(diffusers, a.checkpoint, a.bundle, a.steps)
    for turn in range(a.rounds):
        for n in a.concepts:
            for what, contender in together.items():
                take(contender, what, n, turn)
    for contender in set(together.values()):
        contender.close()
    if a.checkpoint and a.authors_rounds:
        alone = Contender(authors, a.checkpoint, a.bundle, a.authors_steps, a.mask_share)
        for turn in range(a.authors_rounds):
            for n in a.concepts:
                take(alone, "authors", n, turn)
        alone.close()
    print(f"load after: {os.getloadavg()[0]:.1f}\n\n{described(bundle)}, {a.steps} steps")
    if a.checkpoint:
        print("PyTorch: the same size, float32")
    print_table(found)


def print_table(found: dict[tuple[str, int], list[Told]]) -> None:
    """Print the measurements and their ratios as Markdown."""
    print(
        "\n| N | | seconds a step, median (fastest to slowest) | request | peak GB | | error of the latents |"
        "\n|---|---|---|---|---|---|---|"
    )
    for (what, n), told in sorted(found.items(), key=lambda item: item[0][1]):
        step = figures([one.seconds for one in told])
        request = figures([one.request for one in told if one.request is not None] or [0.0]).median
        notes = ", ".join(f"{name} {value}" for name, value in told[-1].notes.items())
        print(
            f"| {n} | {what} | {step.median:.3f} ({step.fastest:.3f} to {step.slowest:.3f}) "
            f"| {f'{request:.1f} s' if request else ''} | {max(one.peak for one in told) / 1e9:.2f} | {notes} "
            f"| {_parity(told)} |"
        )
    interval = f"95 % interval; with fewer than {MIN_SAMPLES} rounds their range"
    print(f"\n| N | ratio | of a step ({interval}) | of a request |\n|---|---|---|---|")
    for n in sorted({n for _, n in found}):
        for above, below in RATIOS:
            upper, lower = found.get((above, n)), found.get((below, n))
            if upper and lower:
                print(
                    f"| {n} | {above} / {below} | {_ratio(upper, lower, above)} | {_ratio_of_requests(upper, lower)} |"
                )


def _parity(told: list[Told]) -> str:
    """The largest error of all rounds."""
    found = [one.error for one in told if one.error is not None]
    return f"{max(found):.1e}" if found else "not compared"


def _ratio(upper: list[Told], lower: list[Told], above: str) -> str:
    """The ratio of seconds a step. Rounds are pairs only if the two took turns."""
    a, b = ([one.seconds for one in side] for side in (upper, lower))
    ratio, low, high = ratio_of_medians(a, b, paired=above not in ALONE, confidence=0.95, seed=0)
    said = f"{ratio:.2f}" if low is None else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    return f"{said}, not in turn" if above in ALONE else said


def _ratio_of_requests(upper: list[Told], lower: list[Told]) -> str:
    a, b = ([one.request for one in side if one.request is not None] for side in (upper, lower))
    return f"{figures(a).median / figures(b).median:.2f}" if a and b else ""


if __name__ == "__main__":
    main()
