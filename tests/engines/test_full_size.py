"""The step of Stable Diffusion 1.5 at 512 pixels, built in 16 bits by the real TensorRT-RTX."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("torch")

MOST_HOST_BYTES = 12 * 10**9
MOST_SCRATCH_BYTES = 300 * 10**6

EXPORT = """
import resource, sys, torch
from magicface_rt.export.checkpoint import Checkpoint
from magicface_rt.export.exporter import ExportOptions, export_unet_bundle

checkpoint = Checkpoint.open(sys.argv[1])
export_unet_bundle(
    lambda: checkpoint.load_unet(torch.float16), sys.argv[2], ExportOptions(dtype="fp16"), schedule=checkpoint.schedule
)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.full
def test_the_step_is_fused_and_within_memory(tmp_path: Path) -> None:
    from magicface_rt.export.random_weights import write_checkpoint

    checkpoint = write_checkpoint("sd15", tmp_path / "sd15", seed=0, dtype="float16")
    exported = subprocess.run(
        [sys.executable, "-c", EXPORT, str(checkpoint), str(tmp_path / "bundle")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(exported.stdout) <= MOST_HOST_BYTES
    command = [sys.executable, "-m", "magicface_rt.cli", "build", str(tmp_path / "bundle")]
    command += ["--store", str(tmp_path / "store"), "--graph", "denoise_step", "--json", str(tmp_path / "said.json")]
    subprocess.run(command, check=True)
    said = json.loads((tmp_path / "said.json").read_text())
    gate = said["plans"][0]["facts"]["gate"]
    assert (gate["verdict"], gate["fused"], gate["expected"]) == ("fine", 16, 16)
    assert gate["scratch_bytes"] <= MOST_SCRATCH_BYTES
    assert said["peak_host_bytes"] <= MOST_HOST_BYTES
