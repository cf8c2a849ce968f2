"""`magicface-rt ui`: the page for one bundle, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._backend_options import BackendOption, BuildMissingOption, DeviceOption, StoreOption, TargetOption
from ._command import JsonOption
from ._kept_options import BudgetOption, KeepOption, MemoryOption
from .serve import serve


def ui(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen. Others reach it only if this says so.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 for any that is free.")] = 8000,
    tokens: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tokens, one a line, which the browser then asks for as a password."),
    ] = None,
    default_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Where the slider stands at first.")] = 50,
    max_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Denoising steps of a picture.")] = 150,
    keep: KeepOption = None,
    memory: MemoryOption = "auto",
    budget: BudgetOption = None,
    backend: BackendOption = "auto",
    store: StoreOption = None,
    device: DeviceOption = 0,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    threads: Annotated[int, typer.Option(metavar="N", min=0, help="Of one picture; 0: the runtime's choice.")] = 0,
    json_to: JsonOption = None,
) -> None:
    """Open a page for a bundle: drop photographs, paint masks, make pictures; see docs/ui.md.

    It is `serve --ui` with fewer options, so that the calls which the page shows work against it as well.
    """
    serve(
        bundle,
        host=host,
        port=port,
        tokens=tokens,
        default_steps=default_steps,
        max_steps=max_steps,
        keep=keep,
        memory=memory,
        budget=budget,
        backend=backend,
        store=store,
        device=device,
        target=target,
        build_missing=build_missing,
        threads=threads,
        ui=True,
        json_to=json_to,
    )
