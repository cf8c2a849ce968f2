"""The graphs of a bundle that a backend has loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .backends import Backend, GraphRunner
from .bundle import Bundle
from .kept.awaited import Awaited


class LoadedGraphs:
    """Loads each graph when it is first wanted, one at a time, and keeps it until it is unloaded. Thread-safe.

    Backends need not be able to load several graphs at once, and to build two plans at once would take memory for both.
    """

    def __init__(self, bundle: Bundle, backend: Backend, check_open: Callable[[], None]) -> None:
        """`check_open` raises if no graph is wanted any more."""
        self._bundle = bundle
        self._backend = backend
        self._check_open = check_open
        self._lock = threading.RLock()  # never held while a graph is loaded; a signal handler may want it in between
        self._loading = _Loading()
        self._loading.finished = True
        self.runners: dict[str, GraphRunner] = {}

    def get_or_load(self, graph: str, waiting: Callable[[], object]) -> GraphRunner:
        """Return a graph, after loading it if it is not there.

        While another thread loads this graph or another one, `waiting` is called from time to time, and may raise. If
        that thread fails, each that waited makes its own attempt, and gets the errors of that attempt only.

        Raises:
            BundleError: the bundle has no such graph, or a file of it was replaced since it was opened.
            whatever `Backend.load` and `check_open` raise.
        """
        while True:
            mine = _Loading()
            try:  # before `mine` is registered (rule R2 of `interrupts`)
                with self._lock:
                    idle = self._loading.finished  # read before the graphs, which are added before it is set
                    found = self.runners.get(graph)
                    if found is not None:
                        return found
                    if idle:
                        self._loading = mine
                    loading = self._loading
                # A signal handler or a finalizer that wants a graph while its own thread loads one must not wait.
                if loading.thread == mine.thread:
                    return self._add(graph, self._load(graph))
                loading.wait(waiting)
            finally:
                mine.finished = True  # before any call (rule R1)
                mine.wake()

    def unload(self, graph: str) -> None:
        """Free a graph. It is no error if it is not there."""
        runner = self.runners.pop(graph, None)
        if runner is not None:
            runner.close()

    def close(self) -> None:
        """Free all graphs. May be called twice."""
        for runner in list(self.runners.values()):
            runner.close()
        self.runners.clear()

    def _add(self, graph: str, runner: GraphRunner) -> GraphRunner:
        try:
            self._check_open()
        except BaseException:
            runner.close()
            raise
        found = self.runners.setdefault(graph, runner)
        if found is not runner:  # a signal handler loaded it in between
            runner.close()
        return found

    def _load(self, graph: str) -> GraphRunner:
        """Load a graph, making sure that it is from the files that were opened: backends find them by path."""
        self._bundle.check_unchanged()
        runner = self._backend.load(self._bundle, graph)
        try:
            self._bundle.check_unchanged()
        except BaseException:
            runner.close()
            raise
        return runner


class _Loading(Awaited):
    """A load that others wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
