"""Stable Diffusion 1.5 at full size and random weights, by the command line: what memory an export and a step need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
from magicface_rt import Concept, Reference, Session

picture = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
mask = np.zeros((128, 128), np.uint8)
mask[:38] = 255  # 30 %
concepts = [Concept(word, Reference(picture, mask=mask, prompt=f"a {{word}}")) for word in ("man", "hat", "coat")]
with Session(sys.argv[1], backend="onnxruntime-cpu", check_hashes=False) as session:
    result = session.generate("a man with a hat and a coat", concepts, steps=2, alpha=0.0)
assert np.isfinite(result.latents).all()
{PEAK}
"""


def peak_of(code: str, *arguments: object) -> int:
    """Runs code in a process of its own; the bytes of memory it had at most."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from magicface_rt.export.random_weights import write_checkpoint

    return write_checkpoint("sd15", tmp_path_factory.mktemp("full") / "sd15", seed=0, dtype="float16")


@pytest.mark.full
def test_a_full_size_fp32_bundle_is_made_and_runs_within_memory(checkpoint: Path, tmp_path: Path) -> None:
    """All five graphs, three concepts of 30 % masks, both stages."""
    assert peak_of(EXPORT, checkpoint, tmp_path / "bundle", "fp32") <= MOST_EXPORT_BYTES
    assert peak_of(STEP, tmp_path / "bundle") <= MOST_STEP_BYTES


@pytest.mark.full
def test_a_full_size_fp16_bundle_is_made_within_memory(checkpoint: Path, tmp_path: Path) -> None:
    assert peak_of(EXPORT, checkpoint, tmp_path / "bundle", "fp16") <= MOST_EXPORT_BYTES
