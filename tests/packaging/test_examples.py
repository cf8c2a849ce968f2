"""Each example of docs/operations.md, "What a user sees", prints what stands there."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import example_scenes as scenes
import pytest
from test_promises import sections, text_of

from magicface_rt import Session
from magicface_rt.cli import main
from tests.faults.memory_hollow import Hollow
from tools import install

BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(os.name != "posix" or BASH is None, reason="the examples are of a POSIX shell")

VARIES = {
    "beginning of a digest": r"\b[0-9a-f]{12}(?:[0-9a-f]{4})?(?=\.\.\.)",
    "key of a plan": r"\b[0-9a-f]{12}\b(?!\.\.\.)",
    "digest": r"\b[0-9a-f]{64}\b",
    "temporary name": r"(?<=\.out\.)[0-9a-f]{32}(?=\.part$)",
    "size": r"(?<=has )\d+(?= bytes, expected \d)|(?<=, expected )\d+(?=\. )",
    "memory": r"(?<=may take )\d+(?= MB more)",
    "seconds": r"^\d+\.\d(?= s on )|(?<=, )\d+\.\d{3}(?= s a step$)",
    "process": r"(?<=process )\d+\b",
    "version of onnxruntime": r"(?<=onnxruntime )\d+\.\d+\.\d+(?= has no )",
    "providers": r"(?<=, only )\w+ExecutionProvider(?:, \w+ExecutionProvider)*(?=\. )",
    "version of TensorRT-RTX": r"(?<=, expected )\d+(?:\.\d+){3}$",
}
"""What may be another in another run or environment, by name."""


@dataclass(frozen=True)
class Example:
    """What has happened before, how the commands end, what of their lines varies, and what a process of its own, in
    which the first of them runs, does `first`.
    """

    scene: Callable[[scenes.Scene], None]
    codes: tuple[int, ...]
    varies: tuple[str, ...] = ()
    first: str = ""


EXAMPLES = {
    "A file of a bundle that was cut short": Example(scenes.cut_short, (2,), ("size",)),
    "A bundle of a newer version": Example(scenes.newer, (2,)),
    "A link that leads out of a bundle": Example(scenes.linked, (2,)),
    "A path that leads out of it": Example(scenes.escaping, (2,)),
    "Two of its graphs that were renamed into each other": Example(scenes.renamed, (2,), ("size",)),
    "One bit of a kept concept that has changed": Example(scenes.flipped_concept, (2,), ("beginning of a digest",)),
    "A kept concept under another's name, which stays what it is inside": Example(scenes.renamed_concept, (2,)),
    "A kept concept of 12 bytes, the first of which claim four terabytes": Example(scenes.claiming_concept, (2,)),
    "A picture of 3.6 billion pixels in 69 bytes": Example(scenes.bomb, (2,)),
    "The same, uploaded to a service (status 422)": Example(scenes.uploaded_bomb, (0,)),
    "A JPEG of 200 scans, uploaded to a service (status 422)": Example(scenes.uploaded_scans, (0,)),
    "Metadata in which 24 KB name the same 60 KB 2,000 times": Example(scenes.unfolding, (2,)),
    "33 packed texts of a megabyte each, in a PNG of 35 KB": Example(scenes.packed, (2,)),
    "A mask of another size than its image, with a warning": Example(scenes.photographed, (0,)),
    "A job that says two things at once": Example(scenes.doubled, (2,)),
    "A job of 100,000 opening brackets": Example(scenes.nested, (2,)),
    "A job in YAML of ten lines that would unfold to three billion words": Example(scenes.aliased, (2,)),
    "A job whose name is not UTF-8, and which is empty": Example(scenes.strange_name, (2,)),
    "An archive that is not the one which is locked": Example(scenes.wrong_archive, (1,), ("digest",)),
    "A disk that is full, on which nothing stays behind": Example(scenes.full_disk, (2,)),
    "A disk that may only be read": Example(scenes.read_only_disk, (2,)),
    "Ctrl-C, or SIGTERM, in the middle": Example(scenes.interrupted, (130,)),
    "SIGKILL as the result gets its name, and the same command again, which removes what was left": Example(
        scenes.nothing, (137, 0, 0, 0), ("temporary name", "seconds"), scenes.KILLED
    ),
    "After `close()`": Example(scenes.nothing, (1,)),
    "In a process that was forked from its own": Example(scenes.nothing, (1,), ("process",)),
    "A progress callback that returns False": Example(scenes.nothing, (1,)),
    "A process that may have too few addresses": Example(scenes.nothing, (3,), ("memory",)),
    "References that need more than they may have": Example(scenes.photographed, (2,)),
    "Weights that are not finite, in a bundle whose hashes are right": Example(scenes.not_finite, (1,)),
    "A GPU that was asked for where there is none": Example(
        scenes.nothing, (3,), ("version of onnxruntime", "providers")
    ),
    "A GPU that does not start, and was not asked for: the CPU computes, with a warning": Example(
        scenes.failing_gpu, (0,), ("seconds",)
    ),
    "One bit of a plan that has changed; the next `build` makes it again": Example(
        scenes.flipped_plan, (1,), ("beginning of a digest",)
    ),
    "A plan that another version of TensorRT-RTX made": Example(
        scenes.stale_plan, (1,), ("key of a plan", "version of TensorRT-RTX")
    ),
}
"""By what stands above each."""

# ------------------------------------------------------------------------------------------------------- the document

PROMPT, PYTHON = "$ ", ">>> "
CODE = re.compile(r"(?:^| {4})\((\d+)\)$")


@dataclass(frozen=True)
class Shown:
    """A command, or lines of Python, the lines that stand under it, and the exit code: 0 where none stands there, and 1
    of what Python raises.
    """

    command: str
    lines: tuple[str, ...]
    code: int


@functools.cache
def document() -> dict[str, list[Shown]]:
    """The commands of each example, by what stands above it."""
    section = sections(text_of("docs/operations.md"))["What a user sees"]
    blocks = re.findall(r"^(.+)\n\n((?: {4}.*\n)+)", section, re.MULTILINE)
    assert len(re.findall(r"(?<=\n\n) {4}\S", section)) == len(blocks), "one has nothing above it"
    assert "```" not in section, "examples are indented"
    titles = [title.removesuffix(":") for title, _ in blocks]
    assert len(set(titles)) == len(titles)
    return {
        title: shown([line[4:] for line in block.splitlines()])
        for title, (_, block) in zip(titles, blocks, strict=True)
    }


def shown(lines: list[str]) -> list[Shown]:
    """What a block shows; lines of Python that follow each other are one command."""
    found: list[tuple[list[str], list[str]]] = []
    for line in lines:
        if line.startswith((PROMPT, PYTHON)):
            goes_on = bool(found) and line.startswith(PYTHON) and not found[-1][1]
            if not goes_on:
                found.append(([], []))
            found[-1][0].append(line)
        else:
            found[-1][1].append(line)
    made = []
    for commands, said in found:
        python = commands[0].startswith(PYTHON)
        code = CODE.search(said[-1]) if said else None
        if code is not None:
            said = [*said[:-1], *([said[-1][: code.start()]] if code.start() else [])]
        if python:
            command = PYTHON + "\n".join(line.removeprefix(PYTHON) for line in commands)
        else:
            command = commands[0].removeprefix(PROMPT)
        made.append(Shown(command, tuple(said), 1 if python else int(code[1]) if code else 0))
    return made


# -------------------------------------------------------------------------------------------------------- the commands

Ended = tuple[int, str]


def ended(command: str, first: str) -> Ended:
    """Its exit code and what it printed, in the order in which it did."""
    if command.startswith(PYTHON):
        lines = command.removeprefix(PYTHON)
        return apart_in_python(lines) if "fork" in lines else in_python(lines)
    if command.startswith("curl "):
        return 0, asyncio.run(curl(shlex.split(command)))
    if command == "python -m tools.install":
        return installing()
    if command.startswith("magicface-rt ") and "$'" not in command and not first:
        return in_this_process(shlex.split(command)[1:])
    return in_a_shell(command, first)


def in_this_process(arguments: list[str]) -> Ended:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    return code, said.getvalue()


def in_a_shell(command: str, first: str) -> Ended:
    code = f"{first or 'pass'}; from magicface_rt.cli import main; raise SystemExit(main())"
    entry = 'magicface-rt() { exec "$PYTHON" -c "$CODE" "$@"; }'
    environment = {"PYTHON": sys.executable, "CODE": code, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(BASH), "-c", f"{entry}; {command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
    )
    return (done.returncode if done.returncode >= 0 else 128 - done.returncode), done.stdout


def in_python(lines: str) -> Ended:
    with Session("bundle", backend=Hollow()) as session:
        try:
            exec(lines, {"session": session})
        except Exception as error:
            return 1, "".join(traceback.format_exception_only(error))
    return 0, ""


def apart_in_python(lines: str) -> Ended:
    """What the process that was forked says in the end."""
    code = f"import os\nfrom magicface_rt import Session\nsession = Session('bundle')\n{lines}\nos.wait()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    said = done.stderr.splitlines()
    return int(bool(said)), said[-1] if said else ""


async def curl(words: list[str]) -> str:
    """What a service in this process answers to it."""
    import httpx

    from magicface_rt.serve.app import build_app
    from magicface_rt.serve.metrics import Metrics
    from magicface_rt.serve.server import local_service

    fields = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-F")
    files = {name: Path(value[1:]).read_bytes() for name, value in fields.items() if value.startswith("@")}
    data = {name: value for name, value in fields.items() if name not in files}
    metrics = Metrics()
    with Session("bundle", backend=Hollow()) as session:
        service = local_service([session], metrics=metrics, warm=False)
        app = build_app(service, settings=service.settings, metrics=metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            (url,) = [word for word in words if word.startswith("http")]
            answer = await client.request(words[words.index("-X") + 1], url, files=files, data=data)
    assert answer.status_code == 422
    return answer.text


def installing() -> Ended:
    with open("said", "w+", encoding="utf-8") as said:
        kept = os.dup(1), os.dup(2)
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            with contextlib.redirect_stdout(said):
                install.main()
            code = 0
        except SystemExit as error:
            code = int(str(error.code))
        finally:
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
        said.seek(0)
        return code, said.read()


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def _with_the_wheel_for_cpus() -> None:
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("the wheel for GPUs is installed, and the examples are of the one for CPUs")


@pytest.fixture(scope="module")
def concept(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kept concept of the word "man"."""
    folder = tmp_path_factory.mktemp("concept")
    scenes.photograph(folder)
    man = f"word=man,image={folder / 'man.png'},mask={folder / 'man-mask.png'},prompt=a man"
    assert main(["prepare", str(tiny_bundle), "--concept", man, "--steps", "1", "--out", str(folder)]) == 0
    return folder / "man.concept"


