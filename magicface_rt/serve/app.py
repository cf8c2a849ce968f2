"""The server's HTTP application over a `Service`: routes, and nothing that computes."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .. import __version__
from ..errors import Cancelled, MagicFaceError, ServiceError
from ..request import Progress
from ..values.shown import shown
from . import events
from .access import OPEN, AccessMiddleware
from .auth import Tokens
from .bodies import BodyLimitMiddleware, take_body
from .error_middleware import ErrorMiddleware
from .metrics import CONTENT_TYPE_LATEST, Metrics
from .multipart import read_form
from .openapi import FORM_BODY, ORDER_BODY, describe, documented
from .problems import Problem, refusal
from .reading import FORM_PARTS, NoOrderError, read_order, upload_of, wants_png
from .schemas import (
    BundleInfo,
    ConceptInfo,
    ConceptList,
    ConceptPut,
    Erasure,
    PictureOrder,
    Pictures,
    Status,
)
from .service import Accepted, Outcome, Service
from .settings import ServeSettings

__all__ = ["build_app"]

logger = logging.getLogger("magicface_rt.serve")

T = TypeVar("T")

WARNINGS = "Magicface-Warnings"
"""The header that lists the kinds of warnings when the answer is a picture."""

DESCRIPTION = """\
Pictures of people and things from a prompt and masked reference images, without training.

