"""What the store's tests share, and the processes that they start: builders, readers, and builders to be killed.

python store_worker.py build STORE CALLS SECONDS    wait for a line, build `sample_key()`, say what became of it
python store_worker.py lease STORE                  take a lease on it and keep it
python store_worker.py serve                        for each line of JSON, fork a child that works and kill it
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from magicface_rt.engines.plan_key import PlanKey
from magicface_rt.engines.store import EngineStore

CONTENT = bytes(range(256)) * 256
STEPS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.utime", "os.listdir", "os.scandir"),
    *("fcntl.flock", "shutil.rmtree"),
}


def sample_key(**changes: Any) -> PlanKey:
    fields: dict[str, Any] = {
        "graph": "denoise_step",
        "graph_hash": "0123456789abcdef" * 4,
        "flavour": "tensorrt-rtx",
        "flavour_version": "1.7.1.116",
        "precision": "fp16",
        "compute_capabilities": ("8.6", "8.9"),
        "profile": {
            "latents": ((1, 4, 64, 64), (1, 4, 64, 64), (4, 4, 64, 64)),
            "k_ref_13": ((1, 1, 320), (1, 1229, 320), (4, 12288, 320)),
        },
        "builder_options": {"tf32": False, "optimisation_level": 3, "workspace": {"bytes": 1 << 30}},
    }
    return PlanKey(**{**fields, **changes})


def writer(content: bytes = CONTENT, *, pieces: int = 1, seconds: float = 0.0, **facts: Any) -> Callable[[Path], Any]:
    """A builder that writes `content` in so many pieces, opening the file for each, in about so many seconds."""

    def make(path: Path) -> dict[str, Any]:
        size = -(-len(content) // pieces)
        for start in range(0, len(content), size):
            with path.open("ab") as stream:
                stream.write(content[start : start + size])
            time.sleep(seconds / pieces)
        return facts

    return make


def build(root: str, calls: str, seconds: str) -> None:
    def make(path: Path) -> dict[str, Any]:
        with open(calls, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        return writer(pieces=4, seconds=float(seconds))(path)

    waits: list[int] = []
    print("ready", flush=True)
    sys.stdin.readline()
    store = EngineStore(root)
    plan = store.build(sample_key(), make, timeout=60, on_wait=lambda: waits.append(1))
    print(json.dumps({"sha256": plan.sha256, "read": len(store.read(plan)), "waits": len(waits)}), flush=True)


def lease(root: str) -> None:
    store = EngineStore(root)
    with store.in_use(store.get(sample_key())):
        print("leased", flush=True)
        sys.stdin.readline()


def serve() -> None:
    """Requests: `store`, `work` (build, prune), `step` (die before that step) or `delay` (be killed so much later)."""
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _work(request)
            os._exit(0)
        if request.get("delay") is not None:
            time.sleep(request["delay"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "seconds": time.monotonic() - started}), flush=True)


def _work(request: dict[str, Any]) -> None:
    if request.get("step") is not None:
        _die_before(request["step"])
    store = EngineStore(request["store"])
    if request["work"] == "build":
        store.build(sample_key(), writer(pieces=4, seconds=request.get("seconds", 0)), timeout=0)
    else:
        store.prune(limit=0)


def _die_before(step: int) -> None:
    left = step

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in STEPS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    {"build": build, "lease": lease, "serve": serve}[sys.argv[1]](*sys.argv[2:])
