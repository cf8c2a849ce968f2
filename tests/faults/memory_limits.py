"""The command line in processes that may have only so many addresses, and what such a process left."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threads_requests import HAT, MAN

SECONDS = 1200
"""What one command may take, to end what hangs: an export beside other tests takes minutes."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. `left`: files, and folders for temporary ones, relative to its own folder. `hung`: it had to
    be killed.
    """

    code: int
    said: str
    left: tuple[str, ...]
    hung: bool = False

    @property
    def last(self) -> str:
        return self.said.strip().splitlines()[-1] if self.said.strip() else ""


class Scene:
    """A folder to work in, and the command lines of all verbs. `inputs` are beside it and never written to."""

    def __init__(self, bundle: Path, checkpoint: Path | None, inputs: Path) -> None:
        self.inputs = inputs
        for concept in (MAN, HAT):
            (reference,) = concept.references
            for what, image in (("image", reference.image), ("mask", reference.mask)):
                image.save(inputs / f"{concept.word}-{what}.png")  # type: ignore[union-attr]
        references = {
            concept.word: [
                {
                    "image": f"{concept.word}-image.png",
                    "mask": f"{concept.word}-mask.png",
                    "prompt": f"a {concept.word}",
                }
            ]
            for concept in (MAN, HAT)
        }
        concepts = [{"word": word, "references": of_one} for word, of_one in references.items()]
        job = {"prompt": "a man with a hat", "concepts": concepts, "steps": 2}
        (inputs / "job.json").write_text(json.dumps(job))
        (inputs / "store").mkdir(exist_ok=True)
        self.bundle, self.job = str(bundle), str(inputs / "job.json")
        of_job, store = ["--job", self.job], ["--store", str(inputs / "store")]
        portable = ["--target", "rtx-portable"]
        self.verbs: dict[str, list[str]] = {
            "run": ["run", self.bundle, *of_job, "--out", "out"],
            "run, prompt alone": ["run", self.bundle, "--prompt", "a man", "--steps", "2", "--out", "out"],
            "prepare": ["prepare", self.bundle, *of_job, "--out", "kept"],
            "plan": ["plan", self.bundle, *of_job],
            "inspect": ["inspect", self.bundle],
            "doctor": ["doctor"],
            "engines list": ["engines", "list", *store],
            "engines why": ["engines", "why", self.bundle, *store, *portable],
            "engines verify": ["engines", "verify", *store],
            "engines prune": ["engines", "prune", *store, "--limit", "1GiB"],
            "build": ["build", self.bundle, "--store", "plans", "--graph", "text_encoder", *portable],
            "bench": [
                *("bench", self.bundle, "--out", "report", "--concepts", "1", "--contenders", "bare,kept"),
                *("--steps", "2", "--rounds", "1", "--requests", "1", "--parity-steps", "2"),
            ],
            "serve": ["serve", self.bundle, "--port", "0"],
            "ui": ["ui", self.bundle, "--port", "0"],
            "checkpoint": ["checkpoint", "tiny", "--out", "checkpoint"],
            "demo": ["demo", *of_job, "--work", "work", "--out", "demo-out", "--steps", "1"],
        }
        if checkpoint is not None:
            self.verbs["export"] = ["export", str(checkpoint), "--out", "bundle"]
            self.verbs["verify"] = ["verify", self.bundle, "--checkpoint", str(checkpoint), "--steps", "2"]

    def run(self, arguments: Sequence[str], folder: Path, **limits: Any) -> Ended:
        """Run a verb in a folder that is made for it. `limits`: those of `limited`."""
        folder.mkdir()
        return limited([sys.executable, "-m", "magicface_rt.cli", *arguments], folder, **limits)


def limited(
    command: Sequence[str],
    folder: Path,
    *,
    addresses: int | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = SECONDS,
    ends: bool = True,
) -> Ended:
    """Run a command in a folder, which has its temporary files too. `ends`: else it is told to end once it is ready."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)

    def limit() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        hard = resource.RLIM_INFINITY if addresses is None else addresses
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(temporary), **(environment or {})},
        preexec_fn=limit,
    )
    assert process.stderr is not None
    over = threading.Event()

    def end() -> None:
        over.set()
        process.kill()

    watch = threading.Timer(seconds, end)
    watch.start()
    said = ""
    for line in process.stderr:
        said += line
        if not ends and line.strip() == "ready":
            process.send_signal(signal.SIGTERM)
    code = process.wait()
    watch.cancel()
    process.stderr.close()
    # Of folders, those that are temporary by their place or their name.
    found = [
        path
        for path in folder.rglob("*")
        if not path.is_dir() or temporary in path.parents or path.suffix in (".part", ".old")
    ]
    found = [path for path in found if not path.name.startswith("torchinductor_")]  # PyTorch makes it as it is loaded
    left = tuple(sorted(str(path.relative_to(folder)) for path in found))
    return Ended(code, said, left, over.is_set())


def largest_refused(refused: int, done: int, is_refused: Callable[[int], bool], step: int = 1 << 20) -> int:
    """Of limits the largest that is refused, to `step` bytes, between one that is and one with which all is done."""
    while done - refused > step:
        middle = (refused + done) // 2
        if is_refused(middle):
            refused = middle
        else:
            done = middle
    return refused
