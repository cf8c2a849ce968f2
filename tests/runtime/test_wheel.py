"""The wheel: what it holds, that it is the same bytes each time, and that it works on each Python that it claims.

It is installed into environments of their own that have no torch, diffusers, transformers or onnx.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import figures
import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())

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
print(result.images[0].size, sys.version_info[:2])
"""

USER = """
from magicface_rt import Session

with Session("bundle") as session:
    result = session.generate("a man", [])
    reveal_type(result)
    session.generate(7)
"""


def build(source: Path, out: Path, umask: int = 0o022, **environment: str) -> Path:
    """The wheel of a source tree, by the build tools of this environment."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(pip, check=True, env={**os.environ, **environment}, umask=umask)
    (found,) = out.glob("*.whl")
    return found


def interpreter(version: str) -> str | None:
    """A Python of this version, on the path or among pyenv's; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    named = shutil.which(f"python{version}")
    for python in [named, *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}")))]:
        # A shim of pyenv may be on the path without the Python that it stands for; Debian's may lack venv.
        if python and subprocess.run([python, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return python
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_package_and_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "session.py", "cli/__init__.py", "export/exporter.py", "engines/__init__.py"):
        assert f"magicface_rt/{name}" in names
    for target in (ROOT / "engines" / "targets").glob("*.toml"):
        assert f"magicface_rt/engines/targets/{target.name}" in names
    assert "magicface_rt/export/tokenizer/bpe_simple_vocab_16e6.txt.gz" in names
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if ".dist-info/licenses/" in name}
    assert not any(name.startswith(("tests/", "benchmarks/", "export/", "tools/", "requirements/")) for name in names)


def test_the_wheel_is_the_same_bytes_each_time(wheel: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another folder" / "copy"
    for name in ("magicface_rt", "engines", "export", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, copy / name)
    for number, path in enumerate(sorted(copy.rglob("*"))):
        os.utime(path, (1e9 + number, 1e9 + number))
        path.chmod(0o700 if path.is_dir() else 0o600)
    again = build(copy, tmp_path / "out", umask=0o077, TZ="Asia/Kathmandu", PYTHONHASHSEED="7", LC_ALL="C")
    assert again.name == wheel.name
    one, other = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert [info.filename for info in one.infolist()] == [info.filename for info in other.infolist()]
    for left, right in zip(one.infolist(), other.infolist(), strict=True):
        assert (left.date_time, left.external_attr) == (right.date_time, right.external_attr), left.filename
        assert one.read(left) == other.read(right), left.filename
    assert wheel.read_bytes() == again.read_bytes()


@pytest.mark.slow
def test_a_users_program_is_checked_against_the_types_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    (tmp_path / "user.py").write_text(USER)
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--python-executable", str(python), "user.py"]
    said = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert "import-untyped" not in said
    assert 'Revealed type is "magicface_rt.results.Result"' in said
    assert 'incompatible type "int"; expected "str"' in said


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_generates_without_torch(version: str, wheel: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    found = interpreter(version)
    if found is None:
        figures.tell("wheel", f"Python {version}", "not run: there is none on this machine")
        pytest.skip(f"there is no Python {version} on this machine: the wheel was not run on it")
    subprocess.run([found, "-m", "venv", str(tmp_path / "venv")], check=True)
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
    major, minor = version.split(".")
    assert done.stdout.strip() == f"(256, 256) ({major}, {minor})"
    assert (tmp_path / "out" / "image-0.png").is_file()
    assert subprocess.run([python, "-m", "magicface_rt.cli", "doctor"], cwd=tmp_path, check=False).returncode == 0
    figures.tell("wheel", f"Python {version}", "installed, drew a picture, and its doctor was fine")