Put a concept once (`PUT /v1/concepts`), then make pictures with it (`POST /v1/images`). Whatever is refused is answered
with problem details (RFC 9457) that name the field at fault.
"""


def build_app(
    service: Service,
    *,
    settings: ServeSettings | None = None,
    tokens: Tokens | None = None,
    metrics: Metrics | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """Build the application. It starts the service on startup and closes it on shutdown. Once its `state.ending`, an
    asyncio.Event, is set, requests whose bodies have not fully arrived are refused.

    settings  the service's own; the limits on bodies are taken from them
    tokens    who may use the service; everybody, unless given
    metrics   what /metrics shows; pass the object that the service reports to
    hosts     names that clients may call the machine by, such as `access.LOOPBACK_NAMES` where it can be reached from
              this machine only and has no tokens; any name, unless given
    """
    limits = settings or ServeSettings()
    measured = metrics or Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="magicface_rt",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its pages would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.ending = asyncio.Event()
    app.add_middleware(
        BodyLimitMiddleware,
        settings=limits,
        on_problem=measured.problem,
        ending=app.state.ending,
        bodiless=OPEN,
    )
    app.add_middleware(ErrorMiddleware, problem_of=partial(_counted, metrics=measured))
    app.add_middleware(AccessMiddleware, tokens=tokens or Tokens(), metrics=measured, hosts=hosts)
    _add_handlers(app, measured)
    _add_concepts(app, service)
    _add_images(app, service, measured)
    _add_state(app, service, measured)
    describe(app, protected=bool(tokens))
    return app


def _add_handlers(app: FastAPI, metrics: Metrics) -> None:
    def answer(problem: Problem) -> Response:
        metrics.problem(problem.kind)
        return Response(problem.body, problem.status, problem.headers)

    async def failed(request: Request, error: Exception) -> Response:
        problem = _counted(error, metrics)
        return Response(problem.body, problem.status, problem.headers)

    async def no_order(request: Request, error: Exception) -> Response:
        assert isinstance(error, NoOrderError)
        return answer(error.problem)

    async def not_routed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, lists = shown(request.url.path), "/openapi.json lists what there is."
        kind, detail = {
            404: ("no-such-path", f"there is nothing at {path}; {lists}"),
            405: ("method-not-allowed", f"{request.method} is not offered at {path}; {lists}"),
        }.get(error.status_code, ("bad-request", str(error.detail)))
        answered = answer(Problem(error.status_code, kind, detail))
        for name, value in (error.headers or {}).items():
            answered.headers[name] = value
        return answered

    app.add_exception_handler(MagicFaceError, failed)
    app.add_exception_handler(MemoryError, failed)
    app.add_exception_handler(NoOrderError, no_order)
    app.add_exception_handler(HTTPException, not_routed)
    app.add_exception_handler(Exception, failed)


def _add_concepts(app: FastAPI, service: Service) -> None:
    @app.put(
        "/v1/concepts",
        summary="Prepare a concept and keep it",
        responses=documented(
            {200: (ConceptPut, "It was kept already."), 201: (ConceptPut, "It is kept now.")},
            *(400, 410, 413, 415, 422, 429, 503, 504, 507),
        ),
        response_class=Response,
        status_code=201,
        openapi_extra={"requestBody": FORM_BODY},
    )
    async def put_concept(request: Request) -> Response:
        """The id names the content: the same images, masks, prompts, steps and settings have the same id, and are
        prepared once. The images are not kept, only keys and values made from them.
        """
        kind, body = request.headers.get("content-type"), await take_body(request.receive)
        form = await asyncio.to_thread(read_form, kind, body, FORM_PARTS)
        upload = upload_of(form)
        request.state.share.lasts_as_long_as(upload)
        put = service.put_concept(upload, owner=request.state.owner)
        del body, form, upload
        info, made = await _while_here(request, put)
        where = {"Location": f"/v1/concepts/{info.id}"}
        return _json(info, 201 if made else 200, where)

    @app.get(
        "/v1/concepts",
        summary="All kept concepts",
        responses=documented({200: (ConceptList, "The oldest first.")}, 503),
        response_class=Response,
    )
    async def list_concepts() -> Response:
        found = await service.concepts()
        return _json(ConceptList(concepts=found, bytes=sum(one.bytes for one in found)))

    @app.get(
        "/v1/concepts/{id}",
        summary="One kept concept",
        responses=documented({200: (ConceptInfo, "It is kept.")}, 404, 503),
        response_class=Response,
    )
    async def get_concept(id: str) -> Response:
        return _json(await service.concept(id))

    @app.delete(
        "/v1/concepts/{id}",
        summary="Erase a concept",
        responses=documented(
            {200: (Erasure, "It is gone: memory, disk and device were looked through.")},
            *(404, 409, 429, 500, 503, 504),
        ),
        response_class=Response,
    )
    async def erase_concept(id: str) -> Response:
        """Requests that use it are stopped. The answer comes when nothing of it is left, or says where something is."""
        return _json(await asyncio.shield(service.erase(id)))


def _add_images(app: FastAPI, service: Service, metrics: Metrics) -> None:
    def failed(error: BaseException) -> Problem:
        gone = isinstance(error, asyncio.CancelledError)
        return _counted(Cancelled("the client has gone.") if gone else error, metrics)

    @app.post(
        "/v1/images",
        summary="Make pictures",
        responses=documented(
            {200: (Pictures, "The pictures.")},
            *(400, 404, 406, 410, 413, 415, 422, 429, 500, 503, 504, 507),
            more={200: {"image/png": {"type": "string", "format": "binary"}, events.MEDIA_TYPE: events.SCHEMA}},
        ),
        response_class=Response,
        openapi_extra={"requestBody": ORDER_BODY},
    )
    async def make_images(request: Request) -> Response:
        """One picture as PNG or pictures as JSON, by `response` or the Accept header; or events, with `stream`.

        The request stops at its next step when its deadline passes or its client goes.
        """
        kind, body = request.headers.get("content-type"), await take_body(request.receive)
        order = await asyncio.to_thread(read_order, kind, body)  # a large one would block all other requests
        del body
        request.state.share.lasts_as_long_as(order)
        png = wants_png(order, request.headers.get("accept"))
        if order.stream:
            return await _stream(request, service, order, failed)
        work = service.generate(order, owner=request.state.owner)
        del order
        outcome = await _while_here(request, work)
        if not png:
            return Response(await asyncio.to_thread(_answer, outcome), media_type="application/json")
        spent = ", ".join(f"{stage};dur={1000 * outcome.timings[stage]:.1f}" for stage in ("queued", "total"))
        headers = {"Cache-Control": "no-store", "Server-Timing": spent}
        if outcome.warnings:
            headers[WARNINGS] = ", ".join(sorted({one.kind for one in outcome.warnings}))
        return Response(outcome.pngs[0], media_type="image/png", headers=headers)


def _add_state(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get(
        "/v1/bundle",
        summary="What is served, and its limits",
        responses=documented({200: (BundleInfo, "The bundle.")}),
        response_class=Response,
    )
    async def get_bundle() -> Response:
        return _json(await service.bundle())

    @app.get(
        "/healthz",
        summary="Whether the process lives",
        responses=documented({200: (Status, "It does.")}),
        response_class=Response,
    )
    async def get_health() -> Response:
        return _json(Status(status="ok"))

    @app.get(
        "/readyz",
        summary="Whether it should get requests",
        responses=documented({200: (Status, "It is warm.")}, 503),
        response_class=Response,
    )
    async def get_readiness() -> Response:
        reason = service.not_ready()
        if reason is not None:
            not_ready = refusal(503, "not-ready", reason)
            not_ready.retry_after = 1.0
            raise not_ready
        return _json(Status(status="ready"))

    @app.get(
        "/metrics",
        summary="For Prometheus",
        responses={
            **documented({}),
            200: {"description": "Text.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        },
        response_class=Response,
    )
    async def get_metrics() -> Response:
        return Response(await asyncio.to_thread(metrics.text), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _stream(
    request: Request, service: Service, order: PictureOrder, failed: Callable[[BaseException], Problem]
) -> Response:
    """Answer with events; a request that is refused before it has a place in the queue gets a problem instead."""
    news: asyncio.Queue[Accepted | Progress] = asyncio.Queue()
    begun = asyncio.Event()

    def listener(one: Accepted | Progress) -> None:
        news.put_nowait(one)
        begun.set()

    task = asyncio.ensure_future(service.generate(order, owner=request.state.owner, listener=listener))
    watch = asyncio.ensure_future(_gone(request))
    watch.add_done_callback(lambda _: task.cancel())
    task.add_done_callback(lambda _: watch.cancel())
    task.add_done_callback(lambda _: begun.set())
    try:
        await begun.wait()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if news.empty():
        _result(task)
    following = events.follow(task, news, _answer, failed)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(following, media_type=events.MEDIA_TYPE, headers=headers)


async def _while_here(request: Request, work: Awaitable[T]) -> T:
    """Return the result of some work; cancel the work if the client disconnects.

    Raises:
        Cancelled: the client has gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        return _result(task)
    finally:
        task.cancel()
        watch.cancel()


