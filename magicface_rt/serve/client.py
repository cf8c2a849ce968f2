"""The client of a service, for threads and for asyncio. It needs httpx and nothing else of the extra `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import Any, TypeVar

import httpx

from ..concept import Concept
from ..errors import (
    AnswerError,
    Cancelled,
    MagicFaceError,
    OptionError,
    ServiceError,
    UnknownConceptError,
    UnreachableError,
)
from ..files.strict_json import read_json
from ..request import Progress, ProgressCallback, check_progress, declined
from ..values.shown import shown
from .answers import ANSWER_BYTES, PACKED, Answer, Body, Lines
from .wire import (
    UNREADABLE,
    EventParser,
    Given,
    KeptId,
    Made,
    body_of,
    error_of,
    form_of,
    listed,
    made_of,
    order_of,
    pause,
)

T = TypeVar("T")

__all__ = ["AsyncClient", "Client"]

READ_SECONDS = 660.0
"""Longer than the service's own limit, so that a deadline that passes is reported by the service itself."""

EVENTS = "text/event-stream"

Concepts = Iterable[Given]


def _options(url: str, token: str | None, timeout: float | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for httpx's client. Raises OptionError for what cannot be used; a token is never shown."""
    headers = httpx.Headers(given.get("headers"))
    if token is not None:
        headers["Authorization"] = f"Bearer {_token(token)}"
    headers["Accept-Encoding"] = PACKED
    try:
        httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise OptionError(f"url is none ({error}); expected one such as http://127.0.0.1:8000.") from error
    if timeout is not None and not (_is_number(timeout) and timeout > 0):
        raise OptionError(f"timeout is {shown(timeout)}, expected seconds above 0, or None for no limit.")
    limits = httpx.Timeout(timeout, connect=10.0)
    # The service sets no cookies. Those that something on the way sets are dropped: httpx could not even send some.
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    return {"base_url": url, "timeout": limits, "cookies": no_cookies, **given, "headers": headers}


def _token(token: str) -> str:
    """Return the token without surrounding blanks and line ends, which a file may have."""
    found = token.strip() if isinstance(token, str) else ""
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise OptionError("token is empty, or no printable ASCII text without blanks; expected one of the service's.")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_LOST = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""Errors that mean that there was no connection, or that it broke: another one may work. An answer that takes too long
is not among them, since the service would only start over.
"""

_REQUEST_FAILED = (httpx.RequestError, httpx.InvalidURL)
"""What httpx raises when a request fails. InvalidURL is not a subclass of RequestError."""


@contextlib.contextmanager
def _reached(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    """Turn errors of httpx into ServiceError."""
    try:
        yield
    except _REQUEST_FAILED as error:
        raise UnreachableError(f"no answer from {http.base_url}: {type(error).__name__}: {error}.") from error
    except RuntimeError as error:
        if not http.is_closed:
            raise
        raise UnreachableError("this client was closed; make another one.") from error


@dataclass(frozen=True)
class _Retries:
    """When a request is sent again.

    most     how often it is sent again
    longest  the most seconds to wait before that
    """

    most: int
    longest: float

    @classmethod
    def of(cls, retries: int, timeout: float | None) -> _Retries:
        """Check the client's arguments. Raises OptionError."""
        if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
            raise OptionError(f"retries is {shown(retries)}, expected a whole number from 0.")
        return cls(retries, math.inf if timeout is None else timeout)

    def wait(self, method: str, error: ServiceError, attempt: int) -> float | None:
        """Return the seconds to wait before the request is sent again, or None if it is not."""
        return pause(error, attempt, self.most, self.longest) if _repeats(method, error) else None


def _repeats(method: str, error: ServiceError) -> bool:
    """Return whether sending the request again would ask for the same thing and may help. A DELETE that may have begun
    is not repeated: what has been erased cannot be erased again.
    """
    if not isinstance(error, UnreachableError):
        return True
    never_begun = isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))
    return never_begun if method == "DELETE" else error.__cause__ is None or isinstance(error.__cause__, _LOST)


