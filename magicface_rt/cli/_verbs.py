"""Assembles all verbs, and reads the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import (
    INTERRUPTED,
    INTERRUPTED_TEXT,
    _command,
    bench,
    build,
    checkpoint,
    demo,
    doctor,
    engines,
    export,
    inspect,
    plan,
    prepare,
    run,
    serve,
    ui,
    verify,
)
from ._signals import heard

__all__ = ["app", "read"]

app = typer.Typer(
    name="magicface-rt",
    help="MagicFace: pictures of several people and things from a prompt and masked reference images, no training.",
    epilog="Exit codes: 0 fine, 1 a check or a result is wrong, 2 what was given cannot be used, or a place cannot be "
    "written to, 3 it cannot be computed here (no runtime or extra, too little memory), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # brackets in help and messages are meant as brackets
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        from magicface_rt import __version__

        typer.echo(f"magicface-rt {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback", envvar="MAGICFACE_RT_TRACEBACK", help="Show where an error comes from, and all warnings."
        ),
    ] = False,
) -> None:
    _command.show_traceback(traceback)


for _verb in (
    demo.demo,
    checkpoint.checkpoint,
    export.export,
    build.build,
    run.run,
    prepare.prepare,
    plan.plan,
    serve.serve,
    ui.ui,
    verify.verify,
    bench.bench,
    inspect.inspect,
    doctor.doctor,
):
    app.command()(_verb)
app.add_typer(engines.app, name="engines")


def read(argv: Sequence[str] | None) -> int:
    """Run a command line, as `main` does once the verbs are loaded, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with heard():
            code = int(app(arguments, prog_name="magicface-rt", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # what typer (or click) raises for a command line it cannot read
            raise
        return _command.print_usage_error(error, arguments)
    if code == INTERRUPTED:
        print(INTERRUPTED_TEXT, file=sys.stderr)
    return code
