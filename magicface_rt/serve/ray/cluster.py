"""Ray on this machine, for as long as the service runs: starts, watches, updates and ends it."""

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
from ...files import atomic_files
from ...values.shown import one_line
from .. import module
from ..access import PAGE, names_of
from ..auth import ENVIRONMENT as TOKENS_VARIABLE
from ..auth import Tokens
from ..server import listen
from .plan import RayPlan, wants_gpu
from .signals import Signals

__all__ = ["Running", "serve", "shared_memory_folder", "started", "system_config"]

if importlib.util.find_spec("ray") is None:  # do not import it yet: Ray reads its environment on import
    raise ModuleNotFoundError("No module named 'ray'", name="ray")

logger = logging.getLogger("magicface_rt.serve")

APPLICATION = "magicface"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send no usage statistics
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of later versions; without it this one warns
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: 0 makes Ray use the loopback address on every system
}
"""What Ray's processes have in their environment, unless it is set already."""

OBJECT_STORE_BYTES = 128 * 2**20
START_SECONDS = 900.0


def system_config(body_bytes: int) -> dict[str, Any]:
    """Return settings of a Ray cluster under which no request is written to a disk.

    By default Ray puts what is larger than 100 KB into shared memory and, when that is full, into files. With these
    settings whatever one request may have goes from process to process in the call itself, and files never take the
    place of memory.
    """
    most = 2 * body_bytes + 2**24
    return {
        "max_direct_call_object_size": most,
        "task_rpc_inlined_bytes_limit": most,
        "automatic_object_spilling_enabled": False,
    }


MOST_SAID = 500
"""The most characters of one of Ray's errors, which may be pages long, that are reported."""


def serve(
    plan: RayPlan,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    report: Callable[[str], object] = logger.info,
) -> int:
    """Serve until SIGTERM, SIGINT or Ctrl-C, and then until the running requests have their answers or `settings.drain`
    seconds have passed. Returns how many requests were cut off. SIGHUP replaces the replicas, one after the other, by
    new ones with what is then in the bundle's folder.

    port    0 for any free port
    report  called with what is going on, line by line

    Raises:
        OptionError: the port is in use, or the address does not belong to this machine.
        BundleError: the folder is no intact bundle.
        DeviceError: there are fewer GPUs than replicas.
        MagicFaceError: a replica could not start.
    """
    with contextlib.closing(listen(host, port)) as where:
        address = where.getsockname()
    _checked(plan)
    plan = replace(plan, hosts=names_of(str(address[0])))
    signals = Signals(report)
    # Caught twice: Ray catches some at its start.
    with signals.caught(), started(plan, report=report) as plan, signals.caught():
        running = Running(plan, str(address[0]), int(address[1]), signals=signals)
        running.start()
        signals.wait(0)
        if signals.stops:
            return 0
        report(f"listening on {running.url}")
        if plan.page:
            report(f"the page is at {running.url}{PAGE}/")
        report("ready")
        updates = 0
        while not signals.stops:
            if signals.updates > updates:
                updates = signals.updates
                _update(running, report)
            signals.wait(1.0)
        return running.end()


SHARED_MEMORY = Path("/dev/shm")


def shared_memory_folder() -> atomic_files.TemporarySibling:
    """Return a context that makes a folder that only its owner can read, in shared memory if the machine has that.

    It is removed when the context ends. What services of this user that were killed left is removed first: kept
    concepts are personal data, and shared memory would hold them until the machine restarts.
    """
    usable = os.access(SHARED_MEMORY, os.W_OK)
    return atomic_files.temporary_folder("magicface-concepts", SHARED_MEMORY if usable else None)


