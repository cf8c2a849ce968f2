"""What has happened before each example of docs/operations.md, "What a user sees": one function for each.

A function changes the scene's folder, in which `bundle` is a sound one, or this process for as long as `during` lasts.
What it puts there with `during.callback` is done, and may be asserted, after the example.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_locks import wheel_in

from magicface_rt import Bundle, Session
from magicface_rt import backends as backends_module
from magicface_rt.backends import onnxruntime as onnxruntime_module
from magicface_rt.backends.onnxruntime import import_onnxruntime
from magicface_rt.bundle import MANIFEST, sha256
from magicface_rt.cli import run as run_module
from magicface_rt.engines.store import EngineStore
from tests.engines.store_worker import sample_key, writer
from tests.faults.disks import Layer
from tests.faults.memory_hollow import Hollow
from tests.faults.test_faults_cpu_fallback import Ort
from tests.runtime.encoded_pictures import directory, jpeg_of_scans
from tools import install, lockfile

WEIGHTS = "weights.bin"


@dataclass(frozen=True)
class Scene:
    """A folder with a bundle of its own, which is the working one, and a sound file of a kept concept elsewhere; what
    changes this process does so by `monkeypatch`, or within `during`.
    """

    folder: Path
    concept: Path
    monkeypatch: pytest.MonkeyPatch
    during: contextlib.ExitStack

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def kept(self, name: str = "man.concept") -> Path:
        (self.folder / "kept").mkdir()
        return Path(shutil.copyfile(self.concept, self.folder / "kept" / name))

    def manifest(self) -> Any:
        return json.loads((self.bundle / MANIFEST).read_bytes())

    def describe(self, manifest: Any) -> None:
        (self.bundle / MANIFEST).write_text(json.dumps(manifest))


def nothing(scene: Scene) -> None:
    """A sound bundle alone."""


# --------------------------------------------------------------------------------------------------------------- files


def cut_short(scene: Scene) -> None:
    os.truncate(scene.bundle / WEIGHTS, (scene.bundle / WEIGHTS).stat().st_size - 100)


def newer(scene: Scene) -> None:
    scene.describe({**scene.manifest(), "format": 99})


def linked(scene: Scene) -> None:
    (scene.bundle / WEIGHTS).rename(scene.folder / WEIGHTS)
    (scene.bundle / WEIGHTS).symlink_to(scene.folder / WEIGHTS)


def escaping(scene: Scene) -> None:
    manifest = scene.manifest()
    manifest["files"][f"../{WEIGHTS}"] = manifest["files"].pop(WEIGHTS)
    scene.describe(manifest)


def renamed(scene: Scene) -> None:
    encoder, decoder, aside = (
        scene.bundle / name for name in ("vae_encoder.onnxruntime.onnx", "vae_decoder.onnxruntime.onnx", "aside")
    )
    encoder.rename(aside)
    decoder.rename(encoder)
    aside.rename(decoder)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flipped_concept(scene: Scene) -> None:
    flip(scene.kept(), -1)


def renamed_concept(scene: Scene) -> None:
    scene.kept("hat.concept")


def claiming_concept(scene: Scene) -> None:
    scene.kept().write_bytes((1 << 42).to_bytes(8, "little") + b"{}  ")


def bomb(scene: Scene) -> None:
    """A picture of one pixel whose header claims more."""
    path = scene.folder / "bomb.png"
    Image.new("RGB", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def serving(scene: Scene) -> None:
    for name in ("fastapi", "httpx"):
        pytest.importorskip(name)


def uploaded_bomb(scene: Scene) -> None:
    serving(scene)
    bomb(scene)


def uploaded_scans(scene: Scene) -> None:
    serving(scene)
    (scene.folder / "scans.jpg").write_bytes(jpeg_of_scans(190))


def unfolding(scene: Scene) -> None:
    """2,000 tags name the same 60,000 bytes."""
    (scene.folder / "tags.tiff").write_bytes(directory())


def packed(scene: Scene) -> None:
    """33 texts of a megabyte each."""
    info = PngInfo()
    for _ in range(33):
        info.add_text("Comment", " " * (1 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(scene.folder / "packed.png", pnginfo=info)
    assert (scene.folder / "packed.png").stat().st_size // 1000 == 35


def photograph(folder: Path) -> None:
    """An image, a mask for it, and one of another size."""
    pixels = np.random.default_rng(90).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "man.png")
    for side, name in ((64, "man-mask.png"), (32, "mask.png")):
        mask = np.zeros((side, side), np.uint8)
        mask[side // 4 : side // 4 * 3, side // 8 : side // 8 * 5] = 255
        Image.fromarray(mask).save(folder / name)


def photographed(scene: Scene) -> None:
    photograph(scene.folder)


def doubled(scene: Scene) -> None:
    (scene.folder / "job.json").write_text('{"prompt": "a man", "steps": 2, "steps": 50}')


def nested(scene: Scene) -> None:
    (scene.folder / "job.json").write_text("[" * 100_000)


def aliased(scene: Scene) -> None:
    """Ten lines, each ten times the one before."""
    lines = ["a0: &a0 [man, man, man]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))]
    (scene.folder / "job.yaml").write_text("\n".join(lines))


def strange_name(scene: Scene) -> None:
    try:
        (scene.folder / os.fsdecode(b"caf\xe9.json")).touch()
    except OSError:
        pytest.skip("no file here may have such a name")


def wrong_archive(scene: Scene) -> None:
    """pip sees a folder of wheels alone, and installs into another."""
    wheel = wheel_in(scene.folder / "wheels", "thing", "1.0")
    lock = scene.folder / "lock.txt"
    pin = lockfile.Pin("thing", "1.0", (hashlib.sha256(wheel.read_bytes()).hexdigest(),))
    lock.write_text(lockfile.text_of([pin]))
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    patch, target = scene.monkeypatch, scene.folder / "target"
    sees = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": wheel.parent, "TARGET": target}
    for name, value in sees.items():
        patch.setenv(f"PIP_{name}", str(value))
    patch.setattr(lockfile, "ROOT", scene.folder)
    patch.setattr(install, "torch_on_offer", lambda: "")
    patch.setattr(install, "usable_lock", lambda torch: lock)
    scene.during.callback(lambda: expect(not target.exists()))


def expect(that: object) -> None:
    assert that


# --------------------------------------------------------------------------------------------------- disks and signals


def without_computing(scene: Scene) -> None:
    """`run` draws ones, at once: what it then meets and says is its own."""

    def opened(bundle: Path, **settings: Any) -> Session:
        return Session(bundle, **{**settings, "backend": Hollow()})

    scene.monkeypatch.setattr(run_module, "Session", opened)


def full_disk(scene: Scene) -> None:
    place = scene.folder / "full"
    place.mkdir()
    scene.during.callback(lambda: expect(os.listdir(place) == []))

    def full(operation: str, path: str) -> None:
        if operation == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    without_computing(scene)
    scene.during.enter_context(Layer(place, full).installed())


def read_only_disk(scene: Scene) -> None:
    place = scene.folder / "ro"
    place.mkdir()

    def refused(operation: str, path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    scene.during.enter_context(Layer(place, refused).installed())


def interrupted(scene: Scene) -> None:
    """By Ctrl-C, after the first step."""

    @contextlib.contextmanager
    def bar(options: object) -> Iterator[object]:
        yield lambda progress: signal.raise_signal(signal.SIGINT)

    without_computing(scene)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    scene.during.callback(signal.signal, signal.SIGINT, before)
    scene.monkeypatch.setattr(run_module, "progress_bar", bar)
    scene.during.callback(lambda: expect(os.listdir(scene.folder) == ["bundle"]))


KILLED = "import os; os.rename = os.replace = lambda *_: os.kill(os.getpid(), 9)"
"""What a process does first that is then killed as its result gets its name."""


# ------------------------------------------------------------------------------------------ memory, numbers, runtimes


def not_finite(scene: Scene) -> None:
    weights = np.memmap(scene.bundle / WEIGHTS, np.float32, "r+")
    weights[weights.size // 2 :] = np.nan
    weights.flush()
    manifest = scene.manifest()
    manifest["files"][WEIGHTS]["sha256"] = sha256(scene.bundle / WEIGHTS)
    scene.describe(manifest)


def failing_gpu(scene: Scene) -> None:
    """The wheel for GPUs is installed, and CUDA does not start. What the CPU computes it computes indeed."""
    real, stands_in = import_onnxruntime, Ort(refuse="CUDA failure 35: CUDA driver version is insufficient")
    with scene.monkeypatch.context() as patch:
        patch.setattr(onnxruntime_module, "import_onnxruntime", lambda: stands_in)
        reason = backends_module.why_not("onnxruntime-cuda")
    assert import_onnxruntime is real
    scene.monkeypatch.setattr(backends_module, "import_onnxruntime", lambda: stands_in)
    scene.monkeypatch.setattr(backends_module, "why_not", lambda name, device: reason)
    logger, shown = logging.getLogger("magicface_rt"), logging.lastResort
    assert shown is not None
    logger.addHandler(shown)  # as in a process in which nobody has set the log up
    scene.during.callback(logger.removeHandler, shown)


def flipped_plan(scene: Scene) -> None:
    flip(EngineStore(scene.folder / "plans").build(sample_key(graph="text_encoder"), writer()).path, 5)


def stale_plan(scene: Scene) -> None:
    pytest.importorskip("tensorrt_rtx")
    from magicface_rt.cli.build import choose_target
    from magicface_rt.engines.builder import plan_key

    target, library = choose_target("tensorrt-rtx", "rtx-4090", 0)
    bundle, store = Bundle.open(scene.bundle, check_hashes=False), EngineStore(scene.folder / "plans")
    for graph in bundle.graphs:
        key = plan_key(bundle, graph, library, target)
        store.build(replace(key, flavour_version="1.6.0.1") if graph == "text_encoder" else key, writer())
