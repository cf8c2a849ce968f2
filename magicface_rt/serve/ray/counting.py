"""The metrics of a front: those of a service in one process, counted from what its replicas report."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import Gauge

from ..concepts import ConceptStore, known_use
from ..metrics import Metrics
from .messages import Tally

__all__ = ["FrontMetrics"]


class FrontMetrics(Metrics):
    """One front's metrics; its counters add up what all replicas have reported to this front."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, Tally] = {}

    def watch_front(
        self,
        store: ConceptStore,
        *,
        waiting: Callable[[], int],
        running: Callable[[], int],
        replicas: Callable[[], Collection[str]],
    ) -> None:
        """Add gauges of what waits and runs, what replicas keep, and what the shared folder holds."""

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=self.registry).set_function(value)

        def kept(of: Callable[[Tally], int]) -> Callable[[], float]:
            def bytes_of(name: str) -> int:
                tally = self._last.get(name)  # `get`, as another thread may be forgetting it
                return 0 if tally is None else of(tally)

            return lambda: sum(bytes_of(name) for name in replicas())

        gauge("magicface_queue_length", "Requests that wait.", waiting)
        gauge("magicface_running", "Requests that are being done.", running)
        gauge("magicface_replicas", "Replicas that are warm.", lambda: len(replicas()))
        gauge(
            "magicface_session_kept_bytes",
            "Bytes of references that Sessions keep by content.",
            kept(lambda tally: tally.session_bytes),
        )
        gauge("magicface_device_kept_bytes", "Bytes of keys in device memory.", kept(lambda tally: tally.device_bytes))
        gauge("magicface_concepts", "Kept concepts.", lambda: known_use(store)[0])
        gauge("magicface_concept_kept_bytes", "Bytes of kept concepts.", lambda: known_use(store)[1])

    def add_tally(self, tally: Tally) -> None:
        """Add the counts that came with a replica's answer."""
        self._last[tally.replica] = tally
        for pictures in tally.batches:
            self.batches.observe(pictures)
        self.preparations.inc(tally.prepared)
        self.lookups.labels("hit").inc(tally.hits)
        self.lookups.labels("miss").inc(tally.misses)

    def forget(self, living: Collection[str]) -> None:
        """Drop what is known of replicas that are not in `living`: they have ended."""
        for name in self._last.keys() - set(living):
            del self._last[name]
