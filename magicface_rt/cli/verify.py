"""`magicface-rt verify`: replays a recording, or compares a bundle with its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from magicface_rt.backends import Backend, open_backend
from magicface_rt.bundle import Bundle
from magicface_rt.engines.flavour import FLAVOURS
from magicface_rt.engines.store import EngineStore
from magicface_rt.errors import OptionError

from ._backend_options import BuildMissingOption, StoreOption, TargetOption
from ._command import JsonOption, command, export_module


def verify(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle, with --checkpoint; or none, with --case.")] = None,
    case: Annotated[Path | None, typer.Option(metavar="DIR", help="A recording to replay.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The checkpoint that the bundle was exported from.")
    ] = None,
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="The bundle's runtime; auto by default.")] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Denoising steps to compare a bundle for; 6 by default.")
    ] = None,
    store: StoreOption = None,
    device: Annotated[int | None, typer.Option(metavar="N", min=0, help="The GPU's ordinal; 0 by default.")] = None,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the case's bundle here, for another time.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Check a bundle against PyTorch, or PyTorch and a bundle against a recording. Exit code 1 where they differ."""
    with command(json_to) as verb:
        given = {
            "checkpoint": checkpoint,
            "backend": backend,
            "steps": steps,
            "store": store,
            "device": device,
            "target": target,
            "build-missing": build_missing or None,
        }
        _check_arguments(bundle, case, given, work)
        parity = export_module("parity")
        if case is not None:
            verdict = parity.verify_case(case, work=work, report=verb.note)
        else:
            assert bundle is not None
            opened = Bundle.open(bundle)
            with closing(_runtime(opened, backend or "auto", store, device or 0, target, build_missing)) as runtime:
                verdict = parity.verify_bundle(bundle, checkpoint, backend=runtime, steps=steps or 6, report=verb.note)
        verb.outcome = verdict.to_json()
        for line in verdict.summary():
            verb.print(line)
        if not verdict.passed:
            verb.fail()


def _runtime(
    bundle: Bundle, name: str, store: Path | None, device: int, target: str | None, build_missing: bool
) -> Backend:
    """Open the backend; a TensorRT flavour with a store gets plans that have every output."""
    if name not in FLAVOURS or store is None:
        return open_backend(name, store=store, device=device)
    from magicface_rt.engines import gpu
    from magicface_rt.engines.finding import target_with_plans

    chosen = target_with_plans(bundle, name, target, EngineStore(store), gpu.capability_here(device), parity=True)
    return open_backend(name, store=store, device=device, target=chosen, build_missing=build_missing)


def _check_arguments(bundle: Path | None, case: Path | None, given: Mapping[str, Any], work: Path | None) -> None:
    forms = "`verify --case DIR` or `verify BUNDLE --checkpoint DIR`"
    if (bundle is None) == (case is None):
        found = "neither a bundle nor --case" if bundle is None else "both a bundle and --case"
        raise OptionError(f"{found} was given, expected one of them: {forms}.")
    if bundle is not None and given["checkpoint"] is None:
        raise OptionError(f"--checkpoint is missing: what shall the bundle be compared with? Expected {forms}.")
    for name, value in given.items():
        if case is not None and value is not None:
            raise OptionError(
                f"--{name} was given with --case, where it means nothing: a case holds its own settings and is "
                "replayed on the CPU."
            )
    if given["backend"] not in FLAVOURS:
        for name in ("store", "target", "build-missing"):
            if given[name] is not None:
                raise OptionError(f"--{name} is for --backend {' or '.join(FLAVOURS)}, found {given['backend']}.")
    steps = given["steps"]
    if bundle is not None and work is not None:
        raise OptionError("--work was given with a bundle, where it means nothing; it keeps a case's bundle.")
    if steps is not None and not 1 <= steps <= 1000:
        raise OptionError(f"--steps is {steps}, expected a whole number from 1 to 1000.")