def _path_of(id: str) -> str:
    """Return the URL path of a concept. Raises UnknownConceptError for an id that cannot exist."""
    if not isinstance(id, str) or not id.isalnum() or not id.isascii():
        raise UnknownConceptError(f"concept {shown(id)} is no id; expected what `put_concept` or `concepts` gave.")
    return f"/v1/concepts/{id}"


def _error_of(answer: Answer) -> ServiceError:
    return error_of(answer.status, answer.content, answer.response.headers.get("Retry-After"))


class Client:
    """A service, used from one or more threads.

        with Client("http://127.0.0.1:8000") as client:
            man = client.put_concept(Concept("man", Reference("man.jpg", mask="man-mask.png")), steps=20)
            made = client.generate("a man in the rain", [man.use(weight=2.5)], seed=7)
            made.images[0].save("out.png")

    token    one of the service's tokens, where it requires them; surrounding blanks and line ends are removed
    retries  how often a request is sent again, after the seconds of Retry-After where the service is full, or where the
             connection is lost: the same request makes the same picture. It is not sent again when an answer takes too
             long
    timeout  seconds without a byte of an answer, None for no limit; where Retry-After asks for more, the error is
             raised at once
    answer_bytes  the most bytes of an answer, unpacked. Its content takes several times that in memory, whoever sends
             it
    options  of httpx.Client, such as verify=... or trust_env=False. With follow_redirects=True, httpx itself reads the
             redirecting answers, without that limit

    Methods raise a subclass of `ServiceError`, with `status`, `kind` and `field` of the problem.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        retries: int = 4,
        timeout: float | None = READ_SECONDS,
        answer_bytes: int = ANSWER_BYTES,
        **options: Any,
    ) -> None:
        self._http = httpx.Client(**_options(url, token, timeout, options))
        self._retries = _Retries.of(retries, timeout)
        self._answer_bytes = answer_bytes

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the client's connections."""
        self._http.close()

    def generate(
        self,
        prompt: str,
        concepts: Concepts = (),
        *,
        progress: ProgressCallback | None = None,
        **settings: Any,
    ) -> Made:
        """Make pictures, as `Session.generate` does.

        concepts  what `put_concept` returned (or its `use`, or its id), or a `Concept`, whose images are sent along
        progress  called after every step; return False to cancel. It starts over when the request is sent again
        settings  those of `Options`; also `deadline` in seconds, and `alone=True` to keep the request out of batches

        Raises:
            Cancelled: `progress` returned False.
        """
        check_progress(progress)
        order = order_of(prompt, listed(concepts), settings)
        if progress is None:
            return read(self._send("POST", "/v1/images", **_sent(order)), made_of)
        try:
            return self._repeat("POST", lambda: self._streamed({**order, "stream": True}, progress))
        except _CallbackError as carried:
            raised = carried.raised
        raise raised  # not from within the handler, which would become its context

    def put_concept(
        self, concept: Concept, *, steps: int | None = None, reference_seed: int = 0, storage: str = "exact"
    ) -> KeptId:
        """Have the service prepare a concept and keep it. The same content has the same id, and is prepared once.

        steps  the number of steps of the pictures that it will serve; None for the service's default
        """
        texts, files = form_of(concept, steps, reference_seed, storage)
        answer = self._send("PUT", "/v1/concepts", data=texts, files=files)
        return read(answer, lambda info: KeptId.of(info, answer.status == 201).put_as(concept))

    def concepts(self) -> list[KeptId]:
        """Return all kept concepts, oldest first."""
        return read(self._send("GET", "/v1/concepts"), _listed)

    def concept(self, id: str) -> KeptId:
        """Return the kept concept with this id."""
        return read(self._send("GET", _path_of(id)), KeptId.of)

    def erase(self, concept: KeptId | str) -> dict[str, Any]:
        """Erase a concept; returns once the service has checked that nothing of it is left."""
        id = concept if isinstance(concept, str) else concept.id
        return read(self._send("DELETE", _path_of(id)), dict)

    def bundle(self) -> dict[str, Any]:
        """Return the bundle that is served, and the service's limits."""
        return read(self._send("GET", "/v1/bundle"), dict)

    def ready(self) -> bool:
        """Return whether the service is up and warm."""
        try:
            with _reached(self._http), self._http.stream("GET", "/readyz") as response:
                return response.is_success
        except UnreachableError:
            return False

    def _send(self, method: str, path: str, **arguments: Any) -> Answer:
        def send() -> Answer:
            with _reached(self._http), self._http.stream(method, path, **arguments) as response:
                answer = self._read(response)
            if not answer.response.is_success:
                raise _error_of(answer)
            return answer

        return self._repeat(method, send)

    def _repeat(self, method: str, send: Callable[[], T]) -> T:
        """Return what `send` returns. It is called again, after a wait, where that may help."""
        attempt = 0
        while True:
            try:
                return send()
            except ServiceError as error:
                wait = self._retries.wait(method, error, attempt)
                if wait is None:
                    raise
            time.sleep(wait)
            attempt += 1

    def _streamed(self, order: dict[str, Any], progress: ProgressCallback) -> Made:
        events, lines = EventParser(), Lines()
        with _reached(self._http), self._http.stream("POST", "/v1/images", **_sent(order)) as response:
            if not response.is_success:
                raise _error_of(self._read(response))
            _check_events(response)
            body = Body(response, self._answer_bytes)
            for raw in response.iter_raw():
                _hear(response, body.unpacked(raw), lines, events, progress)
            body.end()
        with _understood(response):
            return events.made()

    def _read(self, response: httpx.Response) -> Answer:
        body, content = Body(response, self._answer_bytes), bytearray()
        for raw in response.iter_raw():
            for piece in body.unpacked(raw):
                content += piece
        body.end()
        return Answer(response, content)


