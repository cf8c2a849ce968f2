"""The server's errors as problem details (RFC 9457): which status each kind of error has, and what its body says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import (
    AnswerError,
    BackendError,
    BackendMissingError,
    BudgetError,
    BundleError,
    Cancelled,
    ConceptError,
    DeviceError,
    EngineError,
    ImageError,
    InputError,
    KeptConceptError,
    MaskError,
    NonFiniteError,
    OptionError,
    OutputError,
    PromptError,
    ServiceError,
    SessionClosedError,
)
from ..soft_warnings import attributed_to

__all__ = ["MEDIA_TYPE", "Problem", "at", "refusal", "title"]

MEDIA_TYPE = "application/problem+json"

_STATUS: tuple[tuple[type[BaseException], int, str], ...] = (
    (BudgetError, 507, "memory-budget"),
    (KeptConceptError, 422, "kept-concept"),
    (PromptError, 422, "prompt"),
    (MaskError, 422, "mask"),
    (ImageError, 422, "image"),
    (ConceptError, 422, "concept"),
    (OptionError, 422, "option"),
    (OutputError, 507, "not-written"),
    (InputError, 422, "input"),
    (SessionClosedError, 503, "draining"),
    (BundleError, 503, "bundle-unusable"),
    (EngineError, 503, "plan-unusable"),
    (BackendMissingError, 503, "backend-missing"),
    (DeviceError, 503, "device"),
    (NonFiniteError, 500, "not-finite"),
    (MemoryError, 503, "out-of-memory"),  # HostMemoryError, which is a BackendError as well, among them
    (BackendError, 503, "backend"),
    (Cancelled, 499, "client-gone"),
)
"""The status and kind of an error: those of the first class that fits. A `ServiceError` has its own."""

_TITLES = {
    400: "The request cannot be read",
    401: "A token is needed",
    403: "The request is not allowed",
    404: "There is no such thing",
    405: "The method is not allowed here",
    406: "No acceptable form of the answer",
    408: "The request did not come in time",
    409: "Another process changes it",
    410: "A concept was erased",
    413: "The request is too large",
    415: "The body has another form than expected",
    422: "The request cannot be used",
    429: "Too many requests wait",
    499: "The client has gone",
    500: "The service failed",
    503: "The service cannot do this now",
    504: "The deadline has passed",
    507: "It cannot be kept",
}


@dataclass(frozen=True)
class Problem:
    """An answer that reports a failure.

    retry_after  seconds after which the same request may succeed
    errors       (field, message), where several parts of the request are at fault
    """

    status: int
    kind: str
    detail: str
    field: str | None = None
    retry_after: float | None = None
    errors: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """Make the problem of an error. If the service is to blame, the detail is only general, since the error's text
        may hold paths.
        """
        if isinstance(error, ServiceError):
            return cls(error.status or 500, error.kind, str(error), error.field, error.retry_after)
        for kind, status, name in _STATUS:
            if isinstance(error, kind):
                ours = status in (500, 503) or isinstance(error, OutputError)
                detail = f"{type(error).__name__}; the service's log says more." if ours else str(error)
                return cls(status, name, detail, retry_after=1.0 if status == 503 else None)
        return cls(500, "internal", f"An unexpected {type(error).__name__}; the service's log says more.")

    def to_dict(self) -> dict[str, Any]:
        """Return the members of the body."""
        found: dict[str, Any] = {
            "type": f"urn:magicface-rt:problem:{self.kind}",
            "title": title(self.status),
            "status": self.status,
            "kind": self.kind,
            "detail": self.detail,
        }
        if self.field is not None:
            found["field"] = self.field
        if self._seconds is not None:
            found["retry_after"] = self._seconds
        if self.errors:
            found["errors"] = [{"field": field, "detail": detail} for field, detail in self.errors]
        return found

    @property
    def _seconds(self) -> int | None:
        """The whole seconds of Retry-After."""
        return None if self.retry_after is None else max(1, math.ceil(self.retry_after))

    @property
    def body(self) -> bytes:
        """The body: JSON in ASCII, since a detail may quote text that UTF-8 cannot encode."""
        return json.dumps(self.to_dict(), ensure_ascii=True, allow_nan=False).encode("ascii")

    @property
    def headers(self) -> dict[str, str]:
        """Content-Type, and the headers that the status calls for."""
        headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
        if self._seconds is not None:
            headers["Retry-After"] = str(self._seconds)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


@contextmanager
def at(field: str, *parts: str) -> Iterator[None]:
    """Attribute what the block refuses, or warns of, to this part of the request, unless the error names a part itself.

    parts  names of the field's own parts; if the message is about one ("weight is nan"), that one is appended to the
           field

    Raises:
        AnswerError: in place of an InputError, with its status and kind, and the field.
    """
    try:
        with attributed_to(field):
            yield
    except InputError as error:
        problem = Problem.of(error)
        part = next((part for part in parts if f"{part} is " in str(error)), None)
        found = ".".join(filter(None, (field, part))) or None
        raise AnswerError(str(error), status=problem.status, kind=problem.kind, field=found) from error
    except ServiceError as error:
        if error.field is None:
            error.field = field
        raise


def title(status: int) -> str:
    """Return the title that all problems of a status share."""
    return _TITLES.get(status, "The request failed")


def refusal(status: int, kind: str, detail: str, field: str | None = None) -> AnswerError:
    """Make the error for a refused request."""
    return AnswerError(detail, status=status, kind=kind, field=field)
