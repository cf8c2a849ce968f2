from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
import weakref
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from magicface_rt import errors
from magicface_rt.cli import doctor, main
from magicface_rt.cli._bundle_view import parity_lines
from magicface_rt.cli.export import parse_layers
from magicface_rt.cli.inspect import _parity
from magicface_rt.errors import NonFiniteError, OptionError, ParityError
from magicface_rt.soft_warnings import MagicFaceWarning
from tests.faults.disks import Layer, Settling
from tests.locations import CASES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERBS = ("demo", "checkpoint", "export", "build", "run", "prepare", "plan", "verify", "bench", "inspect", "doctor")


@pytest.fixture
def concept(tmp_path: Path) -> str:
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "man.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return f"word=man,image={tmp_path / 'man.png'},mask={tmp_path / 'mask.png'},prompt=a man"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("magicface-rt ")


def test_the_command_line_imports_no_torch() -> None:
    heavy = ["torch", "diffusers", "transformers", "onnx", "onnxruntime", "magicface_rt.export"]
    code = f"import sys, magicface_rt.cli._verbs; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nowhere", "--prompt", "a man", "--out", "out"], "nowhere"),
        (["run", "nowhere", "--out", "out"], "neither --job nor --prompt"),
        (["run", "nowhere", "--job", "no.json", "--out", "out"], "no.json"),
        (["run", "nowhere", "--prompt", "a", "--steps", "0", "--out", "out"], "steps is 0"),
        (["run", "nowhere", "--prompt", "a", "--steps", "many", "--out", "out"], "--steps"),
        (["run", "nowhere", "--prompt", "a"], "--out"),
        (["inspect", "nowhere"], "nowhere"),
        (["verify"], "neither a bundle nor --case"),
        (["verify", "b", "--case", "c"], "both a bundle and --case"),
        (["verify", "b"], "--checkpoint is missing"),
        (["verify", "--case", "c", "--steps", "3"], "--steps"),
        (["export", "nowhere", "--out", "b", "--layers", "5-x"], "5-x"),
        (["demo", "--job", "no.json"], "no.json"),
        (["bench", "nowhere"], "nowhere"),
        (["bench", "b", "--contenders", "authors"], "needs the checkpoint"),
        (["bench", "b", "--concepts", "few"], "--concepts"),
        (["bench", "b", "--backends", "abacus"], "abacus"),
        (["bench", "b", "--mask-share", "130"], "mask_shares"),
        (["run", "nowhere", "--prompt", "a", "--threads", "2147483648", "--out", "out"], "--threads"),
        (["run", "nowhere", "--prompt", "a", "--threads", "-1", "--out", "out"], "--threads"),
        (["prepare", "nowhere", "--out", "out", "--threads", "1025"], "--threads"),
        (["serve", "nowhere", "--threads", "1025"], "--threads"),
        (["bench", "nowhere", "--threads", "1025"], "threads"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_named_and_exits_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not list(tmp_path.iterdir())


def test_an_error_is_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none"), "--json", "-"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "BundleError"
    report = tmp_path / "report.json"
    assert main(["inspect", "--json", str(report)]) == 2
    assert json.loads(report.read_text())["error"]["kind"] == "UsageError"


def test_a_report_replaces_the_file_that_is_named(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("of yesterday, and longer than what comes now" * 100)
    assert main(["inspect", str(tmp_path / "none"), "--json", str(report)]) == 2
    assert json.loads(report.read_text())["error"]["kind"] == "BundleError"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_report_goes_where_a_link_leads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link.json").symlink_to("deep/report.json")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for _ in range(2):
        assert main(["inspect", "nowhere", "--json", str(tmp_path / "link.json")]) == 2
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "deep" / "report.json").read_text())["error"]["kind"] == "BundleError"
    capsys.readouterr()
    assert main(["inspect", "nowhere", "--json", str(tmp_path / "loop.json")]) == 2
    assert "symbolic links" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("of", ["/proc/self/fd/{}", "/proc/thread-self/fd/{}", "/dev/fd/{}", "link"])
