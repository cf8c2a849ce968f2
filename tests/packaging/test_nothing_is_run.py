"""No module of the package runs, unpickles or imports what it reads, and few of them know of a network."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from locations import ROOT

PACKAGES = ("magicface_rt", "engines", "export", "benchmarks")
"""What is in the wheel."""

RUNS_WHAT_IT_READS = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "runpy",
    "imp", "pty",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
"""Names of Python's own; methods of others, such as `re.compile` and PyTorch's `Module.eval`, are something else."""

UNSAFE = {"torch.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen"}

SAFE = {"allow_pickle": "False", "weights_only": "True", "Loader": "_Loader", "trust_remote_code": "False"}
"""Arguments that decide it, with the one value that may stand there. numpy unpickles nothing where it is not told to;
`_Loader` is that of jobs.py.
"""

NETWORK = {
    "socket", "ssl", "socketserver", "asyncio.streams", "http.client", "http.server", "urllib.request", "ftplib",
    "smtplib", "xmlrpc", "httpx", "requests", "aiohttp", "urllib3", "websockets", "uvicorn", "huggingface_hub",
}  # fmt: skip
OF_THE_NETWORK = {
    "magicface_rt/serve/answers.py": {"httpx"},
    "magicface_rt/serve/client.py": {"httpx"},
    "magicface_rt/serve/connection.py": {"uvicorn"},
    "magicface_rt/serve/server.py": {"socket", "uvicorn"},
    "benchmarks/serve_load.py": {"httpx"},
}
"""The client of a service, the service, and what measures both."""

IMPORTED_BY_NAME = {
    ("magicface_rt/__init__.py", "f'{__name__}.{name}'"),  # what a user takes out of the package
    ("magicface_rt/__init__.py", "f'{__name__}._public'"),
    ("magicface_rt/backends/device.py", "'cuda.bindings.runtime'"),
    ("magicface_rt/backends/onnxruntime.py", "'onnxruntime'"),
    ("magicface_rt/backends/onnxruntime.py", "'tensorrt'"),
    ("magicface_rt/backends/onnxruntime.py", "_RTX_PLUGIN"),  # a constant
    ("magicface_rt/backends/onnxruntime.py", "f'magicface_rt.engines.{n}'"),  # of a tuple there
    ("magicface_rt/backends/probe.py", "'magicface_rt.engines.flavour'"),
    ("magicface_rt/backends/probe.py", "'magicface_rt.engines.targets'"),
    ("magicface_rt/backends/tensorrt.py", "f'magicface_rt.engines.{module}'"),  # callers in that module
    ("magicface_rt/cli/_command.py", "f'magicface_rt.export.{name}'"),  # verbs
    ("magicface_rt/cli/bench.py", "f'magicface_rt.benchmarks.{name}'"),
    ("magicface_rt/cli/doctor.py", "module"),  # of a table there
    ("magicface_rt/serve/__init__.py", "f'.{name}'"),  # of a table there
    ("magicface_rt/serve/ray/cluster.py", "'ray'"),
    ("magicface_rt/serve/ray/cluster.py", "'ray._raylet'"),
    ("magicface_rt/ui/__init__.py", "f'.{name}'"),  # of a table there
    ("engines/flavour.py", "name.replace('-', '_')"),  # of FLAVOURS
}
"""Every import of a name that is computed: each was read, and none comes from a file or a request."""


@cache
def modules() -> dict[str, ast.Module]:
    """By path, every module of the wheel."""
    found = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in found}


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of modules, and of what is taken out of them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`np.load` as text; "" stands for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def called(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """What is called, by its name."""
    return ((dotted(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def within(name: str, of: set[str]) -> str | None:
    """The one of those modules that a name is, or is in."""
    return next((one for one in of if name == one or name.startswith(f"{one}.")), None)


def what_is_run(tree: ast.Module) -> list[str]:
    """What of a module would run or unpickle what it reads."""
    found = [name for name in imported(tree) if within(name, RUNS_WHAT_IT_READS)]
    for name, call in called(tree):
        says = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in SAFE}
        if any(value != SAFE[argument] for argument, value in says.items()):
            found.append(f"{name}({says})")
        if name in CALLS | UNSAFE or (name == "yaml.load" and "Loader" not in says):
            found.append(name)
    return found


def test_nothing_unpickles_or_evaluates_what_it_reads() -> None:
    assert len(modules()) > 150
    assert {path: found for path, tree in modules().items() if (found := what_is_run(tree))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "__import__(name)",
        "torch.load(path)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "def f():\n    import cloudpickle.fast",
    ],
)
def test_what_would_is_seen(text: str) -> None:
    assert what_is_run(ast.parse(text))
    assert not what_is_run(ast.parse("re.compile(x); unet.eval(); np.load(p, allow_pickle=False); yaml.safe_load(t)"))


def test_every_import_of_a_computed_name_is_known() -> None:
    found = {
        (path, ast.unparse(call.args[0]))
        for path, tree in modules().items()
        for name, call in called(tree)
        if name.rpartition(".")[2] == "import_module"
    }
    assert len(found) > 10
    assert found - IMPORTED_BY_NAME == set()


def test_only_the_service_and_its_client_know_of_a_network() -> None:
    found: dict[str, set[str]] = {}
    for path, tree in modules().items():
        for name in imported(tree):
            if one := within(name, NETWORK):
                found.setdefault(path, set()).add(one)
    assert found["magicface_rt/serve/client.py"] == {"httpx"}
    assert {path: names for path, names in found.items() if not names <= OF_THE_NETWORK.get(path, set())} == {}


def test_the_loader_of_jobs_makes_plain_values_only() -> None:
    (loader,) = (
        node
        for node in ast.walk(modules()["magicface_rt/jobs.py"])
        if isinstance(node, ast.ClassDef) and node.name == "_Loader"
    )
    assert [ast.unparse(base) for base in loader.bases] == ["yaml.SafeLoader"]
    assert Path(ROOT / "magicface_rt/jobs.py").read_text(encoding="utf-8").count("add_constructor") == 1
