"""The options that choose a backend, shared by the verbs that compute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicface_rt.process.cores import MOST_THREADS

BackendOption = Annotated[str, typer.Option(metavar="NAME", help="See `magicface-rt doctor`.")]
StoreOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The engine store, for the TensorRT backends; `build` fills it.")
]
DeviceOption = Annotated[int, typer.Option(metavar="N", min=0, help="The GPU's ordinal.")]
ThreadsOption = Annotated[
    int,
    typer.Option(metavar="N", min=0, max=MOST_THREADS, help="Threads to compute with; 0: the runtime's choice."),
]
TargetOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="What plans were built for; else what this GPU can load.")
]
BuildMissingOption = Annotated[
    bool,
    typer.Option(
        "--build-missing", help="With a TensorRT --backend: build plans that the store lacks; else that is an error."
    ),
]
