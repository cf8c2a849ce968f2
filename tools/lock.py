"""`make lock`: write the lock files of one or more Pythons, from what the package index says.

pip resolves what pyproject.toml asks for at the versions of constraints.txt, as if in an empty environment, and reports
each archive with its SHA-256; nothing is installed. The index, and with it the build of torch, is pip's own setting.
Takes one to three minutes for each Python.

    python -m tools.lock [python3.11 /opt/python3.12/bin/python ...]
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tools import lockfile
from tools.wanted import APART, IMAGE, IMAGE_PYTHON, SOURCES, asked_for

_HEADER = """\
# Python {python}, Linux x86_64, torch {torch}. Made by `make lock` from pyproject.toml and constraints.txt; not to be
# edited. Installed by `make venv` with --no-deps --require-hashes.
"""
_HEADER_APART = """\
# Python {python}, Linux x86_64, the package itself with its extra {extra}. Made by `make lock` from pyproject.toml and
# constraints.txt; not to be edited. To be installed with --no-deps --require-hashes.
"""
_HEADER_IMAGE = """\
# Python {python}, Linux x86_64, {what}. Made by `make lock` from
# pyproject.toml and constraints.txt; not to be edited. Installed by deploy/Dockerfile with --no-deps --require-hashes.
"""


def report(python: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """pip's report of what it would install into `python`: one dictionary for each package.

    Raises:
        SystemExit: pip could not resolve the requirements, or its report has another format version.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        options = ["--dry-run", "--ignore-installed", "--report", str(out), "-c", str(lockfile.CONSTRAINTS)]
        done = subprocess.run([*pip, *options, *wanted], cwd=lockfile.ROOT, check=False)
        if done.returncode:
            raise SystemExit(f"pip found no set of packages for {python}; its words are above. No lock was written")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if found["version"] != "1":
        raise SystemExit(f"pip's report has version {found['version']}, and only version 1 is understood")
    installed: list[dict[str, Any]] = found["install"]
    return installed


def sha256_of(download: Mapping[str, Any]) -> str:
    """The SHA-256 of an archive in pip's report; computed for a file on this machine, for which the report has none.

    Raises:
        SystemExit: the index gave no SHA-256, and the archive is not a file on this machine.
    """
    given = download.get("archive_info", {}).get("hashes", {}).get("sha256")
    if given is not None:
        return str(given)
    address = urlparse(download["url"])
    if address.scheme != "file":
        raise SystemExit(f"the index gave no SHA-256 for {Path(address.path).name}: it cannot be locked")
    return hashlib.sha256(Path(unquote(address.path)).read_bytes()).hexdigest()


def pin_of(item: Mapping[str, Any]) -> lockfile.Pin:
    """The pin of a package in pip's report.

    Raises:
        SystemExit: it comes as sources and is not in `SOURCES`; or see `sha256_of`.
    """
    name, download = lockfile.normal(item["metadata"]["name"]), item["download_info"]
    if not urlparse(download["url"]).path.endswith(".whl") and name not in SOURCES:
        raise SystemExit(
            f"{name} {item['metadata']['version']} comes as sources, whose build would run: choose one that has a "
            "wheel in constraints.txt, or read its build and name it in SOURCES of tools/wanted.py"
        )
    return lockfile.Pin(name, item["metadata"]["version"], (sha256_of(download),))


def version_of(python: str) -> tuple[int, int]:
    asked = "import sys; print(*sys.version_info[:2])"
    major, minor = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    return int(major), int(minor)


def write_lock(python: str) -> Path:
    """Resolve for one Python what `make venv` installs, and write its lock file.

    Raises:
        SystemExit: see `report` and `pin_of`.
    """
    wanted = [requirement for group in asked_for().values() for requirement in group]
    pins = [pin_of(item) for item in report(python, [*wanted, f"torch=={lockfile.torch_version()}"])]
    (torch,) = (pin.version for pin in pins if pin.name == "torch")
    version = version_of(python)
    header = _HEADER.format(python="{}.{}".format(*version), torch=torch)
    return _write(lockfile.path_of(version, torch), header, pins)


def write_lock_apart(python: str, extra: str) -> Path:
    """Resolve for one Python the package itself with an extra of `APART`, and write its lock file.

    Raises:
        SystemExit: see `report` and `pin_of`.
    """
    wanted = [requirement for group in asked_for(extra).values() for requirement in group]
    version = version_of(python)
    header = _HEADER_APART.format(python="{}.{}".format(*version), extra=extra)
    return _write(lockfile.path_apart(version, extra), header, [pin_of(item) for item in report(python, wanted)])


def write_lock_image(python: str, folder: str) -> Path:
    """Resolve for the Python of the image's base what one of its environments holds, and write its lock file.

    Args:
        python: of the version `IMAGE_PYTHON`.
        folder: one of `IMAGE`.

    Raises:
        SystemExit: see `report` and `pin_of`.
    """
    extras = IMAGE[folder]
    what = f"the package itself with its extras {', '.join(extras)}" if extras else "what builds the wheel"
    header = _HEADER_IMAGE.format(python="{}.{}".format(*IMAGE_PYTHON), what=what)
    wanted = [requirement for group in asked_for(folder).values() for requirement in group]
    pins = [pin_of(item) for item in report(python, wanted)]
    return _write(lockfile.path_apart(IMAGE_PYTHON, folder), header, pins)


def _write(path: Path, header: str, pins: Sequence[lockfile.Pin]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + lockfile.text_of(pins), encoding="utf-8")
    print(f"{path.relative_to(lockfile.ROOT)}: {len(pins)} packages")
    return path


if __name__ == "__main__":
    for interpreter in sys.argv[1:] or [sys.executable]:
        for apart in APART:
            write_lock_apart(interpreter, apart)
        if version_of(interpreter) == IMAGE_PYTHON:
            for environment in IMAGE:
                write_lock_image(interpreter, environment)
        write_lock(interpreter)
