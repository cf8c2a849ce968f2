"""What kept concepts save: first and second request, plain Stable Diffusion of the same bundle, and PyTorch.

    .venv/bin/python -m benchmarks.kept_concepts BUNDLE [--checkpoint DIR] [--steps 4] [--rounds 3] [--concepts 1 2 3]

For each number N of concepts, in turn and round after round, so that whatever else the machine does meets all of them:

    first     a Session that knows none of the N concepts: references prepared, then the picture
    second    the same request again: everything about the references is kept
    beside    the request without keeping: references run beside the target at each step
    plain     the same bundle without concepts: Stable Diffusion
    8-bit     the second request with keys in 8 bits
    pytorch   with --checkpoint: the PyTorch reference of the algorithm, as its authors run it, eager (21 GB at full
              size with N = 3)
    diffusers with --checkpoint: plain Stable Diffusion by diffusers, eager

Seconds are of the steps, the preparation of references included, encoding and decoding not; divided by the number of
steps. Ours, PyTorch and diffusers have processes of their own, whose peak memory is told.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

WORDS = ("man", "hat", "dog", "car", "tree", "house")


def ours(pipe: Connection, bundle_path: str, numbers: list[int], steps: int, share: float) -> None:
    from magicface_rt import Bundle, Concept, Reference, Session

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
        session.warm_up(prompt, concepts[:1], steps=1)

        def run(what: str, n: int) -> tuple[float, Any]:
            keeper.settings = settings.get(what, settings["exact"])
            if what == "first":
                keeper.store.forget()
            if what == "8-bit":
                for one in concepts[:n]:
                    session.prepare(one, steps=steps, storage="8-bit")
            result = session.generate(prompt, [] if what == "plain" else concepts[:n], steps=steps, seed=7)
            took = result.timings.denoising + result.timings.reference_pass
            return took / steps, result.latents

        def measure(what: str, n: int) -> dict[str, float]:
            seconds, latents = run(what, n)
            told = {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
            if what == "second":
                told["kept"] = keeper.store.nbytes / n
                found[n] = latents
            if what == "8-bit" and n in found:
                told["drift"] = float(np.linalg.norm(latents - found[n]) / np.linalg.norm(found[n]))
                told["error"] = max(session.prepare(one, steps=steps, storage="8-bit").error for one in concepts[:n])
            return told

        found: dict[int, Any] = {}
        _serve(pipe, measure)


def pytorch(pipe: Connection, checkpoint_path: str, steps: int, share: float) -> None:
    import torch

    from magicface_rt.export.checkpoint import Checkpoint
    from magicface_rt.export.reference import MagicFaceReference, generate_latents

    checkpoint = Checkpoint.open(checkpoint_path)
    unet = checkpoint.load_unet(torch.float32)
    reference, side = MagicFaceReference(unet), int(unet.config.sample_size)
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[: round(128 * share)] = True

    def measure(what: str, n: int) -> dict[str, float]:
        torch.manual_seed(0)
        text = torch.randn(2, 77, checkpoint.text_width)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in generate_latents(
                reference,
                x_T=torch.randn(1, 4, side, side),
                text=text,
                z0=torch.randn(n, 4, side, side),
                noise=torch.randn(steps, n, 4, side, side),
                reference_text=torch.randn(n, 77, checkpoint.text_width),
                reference_masks=mask[None].repeat(n, 1, 1),
                weights=torch.full((n,), 3.0),
                concept_of_reference=range(n),
                tokens=[(2 * k + 2,) for k in range(n)],
                schedule=checkpoint.schedule,
                ca_scale=0.9 if n == 1 else 0.6,
            ):
                pass
        return _told((time.perf_counter() - start) / steps)

    _serve(pipe, measure)


def diffusers(pipe: Connection, checkpoint_path: str, steps: int) -> None:
    import torch
    from diffusers import DDIMScheduler

    from magicface_rt.export.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(checkpoint_path)
    unet = checkpoint.load_unet(torch.float32)
    scheduler, side = DDIMScheduler.from_config(checkpoint.schedule.to_config()), int(unet.config.sample_size)
    scheduler.set_timesteps(steps)

    def measure(what: str, n: int) -> dict[str, float]:
        latents, text = torch.randn(1, 4, side, side), torch.randn(2, 77, checkpoint.text_width)
        start = time.perf_counter()
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                u, c = unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
                latents = scheduler.step(u + 7.5 * (c - u), timestep, latents).prev_sample
        return _told((time.perf_counter() - start) / steps)

    _serve(pipe, measure)


def _told(seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def _serve(pipe: Connection, measure: Callable[[str, int], dict[str, float]]) -> None:
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(measure(*asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--checkpoint", help="of the bundle, to measure PyTorch as well")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--mask-share", type=float, default=0.3)
    parser.add_argument("--no-reference", action="store_true", help="with --checkpoint: diffusers only")
    a = parser.parse_args()
    contenders: dict[str, tuple[Any, tuple[Any, ...]]] = {"ours": (ours, (a.bundle, a.concepts, a.steps, a.mask_share))}
    of_process = dict.fromkeys(("first", "second", "beside", "plain", "8-bit"), "ours")
    if a.checkpoint:
        contenders["diffusers"] = (diffusers, (a.checkpoint, a.steps))
        of_process["diffusers"] = "diffusers"
        if not a.no_reference:
            contenders["pytorch"] = (pytorch, (a.checkpoint, a.steps, a.mask_share))
            of_process["pytorch"] = "pytorch"
    pipes, workers = {}, []
    context = multiprocessing.get_context("spawn")
    for name, (target, arguments) in contenders.items():
        pipes[name], far = context.Pipe()
        workers.append(context.Process(target=target, args=(far, *arguments), daemon=True))
        workers[-1].start()
        if pipes[name].recv() != "ready":
            raise SystemExit(f"{name} did not start")
    seconds: dict[tuple[str, int], list[float]] = {}
    last: dict[tuple[str, int], dict[str, float]] = {}
    print(f"load before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    for turn in range(a.rounds):
        for n in a.concepts:
            for what, name in of_process.items():
                pipes[name].send((what, n))
                told = pipes[name].recv()
                seconds.setdefault((what, n), []).append(told["seconds"])
                last[(what, n)] = told
                print(f"round {turn + 1}, N = {n}, {what}: {told['seconds']:.3f} s a step", flush=True)
    print(f"load after: {os.getloadavg()[0]:.1f}\n\nmedian seconds a step (fastest to slowest)")
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for n in a.concepts:
        for what in of_process:
            values, told = seconds[(what, n)], last[(what, n)]
            extra = "".join(
                f", {label} {told[key]:{form}}"
                for key, label, form in (
                    ("kept", "bytes kept for a concept", ",.0f"),
                    ("error", "error of the keys", ".1e"),
                    ("drift", "of the latents", ".1e"),
                )
                if key in told
            )
            print(
                f"N = {n} {what:<9} {medians[(what, n)]:.3f} ({min(values):.3f} to {max(values):.3f}), "
                f"peak so far {told['peak']:.2f} GB{extra}"
            )
        ratios = {"first / second": ("first", "second"), "second / plain": ("second", "plain")}
        ratios |= {"beside / second": ("beside", "second")}
        ratios |= {f"{what} / second": (what, "second") for what in ("diffusers", "pytorch") if what in of_process}
        pairs = [f"{name} {medians[(x, n)] / medians[(y, n)]:.2f}" for name, (x, y) in ratios.items()]
        print(f"N = {n} ratios: {', '.join(pairs)}\n")
    for pipe in pipes.values():
        pipe.send(None)
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
