"""`magicface-rt serve`: a bundle over HTTP, one process and no other service."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from magicface_rt import Session
from magicface_rt.errors import OptionError
from magicface_rt.images import MagicFaceWarning
from magicface_rt.serve import module as serving_module
from magicface_rt.sizes import parse_size

from ._backend_options import BackendOption, BuildMissingOption, DeviceOption, StoreOption, TargetOption
from ._command import JsonOption, command
from ._kept_options import BudgetOption, KeepOption, MemoryOption, StorageOption


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen. Others reach it only if this says so.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 for any that is free.")] = 8000,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tokens that clients must have, one a line; or MAGICFACE_RT_TOKENS."),
    ] = None,
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
    max_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Denoising steps of a request.")] = 150,
    default_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Where a request does not say.")] = 50,
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
    threads: Annotated[int, typer.Option(metavar="N", min=0, help="Of one batch; 0: the runtime's choice.")] = 0,
    provenance: Annotated[
        bool, typer.Option("--provenance/--no-provenance", help="Let pictures say how they were made.")
    ] = True,
    json_to: JsonOption = None,
) -> None:
    """Serve a bundle over HTTP: PUT /v1/concepts, POST /v1/images; see docs/serving.md.

    SIGTERM or Ctrl-C ends it when the requests that are being done have their answers.
    """
    with command(json_to) as verb:
        serving = serving_module("server")
        if deadline <= 0:
            raise OptionError(f"--deadline is {deadline:g}, expected seconds above 0.")
        settings = serving_module("settings").ServeSettings(
            queue=queue,
            batch=batch,
            batch_wait=batch_wait_ms / 1000,
            deadline=deadline,
            drain=drain,
            body_bytes=parse_size(max_body, "--max-body"),
            pixels=max_pixels,
            steps=max_steps,
            default_steps=min(default_steps, max_steps),
            images=max_images,
            concepts=most_concepts,
            concept_bytes=parse_size(concept_bytes, "--concept-bytes"),
        )
        accepted = serving_module("auth").Tokens.read(tokens)
        kept = serving_module("concepts")
        limits = {"most": settings.concepts, "most_bytes": settings.concept_bytes}
        place = kept.MemoryConcepts(**limits) if concepts is None else kept.FolderConcepts(concepts, **limits)
        serving.listen(host, port).close()  # a bundle takes long to open: what cannot be served is said before
        if host not in ("127.0.0.1", "::1", "localhost") and not accepted:
            verb.note(f"warning: {host} can be reached by others, and no --tokens were given: anyone may use it.")
        with Session(
            bundle,
            backend=backend,
            workers=workers,
            threads=threads,
            provenance=provenance,
            device=device,
            store=store,
            build_missing=build_missing,
            target=target,
            keep=keep,
            memory=memory,
            budget=budget,
            storage=storage,
        ) as session:
            # Warnings quote the names that clients give their concepts; nothing of a request is logged.
            warnings.simplefilter("ignore", MagicFaceWarning)
            logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
            verb.note(f"serving {bundle} on {session.backend.name}")
            cut_off = serving.serve(
                [session],
                store=place,
                settings=settings,
                tokens=accepted,
                workers=workers,
                host=host,
                port=port,
                told=verb.note,
            )
        verb.outcome = {"cut_off": cut_off}
        verb.note(f"ended; {cut_off} requests were cut off" if cut_off else "ended")
