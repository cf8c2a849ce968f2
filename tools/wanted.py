"""What `make venv` installs, as pyproject.toml asks for it. Imports only the standard library before it is called."""

from __future__ import annotations

import sys
from typing import Any

from tools.lockfile import ROOT

# The extras that are installed. Not gpu, whose package overwrites cpu's, nor tensorrt: the default index has it as
# sources only, whose build would run and has not been read (requirements/README.md).
EXTRAS = ("cpu", "export", "tensorrt-rtx", "bench", "serve", "ray", "ui", "dev")
# The extras that have a lock of their own, with the base, because they cannot be installed beside the others.
APART = ("gpu",)
# What deploy/Dockerfile installs, by folder of requirements/: the extras of the package, or none for what builds the
# wheel. Its base images bring this Python.
IMAGE: dict[str, tuple[str, ...]] = {"image": ("gpu", "serve", "ray"), "image-build": ()}
IMAGE_PYTHON = (3, 12)
# What comes as sources; everything else must be a wheel, so that nothing foreign runs while it is installed.
SOURCES = ("tensorrt-rtx", "tensorrt-rtx-cu13")
# setuptools builds those sources; pip is pinned so that one version of it does the rest.
BUILD_TOOLS = ("pip", "setuptools")
# scikit-build-core asks for these where the machine has none; a lock is for all machines.
NATIVE_TOOLS = ("cmake", "ninja")


def asked_for(apart: str | None = None) -> dict[str, list[str]]:
    """Requirements by group: "base", each of `EXTRAS`, and "build" for what builds the wheel and installs it.

    Args:
        apart: one of `APART`, for the base and that extra only; or one of `IMAGE`, for what that environment holds.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = found["project"]["optional-dependencies"]
    if apart is not None:
        chosen = IMAGE.get(apart, (apart,))
        if not chosen:
            return {"build": [*found["build-system"]["requires"], *NATIVE_TOOLS]}
        return {"base": found["project"]["dependencies"], **{name: extras[name] for name in chosen}}
    return {
        "base": found["project"]["dependencies"],
        **{name: extras[name] for name in EXTRAS},
        "build": [*found["build-system"]["requires"], *BUILD_TOOLS, *NATIVE_TOOLS],
    }
