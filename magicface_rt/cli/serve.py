"""`magicface-rt serve`: a bundle over HTTP, in one process, or on Ray Serve."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from magicface_rt import Session
from magicface_rt.errors import OptionError
from magicface_rt.process.host_memory import check_addresses
from magicface_rt.serve import module as serving_module
from magicface_rt.soft_warnings import MagicFaceWarning
from magicface_rt.ui import module as ui_module
from magicface_rt.values.sizes import parse_size

from ._backend_options import BackendOption, BuildMissingOption, DeviceOption, StoreOption, TargetOption
from ._command import Command, JsonOption, command
from ._kept_options import BudgetOption, KeepOption, MemoryOption, StorageOption
from ._serve_options import (
    DEFAULT_STEPS,
    HOST,
    MAX_STEPS,
    PORT,
    DefaultStepsOption,
    HostOption,
    MaxStepsOption,
    PortOption,
    ServedBundle,
    ServingThreadsOption,
    TokensOption,
)

if TYPE_CHECKING:
    from magicface_rt.serve import ConceptStore, ServeSettings

SERVE_ADDRESSES = 640 << 20
"""Bytes of address space below which even the smallest bundle was not always served: the runtime ends the process if a
thread of its own finds too little.
"""


def serve(
    bundle: ServedBundle,
    host: HostOption = HOST,
    port: PortOption = PORT,
    tokens: TokensOption = None,
    concepts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep concepts in files there, over restarts; else in memory."),
    ] = None,
    most_concepts: Annotated[int, typer.Option(metavar="N", min=0, help="Concepts that are kept.")] = 1000,
    concept_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Of all kept concepts.")] = "8GiB",
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Batches that are made at the same time; each has its own memory.")
    ] = 1,
    queue: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that may wait; one more gets 429.")] = 32,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures made together; 1 for none.")] = 4,
    batch_wait_ms: Annotated[
        float, typer.Option(metavar="MS", min=0, help="What a request waits for others to join it.")
    ] = 20.0,
    deadline: Annotated[float, typer.Option(metavar="S", help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(metavar="S", min=0, help="Seconds to finish requests at the end.")] = 60.0,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Of one request.")] = "32MiB",
    max_pixels: Annotated[int, typer.Option(metavar="N", min=1, help="Of one uploaded image.")] = 16_000_000,
    max_steps: MaxStepsOption = MAX_STEPS,
    default_steps: DefaultStepsOption = DEFAULT_STEPS,
    max_images: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures of a request.")] = 4,
    keep: KeepOption = None,
    memory: MemoryOption = "auto",
    budget: BudgetOption = None,
    storage: StorageOption = "exact",
    backend: BackendOption = "auto",
    store: StoreOption = None,
    device: DeviceOption = 0,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    threads: ServingThreadsOption = 0,
    ui: Annotated[bool, typer.Option("--ui", help="With a page for browsers at /ui; see docs/ui.md.")] = False,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="This process, or replicas on Ray Serve, docs/serving-ray.md.")
    ] = "local",
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N|MIN-MAX", help="With --engine ray, one for each GPU; within the range by the queue."),
    ] = None,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Let pictures say how they were made.")
    ] = True,
    json_to: JsonOption = None,
) -> None:
    """Serve a bundle over HTTP: PUT /v1/concepts, POST /v1/images; see docs/serving.md.

    SIGTERM or Ctrl-C ends it when the requests that are being done have their answers.
    """
    with command(json_to) as verb:
        check_addresses(SERVE_ADDRESSES, "the service")
        serving_module("server")
        on_ray = _on_ray(engine, replicas=replicas, device=device)
        if on_ray:
            serving_module("ray.cluster")
        if ui:
            ui_module("mounting")
        settings = _settings(
            deadline=deadline,
            max_body=max_body,
            concept_bytes=concept_bytes,
            queue=queue,
            batch=batch,
            batch_wait=batch_wait_ms / 1000,
            drain=drain,
            pixels=max_pixels,
            steps=max_steps,
            default_steps=min(default_steps, max_steps),
            images=max_images,
            concepts=most_concepts,
        )
        accepted = serving_module("auth").Tokens.read(tokens)
        kept = _concept_store(concepts, settings)
        # A bundle takes long to open, so check first whether it can be served here.
        _check_address(verb, host, port, protected=bool(accepted))
        options: dict[str, Any] = {
            "backend": backend,
            "threads": threads,
            "provenance": provenance,
            "store": None if store is None else str(store.absolute()),
            "build_missing": build_missing,
            "target": target,
            "keep": keep,
            "memory": memory,
            "budget": budget,
            "storage": storage,
        }
        service = {"settings": settings, "tokens": accepted, "workers": workers, "page": ui}
        if on_ray:
            cut_off = _serve_on_ray(verb, bundle, options, service, host, port, concepts=concepts, replicas=replicas)
        else:
            options |= {"workers": workers, "device": device}
            cut_off = _serve_here(verb, bundle, options, {**service, "store": kept}, host, port)
        verb.outcome = {"cut_off": cut_off}
        verb.note(f"ended; {cut_off} requests were cut off" if cut_off else "ended")


def _settings(*, deadline: float, max_body: str, concept_bytes: str, **limits: Any) -> ServeSettings:
    """Return the limits of the service: three as they are on the command line, the others by their names in
    `ServeSettings`.

    Raises:
        OptionError: a limit cannot be used.
    """
    if deadline <= 0:
        raise OptionError(f"--deadline is {deadline:g}, expected seconds above 0.")
    kind: type[ServeSettings] = serving_module("settings").ServeSettings
    body = parse_size(max_body, "--max-body")
    return kind(
        deadline=deadline,
        body_bytes=body,
        bodies_bytes=max(kind.bodies_bytes, 2 * body),
        concept_bytes=parse_size(concept_bytes, "--concept-bytes"),
        **limits,
    )


def _concept_store(folder: Path | None, settings: ServeSettings) -> ConceptStore:
    """Return where concepts are kept: in memory, or as files in a folder, which is made if it is missing.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    stores = serving_module("concepts")
    limits = {"most": settings.concepts, "most_bytes": settings.concept_bytes}
    found: ConceptStore = stores.MemoryConcepts(**limits) if folder is None else stores.FolderConcepts(folder, **limits)
    return found