class AsyncClient:
    """The same as `Client`, for asyncio. Cancelling the task closes the connection, which ends the request at its next
    step.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        retries: int = 4,
        timeout: float | None = READ_SECONDS,
        answer_bytes: int = ANSWER_BYTES,
        **options: Any,
    ) -> None:
        self._http = httpx.AsyncClient(**_options(url, token, timeout, options))
        self._retries = _Retries.of(retries, timeout)
        self._answer_bytes = answer_bytes

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the client's connections."""
        await self._http.aclose()

    async def generate(
        self,
        prompt: str,
        concepts: Concepts = (),
        *,
        progress: ProgressCallback | None = None,
        **settings: Any,
    ) -> Made:
        """The same as `Client.generate`."""
        check_progress(progress)
        order = await asyncio.to_thread(order_of, prompt, listed(concepts), settings)
        if progress is None:
            return read(await self._send("POST", "/v1/images", **_sent(order)), made_of)
        try:
            return await self._repeat("POST", lambda: self._streamed({**order, "stream": True}, progress))
        except _CallbackError as carried:
            raised = carried.raised
        raise raised  # not from within the handler, which would become its context

    async def put_concept(
        self, concept: Concept, *, steps: int | None = None, reference_seed: int = 0, storage: str = "exact"
    ) -> KeptId:
        """The same as `Client.put_concept`."""
        texts, files = await asyncio.to_thread(form_of, concept, steps, reference_seed, storage)
        answer = await self._send("PUT", "/v1/concepts", data=texts, files=files)
        return read(answer, lambda info: KeptId.of(info, answer.status == 201).put_as(concept))

    async def concepts(self) -> list[KeptId]:
        """Return all kept concepts, oldest first."""
        return read(await self._send("GET", "/v1/concepts"), _listed)

    async def concept(self, id: str) -> KeptId:
        """Return the kept concept with this id."""
        return read(await self._send("GET", _path_of(id)), KeptId.of)

    async def erase(self, concept: KeptId | str) -> dict[str, Any]:
        """The same as `Client.erase`."""
        id = concept if isinstance(concept, str) else concept.id
        return read(await self._send("DELETE", _path_of(id)), dict)

    async def bundle(self) -> dict[str, Any]:
        """Return the bundle that is served, and the service's limits."""
        return read(await self._send("GET", "/v1/bundle"), dict)

    async def ready(self) -> bool:
        """Return whether the service is up and warm."""
        try:
            with _reached(self._http):
                async with self._http.stream("GET", "/readyz") as response:
                    return response.is_success
        except UnreachableError:
            return False

    async def _send(self, method: str, path: str, **arguments: Any) -> Answer:
        async def send() -> Answer:
            with _reached(self._http):
                async with self._http.stream(method, path, **arguments) as response:
                    answer = await self._read(response)
            if not answer.response.is_success:
                raise _error_of(answer)
            return answer

        return await self._repeat(method, send)

    async def _repeat(self, method: str, send: Callable[[], Awaitable[T]]) -> T:
        """The same as `Client._repeat`."""
        attempt = 0
        while True:
            try:
                return await send()
            except ServiceError as error:
                wait = self._retries.wait(method, error, attempt)
                if wait is None:
                    raise
            await asyncio.sleep(wait)
            attempt += 1

    async def _streamed(self, order: dict[str, Any], progress: ProgressCallback) -> Made:
        events, lines = EventParser(), Lines()
        with _reached(self._http):
            async with self._http.stream("POST", "/v1/images", **_sent(order)) as response:
                if not response.is_success:
                    raise _error_of(await self._read(response))
                _check_events(response)
                body = Body(response, self._answer_bytes)
                async for raw in response.aiter_raw():
                    _hear(response, body.unpacked(raw), lines, events, progress)
                body.end()
        with _understood(response):
            return events.made()

    async def _read(self, response: httpx.Response) -> Answer:
        body, content = Body(response, self._answer_bytes), bytearray()
        async for raw in response.aiter_raw():
            for piece in body.unpacked(raw):
                content += piece
        body.end()
        return Answer(response, content)


