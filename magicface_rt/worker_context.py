"""The worker contexts in which a Session's workers compute: the bundle's graphs, bound beside each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from .backends import Binding, GraphRunner
from .backends.key_uploader import KeyUploader
from .denoiser import SERVED_OUTPUTS
from .errors import BackendError

LoadGraph = Callable[[str, Callable[[], object]], GraphRunner]
"""Returns a graph. While it waits for another thread that loads one, it calls its second argument from time to time."""


def _wait_on() -> object:
    """Nobody asks to stop waiting."""


class WorkerContext:
    """Bindings that take turns on one stream and share scratch memory. For one thread at a time.

    `waiting` is called from time to time while another thread loads a graph, and may raise.
    """

    def __init__(self, load: LoadGraph) -> None:
        self._load = load
        self.waiting: Callable[[], object] = _wait_on
        self._bindings: dict[str, Binding] = {}
        self._key_uploader: KeyUploader | None = None
        self.closed = False

    def binding(self, graph: str) -> Binding:
        """Return the binding of a graph of the bundle, which is made on first use."""
        if graph not in self._bindings:
            beside = next(iter(self._bindings.values()), None)
            self._bindings[graph] = self._load(graph, self.waiting).bind(SERVED_OUTPUTS.get(graph), beside=beside)
        return self._bindings[graph]

    def key_uploader(self) -> KeyUploader | None:
        """Return what brings keys to the device for `denoise_step`; None if they come from the host."""
        if self._key_uploader is None:
            self._key_uploader = self.binding("denoise_step").key_uploader("reference keys")
        return self._key_uploader

    def drop(self, graph: str) -> None:
        """Free what a graph's binding holds; the graph is bound anew when it is needed."""
        if self._key_uploader is not None:
            self._key_uploader.close()
            self._key_uploader = None
        binding = self._bindings.pop(graph, None)
        if binding is not None:
            binding.close()

    def close(self) -> None:
        """Free what the bindings hold. May be called twice."""
        self.closed = True
        for graph in list(self._bindings):
            self.drop(graph)


class WorkerContextPool:
    """A pool of worker contexts, one for each worker that computes at the same time. Thread-safe."""

    def __init__(self, load: LoadGraph) -> None:
        self._load = load
        self._free: list[WorkerContext] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, waiting: Callable[[], object]) -> Iterator[WorkerContext]:
        """Lend a worker context for the block. One in which a runtime failed is freed and not used again.

        `waiting` is called from time to time while another thread loads a graph, and may raise.
        """
        with self._lock:
            context = self._free.pop() if self._free else WorkerContext(self._load)
        try:
            context.waiting = waiting
            yield context
        except BackendError:
            context.close()
            raise
        finally:
            context.waiting = _wait_on  # else it would hold what the request's callback holds
            with self._lock:
                if not context.closed:
                    self._free.append(context)

    def drop(self, graph: str) -> None:
        """Free a graph's bindings in all worker contexts that are not in use."""
        with self._lock:
            for context in self._free:
                context.drop(graph)

    def close(self) -> None:
        """Free the worker contexts that are not in use."""
        with self._lock:
            contexts, self._free = self._free, []
        for context in contexts:
            context.close()
