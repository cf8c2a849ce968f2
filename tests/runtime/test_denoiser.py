"""The loop over bindings, against single steps that are fed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magicface_rt.backends import OnnxRuntime
from magicface_rt.bundle import Bundle
from magicface_rt.denoiser import STATE, DenoisingLoop, Guidance
from magicface_rt.kept.feed import KeyFeed, PlacedKeys, ReferencePass
from magicface_rt.regions import MaskedReference, Stage
from magicface_rt.single_step import Denoiser, ReferenceSet, padding_keys


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


@pytest.fixture(scope="module")
def runners(bundle: Bundle) -> Any:
    backend = OnnxRuntime("cpu")
    return backend.load(bundle, "reference_kv"), backend.load(bundle, "denoise_step")


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("stages", [("rsa", "rsa", "rba", "rba"), ("rba", "rba"), ("off", "rba", "rsa")])
def test_a_loop_feeds_what_single_steps_are_fed(
    bundle: Bundle, runners: Any, references: int, stages: tuple[Stage, ...]
) -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    images, tokens = 2, [(2,), (5, 6)]
    masks = np.zeros((2, 128, 128), np.uint8)
    masks[0, :90, :90], masks[1, 40:, 40:] = 1, 1
    kept = ReferenceSet.of(bundle, [MaskedReference(mask, k, 2.0 + k) for k, mask in enumerate(masks[:references])])
    text = normal(references, 77, bundle.text_width)
    guidance = Guidance(
        text=normal(2, images, 77, bundle.text_width),
        tokens=tokens,
        ca_scale=0.6,
        scale=7.5,
        semantic=True,
        weight_mode="bias",
    )
    shape = (bundle.latent_channels, bundle.rows, bundle.columns)
    latents, z0 = normal(images, *shape), normal(references, *shape)
    timesteps = [int(t) for t in bundle.schedule.timesteps(len(stages))]
    coefficients = bundle.schedule.step_coefficients(len(stages))

    denoiser = Denoiser(bundle, *runners)
    state = {"latents_out": latents, "region_label_out": np.zeros((images, bundle.rows // 2, bundle.columns // 2), int)}
    bindings = runners[0].bind(), runners[1].bind(STATE)
    computing, placed = None, []
    if references:
        computing = ReferencePass(
            bundle,
            bindings[0],
            masks=masks[:references],
            text=text,
            noised=lambda i: bundle.schedule.add_noise(z0, z0[:1], timesteps[i]),
            timesteps=timesteps,
        )
        placed = [PlacedKeys(source, k, 2.0 + k) for k, source in enumerate(computing.sources())]
    keys = KeyFeed(bundle, bindings[1], [placed], computing=computing)
    loop = DenoisingLoop(bundle, bindings[1], latents=latents, guidance=[guidance], keys=keys)
    for i, stage in enumerate(stages):
        noised = bundle.schedule.add_noise(z0, z0[:1], timesteps[i]) if references else None
        if noised is None:
            kv = padding_keys(bundle)
        else:
            kv = denoiser.reference_kv(kept, noised, timesteps[i], text)
        state = denoiser.step(
            state["latents_out"],
            timesteps[i],
            coefficients[i],
            stage=stage,
            region_label=state["region_label_out"],
            references=kept,
            reference_kv=kv,
            guidance=guidance,
        )
        loop.step(i, timesteps[i], coefficients[i], [stage])
        assert (loop.wait() > 0) == (references > 0)
        for found, name in zip(loop.read(), STATE, strict=True):
            np.testing.assert_array_equal(found, state[name], err_msg=f"{name} after step {i}")
    assert np.unique(state["region_label_out"]).size > 1, "the case shows no regions"
    for binding in bindings:
        binding.close()
