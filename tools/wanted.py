"""What `make venv` installs, as pyproject.toml asks for it. Imports only the standard library before it is called."""

from __future__ import annotations

import sys
from typing import Any

from tools.lockfile import ROOT

# The extras that are installed. Not gpu, whose package overwrites cpu's, nor tensorrt, which is on NVIDIA's own index.
EXTRAS = ("cpu", "export", "tensorrt-rtx", "bench", "serve", "ray", "ui", "dev")
# What comes as sources; everything else must be a wheel, so that nothing foreign runs while it is installed.
SOURCES = ("tensorrt-rtx", "tensorrt-rtx-cu13")
# setuptools packs those sources; and pip, so that one version of it does the rest.
BUILD_TOOLS = ("pip", "setuptools")
# scikit-build-core asks for these where the machine has none; a lock is for all machines.
NATIVE_TOOLS = ("cmake", "ninja")


def asked_for() -> dict[str, list[str]]:
    """Requirements by group: "base", each of `EXTRAS`, and "build" for what builds the wheel and installs it."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = found["project"]["optional-dependencies"]
    return {
        "base": found["project"]["dependencies"],
        **{name: extras[name] for name in EXTRAS},
        "build": [*found["build-system"]["requires"], *BUILD_TOOLS, *NATIVE_TOOLS],
    }
