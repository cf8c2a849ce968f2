"""Ray on this machine, for as long as the service runs: started, watched, updated and ended."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...backends import FLAVOURS, why_not
from ...bundle import Bundle
from ...errors import BackendError, DeviceError, MagicFaceError, OptionError
from ...shown import one_line
from .. import module
from ..auth import ENVIRONMENT as TOKENS_VARIABLE
from ..auth import Tokens
from ..gate import PAGE, names_of
from ..server import listen
from .plan import RayPlan, wants_gpu
from .signals import Signals

__all__ = ["Running", "serve", "shared_memory_folder", "started", "system_config"]

if importlib.util.find_spec("ray") is None:  # not imported yet: Ray reads its environment when it is
    raise ModuleNotFoundError("No module named 'ray'", name="ray")

logger = logging.getLogger("magicface_rt.serve")

APPLICATION = "magicface"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as later versions of Ray do, and this one warns
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name: 0 has Ray use the loopback address everywhere
}
"""What Ray's processes are started with, unless the environment says otherwise already."""

OBJECT_STORE_BYTES = 128 * 2**20
START_SECONDS = 900.0


def system_config(body_bytes: int) -> dict[str, Any]:
    """Settings of a Ray cluster with which no request is written to a disk.

    Ray puts what is larger than 100 KB into shared memory, and when that is full, into files. Here whatever one
    request may have goes from process to process in the call itself, and no file takes the place of memory.
    """
    most = 2 * body_bytes + 2**24
    return {
        "max_direct_call_object_size": most,
        "task_rpc_inlined_bytes_limit": most,
        "automatic_object_spilling_enabled": False,
    }


MOST_SAID = 500
"""Characters of an error of Ray's, which may be pages."""


def serve(
    plan: RayPlan,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    told: Callable[[str], object] = logger.info,
) -> int:
    """Serve until SIGTERM, SIGINT or Ctrl-C, and then until the requests that are being done have their answers, or
    `settings.drain` seconds have passed. Returns how many were cut off. SIGHUP replaces the replicas, one after the
    other, by ones with what is in the bundle's folder then.

    port  0 for any that is free
    told  what is going on, line by line

    Raises:
        OptionError: the port is in use, or the address is none of this machine's.
        BundleError: the folder is no intact bundle.
        DeviceError: there are fewer GPUs than replicas.
        MagicFaceError: a replica could not start.
    """
    with contextlib.closing(listen(host, port)) as where:
        address = where.getsockname()
    _checked(plan)
    plan = replace(plan, hosts=names_of(str(address[0])))
    signals = Signals(told)
    with signals.caught(), started(plan, told=told) as plan, signals.caught():  # Ray catches some when it starts
        running = Running(plan, str(address[0]), int(address[1]), signals=signals)
        running.start()
        if signals.stops:
            return 0
        told(f"listening on {running.url}")
        if plan.page:
            told(f"the page is at {running.url}{PAGE}/")
        told("ready")
        updates = 0
        while not signals.stops:
            if signals.updates > updates:
                updates = signals.updates
                _update(running, told)
            signals.wait(1.0)
        return running.end()


def shared_memory_folder() -> Path:
    """A new folder that only its owner can read, in shared memory where there is such a place."""
    place = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="magicface-concepts-", dir=place if os.access(place, os.W_OK) else None))


