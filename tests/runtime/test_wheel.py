"""The wheel, in an environment of its own that has no torch, diffusers, transformers or onnx."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GENERATE = """
import sys
import numpy as np
from PIL import Image
from magicface_rt import Concept, Reference, Session

for name in ("torch", "diffusers", "transformers", "onnx"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported: this environment proves nothing")
picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
mask = np.zeros((64, 64), np.uint8)
mask[10:50, 10:50] = 255
with Session(sys.argv[1]) as session:
    result = session.generate("a man", [Concept("man", Reference(picture, mask=mask, prompt="a man"))], steps=2)
result.save(sys.argv[2])
print(result.images[0].size)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    subprocess.run([*pip, "-w", str(out), str(ROOT)], check=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_package_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "session.py", "cli/__init__.py", "export/exporter.py", "engines/__init__.py"):
        assert f"magicface_rt/{name}" in names
    for target in (ROOT / "engines" / "targets").glob("*.toml"):
        assert f"magicface_rt/engines/targets/{target.name}" in names
    assert "magicface_rt/export/tokenizer/bpe_simple_vocab_16e6.txt.gz" in names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert not any(name.startswith(("tests/", "benchmarks/", "export/")) for name in names)


@pytest.mark.slow
def test_the_wheel_generates_without_torch(wheel: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, f"{wheel}[cpu]"], check=True)
    done = subprocess.run(
        [python, "-c", GENERATE, str(tiny_bundle), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(256, 256)"
    assert (tmp_path / "out" / "image-0.png").is_file()
    assert subprocess.run([python, "-m", "magicface_rt.cli", "doctor"], cwd=tmp_path, check=False).returncode == 0