def alike(lines: str, varies: tuple[str, ...]) -> str:
    """With the name of what varies in its place."""
    for name in varies:
        lines = re.sub(VARIES[name], f"<{name}>", lines, flags=re.MULTILINE)
    return lines


def test_every_example_has_its_row() -> None:
    assert list(document()) == list(EXAMPLES)


@pytest.mark.usefixtures("_with_the_wheel_for_cpus")
@pytest.mark.parametrize("title", EXAMPLES)
def test_each_example_prints_what_stands_there(
    title: str, tiny_bundle: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, commands = EXAMPLES[title], document()[title]
    assert tuple(shown.code for shown in commands) == example.codes
    for name in example.varies:
        assert any(re.search(VARIES[name], "\n".join(shown.lines), re.MULTILINE) for shown in commands), name
    folder = tmp_path.resolve()
    shutil.copytree(tiny_bundle, folder / "bundle")
    wants_concept = any(" --kept " in one.command for one in commands)
    concept = request.getfixturevalue("concept") if wants_concept else folder
    monkeypatch.chdir(folder)
    with contextlib.ExitStack() as during:
        example.scene(scenes.Scene(folder, concept, monkeypatch, during))
        for number, one in enumerate(commands):
            code, said = ended(one.command, "" if number else example.first)
            assert alike(said.replace(f"{folder}/", "").rstrip("\n"), example.varies) == alike(
                "\n".join(one.lines), example.varies
            )
            assert code == one.code
