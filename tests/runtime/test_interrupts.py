"""What a signal's handler raises, as a task's time limit does, comes out as it is, whatever library works meanwhile."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicface_rt import Bundle, ImageError, Session
from magicface_rt.backends.device import import_cuda
from magicface_rt.backends.onnxruntime import OnnxRuntime, import_onnxruntime
from magicface_rt.cli import doctor, main
from magicface_rt.cli._command import export_module
from magicface_rt.cli.bench import benchmark_module
from magicface_rt.decoding import decode
from magicface_rt.engines.flavour import load_flavour
from magicface_rt.files import atomic_files
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.provenance import read_provenance
from magicface_rt.serve.uploads import open_image
from tests.locations import DATA
from tests.runtime.test_backends import Pair, ort_runner
from tests.runtime.test_kept_files import made
from tests.runtime.test_session import MAN, PROMPT

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")


class SoftTimeLimitError(Exception):
    """As task queues raise it."""


def limit(number: int, frame: FrameType | None) -> None:
    raise SoftTimeLimitError("time is up")


def timeout(number: int, frame: FrameType | None) -> None:
    def say() -> None:
        raise TimeoutError("time is up")

    say()


def anything(*given: object) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # once
    raise ValueError("time is up")


class Handler:
    def __call__(self, number: int, frame: FrameType | None) -> None:
        raise RuntimeError("time is up")

    def method(self, number: int, frame: FrameType | None) -> None:
        raise SoftTimeLimitError("time is up")


HANDLERS: dict[str, Any] = {
    "a function": limit,
    "one that calls another": timeout,
    "one of any arguments": anything,
    "an object": Handler(),
    "a method": Handler().method,
    "a part of a function": functools.partial(limit),
}


@pytest.fixture(params=list(HANDLERS))
def strike(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Called in the place of a library's function, it is interrupted there."""
    before = signal.signal(signal.SIGUSR1, HANDLERS[request.param])

    def work(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    yield work
    signal.signal(signal.SIGUSR1, before)


def struck() -> Any:
    return pytest.raises((SoftTimeLimitError, TimeoutError, ValueError, RuntimeError), match=r"^time is up$")


def test_what_a_library_raises_is_not_let_through() -> None:
    def library(given: object) -> None:
        raise ValueError(given)

    for given in (None, "frame", [1]):
        try:
            library(given)
        except ValueError as error:
            reraise_if_interrupt(error)
    reraise_if_interrupt(ValueError("it was never raised"))


@pytest.mark.parametrize("what", ["an import", "a clean-up"])
def test_what_a_library_makes_of_an_interrupt_is_let_through(strike: Callable[..., Any], what: str) -> None:
    """As modules in C do that are being imported, and as clean-ups do that fail because they were interrupted."""

    def imports() -> None:
        try:
            strike()
        except Exception as error:
            raise ImportError("initialization failed") from error

    def cleans_up() -> None:
        try:
            strike()
        finally:
            os.close(-1)

    with struck():
        try:
            {"an import": imports, "a clean-up": cleans_up}[what]()
        except (ImportError, OSError) as error:
            reraise_if_interrupt(error)


def test_what_was_handled_already_is_not_let_through(strike: Callable[..., Any]) -> None:
    """A caller who takes up something else where its time is up gets that thing's own error."""

    def something_else() -> None:
        try:
            os.close(-1)
        except OSError as error:
            reraise_if_interrupt(error)

    try:
        strike()
    except Exception:
        something_else()


def test_a_runtime_that_is_interrupted_as_it_is_imported_is_not_one_that_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def import_module(name: str) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("importlib.import_module", import_module)
    for load in (
        import_onnxruntime,
        import_cuda,
        lambda: OnnxRuntime._register_plugin(None),
        lambda: load_flavour("tensorrt-rtx"),
        lambda: export_module("parity"),
        lambda: benchmark_module("report"),
        lambda: doctor._imports("ray"),
    ):
        with pytest.raises(KeyboardInterrupt):
            load()


def test_a_command_that_is_interrupted_as_something_is_imported_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    for interrupted in ("magicface_rt.bundle.Bundle.open", "magicface_rt.cli._loaded"):  # in a verb, and before it
        with monkeypatch.context() as patch:
            patch.setattr(interrupted, opened)
            assert main(["inspect", str(tmp_path)]) == 130
        assert capsys.readouterr().err == "interrupted; nothing half written\n"


def test_graphs_on_the_cpu(tiny_bundle: Path, strike: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with Session(tiny_bundle, backend="onnxruntime-cpu", check_hashes=False) as session:
        with monkeypatch.context() as patch:
            patch.setattr(session.runner("text_encoder"), "_session", SimpleNamespace(run=strike))
            with struck():
                session.generate(PROMPT, [MAN], steps=1)
        assert session.generate(PROMPT, [MAN], steps=1).images, "the Session goes on"


def test_a_step_that_was_captured_is_not_run_again(strike: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ids = Pair(ort_runner), []
    for number in range(2):
        pair.run(float(number))
    real: Any = pair.step._session  # type: ignore[attr-defined]

    def run(binding: Any, options: Any) -> None:
        ids.append(options.get_run_config_entry("gpu_graph_id"))
        strike()

    with monkeypatch.context() as patch:
        patch.setattr(pair.step, "_session", SimpleNamespace(run_with_iobinding=run))
        with struck():
            pair.run(2.0)
    assert ids == ["2"], "without the graph"
    assert pair.step._session is real  # type: ignore[attr-defined]
    assert pair.step._graph_ids.of(("another",), "step") != "-1", "graphs were switched off"  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["file", "image", "provenance", "upload"])
def test_pictures_that_are_read(
    how: str, strike: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    content, opened = path.read_bytes(), Image.open(path)
    monkeypatch.setattr(type(opened), "load", strike)
    reads: dict[str, Callable[[], object]] = {
        "file": lambda: decode(os.fspath(path), "one", ImageError),
        "image": lambda: decode(opened, "one", ImageError),
        "provenance": lambda: read_provenance(path),
        "upload": lambda: open_image(content, pixels=64, name="one", error=ImageError),
    }
    with struck():
        reads[how]()


def test_a_file_that_is_written(strike: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "fsync_tree", strike)
    with struck():
        made().save(tmp_path / "man.concept")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["a network", "its weights", "a tokenizer", "a header", "a recording", "a U-Net"])
def test_checkpoints_and_recordings_that_are_read(
    what: str, tiny_checkpoint: Path, strike: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from magicface_rt.export.checkpoint import Checkpoint
    from magicface_rt.export.recordings import Recording, load_unet

    opened, recording = Checkpoint.open(tiny_checkpoint), DATA / "recordings" / "guidance-3"
    cases: dict[str, tuple[str, Callable[[], object]]] = {
        "a network": ("export.checkpoint.UNet2DConditionModel.from_config", opened.load_unet),
        "its weights": ("export.checkpoint.safe_open", opened.load_unet),
        "a tokenizer": ("export.diffusers_folder.guarded", lambda: Checkpoint.open(tiny_checkpoint)),
        "a header": ("export.checkpoint.safe_open", lambda: Checkpoint.open(tiny_checkpoint)),
        "a recording": ("export.npz.zipfile.ZipFile", lambda: Recording.load(recording)),
        "a U-Net": (
            "export.recordings.UNet2DConditionModel.from_pretrained",
            lambda: load_unet(Recording.load(recording).model),
        ),
    }
    replaced, call = cases[what]
    monkeypatch.setattr(f"magicface_rt.{replaced}", strike)
    with struck():
        call()


def test_a_graph_that_is_traced(
    tiny_checkpoint: Path, tmp_path: Path, strike: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from magicface_rt.export.checkpoint import Checkpoint
    from magicface_rt.export.exporter import export_bundle

    monkeypatch.setattr("torch.onnx.export", strike)
    with struck():
        export_bundle(Checkpoint.open(tiny_checkpoint), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_form_for_cuda_that_is_opened(
    tiny_bundle: Path, strike: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from magicface_rt.export.fusion.defined import DefinedCuda

    ort = SimpleNamespace(SessionOptions=import_onnxruntime().SessionOptions, InferenceSession=strike)
    monkeypatch.setattr("magicface_rt.export.fusion.defined.import_onnxruntime", lambda: ort)
    with struck():
        DefinedCuda().load(Bundle.open(tiny_bundle, check_hashes=False), "text_encoder")


SHORT_OF_MEMORY = """
import sys
from _testcapi import remove_mem_hooks, set_nomemory
from magicface_rt.process.interrupts import reraise_if_interrupt, was_interrupted


def import_error(behind):
    try:
        try:
            raise behind
        except BaseException:
            raise ImportError("initialization failed")
    except ImportError as error:
        return error


reported = []
sys.unraisablehook = lambda lost: reported.append(repr(lost.object))
for behind in (ValueError(), KeyboardInterrupt()):
    for look in (was_interrupted, reraise_if_interrupt):
        for allocations in (1, 3):
            for first in range(200):
                error = import_error(behind)
                set_nomemory(first, first + allocations)
                try:
                    look(error)
                except (MemoryError, KeyboardInterrupt):
                    pass
                finally:
                    remove_mem_hooks()
print(reported)
"""


def test_a_search_for_an_interrupt_that_runs_out_of_memory_leaves_nothing_that_python_reports() -> None:
    """It would stand in the middle of what the command line says."""
    pytest.importorskip("_testcapi")
    assert subprocess.check_output([sys.executable, "-c", SHORT_OF_MEMORY], text=True) == "[]\n"
