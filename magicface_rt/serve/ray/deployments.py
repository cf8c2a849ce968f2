"""The deployments on Ray Serve: a front, which speaks HTTP, and the replicas, which make the pictures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import warnings
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import ray as _ray
from fastapi import FastAPI
from ray import serve as _serve
from ray.exceptions import ActorDiedError, RayError

from ...bundle import Bundle
from ...errors import BackendError, MagicFaceError
from ...session import Session, tokenizer_of
from ...soft_warnings import MagicFaceWarning
from ...ui import module as ui_module
from ..app import build_app
from ..auth import Tokens
from ..engine import Engine
from ..schemas import BundleInfo, PictureOrder
from ..server import warm_up
from ..service import ConceptUpload
from .counting import FrontMetrics
from .front import RayService
from .messages import ReplicaErasure
from .plan import RayPlan
from .replica import Counts, ErasureParts, ReplicaService, said
from .roster import PING_SECONDS, Roster
from .shared import SharedConcepts

__all__ = ["RosterLink", "build"]

logger = logging.getLogger("magicface_rt.serve")

ray: Any = _ray  # Ray's type hints do not cover all of its own options
serve: Any = _serve

NAMESPACE = "magicface_rt"

MOST_HELD = 1000
"""The most concepts that Ray knows a replica to have. They are maps of files: address space, but no memory of their
own.
"""

MOST_HTTP = 10_000
"""The most HTTP requests that the front has at the same time; those for pictures are bounded by the queue."""

SPARE_SECONDS = 30.0
"""Seconds, beyond a request's limit, that a replica has after it was told to end, so that it can finish whatever it was
given.
"""


def build(plan: RayPlan) -> Any:
    """Build the application of a plan, for `serve.run`, or for a builder to return."""
    patience = plan.settings.deadline + SPARE_SECONDS
    least, most = plan.range
    number: dict[str, Any] = {"num_replicas": least}
    if most > least:
        number = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "initial_replicas": least,
                "target_ongoing_requests": plan.at_once,  # half of what fits, so that Ray sees when the queue fills
                "upscale_delay_s": 10.0,
                "downscale_delay_s": 300.0,
            }
        }
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    pictures: Any = serve.deployment(
        Pictures,
        name="pictures",
        ray_actor_options={"num_cpus": plan.cpus, "num_gpus": plan.gpus},
        max_ongoing_requests=2 * plan.at_once,
        max_constructor_retry_count=3,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=patience,
        health_check_period_s=5.0,
        logging_config=quiet,
        **number,
    )
    front: Any = serve.deployment(
        serve.ingress()(Front),
        name="front",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MOST_HTTP,
        max_constructor_retry_count=3,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=patience,
        max_surge_percent=100,  # so that the next one is there before this one ends
        logging_config=quiet,
    )
    # A replica has no use for the tokens.
    return front.bind(pictures.bind(replace(plan, tokens=None, token_file=None)), plan)


async def _gone(handle: Any) -> bool:
    try:
        await asyncio.wait_for(handle.__ray_ready__.remote(), PING_SECONDS)
    except ActorDiedError:
        return True
    except (asyncio.TimeoutError, RayError):
        return False
    return False


class _Roster(Roster):
    def __init__(self) -> None:
        super().__init__(_gone)


_RosterActor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=10_000)(_Roster)
"""Detached, so that it belongs to no replica: any of them may end."""


class RosterLink:
    """Finds the roster of an application."""

    def __init__(self, application: str) -> None:
        self._name = f"roster-of-{application}"
        self._handle: Any = None

    @property
    def actor(self) -> Any:
        """The roster's actor, which is created if there is none."""
        if self._handle is None:
            self._handle = _RosterActor.options(
                name=self._name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached"
            ).remote()
        return self._handle

    def lost(self) -> None:
        """Forget the actor, which does not answer, so that it is looked for again next time."""
        self._handle = None


