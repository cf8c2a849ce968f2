"""Describe packages with locks of their own (`APART` of tools/wanted.py), not installed here, as the index does."""

from __future__ import annotations

import os
import sys
from importlib.metadata import Distribution
from typing import Any

from tools import lockfile
from tools.licences import elsewhere

# What each requires, as its metadata on the index says. Python 3.10 gets an older version.
NEEDS = {
    "onnxruntime-gpu": (
        "coloredlogs; python_version < '3.11'",
        "flatbuffers",
        "numpy>=1.21.6",
        "packaging",
        "protobuf",
        "sympy; python_version < '3.11'",
    )
}


class Described(Distribution):
    """A package as its metadata would be, were it installed.

    Args:
        name: normalised; one of `NEEDS`.
        version: as a lock pins it.
    """

    def __init__(self, name: str, version: str) -> None:
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"License-Expression: {elsewhere(name)}", *(f"Requires-Dist: {need}" for need in NEEDS[name])]
        self._text = "\n".join(lines) + "\n"

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        return self._text if os.fspath(filename) == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: the package is not installed")


def described(extra: str) -> dict[str, Distribution]:
    """The packages, by name, that this Python's lock for an extra of `APART` holds and that are not installed.

    Raises:
        SystemExit: there is no such lock.
    """
    path = lockfile.path_apart(sys.version_info[:2], extra)
    if not path.is_file():
        raise SystemExit(f"there is no {path.relative_to(lockfile.ROOT)}: make it with `make lock`")
    return {pin.name: Described(pin.name, pin.version) for pin in lockfile.read(path) if pin.name in NEEDS}