@contextlib.contextmanager
def started(plan: RayPlan, *, report: Callable[[str], object] = logger.info) -> Iterator[RayPlan]:
    """Run a Ray cluster on this machine for the block, reachable from this machine only and with its token only.

    Every start makes a new cluster. Any other Ray that runs here, or that RAY_ADDRESS names, is neither used nor ended.

    Yields the plan, with GPUs for its replicas if the backend uses what is there. Ray's files, including its logs, are
    in a folder of their own, which is removed when the block ends. The folder's name is passed to `report`. It is also
    in the command lines of Ray's daemons, so these can be found if this process was killed and could not end them.

    Raises:
        OptionError: this process is connected to a Ray already.
        DeviceError: there are fewer GPUs than replicas.
    """
    plan = replace(plan, tokens=Tokens.read(plan.token_file) if plan.tokens is None else plan.tokens)
    ray: Any = sys.modules.get("ray")  # do not import it before its environment is set up
    if ray is not None and ray.is_initialized():
        raise OptionError(
            "this process is connected to a Ray already, and the service starts one of its own. Serve in another "
            "process, or deploy on that Ray: ray.serve.run(magicface_rt.serve.ray.application({...}))."
        )
    with _environment():
        yield from _started(plan, report)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Set up the environment that Ray's processes inherit, for the block: a token of Ray's own, and none of the
    service's.
    """
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


def _started(plan: RayPlan, report: Callable[[str], object]) -> Iterator[RayPlan]:
    ray: Any = importlib.import_module("ray")
    folder = tempfile.mkdtemp(prefix="magicface-ray-", dir="/tmp")  # in /tmp: its sockets need short paths
    processors = max(os.cpu_count() or 1, round(plan.range[1] * plan.cpus + 0.5))
    try:
        with _no_other_cluster(report):
            report(f"starting Ray in {folder}")
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
    """Return the plan, with GPUs for its replicas if its backend uses what is there.

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
def _no_other_cluster(report: Callable[[str], object]) -> Iterator[None]:
    """Remove the address of another Ray from the environment, for the block, as processes started here would inherit
    it.
    """
    address = os.environ.pop("RAY_ADDRESS", None)
    if address:
        report(
            f"RAY_ADDRESS is {address} and is not used: this service has a Ray of its own. To serve on that one, "
            "`serve deploy` a config file there, see docs/serving-ray.md"
        )
    try:
        yield
    finally:
        if address is not None:
            os.environ["RAY_ADDRESS"] = address


def _set_token() -> None:
    """Make Ray's processes require a token of each other: otherwise whoever reaches their ports could run anything.

    Ray requires one unless RAY_AUTH_MODE says otherwise. It would create the token by itself and leave it in a file in
    the home folder; this one is only in the environment of its processes.
    """
    wanted = os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"
    if wanted and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _read_token_anew() -> None:
    """Make Ray forget the token that it has read. It would keep the first one as long as the process lives, and what
    this process starts next has another.

    This needs a part of Ray that Ray does not document. With a Ray that lacks it, a process can start Ray only once, as
    usual.
    """
    with contextlib.suppress(ImportError, AttributeError):
        part: Any = importlib.import_module("ray._raylet")
        part.Config.initialize("")  # whether a token is required; first, as a thread of Ray's may read one at once
        part.AuthenticationTokenLoader.instance().reset_cache()


class Running:
    """An application on the Ray that this process has started.

    signals  waiting ends when one of them says stop
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
        """Start the application. Returns when all replicas are warm, or when a signal says stop.

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
        """Replace the replicas, one after the other, by those of another plan. If these cannot start, the remaining old
        ones continue.

        Raises:
            MagicFaceError: why a replica could not start.
        """
        self._plan = replace(plan, revision=f"{plan.revision} {time.time_ns()}")
        self._deploy()

    def end(self) -> int:
        """Finish the running requests, within `settings.drain` seconds or until a second signal. Returns how many were
        cut off.
        """
        from ray import serve

        gone: tuple[type[Exception], ...] = (TimeoutError, *_of_ray())
        try:
            cut_off = self._drained()
        except gone:  # the front is gone or does not answer, and its requests are lost with it
            cut_off = 0
        self._signals.wait(0)
        with contextlib.suppress(*gone):
            serve.delete(APPLICATION)  # returns once the last answers are out
        return cut_off

    def _drained(self) -> int:
        answer = self._handle.drain.remote(self._plan.settings.drain)
        while True:
            try:
                return int(answer.result(timeout_s=0.2))
            except TimeoutError:
                self._signals.wait(0)  # tells of a second one
                if self._signals.stops > 1:
                    return int(self._handle.drain.remote(0.0).result(timeout_s=10))

    def _deploy(self) -> None:
        from ray.serve import RunTarget, run_many  # `serve.run` would wait without regard to signals

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
    """Open the bundle to check it before Ray is started; each replica opens its own."""
    return Bundle.open(plan.bundle, check_hashes=bool(plan.session.get("check_hashes", True)))


def _update(running: Running, report: Callable[[str], object]) -> None:
    try:
        bundle = _checked(running.plan)
        report(f"updating to bundle {bundle.hash[:16]}")
        running.update(running.plan)
        report("updated")
    except Exception as error:
        if not isinstance(error, (MagicFaceError, *_of_ray())):
            raise
        report(f"not updated, the service goes on with what it has: {one_line(str(error))[:MOST_SAID]}")


def _of_ray() -> tuple[type[Exception], ...]:
    """Return the exceptions that Ray raises when something of it fails."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return (RayError, RayServeException)
