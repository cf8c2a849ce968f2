"""A process that has loaded everything once, and forks a child for each line of JSON that it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any


class ForkingProcess:
    """`script` says "ready" when it has loaded everything, and answers each line with a line."""

    def __init__(self, script: str, *arguments: str, before: Callable[[], object] | None = None) -> None:
        # Threads of a library would not be there in a child.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=before,
        )
        assert self._hear() == "ready"

    @property
    def number(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for what the child of the last request came to."""
        return json.loads(self._hear())

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process that forks ended with {self._process.wait()}"
        return line.strip()
