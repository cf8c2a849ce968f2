"""`magicface-rt plan`: what the references of a job will need, reported before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicface_rt import Session

from ._backend_options import BackendOption, DeviceOption, StoreOption, TargetOption
from ._bundle_view import size
from ._command import JsonOption, command
from ._kept_options import BudgetOption, KeepOption, KeptOption, MemoryOption, StorageOption, plan_table
from .run import build_request


def plan(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    job: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The request as JSON or YAML; paths in it count from it.")
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help="word=man,image=man.jpg,mask=m.png,prompt=a man. Several times for several."),
    ] = None,
    kept: KeptOption = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps; 50 by default.")] = None,
    images: Annotated[int | None, typer.Option(metavar="N", help="Pictures to make; 1.")] = None,
    keep: KeepOption = None,
    storage: StorageOption = "exact",
    memory: MemoryOption = "auto",
    budget: BudgetOption = None,
    backend: BackendOption = "auto",
    store: StoreOption = None,
    device: DeviceOption = 0,
    target: TargetOption = None,
    json_to: JsonOption = None,
) -> None:
    """Show what a job's references need in each mode, and which mode would be taken. Loads no graph.

    `run` takes the same options, and does what is shown here.
    """
    with command(json_to) as verb:
        prompt = None if job is not None else ""
        request = build_request(job, prompt, concept or [], {"steps": steps, "images": images}, kept or [])
        with Session(
            bundle,
            backend=backend,
            device=device,
            store=store,
            target=target,
            check_hashes=False,
            keep=keep,
            memory=memory,
            budget=budget,
            storage=storage,
        ) as session:
            found = session.plan(request.concepts, request.options.steps, request.options.images)
        verb.outcome = found.to_dict()
        verb.print(plan_table(found))
        verb.print(f"mode: {found.mode}" + ("" if found.budget is None else f", budget {size(found.budget)}"))
        tokens = ", ".join(f"{count} at factor {factor}" for factor, count in found.tokens.items())
        verb.print(f"kept tokens: {tokens}")
        verb.print(f"keys: {size(found.bytes_per_step)} a step, {size(found.bytes_kept)} kept for {found.steps} steps")
        if found.rows_per_pass:
            verb.print(f"preparing: {found.rows_per_pass} steps in one pass")
