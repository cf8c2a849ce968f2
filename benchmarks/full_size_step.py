"""One denoising step of a full-size bundle on the CPU beside plain Stable Diffusion by diffusers.

    .venv/bin/python -m benchmarks.full_size_step BUNDLE CHECKPOINT [--rounds 4] [--mask-share 0.3] [--concepts 3]

Each contender has a process of its own, so that its peak memory can be told; they take turns step by step. Ours:
`denoise_step` with the kept tokens of the concepts' references. Theirs: diffusers' U-Net on the two rows of
classifier-free guidance, eager float32, the guidance and the DDIM step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np


def ours(pipe: Connection, bundle_path: str, concepts: int, share: float) -> None:
    from magicface_rt import Bundle
    from magicface_rt.backends import OnnxRuntime
    from magicface_rt.denoiser import Denoiser, Guidance, ReferenceSet
    from magicface_rt.regions import MaskedReference

    bundle = Bundle.open(bundle_path, check_hashes=False)
    runner = OnnxRuntime("cpu").load(bundle, "denoise_step")
    denoiser = Denoiser(bundle, runner, runner)
    mask = np.zeros((128, 128), np.uint8)
    mask[: round(128 * share)] = 1
    references = ReferenceSet.of(bundle, [MaskedReference(mask, k, 2.5) for k in range(concepts)])
    rng = np.random.default_rng(0)
    dtype = np.dtype(bundle.dtype)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    keys = denoiser.no_references() if not concepts else {}
    for layer in bundle.injection_layers if concepts else ():
        for kind in "kv":
            count = references.kept[layer.factor].count
            keys[f"{kind}_ref_{layer.index}"] = normal(1, count, layer.width).astype(dtype)
    guidance = Guidance(
        text=normal(2, 1, 77, bundle.text_width).astype(dtype),
        tokens=[(2 * k + 2,) for k in range(concepts)],
        ca_scale=0.6,
        scale=7.5,
        semantic=True,
        weight_mode="bias",
    )
    latents = normal(1, 4, bundle.rows, bundle.columns)
    label = rng.integers(0, concepts + 1, (1, bundle.rows // 2, bundle.columns // 2))

    def step() -> None:
        denoiser.step(
            latents,
            481,
            np.array([1.02, -0.05], np.float32),
            stage="rba",
            region_label=label,
            references=references,
            reference_kv=keys,
            guidance=guidance,
        )

    _serve(pipe, step)


def theirs(pipe: Connection, checkpoint_path: str) -> None:
    import torch
    from diffusers import DDIMScheduler

    from magicface_rt.export.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(checkpoint_path)
    unet = checkpoint.load_unet(torch.float32)
    scheduler = DDIMScheduler.from_config(checkpoint.schedule.to_config())
    scheduler.set_timesteps(50)
    side = int(unet.config.sample_size)
    latents = torch.randn(1, 4, side, side)
    text = torch.randn(2, 77, checkpoint.text_width)
    timestep = scheduler.timesteps[25]

    def step() -> None:
        with torch.no_grad():
            u, c = unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
            scheduler.step(u + 7.5 * (c - u), timestep, latents)

    _serve(pipe, step)


def _serve(pipe: Connection, step: object) -> None:
    assert callable(step)
    step()  # warm-up
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--concepts", type=int, default=3)
    parser.add_argument("--mask-share", type=float, default=0.3)
    a = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, workers, found = {}, [], {"ours": [], "diffusers": []}
    for name, target, arguments in (
        ("ours", ours, (a.bundle, a.concepts, a.mask_share)),
        ("diffusers", theirs, (a.checkpoint,)),
    ):
        pipes[name], far = context.Pipe()
        worker = context.Process(target=target, args=(far, *arguments), daemon=True)
        worker.start()
        workers.append(worker)
        if pipes[name].recv() != "ready":
            raise SystemExit(f"{name} did not start")
    for _ in range(a.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, peak = pipe.recv()
            found[name].append((seconds, peak))
            print(f"{name}: {seconds:.2f} s, peak {peak:.2f} GB", flush=True)
    medians = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    for name, values in found.items():
        times = [s for s, _ in values]
        spread = f"{min(times):.2f} to {max(times):.2f}"
        print(f"{name}: median {medians[name]:.2f} s, {spread}, peak {values[-1][1]:.2f} GB")
    print(f"ratio ours / diffusers: {medians['ours'] / medians['diffusers']:.2f}")
    for pipe in pipes.values():
        pipe.send(False)
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