def read(answer: Answer, of: Callable[[Any], T]) -> T:
    """Parse the body of a successful answer with `of`.

    Raises:
        AnswerError: the body is nothing that the service sends; something on the way has answered in its place.
    """
    with _understood(answer.response):
        return of(read_json(answer.content))


def _sent(order: Mapping[str, Any]) -> dict[str, Any]:
    """Return httpx's arguments for an order, already encoded: httpx would raise errors of its own on some values."""
    return {"content": body_of(order), "headers": {"Content-Type": "application/json"}}


def _check_events(response: httpx.Response) -> None:
    """Raise AnswerError if a successful answer is no event stream but something else, such as a page."""
    kind = response.headers.get("content-type", EVENTS).partition(";")[0].strip().lower()
    with _understood(response):
        if kind != EVENTS:
            raise ValueError(kind)


def _hear(
    response: httpx.Response, pieces: Iterable[bytes], lines: Lines, events: EventParser, progress: ProgressCallback
) -> None:
    """Report to `progress` the steps whose events end in these pieces. Raises Cancelled when it declines."""
    for piece in pieces:
        for line in lines.of(piece):
            with _understood(response):
                step = events.line(line)
            if step is not None and declined(_answer(progress, step)):
                raise Cancelled(f"cancelled by the progress callback after step {step.step} of {step.steps}.")


class _CallbackError(Exception):
    """Carries what a progress callback raised past every handler that would take it for a fault of the service."""

    def __init__(self, raised: Exception) -> None:
        super().__init__(raised)
        self.raised = raised


def _answer(progress: ProgressCallback, step: Progress) -> object:
    try:
        return progress(step)
    except Exception as error:
        raise _CallbackError(error) from error


@contextlib.contextmanager
def _understood(answer: httpx.Response) -> Iterator[None]:
    try:
        yield
    except MagicFaceError:
        raise
    except UNREADABLE as error:
        raise AnswerError(
            f"{answer.request.method} {answer.url} was answered with {answer.status_code}, and with "
            f"{answer.headers.get('content-type', 'content of no type')[:100]} that the service does not send. Look at "
            "what is between, such as a proxy or a sign-in page.",
            status=answer.status_code,
            kind="no-answer",
        ) from error


def _listed(content: Mapping[str, Any]) -> list[KeptId]:
    return [KeptId.of(one) for one in content["concepts"]]