class Pictures:
    """A replica: one Session, its engine, and its map of the shared folder."""

    async def __init__(self, plan: RayPlan) -> None:  # type: ignore[misc]  # Ray awaits it
        # Warnings go into answers. They quote the names that clients give their concepts, so only kinds are logged.
        warnings.simplefilter("ignore", MagicFaceWarning)
        context = serve.get_replica_context()
        self._plan = plan
        self._roster = RosterLink(context.app_name)
        self._name = context.replica_id.unique_id
        self._session: Session | None = None
        self._service: ReplicaService | None = None
        self._parts = ErasureParts(self._erase, self._erased)
        self._seen = 0
        settings = plan.settings
        self._store = SharedConcepts(plan.concepts, most=settings.concepts, most_bytes=settings.concept_bytes)
        self._handle = ray.get_runtime_context().current_actor
        await self._roster.actor.register.remote(self._name, self._handle)
        self._watching = asyncio.ensure_future(self._watch())
        try:
            await self._open()
        except BaseException as error:
            known = isinstance(error, MagicFaceError)
            shown = error if known else BackendError(f"a replica could not start: {type(error).__name__}: {error}.")
            with contextlib.suppress(RayError):
                await self._roster.actor.failed.remote(shown)
            await self.__del__()
            raise

    async def _open(self) -> None:
        plan = self._plan
        options = {**plan.session, "workers": plan.workers, "threads": plan.threads}
        self._session = await asyncio.to_thread(plan.opener, plan.bundle, **options)
        settings = replace(plan.settings, queue=max(plan.settings.queue, 2 * plan.at_once))
        self._counts = Counts(self._name, self._session)
        engine = Engine(
            [self._session],
            settings,
            workers=plan.workers,
            warm=lambda session: warm_up(session, settings),
            observer=self._counts,
        )
        self._service = ReplicaService(engine, self._store, observer=self._counts)
        self._service.set_erasing(self._store.erasing)
        await self._service.start()
        while (reason := self._service.not_ready()) is not None:
            if (failure := self._service.failure()) is not None:
                raise failure
            logger.debug("%s", reason)
            await asyncio.sleep(0.02)
        self._info: BundleInfo = await self._service.bundle()
        await self._roster.actor.ready.remote(self._name, self._info)

    # ---------------------------------------------------------------------------------------------- called by the front

    async def generate(self, order: PictureOrder, owner: str) -> AsyncIterator[Any]:
        """Yield what happens to the request, and finally `Ended`."""
        service = self._ready()
        for use in order.concepts:
            if use.id is not None and await asyncio.to_thread(self._store.has, use.id):
                await self._mark_loaded(use.id)

        async with contextlib.aclosing(
            said(lambda listener: service.generate(order, owner=owner, listener=listener), self._counts)
        ) as all_said:
            async for one in all_said:
                yield one

    async def put_concept(self, upload: ConceptUpload, owner: str) -> AsyncIterator[Any]:
        """Yield `Ended`, with what `Service.put_concept` returns."""
        service = self._ready()
        async with contextlib.aclosing(
            said(lambda _: service.put_concept(upload, owner=owner), self._counts)
        ) as all_said:
            async for one in all_said:
                if one.result is not None:
                    await self._mark_loaded(one.result[0].id)
                yield one

    async def check_health(self) -> None:
        """Raise if this replica can no longer make pictures; Ray then replaces it."""
        failure = None if self._service is None else self._service.failure()
        if failure is not None:
            raise failure

    async def __del__(self) -> None:
        """Close everything. Ray calls this when the replica ends and no request is left."""
        self._watching.cancel()
        if self._service is not None:
            await self._service.close()
        if self._session is not None:
            await asyncio.to_thread(self._session.close)
        with contextlib.suppress(RayError):
            await self._roster.actor.leave.remote(self._name)

    # ----------------------------------------------------------------------------------------------------------- inside

    def _ready(self) -> ReplicaService:
        assert self._service is not None, "Ray sends no requests before the constructor is through"
        return self._service

    @serve.multiplexed(max_num_models_per_replica=MOST_HELD)  # type: ignore[untyped-decorator]
    async def _mark_loaded(self, id: str) -> _LoadedConcept:
        """Let Ray know that this replica has the concept, so it sends requests for the concept here from now on."""
        return _LoadedConcept(self._store, id)

    async def _watch(self) -> None:
        """Follow the roster for as long as the replica lives, and do what it says."""
        while True:
            try:
                view = await self._roster.actor.watch.remote(self._name, self._seen)
                if not view.known:  # the roster was lost, and there is a new one
                    await self._roster.actor.register.remote(self._name, self._handle)
                    if self._service is not None and self._service.not_ready() is None:
                        await self._roster.actor.ready.remote(self._name, self._info)
                    self._seen = 0
                    continue
            except (RayError, ValueError) as error:
                logger.warning("the roster does not answer: %s", type(error).__name__)
                self._roster.lost()
                await asyncio.sleep(0.5)
                continue
            self._seen = view.version
            self._store.set_erasing(view.erasing)
            if self._service is not None:
                self._service.set_erasing(view.erasing)
            self._parts.begin(view.parts)

    async def _erase(self, id: str) -> ReplicaErasure:
        """Do this replica's part of an erasure. A replica that is still starting has nothing in memory."""
        if self._service is None:
            return ReplicaErasure()
        try:
            return await self._service.erase_here(id)
        except Exception as error:
            logger.exception("an erasure failed")
            return ReplicaErasure(True, 0, f"{type(error).__name__}")

    async def _erased(self, id: str, key: str, part: ReplicaErasure) -> None:
        with contextlib.suppress(RayError):
            await self._roster.actor.done.remote(self._name, id, key, part)


class _LoadedConcept:
    """What Ray takes for a loaded model: it stands for the map of a concept's file, and holds no keys itself."""

    def __init__(self, store: SharedConcepts, id: str) -> None:
        self._store, self._id = store, id

    def __del__(self) -> None:
        self._store.unmap(self._id)


class Front:
    """The HTTP application, with the page if it is wanted, in a process that computes nothing."""

    def __init__(self, pictures: Any, plan: RayPlan) -> None:
        warnings.simplefilter("ignore", MagicFaceWarning)
        self._plan = plan
        self._pictures = pictures
        self._roster = RosterLink(serve.get_replica_context().app_name)
        self._tokens = Tokens.read(plan.token_file) if plan.tokens is None else plan.tokens
        self._page: Any = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        plan, metrics = self._plan, FrontMetrics()
        limits = {"most": plan.settings.concepts, "most_bytes": plan.settings.concept_bytes}
        self._service = RayService(
            self._pictures,
            self._roster,
            settings=plan.settings,
            workers=plan.workers,
            store=SharedConcepts(plan.concepts, **limits),
            metrics=metrics,
        )
        hosts = None if self._tokens else plan.hosts
        app = build_app(self._service, settings=plan.settings, tokens=self._tokens, metrics=metrics, hosts=hosts)
        if plan.page:
            bundle = Bundle.open(plan.bundle, check_hashes=False)  # the front reads only its tokenizer
            facts = ui_module("facts").Facts.of(
                bundle, plan.settings, backend="Ray Serve", protected=bool(self._tokens)
            )
            self._page = ui_module("mounting").mount_page(app, self._service, tokenizer_of(bundle), facts)
            self._service.at_replaced = self._page.end
        return app

    async def drain(self, seconds: float) -> int:
        """Does what `Service.drain` does; called before the application is ended."""
        cut_off = await self._service.drain(seconds)
        if self._page is not None:
            self._page.end()
        return cut_off
