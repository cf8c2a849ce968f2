"""The recordings through kept keys: prepared for all steps first, stored, padded, laid into the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt.backends import Backend, OnnxRuntime
from magicface_rt.bundle import Bundle
from magicface_rt.denoiser import STATE
from magicface_rt.export.bundle_runner import BundleStepRunner
from magicface_rt.export.parity import _case_bundle
from magicface_rt.export.recordings import Recording
from magicface_rt.export.replay import replay_free, replay_steps
from magicface_rt.images import LoadedReference
from magicface_rt.kept import KeptConcept, Origin
from magicface_rt.kept.feed import KeyFeed, PlacedKeys, StoredKeys
from magicface_rt.kept.preparation import EncodedReference, prepare_reference
from magicface_rt.single_step import Denoiser
from tests.locations import DATA, GOLDENS

SHIPPED = DATA / "recordings" / "guidance-3"
CASES = sorted(path.parent for path in GOLDENS.glob("*/case.json"))


class KeptStepRunner(BundleStepRunner):
    """As `BundleStepRunner`, but the keys of every step come out of a file."""

    def __init__(self, recording: Recording, bundle: Bundle, backend: Backend, folder: Path, rows: int) -> None:
        super().__init__(recording, bundle, backend)
        self.name = f"bundle on {backend.name}, kept"
        denoiser: Any = _KeptDenoiser(bundle, backend, self.denoiser)
        denoiser.keep(self, folder, rows)
        self.denoiser = denoiser


class _KeptDenoiser:
    """Stands in for `Denoiser`: what is asked of `reference_kv` is found in the file."""

    def __init__(self, bundle: Bundle, backend: Backend, plain: Denoiser) -> None:
        self.bundle = bundle
        self.graph = backend.load(bundle, "denoise_step")
        self.reference_graph = backend.load(bundle, "reference_kv").bind()

    def keep(self, runner: KeptStepRunner, folder: Path, rows: int) -> None:
        recording, inputs = runner.recording, runner.recording.inputs
        origin = Origin.of(self.bundle, recording.steps, 0)
        # A recording may hold the noise of its first steps only.
        last = len(inputs.ref_noise) - 1
        references = [
            prepare_reference(
                self.bundle,
                self.reference_graph,
                EncodedReference(
                    LoadedReference(Image.new("RGB", (8, 8)), np.asarray(mask, np.uint8), f"reference {r}"),
                    "",
                    inputs.ref_z0[r : r + 1],
                    inputs.ref_embeds[r : r + 1],
                ),
                origin,
                f"reference {r}",
                storage="exact",
                rows=rows,
                noise=lambda step, r=r: inputs.ref_noise[min(step, last)][r : r + 1],  # type: ignore[misc]
            )
            for r, mask in enumerate(inputs.ref_masks)
        ]
        concept = KeptConcept("all", references, origin)
        concept.save(folder / "all.concept", overwrite=True)
        kept = KeptConcept.load(folder / "all.concept").references
        placed = [
            PlacedKeys(StoredKeys(one), masked.concept, masked.weight)
            for one, masked in zip(kept, runner.references.masked, strict=True)
        ]
        self.steps = {timestep: step for step, timestep in enumerate(origin.timesteps)}
        self.binding = self.graph.bind()
        self.feed = KeyFeed(self.bundle, self.binding, [placed], padded=True)

    def reference_kv(self, *_: Any) -> None:
        """Nothing is computed here."""

    def step(self, latents: np.ndarray, timestep: int, coefficients: np.ndarray, **given: Any) -> Any:
        self.feed.start(self.steps[timestep])
        stage, guidance = given["stage"], given["guidance"]
        arrays = {
            **guidance.arrays,
            **self.feed.access([stage], [guidance.weight_mode]),
            "latents": latents,
            "timestep": np.array([timestep]),
            "region_label": np.full_like(given["region_label"], {"rsa": 1, "off": 0}.get(stage, 0))
            if stage != "rba"
            else given["region_label"],
            "ddim": coefficients[None],
        }
        for name, array in arrays.items():
            self.binding.set(name, array)
        self.binding.run()
        return {name: self.binding.read(name) for name in (*given["outputs"], *STATE)}


def replay(case: Path, folder: Path, rows: int) -> None:
    recording = Recording.load(case)
    bundle = _case_bundle(recording, folder, lambda _: None)
    runner = KeptStepRunner(recording, bundle, OnnxRuntime("cpu", threads=1), folder, rows)
    reports = [replay_steps(recording, runner)]
    if recording.free_run:
        reports.append(replay_free(recording, runner))
    for report in reports:
        assert report.passed, "\n".join(report.summary())


def test_a_recording_is_reproduced_from_kept_keys(work: Path) -> None:
    replay(SHIPPED, work, rows=4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_every_recording_is_reproduced_from_kept_keys(case: Path, work: Path) -> None:
    replay(case, work, rows=3)