def _result(task: asyncio.Future[T]) -> T:
    if task.cancelled():
        raise Cancelled("the client has gone.")
    return task.result()


async def _gone(request: Request) -> None:
    """Return once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problem(error: BaseException) -> Problem:
    """Turn an error into its problem. Errors that the service is at fault for are logged; they quote nothing of a
    request.
    """
    problem = Problem.of(error)
    if not isinstance(error, MagicFaceError):
        logger.error("a request failed", exc_info=error)
    elif problem.status >= 500 and not isinstance(error, ServiceError):
        first: BaseException = error
        while isinstance(first.__cause__, MagicFaceError):  # the outer messages may quote a name that a client gave
            first = first.__cause__
        logger.error("%s: %s", type(first).__name__, first)
    return problem


def _counted(error: BaseException, metrics: Metrics) -> Problem:
    """Turn an error into its problem as `_problem` does, and count it in the metrics."""
    problem = _problem(error)
    metrics.problem(problem.kind)
    return problem


def _json(content: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(content.model_dump(mode="json"), ensure_ascii=True, allow_nan=False)
    return Response(text, status, {"Cache-Control": "no-store", **(headers or {})}, media_type="application/json")


def _answer(outcome: Outcome) -> bytes:
    """Encode an outcome as JSON: the body of an answer, or the data of the last event."""
    content: dict[str, Any] = {
        "pictures": [base64.b64encode(png).decode("ascii") for png in outcome.pngs],
        "regions": outcome.regions.tolist(),
        "region_names": list(outcome.names),
        "timings": outcome.timings,
        "batch": outcome.batch,
        "settings": outcome.settings,
        "warnings": [one.model_dump(mode="json") for one in outcome.warnings],
    }
    if outcome.regions_per_step is not None:
        content["regions_per_step"] = outcome.regions_per_step.tolist()
    return json.dumps(content, ensure_ascii=True, allow_nan=False).encode("ascii")
