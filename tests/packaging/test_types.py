"""What mypy is told not to read is nothing that the checked code imports: there its types would be lost."""

from __future__ import annotations

import ast
import sys

import pytest
from locations import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MYPY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
SKIPPED = [
    module.removesuffix(".*") for one in MYPY["overrides"] if one.get("follow_imports") for module in one["module"]
]


@pytest.mark.parametrize("folder", MYPY["files"])
def test_what_mypy_does_not_read_is_not_imported(folder: str) -> None:
    assert {"torch", "transformers"} <= set(SKIPPED)
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [name for name in names if name.partition(".")[0] in SKIPPED], file
