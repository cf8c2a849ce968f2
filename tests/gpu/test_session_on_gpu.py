"""A Session on each GPU backend, against ONNX Runtime's CPU provider. Figures are printed: run with -s to see them."""

from __future__ import annotations

import gc
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from magicface_rt import Concept, Reference, Session
from magicface_rt.backends import FLAVOURS
from magicface_rt.backends.device import Device

BACKENDS = [
    "tensorrt-rtx",
    "tensorrt",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-nv-tensorrt-rtx",
]
PROMPT = "a man with a hat"
TOLERANCE = 2e-2
"""Of the latents' largest value after a few steps, fp32 without TF32: sums in another order, and no flipped label."""


def man() -> Concept:
    pixels = np.random.default_rng(1).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    mask = Image.new("L", (96, 96))
    ImageDraw.Draw(mask).ellipse((10, 20, 80, 90), fill=255)
    picture = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
    return Concept("man", Reference(picture, mask=mask, prompt="a man"), weight=2.5)


@pytest.mark.parametrize("needs_backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_it_makes_what_the_cpu_makes_and_frees_its_memory(
    needs_backend: str, cuda_graphs: bool, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, device: Device
) -> None:
    store = tmp_path_factory.getbasetemp() / "store"
    with Session(tiny_bundle, backend="onnxruntime-cpu") as session:
        expected = session.generate(PROMPT, [man()], steps=4, seed=7)
    options = {
        "backend": needs_backend,
        "store": store,
        "build_missing": needs_backend in FLAVOURS,
        "cuda_graphs": cuda_graphs,
    }
    with Session(tiny_bundle, **options) as session:
        session.warm_up(PROMPT, [man()])
    gc.collect()
    before, _ = device.memory()  # what the libraries keep for themselves has been taken
    with Session(tiny_bundle, **options) as session:
        session.warm_up(PROMPT, [man()])
        made = session.generate(PROMPT, [man()], steps=4, seed=7)
        again = session.generate(PROMPT, [man()], steps=20, seed=7)
        held = before - device.memory()[0]
    gc.collect()
    left = before - device.memory()[0]
    error = np.abs(made.latents - expected.latents).max() / np.abs(expected.latents).max()
    step = statistics.median(again.timings.steps)
    print(
        f"\n{needs_backend}, CUDA graphs {cuda_graphs}: error {error:.2e}, step {step * 1e3:.2f} ms, "
        f"memory {held / 1e6:.0f} MB, {left / 1e6:.0f} MB of it after close"
    )
    assert made.backend == needs_backend
    assert error < TOLERANCE
    assert left < 32e6


@pytest.mark.parametrize("needs_backend", BACKENDS, indirect=True)
def test_replayed_steps_are_the_same_as_enqueued_ones(
    needs_backend: str, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also when other shapes came in between, which change the state of an execution context."""
    store = tmp_path_factory.getbasetemp() / "store"
    found = []
    for cuda_graphs in (False, True):
        options = {
            "backend": needs_backend,
            "store": store,
            "build_missing": needs_backend in FLAVOURS,
            "cuda_graphs": cuda_graphs,
        }
        with Session(tiny_bundle, **options) as session:
            for _ in range(3):
                found.append(session.generate(PROMPT, [man()], steps=6, seed=7).latents)
                session.generate(PROMPT, [man()], steps=6, seed=7, images=2)
                session.generate(PROMPT, steps=6, seed=7)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-3 * np.abs(found[0]).max())
