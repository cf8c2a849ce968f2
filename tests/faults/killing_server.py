"""A server that stores concepts in a folder, as a process that can be killed, and what is asked of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from killing import Forks

from magicface_rt import Concept, KeptConcept
from magicface_rt.errors import UnreachableError


def serve_arguments(bundle: Path, folder: Path) -> list[str]:
    return ["serve", *bundle_arguments(bundle), "--concepts", os.fspath(folder)]


def bundle_arguments(bundle: Path) -> list[str]:
    """What `serve` and `ui` have."""
    arguments = [os.fspath(bundle), "--port", "0", "--threads", "1", "--backend", "onnxruntime-cpu"]
    return [*arguments, "--default-steps", "2"]


def wait_for(forks: Forks, text: str) -> None:
    """Until the child has said it."""
    end = time.monotonic() + 120
    while text not in forks.said:
        assert time.monotonic() < end, forks.said
        assert not any(line.startswith("error: ") for line in forks.said.splitlines()), forks.said
        time.sleep(0.01)


def client_of(forks: Forks, **options: Any) -> Any:
    """A client of the server, which listens."""
    from magicface_rt.serve import Client

    url = forks.said.partition("listening on ")[2].split()[0]
    return Client(url, **{"retries": 0, "trust_env": False, **options})


@contextmanager
def serving(
    forks: Forks,
    bundle: Path,
    folder: Path,
    kill: dict[str, Any] | None = None,
    *,
    work: str = "cli",
    options: Sequence[str] = (),
    permits: Path | None = None,
    **of_client: Any,
) -> Iterator[Any]:
    """A client of a server on that folder, which is killed in the end if it was not before."""
    forks.send(
        work, [[*serve_arguments(bundle, folder), *options]], folder, kill=kill, permits=permits and os.fspath(permits)
    )
    try:
        wait_for(forks, "ready\n")
        with client_of(forks, **of_client) as client:
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
