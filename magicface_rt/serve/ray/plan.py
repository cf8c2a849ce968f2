"""What is to be deployed: a bundle, the number and size of replicas, and the service's limits. Nothing here imports
Ray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...backends import BACKENDS
from ...errors import OptionError
from ...kept.keeper import KeepSettings
from ...process.cores import threads_of_each
from ...session import Session
from ...values.shown import shown
from ...values.sizes import parse_size
from ..auth import Tokens
from ..settings import ServeSettings

__all__ = ["RayPlan", "parse_replicas"]

SESSION_OPTIONS = (
    *("backend", "threads", "provenance", "store", "build_missing", "target", "keep", "memory", "budget", "storage"),
    *("check_hashes", "cuda_graphs", "pad_keys"),
)
"""The settings of `Session` that a plan may have. `device` is not one: Ray gives each replica a GPU of its own."""

MOST_CONCEPTS = "most_concepts"
"""The name of `ServeSettings.concepts` among a config file's arguments, where `concepts` is the folder."""

SIZES = ("body_bytes", "bodies_bytes", "concept_bytes")

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class RayPlan:
    """A service on Ray Serve.

    bundle    its folder, on every node
    concepts  the folder of kept concepts, which all nodes share
    session   settings of every replica's Session, by name
    workers   batches that one replica makes at the same time
    replicas  the least and the most; between them Ray follows the queue. None: one for each GPU of this machine, or one
    gpus      GPUs of one replica; 0 for none
    cpus      CPUs of one replica, as Ray counts them
    page      whether to serve the page of `magicface_rt.ui` at /ui
    settings  limits of the service
    tokens    who may use it. None: the tokens of `token_file`, or of the variable MAGICFACE_RT_TOKENS, as the front's
              process finds them
    hosts     names that clients may call the service by if there are no tokens, see `build_app`; None for any
    revision  any text; changing it replaces the replicas, even if nothing else is new
    opener    makes a replica's Session

    Raises OptionError, naming what cannot be used.
    """

    bundle: str
    concepts: str
    session: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    replicas: tuple[int, int] | None = None
    gpus: float = 0.0
    cpus: float = 1.0
    page: bool = False
    settings: ServeSettings = field(default_factory=ServeSettings)
    tokens: Tokens | None = None
    token_file: str | None = None
    hosts: tuple[str, ...] | None = None
    revision: str = ""
    opener: Callable[..., Session] = Session

    def __post_init__(self) -> None:
        least, most = self.range
        if not 1 <= least <= most:
            raise OptionError(f"replicas is {least}-{most}, expected a number from 1, or two, the smaller first.")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise OptionError(f"workers is {self.workers!r}, expected a whole number from 1.")
        for name in ("gpus", "cpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1000:
                raise OptionError(f"{name} is {value!r}, expected a number from 0.")
        if not isinstance(self.page, bool):
            raise OptionError(f"page is {self.page!r}, expected true or false.")
        unknown = sorted(set(self.session) - set(SESSION_OPTIONS))
        if unknown:
            raise OptionError(f"{unknown[0]} is no setting of a replica. There are {', '.join(SESSION_OPTIONS)}.")
        given = self.session.get
        KeepSettings.of(
            given("keep"), given("memory", "auto"), given("budget"), given("storage", "exact"), bool(given("pad_keys"))
        )
        wants_gpu(str(given("backend", "auto")), False)

    @property
    def range(self) -> tuple[int, int]:
        """The least and the most replicas."""
        return (1, 1) if self.replicas is None else self.replicas

    @property
    def at_once(self) -> int:
        """The most requests that a replica makes at once, if they can be made together."""
        return self.workers * self.settings.batch

    @property
    def threads(self) -> Any:
        """Threads of one computation on a CPU: as given, otherwise what a replica's `cpus` allow, or its share of this
        machine.
        """
        of_replica = int(self.cpus) // self.workers
        share = threads_of_each(0, self.workers * self.range[1])
        return self.session.get("threads") or (of_replica if of_replica > 1 else share)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> RayPlan:
        """Make a plan from the arguments of a Serve config file: fields of this class, of `ServeSettings` (`concepts`
        as MOST_CONCEPTS) and settings of a Session, by their names, and `tokens`, the path of a file.

        Raises:
            OptionError: a name that is not known, one that is missing, or a value that cannot be used.
        """
        own = {one.name for one in fields(cls)} - {"session", "settings", "opener", "tokens", "token_file", "hosts"}
        limits = {MOST_CONCEPTS if one.name == "concepts" else one.name: one.name for one in fields(ServeSettings)}
        known = sorted(own | limits.keys() | set(SESSION_OPTIONS) | {"tokens"})
        for name in given:
            if name not in known:
                raise OptionError(f"argument {name!r} is not known. There are {', '.join(known)}.")
        for name in ("bundle", "concepts"):
            if not isinstance(given.get(name), str) or not given[name]:
                raise OptionError(f"argument {name!r} is {given.get(name)!r}, expected a folder that every node has.")
        session = {name: given[name] for name in SESSION_OPTIONS if name in given}
        settings = {
            setting: parse_size(given[name], name) if name in SIZES else given[name]
            for name, setting in limits.items()
            if name in given
        }
        plan = {name: given[name] for name in own if name in given}
        plan["replicas"] = parse_replicas(given.get("replicas", 1))
        plan.setdefault("gpus", float(wants_gpu(str(session.get("backend", "auto")), False)))
        plan["revision"] = str(plan.get("revision", ""))
        return cls(**plan, session=session, settings=ServeSettings(**settings), token_file=_path(given.get("tokens")))


def parse_replicas(given: object) -> tuple[int, int]:
    """Parse `2`, or `1-4` for at least one and at most four.

    Raises:
        OptionError: anything else.
    """
    found = None if isinstance(given, bool) else _RANGE.fullmatch(str(given))
    if found is None:
        raise OptionError(f"replicas is {shown(given)}, expected a number, or two for at least and at most: 1-4.")
    least = int(found[1])
    return least, int(found[2] or least)


def wants_gpu(backend: str, there: bool) -> bool:
    """Return whether a replica with this backend needs a GPU. there: whether one exists, for backends that use what
    there is.
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend {backend!r} is not known; there are {', '.join(BACKENDS)}.")
    return there if backend in ("auto", "onnxruntime") else backend != "onnxruntime-cpu"


def _path(given: object) -> str | None:
    if given is not None and not isinstance(given, (str, Path)):
        raise OptionError(f"argument 'tokens' is a {type(given).__name__}, expected the path of a file of tokens.")
    return None if given is None else str(given)
