"""Mutation testing: change one thing in a module, and see whether its tests notice.

    python -m tools.mutate magicface_rt/regions.py
    python -m tools.mutate magicface_rt/kept/memory.py --lines 150-200
    python -m tools.mutate magicface_rt/values/sizes.py --tests tests/runtime/test_kept_store.py

Each mutant runs in a process of its own, forked after the packages that do not change have been loaded, until its first
test fails. No file is written: the changed module exists in that process only. Mutants that survive are printed; a
survivor means a missing test, or a change that makes no difference.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

UNIT = "tests/runtime/"
WRITTEN_TO = "test_a_file_that_is_written_to_as_its_keys_come_up_leaves_none_of_them"
TESTS = {
    "magicface_rt/options.py": ["test_options.py"],
    "magicface_rt/schedule.py": ["test_schedule.py"],
    "magicface_rt/regions.py": ["test_regions.py", "test_kept_store.py"],
    "magicface_rt/concept.py": ["test_concept.py"],
    "magicface_rt/kept/awaited.py": ["test_kept_store.py", "test_kept_numbers.py"],
    "magicface_rt/kept/concept.py": ["test_kept_numbers.py", "test_kept_files.py"],
    "magicface_rt/kept/feed.py": ["test_kept_numbers.py"],
    "magicface_rt/kept/files.py": ["test_kept_files.py"],
    "magicface_rt/kept/keeper.py": ["test_kept_numbers.py"],
    "magicface_rt/kept/memory.py": ["test_kept_numbers.py"],
    "magicface_rt/kept/on_device.py": ["test_kept_numbers.py", f"test_kept_on_device.py::{WRITTEN_TO}"],
    "magicface_rt/kept/origin.py": ["test_kept_numbers.py"],
    "magicface_rt/kept/preparation.py": ["test_kept_numbers.py"],
    "magicface_rt/kept/reference.py": ["test_kept_numbers.py", "test_kept_files.py"],
    "magicface_rt/kept/store.py": ["test_kept_store.py", "test_kept_numbers.py"],
}
"""The tests of each module, the quickest first, as names in the folder `UNIT`."""

UNCHANGING = ("hypothesis", "magicface_rt", "magicface_rt.export.exporter", "pytest", "safetensors")
"""Loaded once, before forking, with all that they import; modules of the package itself are dropped again."""

MEMORY = 8 << 30
"""Bytes that a mutant may allocate: some would never stop allocating."""

_SWAPPED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "zeros": "ones", "ones": "zeros", "floor": "ceil"}

_NOT_DECIDING = {"annotation", "returns", "type_params"}
_MAKES_NO_DIFFERENCE = {"strict"}
"""Keywords that only guard against what the code itself never does."""


@dataclass(frozen=True)
class Mutant:
    """A module's code with one change, in the words of the source."""

    line: int
    before: str
    after: str
    code: CodeType

    def __str__(self) -> str:
        return f"{self.line}: {self.before}  ->  {self.after}"


def mutants(source: str, path: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, with one change each.

    Annotations, docstrings, imports, f-strings and the arguments of a `raise` are not changed; the `raise` itself is.
    """
    tree = ast.parse(source, path)
    for holder, field, index, node in list(_places(tree)):
        for other in _others(node):
            _put(holder, field, index, ast.copy_location(other, node))
            code = compile(ast.fix_missing_locations(tree), path, "exec")
            yield Mutant(getattr(node, "lineno", 0), _text(node), _text(other), code)
        _put(holder, field, index, node)


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Yield each node below with its place: the node that holds it, the field, and the index if that is a list."""
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Raise)) or _is_literal_type(node):
        return
    for field, value in ast.iter_fields(node):
        if field in _NOT_DECIDING:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_docstring(child) or _is_list_of_names(child):
                continue
            if isinstance(child, ast.keyword) and child.arg in _MAKES_NO_DIFFERENCE:
                continue
            yield node, field, index, child
            yield from _places(child)


