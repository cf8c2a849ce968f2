"""The server's metrics, read by Prometheus at /metrics. Labels are few and fixed, and hold no content of a request."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .concepts import ConceptStore, known_use
from .engine import Engine, EngineObserver
from .job import EngineJob
from .local import ServiceObserver
from .service import Outcome

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
_STAGES = ("queued", "loading", "text_encoding", "image_encoding", "reference_pass", "denoising", "decoding", "total")


class Metrics(EngineObserver, ServiceObserver):
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "magicface_request_seconds",
            "Seconds from a request's first byte to the last of its answer.",
            ["route", "method", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "magicface_stage_seconds",
            "Seconds of a request by stage, of the batch that it was made in; `queued` is its wait before that.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "magicface_batch_pictures",
            "Pictures that were made together.",
            buckets=_COUNTS,
            registry=self.registry,
        )
        self.pictures = Counter("magicface_pictures", "Pictures that were made.", registry=self.registry)
        self.lookups = Counter(
            "magicface_concept_lookups",
            "Concepts that were wanted, by whether they were there.",
            ["result"],
            registry=self.registry,
        )
        self.preparations = Counter(
            "magicface_concept_preparations", "Concepts that were prepared.", registry=self.registry
        )
        self.errors = Counter(
            "magicface_errors", "Answers that were problems, by their kind.", ["kind"], registry=self.registry
        )
        for result in ("hit", "miss"):
            self.lookups.labels(result)
        for stage in _STAGES:
            self.stages.labels(stage)

    def watch(self, engine: Engine, store: ConceptStore) -> None:
        """Add gauges of an Engine's queue, of what its Sessions keep, and of what a store holds."""

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=self.registry)

        gauge("magicface_queue_length", "Requests that wait.").set_function(lambda: engine.waiting)
        gauge("magicface_running", "Requests that are being done.").set_function(lambda: engine.running)
        gauge("magicface_session_kept_bytes", "Bytes of references that Sessions keep by content.").set_function(
            lambda: sum(session.kept_bytes for session in engine.sessions)
        )
        gauge("magicface_device_kept_bytes", "Bytes of keys in device memory.").set_function(
            lambda: sum(session.device_kept_bytes for session in engine.sessions)
        )
        gauge("magicface_concepts", "Kept concepts.").set_function(lambda: known_use(store)[0])
        gauge("magicface_concept_kept_bytes", "Bytes of kept concepts.").set_function(lambda: known_use(store)[1])

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Record that a request has been answered. `route`: the path's pattern, not the path."""
        self.requests.labels(route, method, str(status)).observe(seconds)

    def problem(self, kind: str) -> None:
        """Count an answer that was a problem."""
        self.errors.labels(kind).inc()

    def batch(self, jobs: Sequence[EngineJob], seconds: float) -> None:
        pictures = sum(job.images for job in jobs)
        if pictures:
            self.batches.observe(pictures)

    def looked_up(self, hit: bool) -> None:
        self.lookups.labels("hit" if hit else "miss").inc()

    def prepared(self) -> None:
        self.preparations.inc()

    def made(self, outcome: Outcome) -> None:
        self.pictures.inc(len(outcome.pngs))
        for stage in _STAGES:
            self.stages.labels(stage).observe(float(outcome.timings.get(stage, 0.0)))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format. May block while a folder is looked at."""
        return generate_latest(self.registry)