def test_a_report_comes_after_what_an_open_file_holds(of: str, tmp_path: Path) -> None:
    """As for /dev/stdout, of a link to which a regular file was made."""
    with (tmp_path / "said").open("w+") as stream:
        stream.write("before\n")
        stream.flush()
        inode = os.fstat(stream.fileno()).st_ino
        (tmp_path / "link").symlink_to(f"/proc/self/fd/{stream.fileno()}")
        to = of.format(stream.fileno()) if "{}" in of else str(tmp_path / of)
        assert main(["inspect", "nowhere", "--json", to]) == 2
        stream.seek(0)
        first, _, rest = stream.read().partition("\n")
    assert first == "before"
    assert json.loads(rest)["error"]["kind"] == "BundleError"
    assert (tmp_path / "said").stat().st_ino == inode
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "said"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("arguments", [("doctor",), ("inspect", "nowhere"), ("inspect",)], ids=len)
def test_one_signal_ends_a_report_that_nobody_reads(arguments: tuple[str, ...], number: int, tmp_path: Path) -> None:
    """Sent as the pipe is opened, which then waits."""
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import os, signal, sys, threading, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "import magicface_rt.cli._verbs\n"
        "from magicface_rt.cli import main\n"
        "def opened(event, given):\n"
        "    if event == 'open' and given[0] == 'pipe' and not sent:\n"
        "        sent.append(threading.Thread(target=send, daemon=True))\n"
        "        sent[0].start()\n"
        "def send():\n"
        "    time.sleep(0.5)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "sent = []\n"
        "sys.addaudithook(opened)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments, "--json", "pipe"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted; nothing half written"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills itself by a signal")
def test_what_a_killed_command_left_of_its_json_goes_when_it_is_given_again(tmp_path: Path) -> None:
    killed = "import os; os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    code = "from magicface_rt.cli import main; main(['inspect', 'nowhere', '--json', 'report.json'])"
    done = subprocess.run([sys.executable, "-c", killed + code], cwd=tmp_path, capture_output=True)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name != "report.json"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(os.name != "posix", reason="paths of descriptors are looked up in /proc")
def test_json_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    settling = Settling()
    with Layer(tmp_path, settling).installed():
        assert main(["inspect", "nowhere", "--json", str(tmp_path / "report.json")]) == 2
    settling.check()