def _put(holder: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(holder, field, node)
    else:
        getattr(holder, field)[index] = node


def _others(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what may replace a node."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        for kind in _SWAPPED.get(type(node.op), ()):
            yield _with(node, op=kind())
    if isinstance(node, ast.Compare):
        for position, op in enumerate(node.ops):
            for kind in _SWAPPED.get(type(op), ()):
                yield _with(node, ops=[*node.ops[:position], kind(), *node.ops[position + 1 :]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    if isinstance(node, (ast.If, ast.IfExp, ast.While)) and isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant):
        for value in _other_values(node.value):
            yield ast.Constant(value)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        yield _with(node, id=_NAMES[node.id])
    if isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield _with(node, attr=_NAMES[node.attr])
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield ast.Return(ast.Constant(None))
    if isinstance(node, (ast.Raise, ast.AugAssign)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield ast.Pass()
    if isinstance(node, ast.Continue):
        yield ast.Break()
    if isinstance(node, ast.Break):
        yield ast.Continue()


def _other_values(value: object) -> list[bool | int | float | str]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 1.1 if value else 1.0]
    return [f"{value}x"] if isinstance(value, str) else []


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_literal_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"


def _is_list_of_names(node: ast.AST) -> bool:
    """Whether a node is `__all__ = [...]`."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def _text(node: ast.AST) -> str:
    """The first line of a node's source."""
    lines = ast.unparse(ast.fix_missing_locations(copy.copy(node))).splitlines()
    return lines[0][:120] if lines else ""


# ------------------------------------------------------------------------------------------------------------- running


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with the code of a mutant."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


def module_name(path: Path) -> str:
    """Return the name under which tests import a module of the repository."""
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("magicface_rt", *parts) if parts[0] in ("export", "engines") else parts)


class Trials:
    """Runs the tests of a module on its mutants, one after the other. `folder`: for what tests make once and share."""

    def __init__(self, path: Path, tests: Sequence[str], folder: Path) -> None:
        self.path = path
        self.name = module_name(path)
        self.tests = list(tests)
        self.folder = folder
        self.seconds = 600

    def baseline(self, code: CodeType) -> None:
        """Run the tests on the unchanged module, to find how long they may take.

        Raises:
            SystemExit: they fail.
        """
        self._passes(code)  # makes what is made only once
        start = time.monotonic()
        if not self._passes(code):
            raise SystemExit(f"{self.path}: its tests fail without any change: {' '.join(self.tests)}")
        self.seconds = 20 + round(5 * (time.monotonic() - start))

    def survives(self, mutant: Mutant) -> bool:
        """Whether no test noticed the mutant. A mutant that hangs or exhausts its memory counts as noticed."""
        return self._passes(mutant.code)

    def _passes(self, code: CodeType) -> bool:
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._test(code))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):  # processes that it had started
            os.killpg(child, signal.SIGKILL)
        return status == 0

    def _test(self, code: CodeType) -> int:
        """Run the tests, in the child; return pytest's exit status."""
        import hypothesis
        import pytest

        os.setpgid(0, 0)
        signal.alarm(self.seconds)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        # Pose as a worker of pytest-xdist: workers share what is made once (tests/conftest.py), in the folder above.
        os.environ["PYTEST_XDIST_WORKER"] = "mutant"
        hypothesis.settings.register_profile("mutants", database=None, derandomize=True, max_examples=30)
        hypothesis.settings.load_profile("mutants")
        sys.meta_path.insert(0, _Finder(self.name, self.path, code))
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other packages' plugins take a second to load
        plain = ["-q", "-x", "-m", "not slow and not full and not gpu", "-p", "no:cacheprovider", "--assert=plain"]
        return int(pytest.main([*plain, f"--basetemp={self.folder / 'each'}", *self.tests]))


def _load_what_does_not_change() -> None:
    for name in UNCHANGING:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "magicface_rt"]:
        del sys.modules[name]
    gc.freeze()  # or each child's collector would go through all of it, and so copy it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], prog="python -m tools.mutate")
    parser.add_argument("module", type=Path, help=f"one of {', '.join(TESTS)}, or another with --tests")
    parser.add_argument("--tests", nargs="+", help="in place of the module's own")
    parser.add_argument("--lines", default="1-1000000", help="A-B: only changes on these lines")
    chosen = parser.parse_args(arguments)
    tests = chosen.tests or [UNIT + name for name in TESTS.get(chosen.module.as_posix(), ())]
    if not tests:
        parser.error(f"{chosen.module} has no tests here; name them: --tests tests/...")
    first, last = (int(number) for number in chosen.lines.split("-"))
    source = chosen.module.read_text(encoding="utf-8")
    _load_what_does_not_change()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trials = Trials(chosen.module, tests, Path(folder))
        trials.baseline(compile(source, str(chosen.module), "exec"))
        survivors, tried = 0, 0
        for mutant in mutants(source, str(chosen.module)):
            if not first <= mutant.line <= last:
                continue
            tried += 1
            if trials.survives(mutant):
                survivors += 1
                print(f"{chosen.module}:{mutant}", flush=True)
    if not tried:
        parser.error(f"{chosen.module} has nothing to change on lines {chosen.lines}")
    print(f"{chosen.module}: {tried} mutants, {tried - survivors} killed, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
