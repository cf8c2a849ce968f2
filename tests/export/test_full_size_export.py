"""Stable Diffusion 1.5 at full size and random weights, by the command line: what memory an export and a step need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import figures
import pytest

pytest.importorskip("torch")

MOST_EXPORT_BYTES = 12 * 10**9
MOST_STEP_BYTES = 7 * 10**9

PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
EXPORT = f"""
import sys
from magicface_rt.cli import main
assert main(["export", sys.argv[1], "--out", sys.argv[2], "--dtype", sys.argv[3]]) == 0
{PEAK}
"""
STEP = f"""
import sys
import numpy as np
from magicface_rt import Bundle
from magicface_rt.backends import OnnxRuntime
from magicface_rt.denoiser import Guidance
from magicface_rt.regions import MaskedReference
from magicface_rt.single_step import Denoiser, ReferenceSet

bundle = Bundle.open(sys.argv[1], check_hashes=False)
graph = OnnxRuntime("cpu").load(bundle, "denoise_step")
denoiser = Denoiser(bundle, graph, graph)
mask = np.zeros((128, 128), np.uint8)
mask[:38] = 1  # 30 %
references = ReferenceSet.of(bundle, [MaskedReference(mask, k, 2.5) for k in range(3)])
rng = np.random.default_rng(0)

def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)

keys = {{
    f"{{kind}}_ref_{{layer.index}}": normal(1, references.kept[layer.factor].count, layer.width)
    for layer in bundle.injection_layers
    for kind in "kv"
}}
guidance = Guidance(
    text=normal(2, 1, 77, 768), tokens=[(2,), (4,), (6,)], ca_scale=0.6, scale=7.5, semantic=True, weight_mode="bias"
)
latents, label = normal(1, 4, 64, 64), rng.integers(0, 4, (1, 32, 32))
for stage in ("rsa", "rba"):
    out = denoiser.step(
        latents,
        481,
        np.array([1.02, -0.05], np.float32),
        stage=stage,
        region_label=label,
        references=references,
        reference_kv=keys,
        guidance=guidance,
    )
    latents, label = out["latents_out"], out["region_label_out"]
assert np.isfinite(latents).all()
{PEAK}
"""


def peak_of(code: str, *arguments: object) -> int:
    """Runs code in a process of its own; the bytes of memory it had at most."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def told(what: str, peak: int) -> int:
    figures.tell("memory", f"{what}, full size", f"{peak / 1e9:.1f} GB")
    return peak


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from magicface_rt.export.random_weights import write_checkpoint

    return write_checkpoint("sd15", tmp_path_factory.mktemp("full") / "sd15", seed=0, dtype="float16")


@pytest.mark.full
def test_a_full_size_fp32_bundle_is_made_and_runs_within_memory(checkpoint: Path, tmp_path: Path) -> None:
    """All five graphs; then steps of both stages with three concepts of 30 % masks, whose keys are there."""
    assert told("export in fp32", peak_of(EXPORT, checkpoint, tmp_path / "bundle", "fp32")) <= MOST_EXPORT_BYTES
    assert told("steps in fp32", peak_of(STEP, tmp_path / "bundle")) <= MOST_STEP_BYTES


@pytest.mark.full
def test_a_full_size_fp16_bundle_is_made_within_memory(checkpoint: Path, tmp_path: Path) -> None:
    assert told("export in fp16", peak_of(EXPORT, checkpoint, tmp_path / "bundle", "fp16")) <= MOST_EXPORT_BYTES