@contextlib.contextmanager
def started(plan: RayPlan, *, told: Callable[[str], object] = logger.info) -> Iterator[RayPlan]:
    """A Ray cluster of this machine for the block, reachable from this machine only and by whoever has its token.

    It is a new one at every start. Whatever other Ray runs here, or is named by RAY_ADDRESS, is neither used nor ended.

    Gives the plan back, with GPUs for its replicas where the backend takes what is there. Ray's files, its logs among
    them, are in a folder of their own, which goes when the block ends. `told` is told its name: the command lines of
    Ray's daemons have it, and so they are found where this process was killed and could not end them.

    Raises:
        OptionError: this process is connected to a Ray already.
        DeviceError: there are fewer GPUs than replicas.
    """
    plan = replace(plan, tokens=Tokens.read(plan.token_file) if plan.tokens is None else plan.tokens)
    ray: Any = sys.modules.get("ray")  # imported not before its environment is there
    if ray is not None and ray.is_initialized():
        raise OptionError(
            "this process is connected to a Ray already, and the service starts one of its own. Serve in another "
            "process, or deploy on that Ray: ray.serve.run(magicface_rt.serve.ray.application({...}))."
        )
    with _environment():
        yield from _started(plan, told)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What Ray's processes shall find in theirs, for the block: a token of Ray's own, and none of the service's."""
    before = dict(os.environ)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _set_token()
    os.environ.pop(TOKENS_VARIABLE, None)
    _read_token_anew()
    try:
        yield
    finally:
        for name in {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", TOKENS_VARIABLE}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
        _read_token_anew()


def _started(plan: RayPlan, told: Callable[[str], object]) -> Iterator[RayPlan]:
    ray: Any = importlib.import_module("ray")
    folder = tempfile.mkdtemp(prefix="magicface-ray-", dir="/tmp")  # sockets are in it, whose paths must be short
    processors = max(os.cpu_count() or 1, round(plan.range[1] * plan.cpus + 0.5))
    try:
        with _no_other_cluster(told):
            told(f"starting Ray in {folder}")
            ray.init(
                address="local",
                num_cpus=processors,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                log_to_driver=True,
                _temp_dir=folder,
                _system_config=system_config(plan.settings.body_bytes),
            )
            yield _with_gpus(plan, int(ray.cluster_resources().get("GPU", 0)))
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _with_gpus(plan: RayPlan, gpus: int) -> RayPlan:
    """The plan with GPUs for its replicas, where its backend takes what is there.

    Raises:
        DeviceError: there are fewer GPUs than replicas.
    """
    works = gpus > 0 and any(not why_not(name) for name in ("onnxruntime-cuda", *FLAVOURS))
    if wants_gpu(str(plan.session.get("backend", "auto")), works):
        plan = replace(plan, gpus=1.0, replicas=plan.replicas or (max(1, gpus),) * 2)
    if plan.gpus * plan.range[1] > gpus:
        raise DeviceError(
            f"{plan.range[1]} replicas need {plan.gpus * plan.range[1]:g} GPUs, and this machine has {gpus}. "
            "Give fewer --replicas, or --backend onnxruntime-cpu."
        )
    return plan


@contextlib.contextmanager
def _no_other_cluster(told: Callable[[str], object]) -> Iterator[None]:
    """For the block, no address of another Ray in the environment, which the processes started here would have."""
    address = os.environ.pop("RAY_ADDRESS", None)
    if address:
        told(
            f"RAY_ADDRESS is {address} and is not used: this service has a Ray of its own. To serve on that one, "
            "`serve deploy` a config file there, see docs/serving-ray.md"
        )
    try:
        yield
    finally:
        if address is not None:
            os.environ["RAY_ADDRESS"] = address


def _set_token() -> None:
    """Let Ray's processes ask each other for a token: whoever reaches their ports could run anything, else.

    Ray asks for one unless RAY_AUTH_MODE says otherwise. It would make it by itself, and leave it in a file in the home
    folder; this one is in the environment of its processes only.
    """
    wanted = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    if wanted and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _read_token_anew() -> None:
    """Let Ray forget the token that it has read: it keeps the first one for as long as the process lives, and what this
    process starts next has another.

    That needs a part of Ray that Ray does not document. A Ray without it starts once in a process, as ever.
    """
    with contextlib.suppress(ImportError, AttributeError):
        part: Any = importlib.import_module("ray._raylet")
        part.Config.initialize("")  # whether a token is asked for; first, as a thread of Ray's may read one at once
        part.AuthenticationTokenLoader.instance().reset_cache()


class Running:
    """An application on the Ray that this process has started.

    signals  whatever waits ends when one of them says stop
    """

    def __init__(self, plan: RayPlan, host: str, port: int, *, signals: Signals | None = None) -> None:
        self._plan, self._host, self._port = plan, host, port
        self._signals = signals or Signals()
        self._handle: Any = None

    @property
    def plan(self) -> RayPlan:
        return self._plan

    @property
    def url(self) -> str:
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    def start(self) -> None:
        """Returns when all replicas are warm, or a signal says stop.

        Raises:
            MagicFaceError: why a replica could not start.
        """
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": self._host, "port": self._port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        self._deploy()

    def update(self, plan: RayPlan) -> None:
        """Replace the replicas, one after the other, by those of another plan. Where these cannot start, the old ones
        that are left go on.

        Raises:
            MagicFaceError: why a replica could not start.
        """
        self._plan = replace(plan, revision=f"{plan.revision} {time.time_ns()}")
        self._deploy()

    def end(self) -> int:
        """Finish what is being done, within `settings.drain` seconds or until a second signal. Returns how many
        requests were cut off.
        """
        from ray import serve

        gone: tuple[type[Exception], ...] = (TimeoutError, *_of_ray())
        try:
            cut_off = self._drained()
        except gone:  # the front, or it does not answer, and what it had goes with it
            cut_off = 0
        with contextlib.suppress(*gone):
            serve.delete(APPLICATION)  # when the last answers are out
        return cut_off

    def _drained(self) -> int:
        answer = self._handle.drain.remote(self._plan.settings.drain)
        while True:
            self._signals.wait(0)
            try:
                return int(answer.result(timeout_s=0.2))
            except TimeoutError:
                if self._signals.stops > 1:
                    return int(self._handle.drain.remote(0.0).result(timeout_s=10))

    def _deploy(self) -> None:
        from ray.serve import RunTarget, run_many  # `serve.run` would wait where no signal ends it

        application = module("ray.deployments").build(self._plan)
        target = RunTarget(application, name=APPLICATION, route_prefix="/")
        (self._handle,) = run_many(
            [target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False
        )
        self._wait()

    def _wait(self) -> None:
        from ray import serve

        end = time.monotonic() + START_SECONDS
        while not self._signals.stops:
            application = serve.status().applications.get(APPLICATION)
            status = "unknown" if application is None else application.status.value
            if status == "RUNNING":
                return
            if status in ("DEPLOY_FAILED", "UNHEALTHY") or time.monotonic() > end:
                raise self._failure() or BackendError(f"the replicas did not start: Ray Serve says {status}.")
            self._signals.wait(0.2)

    def _failure(self) -> Exception | None:
        import ray

        roster = module("ray.deployments").RosterLink(APPLICATION).actor
        found: Exception | None = ray.get(roster.failure.remote(), timeout=10)
        return found


def _checked(plan: RayPlan) -> Bundle:
    """The bundle, looked at before Ray is; a replica opens its own."""
    return Bundle.open(plan.bundle, check_hashes=bool(plan.session.get("check_hashes", True)))


def _update(running: Running, told: Callable[[str], object]) -> None:
    try:
        bundle = _checked(running.plan)
        told(f"updating to bundle {bundle.hash[:16]}")
        running.update(running.plan)
        told("updated")
    except Exception as error:
        if not isinstance(error, (MagicFaceError, *_of_ray())):
            raise
        told(f"not updated, the service goes on with what it has: {one_line(str(error))[:MOST_SAID]}")


def _of_ray() -> tuple[type[Exception], ...]:
    """What Ray raises where something of it fails."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return (RayError, RayServeException)