@pytest.mark.parametrize("verb", ["verify", "verify --case", "export", "bench"])
def test_a_check_that_failed_exits_1(
    verb: str, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the check is. The others that check are `engines` (tests/cli/test_engines.py) and `demo`."""
    output, bench = (importlib.import_module(f"magicface_rt.benchmarks.{name}") for name in ("output", "bench"))
    exporter, parity = (importlib.import_module(f"magicface_rt.export.{name}") for name in ("exporter", "parity"))
    other = SimpleNamespace(passed=False, to_json=dict, summary=lambda: ["out differs"])

    def differ(*_: object, **__: object) -> None:
        raise ParityError("graph vae_decoder: out differs from PyTorch")

    def table(_: object, out: Path, **__: object) -> list[Path]:
        (out / "bench.md").write_text("wrong")
        return []

    case = SimpleNamespace(outcomes=[SimpleNamespace(status="ok"), SimpleNamespace(status="wrong picture")])
    for name in ("verify_bundle", "verify_case"):
        monkeypatch.setattr(parity, name, lambda *_, **__: parity.Verdict("it", (other,)))
    monkeypatch.setattr(exporter, "export_bundle", differ)
    monkeypatch.setattr(bench, "run", lambda *_: SimpleNamespace(cases=[case], to_json=dict))
    monkeypatch.setattr(output, "write", table)
    arguments: dict[str, list[object]] = {
        "verify": ["verify", tiny_bundle, "--checkpoint", tiny_checkpoint],
        "verify --case": ["verify", "--case", tmp_path],
        "export": ["export", tiny_checkpoint, "--out", tmp_path / "bundle"],
        "bench": ["bench", tiny_bundle, "--out", tmp_path / "report", "--contenders", "kept"],
    }
    assert main([*map(str, arguments[verb])]) == 1


def test_numbers_that_are_not_finite_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(*_: object, **__: object) -> None:
        raise NonFiniteError("graph denoise_step: 1 of 1 values of latents_out are NaN or infinite.")

    monkeypatch.setattr("magicface_rt.cli.run.Session", drawn)
    assert main(["run", "b", "--prompt", "a man", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: graph denoise_step")


def test_what_nobody_foresaw_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("magicface_rt.cli.run.Session", failing)
    assert main(["run", "b", "--prompt", "a man", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: unexpected ZeroDivisionError: division by zero. Run `magicface")


WRONG = {"BuildError", "ExportError", "GateError", "NonFiniteError", "ParityError"}
NOT_HERE = {"BackendError", "BackendMissingError", "DeviceError", "DeviceMemoryError", "HostMemoryError"}


@pytest.mark.parametrize("name", errors.__all__)
def test_every_kind_of_error_has_its_exit_code(name: str) -> None:
    others = 130 if name == "Cancelled" else 2
    assert getattr(errors, name).exit_code == (1 if name in WRONG else 3 if name in NOT_HERE else others)


@pytest.mark.parametrize("verb", ["checkpoint", "export", "verify"])
def test_a_missing_extra_exits_3(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("random_weights", "exporter", "checkpoint", "parity"):
        monkeypatch.setitem(sys.modules, f"magicface_rt.export.{name}", None)
    arguments = {"checkpoint": ["tiny", "--out", "c"], "export": ["c", "--out", "b"], "verify": ["--case", "c"]}
    monkeypatch.chdir(tmp_path)
    assert main([verb, *arguments[verb]]) == 3
    assert "pip install 'magicface_rt[export]'" in capsys.readouterr().err


def test_weights_that_are_too_large_to_be_mapped_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too little memory would be said of the host, where it is the file that is another one."""
    checkpoint = importlib.import_module("magicface_rt.export.checkpoint")

    def too_large(*_: object, **__: object) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(checkpoint, "safe_open", too_large)
    (tmp_path / "large.safetensors").write_bytes(b"12345678")
    assert main(["export", str(tmp_path / "large.safetensors"), "--out", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert "large.safetensors" in said
    assert "8 bytes are more than this process may map. Is it another file?" in said


def test_bench_without_the_extra_exits_3_before_anything_is_measured(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "magicface_rt.export.checkpoint", None)
    assert main(["bench", str(tiny_bundle), "--checkpoint", "c", "--out", str(tmp_path / "report")]) == 3
    assert "pip install 'magicface_rt[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (MemoryError(), 3, "error: there is too little memory on the host: MemoryError. "),
        (
            ImportError("libfew.so: failed to map segment from shared object"),
            3,
            "error: there is too little memory on ",
        ),
        (KeyboardInterrupt(), 130, "interrupted; nothing half written"),
    ],
    ids=["memory", "library", "interrupt"],
)
def test_what_ends_the_command_line_before_it_is_read_is_said(
    raised: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unloadable(argv: object) -> int:
        raise raised

    monkeypatch.setattr("magicface_rt.cli._verbs.read", unloadable)
    assert main(["doctor"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)


def test_what_is_no_shortage_is_not_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "magicface_rt.cli._verbs", None)
    monkeypatch.delattr(sys.modules["magicface_rt.cli"], "_verbs", raising=False)
    with pytest.raises(ImportError):
        main(["doctor"])


def test_interrupting_before_a_verb_begins_is_said_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(on: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("magicface_rt.cli._command.show_traceback", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing half written\n"


def test_interrupting_exits_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("magicface_rt.cli.run.Session", interrupted)
    assert main(["run", "b", "--prompt", "a man", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted; nothing half written\n"


WAIT_SECONDS = 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["a finalizer", "a callback of a weak reference"])
def test_a_signal_is_not_lost_where_python_cannot_raise(
    number: int, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def struck(*_: object) -> None:
        os.kill(os.getpid(), number)
        sum(range(1000))

    class Finalized:
        if where == "a finalizer":
            __del__ = struck

    def working(*_: object, **__: object) -> None:
        one = Finalized()
        told = weakref.ref(one, struck) if where != "a finalizer" else None
        del one
        time.sleep(WAIT_SECONDS)
        raise AssertionError(f"nobody ended it {told}")

    monkeypatch.setattr("magicface_rt.cli.run.Session", working)
    began = time.monotonic()
    hook, before = sys.unraisablehook, signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["run", "b", "--prompt", "a man", "--out", "never"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted; nothing half written\n"
    assert sys.unraisablehook is hook
    assert time.monotonic() - began < WAIT_SECONDS, "it was heard only when that ended what the command waited for"


def test_what_a_signal_left_half_made_is_not_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an event loop of asyncio that has no list of handlers yet."""

    class Loop:
        def __init__(self, *_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(WAIT_SECONDS)
            self.handlers: list[object] = []

        def __del__(self) -> None:
            finalized.append(self)
            self.handlers.clear()

    finalized: list[Loop] = []
    monkeypatch.setattr("magicface_rt.cli.run.Session", Loop)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # and not that of pytest
    assert main(["run", "b", "--prompt", "a man", "--out", "never"]) == 130
    assert finalized
    assert capsys.readouterr().err == "interrupted; nothing half written\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("then", ["it fails", "it goes on"])
def test_a_signal_is_not_lost_where_a_library_swallows_what_it_raised(
    number: int, then: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one in C++ does that takes it for an argument that does not fit."""

    def working(*_: object, **__: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(WAIT_SECONDS)
        if then == "it fails":
            raise RuntimeError("expected a value of another type")
        warnings.warn("it goes on", MagicFaceWarning, stacklevel=2)
        raise AssertionError("nobody ended it")

    monkeypatch.setattr("magicface_rt.cli.run.Session", working)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["run", "b", "--prompt", "a man", "--out", "never"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted; nothing half written\n"
    assert main(["run", "b", "--prompt", "a man", "--out", "never", "--concept", "x"]) == 2, "the next is another"


def test_doctor_finds_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["doctor", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["can_serve"]
    assert {b["name"]: b["works"] for b in found["backends"]}["onnxruntime-cpu"]


def test_doctor_without_a_runtime_exits_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["doctor"]) == 3
    assert "magicface_rt[cpu]" in capsys.readouterr().err


def doctors_extras(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    assert main(["doctor", "--json", "-"]) in (0, 3)
    found: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)["extras"]
    return found


def test_doctor_says_of_every_extra_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor.version

    def version(package: str) -> str:
        if package in ("gradio", "uvicorn", "matplotlib"):
            raise PackageNotFoundError(package)
        return real(package) if package in ("torch", "numpy") else "1.0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    found = doctors_extras(capsys)
    assert {name for name, one in found.items() if one["works"]} == {"export", "ray"}
    assert found.keys() == {"export", "bench", "serve", "ui", "ray"}
    assert (found["ui"]["found"], found["ui"]["command"]) == (
        "not installed: gradio, uvicorn",
        "pip install 'magicface_rt[ui]'",
    )
    main(["doctor"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} (" in shown for name in doctor.EXTRAS)


def test_doctor_knows_the_packages_of_the_extras() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    of_backends = {"cpu", "gpu", "tensorrt", "tensorrt-rtx"}
    assert set(doctor.EXTRAS) == set(extras) - of_backends - {"dev"}
    for name, (_, packages) in doctor.EXTRAS.items():
        assert sorted(packages) == sorted(re.split(r"[\[>=<]", one)[0] for one in extras[name])


@pytest.mark.parametrize("raised", [OSError("libcudart.so.13: cannot open\nmore"), RuntimeError("it is broken")])
def test_a_torch_that_does_not_load_is_no_yes(
    raised: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> types.ModuleType:
        if name == "torch":
            raise raised
        return real(name, package)

    monkeypatch.setattr(doctor, "version", lambda _: "2.8")
    monkeypatch.setattr(importlib, "import_module", import_module)
    export = doctors_extras(capsys)["export"]
    assert not export["works"]
    assert str(raised).partition("\n")[0] in str(export["found"])
    assert "more" not in str(export["found"])
    assert export["command"]


def test_run_writes_pictures_and_refuses_to_overwrite(
    tiny_bundle: Path, concept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(tiny_bundle), "--prompt", "a man", "--concept", concept, "--steps", "2", "--out", str(out)]
    assert main([*arguments, "--json", str(tmp_path / "run.json")]) == 0
    assert {"image-0.png", "regions-0.png", "regions.npz", "run.json"} == {path.name for path in out.iterdir()}
    assert json.loads((tmp_path / "run.json").read_text())["run"]["options"]["steps"] == 2
    capsys.readouterr()
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


CLOSED = pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])


def without_streams(closed: str, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell starts with streams that it has closed."""
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, *command]
    return subprocess.run(shell, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@CLOSED
def test_closed_streams_take_nothing_from_a_verb(closed: str, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "a man", "--steps", "1", "--out", "out", "--json", "-")
    done = without_streams(closed, "-m", "magicface_rt.cli", "run", str(tiny_bundle), *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("image-0.png", "regions-0.png", "regions.npz", "run.json")
    }
    assert closed != "2>&-" or json.loads(done.stdout)["out"] == str(tmp_path / "out")
    refused = without_streams(closed, "-m", "magicface_rt.cli", "inspect", "nowhere", folder=tmp_path)
    assert refused.returncode == 2
    assert refused.stdout == "", "what is meant for stderr is not on stdout"


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@CLOSED
def test_what_a_library_writes_to_a_closed_stream_comes_into_no_file(closed: str, tmp_path: Path) -> None:
    code = (
        "import os; from magicface_rt.cli import main; main(['doctor'])\n"
        "with open('file', 'wb') as file:\n"
        "    for number in (1, 2): os.write(number, b'a message')\n"
        "assert all(map(os.get_inheritable, (0, 1, 2)))"
    )
    done = without_streams(closed, "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == b""


LOST = (
    "error: stdout cannot be written: [Errno 28] No space left on device. What was asked for is done, and what it "
    "writes is saved; only what was to be printed of it is lost.\n"
)
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
RESULT = {"image-0.png", "regions-0.png", "regions.npz", "run.json"}


def with_streams(streams: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it, with its streams led elsewhere; the shell tells its exit code as its own."""
    shell = ["bash", "-c", f'set -o pipefail; "$@" {streams}', "bash", sys.executable, "-m", "magicface_rt.cli"]
    return subprocess.run([*shell, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300)


@FULL
@pytest.mark.parametrize("arguments", [("--version",), ("run", "--help"), ("doctor",)])
def test_a_full_stdout_is_said(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = with_streams("> /dev/full", *arguments, folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, LOST)


@FULL
@pytest.mark.parametrize("streams", ["2> /dev/full", "> /dev/full 2>&1", "2>&1 | true"])
@pytest.mark.parametrize("arguments", [("inspect", "nowhere"), ("nonsense",)])
def test_an_error_that_cannot_be_told_keeps_its_exit_code(
    streams: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    assert with_streams(streams, *arguments, folder=tmp_path).returncode == 2


@FULL
@pytest.mark.parametrize(
    ("streams", "code", "said"), [("> /dev/full", 2, LOST), ("| true", 0, ""), ("2>&1 | true", 0, "")]
)
def test_work_is_done_whoever_is_told_of_it(
    streams: str, code: int, said: str, tiny_bundle: Path, job: Path, tmp_path: Path
) -> None:
    asked = ("--job", job, "--steps", 1, "--threads", 1, "--backend", "onnxruntime-cpu", "--json", "report.json")
    done = with_streams(streams, "run", tiny_bundle, "--out", "out", *asked, folder=tmp_path)
    assert (done.returncode, done.stderr) == (code, said)
    assert {path.name for path in (tmp_path / "out").iterdir()} == RESULT
    assert json.loads((tmp_path / "report.json").read_text())["out"] == str(tmp_path / "out")
    done = with_streams(streams, "prepare", tiny_bundle, "--out", "kept", *asked, folder=tmp_path)
    assert (done.returncode, done.stderr) == (code, said)
    assert sorted(os.listdir(tmp_path / "kept")) == ["hat.concept", "man.concept"]
    assert len(json.loads((tmp_path / "report.json").read_text())["files"]) == 2


def test_the_streams_are_the_callers_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    assert main(["--version"]) == 0
    assert main(["nonsense"]) == 2
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that takes no file")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--out", "/proc/self/zz"), "output folder '/proc/self/zz' cannot be made: "),
        (("--out", f"a/{'b' * 256}"), "Choose another name."),
        (("--out", f"a/{'b' * 256}/c"), "Choose another name."),
        (("--out", "file/out"), "Not a directory"),
        (("--out", "out", "--json", "/proc/self/zz"), "JSON file '/proc/self/zz' cannot be written: "),
    ],
)
def test_a_place_that_takes_nothing_is_refused_before_anything_is_read(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is no such bundle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["run", "nowhere", "--prompt", "a man", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file"]


def test_inspect_says_that_a_bundle_is_intact(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert "intact" in capsys.readouterr().out


def test_an_error_below_its_tolerance_is_shown_below_it_for_each_form(capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"errors": {"eps": 1.31e-3, "rate": 1e-9}, "tolerance": {"eps": 1.36e-3, "rate": 1e-5}}
    fused = {"errors": {"eps": 1.9e-3}, "tolerance": {"eps": 2.4e-3}}
    bundle: Any = SimpleNamespace(parity={"vae_encoder": plain, "denoise_step": {**plain, "onnxruntime-cuda": fused}})
    assert list(parity_lines(bundle)) == [
        "vae_encoder: eps differs from PyTorch by 1.3e-03, tolerance 1.4e-03",
        "denoise_step: eps differs from PyTorch by 1.3e-03, tolerance 1.4e-03",
        "denoise_step (onnxruntime-cuda): eps differs from PyTorch by 1.9e-03, tolerance 2.4e-03",
    ]
    Console(width=120).print(_parity(bundle))
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["denoise_step", "(onnxruntime-cuda)", "eps", "1.9e-03", "2.4e-03"]


@pytest.mark.parametrize(
    ("text", "layers"), [("10-12", (10, 11, 12)), ("10,12", (10, 12)), ("0-1, 15", (0, 1, 15)), ("3", (3,))]
)
def test_layers_are_read(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "1,,2", "99999"])
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse_layers(text)


PHOTOGRAPHS = sorted(CASES.glob("*/case.json"))


@pytest.mark.slow
@pytest.mark.parametrize("job", PHOTOGRAPHS, ids=lambda path: path.parent.name)
def test_photographs_with_their_masks_run(job: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["run", str(tiny_bundle), "--job", str(job), "--steps", "3", "--out", str(out)]) == 0
    said = json.loads((out / "run.json").read_text())
    assert len(said["concepts"]) == len(json.loads(job.read_text())["concepts"])
    with Image.open(out / "image-0.png") as picture:
        assert picture.size == (256, 256)
