"""A server that stores concepts in a folder, as a process that can be killed, and what is asked of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from killing import Forks

from magicface_rt import Concept, KeptConcept
from magicface_rt.errors import UnreachableError


def serve_arguments(bundle: Path, folder: Path) -> list[str]:
    arguments = ["serve", bundle, "--port", "0", "--concepts", folder, "--threads", "1"]
    return [*map(os.fspath, arguments), "--backend", "onnxruntime-cpu", "--default-steps", "2"]


@contextmanager
def serving(forks: Forks, bundle: Path, folder: Path, kill: dict[str, Any] | None = None) -> Iterator[Any]:
    """A client of a server on that folder, which is killed in the end if it was not before."""
    from magicface_rt.serve import Client

    forks.send("cli", [serve_arguments(bundle, folder)], folder, kill=kill)
    end = time.monotonic() + 120
    while "ready\n" not in forks.said:
        assert time.monotonic() < end, forks.said
        assert "error:" not in forks.said, forks.said
        time.sleep(0.01)
    url = forks.said.partition("listening on ")[2].split()[0]
    try:
        with Client(url, retries=0, trust_env=False) as client:
            yield client
    finally:
        forks.end()
        assert forks.answer().killed


def put(client: Any, concept: Concept, seed: int) -> str | None:
    """The id under which it is kept; None where the server went."""
    try:
        return str(client.put_concept(concept, reference_seed=seed).id)
    except UnreachableError:
        return None


def stored(folder: Path) -> list[str]:
    """The files that a server counts, whatever is in them."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def check(client: Any, folder: Path) -> None:
    """What is served is what is whole, and nothing else has a name."""
    files = stored(folder)
    for name in files:
        KeptConcept.load(folder / name, check_hashes=True)
    assert sorted(f"{one.id}.concept" for one in client.concepts()) == files