def _check_address(verb: Command, host: str, port: int, *, protected: bool) -> None:
    """Check that the service can listen there; warn if others than this machine could then use it without a token.

    Raises:
        OptionError: the port is in use, or the address does not belong to this machine.
    """
    with contextlib.closing(serving_module("server").listen(host, port)) as where:
        address = str(where.getsockname()[0])
    if not protected and serving_module("access").names_of(address) is None:
        verb.note(f"warning: {host} can be reached by others, and no --tokens were given: anyone may use it.")


def _serve_here(
    verb: Command, bundle: Path, options: dict[str, Any], service: dict[str, Any], host: str, port: int
) -> int:
    """Serve in this process until a signal. Returns how many requests were cut off.

    options  settings of the Session
    service  further arguments of `serve.server.serve`
    """
    with Session(bundle, **options) as session:
        # Warnings go into answers. They quote the names that clients give their concepts, so only kinds are logged.
        warnings.simplefilter("ignore", MagicFaceWarning)
        logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        verb.note(f"serving {bundle} on {session.backend.name}")
        cut_off: int = serving_module("server").serve([session], **service, host=host, port=port, report=verb.note)
        return cut_off


def _serve_on_ray(
    verb: Command,
    bundle: Path,
    options: dict[str, Any],
    service: dict[str, Any],
    host: str,
    port: int,
    *,
    concepts: Path | None,
    replicas: str | None,
) -> int:
    """Serve on Ray, which is started for that, until a signal. Returns how many requests were cut off.

    options  settings of each replica's Session
    service  further arguments of `RayPlan`
    """
    plans = serving_module("ray.plan")
    with _shared_folder(concepts) as folder:
        plan = plans.RayPlan(
            bundle=str(bundle.absolute()),
            concepts=str(folder),
            session=options,
            replicas=None if replicas is None else plans.parse_replicas(replicas),
            **service,
        )
        cut_off: int = serving_module("ray.cluster").serve(plan, host=host, port=port, report=verb.note)
    return cut_off


def _on_ray(engine: str, *, replicas: str | None, device: int) -> bool:
    """Return whether Ray serves. Raises OptionError for an option that does not fit the engine."""
    if engine not in ("local", "ray"):
        raise OptionError(f"--engine is {engine!r}, expected local or ray.")
    if engine == "local":
        if replicas is not None:
            raise OptionError("--replicas goes with --engine ray; this process is one. Leave it out, or serve on Ray.")
        return False
    if device:
        raise OptionError(f"--device is {device}; with --engine ray each replica has a GPU of its own. Leave it out.")
    return True


@contextlib.contextmanager
def _shared_folder(concepts: Path | None) -> Iterator[Path]:
    """Yield the folder in which replicas keep concepts: the given one, or one in shared memory that is removed
    afterwards.
    """
    if concepts is not None:
        yield concepts.absolute()
        return
    with serving_module("ray.cluster").shared_memory_folder() as folder:
        yield folder
