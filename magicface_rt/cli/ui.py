"""`magicface-rt ui`: the page for one bundle, on this machine."""

from __future__ import annotations

from ._backend_options import BackendOption, BuildMissingOption, DeviceOption, StoreOption, TargetOption
from ._command import JsonOption
from ._kept_options import BudgetOption, KeepOption, MemoryOption
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
from .serve import serve


def ui(
    bundle: ServedBundle,
    host: HostOption = HOST,
    port: PortOption = PORT,
    tokens: TokensOption = None,
    default_steps: DefaultStepsOption = DEFAULT_STEPS,
    max_steps: MaxStepsOption = MAX_STEPS,
    keep: KeepOption = None,
    memory: MemoryOption = "auto",
    budget: BudgetOption = None,
    backend: BackendOption = "auto",
    store: StoreOption = None,
    device: DeviceOption = 0,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    threads: ServingThreadsOption = 0,
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
