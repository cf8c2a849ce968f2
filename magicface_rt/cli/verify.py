"""`magicface-rt verify`: a recording replayed, or a bundle compared with its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from magicface_rt.backends import Backend, open_backend
from magicface_rt.errors import OptionError

from ._backend_options import BuildMissingOption, DeviceOption, StoreOption, TargetOption
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
    device: DeviceOption = 0,
    target: TargetOption = None,
    build_missing: BuildMissingOption = False,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the case's bundle here, for another time.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Check a bundle against PyTorch, or PyTorch and a bundle against a recording. Exit code 1 where they differ."""
    with command(json_to) as verb:
        _check_arguments(bundle, case, checkpoint, backend, steps, work)
        if case is not None and (store is not None or build_missing):
            raise OptionError("--store was given with --case, where it means nothing: a case is replayed on the CPU.")
        parity = export_module("parity")
        if case is not None:
            verdict = parity.verify_case(case, work=work, report=verb.note)
        else:
            runtime = _runtime(backend or "auto", store, device, target, build_missing)
            verdict = parity.verify_bundle(bundle, checkpoint, backend=runtime, steps=steps or 6, report=verb.note)
            runtime.close()
        verb.outcome = verdict.to_json()
        for line in verdict.summary():
            verb.print(line)
        if not verdict.passed:
            verb.fail()


def _runtime(name: str, store: Path | None, device: int, target: str | None, build_missing: bool) -> Backend:
    """The backend; a TensorRT flavour with plans that have every output."""
    if name not in ("tensorrt", "tensorrt-rtx"):
        return open_backend(name, device=device)
    from magicface_rt.engines import gpu, targets

    chosen = targets.load_target(target, name) if target else targets.target_for(name, gpu.capability_here(device))
    return open_backend(
        name, store=store, device=device, target=chosen.with_parity_outputs(), build_missing=build_missing
    )


def _check_arguments(
    bundle: Path | None,
    case: Path | None,
    checkpoint: Path | None,
    backend: str | None,
    steps: int | None,
    work: Path | None,
) -> None:
    forms = "`verify --case DIR` or `verify BUNDLE --checkpoint DIR`"
    if (bundle is None) == (case is None):
        found = "neither a bundle nor --case" if bundle is None else "both a bundle and --case"
        raise OptionError(f"{found} was given, expected one of them: {forms}.")
    if bundle is not None and checkpoint is None:
        raise OptionError(f"--checkpoint is missing: what shall the bundle be compared with? Expected {forms}.")
    for name, value in {"checkpoint": checkpoint, "backend": backend, "steps": steps}.items():
        if case is not None and value is not None:
            raise OptionError(f"--{name} was given with --case, where it means nothing: a case holds its own.")
    if bundle is not None and work is not None:
        raise OptionError("--work was given with a bundle, where it means nothing; it keeps a case's bundle.")
    if steps is not None and not 1 <= steps <= 1000:
        raise OptionError(f"--steps is {steps}, expected a whole number from 1 to 1000.")
