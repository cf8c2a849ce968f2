"""Lock files: every package that `make venv` installs, at one version, with the SHA-256 of the archive.

They are requirement files of pip, so `pip install --no-deps --require-hashes -r FILE` needs nothing of ours. Each file
is for one Python and one build of PyTorch, on Linux x86-64:

    requirements/linux-x86_64-py311-cpu.txt    Python 3.11, torch 2.13.0+cpu
    requirements/linux-x86_64-py312.txt        Python 3.12, torch 2.13.0 with CUDA
    requirements/gpu/linux-x86_64-py312.txt    Python 3.12, the package itself with its extra gpu, and no torch

Only the standard library is needed: this runs in an environment that holds nothing yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"

_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!]+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)


@dataclass(frozen=True)
class Pin:
    """One package of a lock.

    Args:
        name: normalised as PEP 503 says.
        version: with its local part, for example 2.13.0+cpu.
        sha256: of the archives that may be installed, 64 hexadecimal digits each; at least one.
    """

    name: str
    version: str
    sha256: tuple[str, ...]


def normal(name: str) -> str:
    """A package's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def path_of(python: tuple[int, int], torch: str) -> Path:
    """The path of the lock for this Python and this version of torch (2.13.0, 2.13.0+cpu), if there is one."""
    build = torch.partition("+")[2]
    return FOLDER / f"linux-x86_64-py{python[0]}{python[1]}{'-' + build if build else ''}.txt"


def path_apart(python: tuple[int, int], extra: str) -> Path:
    """The path of the lock for the package itself with an extra that cannot be installed beside the others."""
    return FOLDER / extra / f"linux-x86_64-py{python[0]}{python[1]}.txt"


def read(path: Path) -> list[Pin]:
    """Read the pins of a lock file.

    Raises:
        ValueError: a line is no pin with at least one SHA-256, or a package is listed twice.
    """
    text = re.sub(r"\s*\\\n\s*", " ", path.read_text(encoding="utf-8"))
    pins: dict[str, Pin] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _PIN.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{path}: {line!r} is no 'name==version --hash=sha256:...'; make the file anew with `make lock`"
            )
        name = normal(match["name"])
        if name in pins:
            raise ValueError(f"{path}: {name} stands there twice; make the file anew with `make lock`")
        pins[name] = Pin(name, match["version"], tuple(re.findall("[0-9a-f]{64}", match["hashes"])))
    return list(pins.values())


def text_of(pins: Iterable[Pin]) -> str:
    """Pins as lines of a requirement file, sorted by name."""
    lines = []
    for pin in sorted(pins, key=lambda pin: pin.name):
        hashes = "".join(f" \\\n    --hash=sha256:{value}" for value in sorted(pin.sha256))
        lines.append(f"{pin.name}=={pin.version}{hashes}\n")
    return "".join(lines)


def torch_version() -> str:
    """The version of torch in constraints.txt, for example 2.13.0."""
    match = re.search(r"^torch==([0-9.]+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f"{CONSTRAINTS} has no line 'torch==VERSION', and torch must be exact: name its version there")
    return match[1]
