"""The options of the verbs that listen: `serve`, and `ui`, which is `serve --ui` with fewer of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicface_rt.process.cores import MOST_THREADS

ServedBundle = Annotated[Path, typer.Argument(help="A bundle's folder.")]
HostOption = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Where to listen. Others reach it only if this says so.")
]
PortOption = Annotated[int, typer.Option(metavar="N", help="0 for any that is free.")]
TokensOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Tokens that callers must have, one a line, or MAGICFACE_RT_TOKENS; a browser asks for one as a password.",
    ),
]
DefaultStepsOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Where a request does not say, and the page's slider stands at first.")
]
MaxStepsOption = Annotated[int, typer.Option(metavar="N", min=1, help="Denoising steps of a request.")]
ServingThreadsOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=MOST_THREADS, help="Of one batch, on a CPU; 0: those made at once share the cores."
    ),
]

HOST, PORT = "127.0.0.1", 8000
DEFAULT_STEPS, MAX_STEPS = 50, 150
