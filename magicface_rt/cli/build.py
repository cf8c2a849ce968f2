"""`magicface-rt build`: from a bundle to TensorRT plans in a store."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from magicface_rt.bundle import Bundle
from magicface_rt.errors import Cancelled, OptionError
from magicface_rt.process.host_memory import check_addresses
from magicface_rt.values.sizes import parse_size

from ._backend_options import DeviceOption
from ._bundle_view import grid, size
from ._command import Command, JsonOption, command

if TYPE_CHECKING:
    from magicface_rt.engines.store import EngineStore, Plan

BUILD_ADDRESSES = 640 << 20
"""Bytes of address space below which the smallest graph could not be built. If there is too little, TensorRT may wait
forever for a thread that it could not start, or the system's loader ends the process.
"""

StoreOption = Annotated[Path, typer.Option(metavar="DIR", help="The engine store; made where it is missing.")]
FlavourOption = Annotated[str, typer.Option(metavar="NAME", help="tensorrt-rtx or tensorrt.")]
TargetOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A target's name, or a .toml file; else the GPU's here, or any RTX GPU's."),
]


def build(
    bundle: Annotated[Path, typer.Argument(help="A folder made by `export`.")],
    store: StoreOption,
    flavour: FlavourOption = "tensorrt-rtx",
    target: TargetOption = None,
    graph: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this graph; may be repeated.")] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Keep the outputs that only `verify` reads; these plans serve slower.")
    ] = False,
    device: DeviceOption = 0,
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Keep the store under this size, such as 20GiB.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Build a plan for each graph of a bundle; those that the store has already are left alone."""
    with command(json_to) as verb:
        from magicface_rt.engines.builder import build_plan
        from magicface_rt.engines.store import EngineStore

        size_limit = None if limit is None else parse_size(limit, "--limit")
        check_addresses(BUILD_ADDRESSES, "TensorRT")
        chosen, library = choose_target(flavour, target, device)
        if parity:
            chosen = chosen.with_parity_outputs()
        opened = Bundle.open(bundle)
        names = list(graph or opened.graphs)
        for name in names:
            opened.graph(name)
        kept = EngineStore(store, size_limit=size_limit)
        verb.outcome = {
            "flavour": library.name,
            "version": library.version,
            "target": chosen.name,
            "store": str(kept.root),
            "plans": [],
        }
        with ExitStack() as in_use:  # else the limit may remove one as the next is built
            for name in names:
                start = perf_counter()

                def make(advance: Callable[[str, int, int], object], name: str = name) -> Plan:
                    return build_plan(
                        opened, name, library, chosen, kept, device=device, report=verb.note, advance=advance
                    )

                plan = _watched(name, make)
                in_use.enter_context(kept.in_use(plan))
                verb.outcome["plans"].append(plan_outcome(plan) | {"seconds": perf_counter() - start})
            _check_limit(verb, kept)
        verb.outcome["peak_host_bytes"] = peak_host_bytes()
        _print(verb)


def _check_limit(verb: Command, store: EngineStore) -> None:
    """Say that plans which are needed together, or in use, take more than the store may."""
    if store.size_limit is None:
        return
    taken = sum(store.size(entry) for entry in store.entries()) + store.cache_size()
    if taken > store.size_limit:
        verb.note(
            f"the store has {size(taken)}, more than --limit {size(store.size_limit)}: the plans of this build, and "
            "those in use, are not removed"
        )


def choose_target(flavour: str, target: str | None, device: int) -> tuple[Any, Any]:
    """Return the target with this name, or without one the flavour's default or that of the GPU here, and the flavour's
    library.

    Raises:
        OptionError: there is no such flavour.
        TargetError: there is no such target.
        BackendMissingError: the library is not installed.
    """
    from magicface_rt.engines import gpu, targets
    from magicface_rt.engines.flavour import FLAVOURS, load_flavour

    if flavour not in FLAVOURS:
        raise OptionError(f"--flavour is {flavour!r}, expected {' or '.join(FLAVOURS)}.")
    if target is not None:
        chosen = targets.load_target(target, flavour)
    else:
        chosen = targets.target_for(flavour, None if flavour in targets.DEFAULT else gpu.capability_here(device))
    return chosen, load_flavour(flavour)


def plan_outcome(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON can hold it."""
    return {
        "graph": plan.key.graph,
        "digest": plan.key.digest,
        "path": str(plan.path),
        "bytes": plan.bytes,
        "flavour": plan.key.flavour,
        "version": plan.key.flavour_version,
        "precision": plan.key.precision,
        "compute_capabilities": list(plan.key.compute_capabilities),
        "facts": dict(plan.facts),
    }


def peak_host_bytes() -> int | None:
    """Return this process's peak memory, or None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _watched(name: str, make: Callable[[Callable[[str, int, int], object]], Plan]) -> Plan:
    """Build in a thread, under a progress bar, so that Ctrl-C takes effect while the library computes."""
    stop, ended = threading.Event(), threading.Event()
    made: list[Plan] = []
    failure: list[BaseException] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)

        def advance(phase: str, done: int, steps: int) -> bool:
            bar.update(task, description=f"{name}: {phase}", completed=done, total=steps)
            return not stop.is_set()

        def work() -> None:
            try:
                if not stop.is_set():  # else nobody waits for it any more
                    made.append(make(advance))
            except BaseException as error:
                failure.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=work, name=f"build {name}")
        try:
            thread.start()
            # Not Thread.join: if Ctrl-C interrupts that, Python 3.11 takes the thread for ended.
            while not ended.wait(0.1):
                pass
        except KeyboardInterrupt:
            stop.set()
            bar.update(task, description=f"{name}: stopping")
            if thread.ident is not None:  # else it was interrupted before the thread had started
                ended.wait()
            raise
    if failure:
        raise KeyboardInterrupt if isinstance(failure[0], Cancelled) else failure[0]
    return made[0]


def _print(verb: Command) -> None:
    outcome = verb.outcome
    table = grid("plans", "graph", "seconds>", "size>", "scratch>", "fused>", "gate")
    for plan in outcome["plans"]:
        gate = plan["facts"]["gate"]
        scratch = "unknown" if gate["scratch_bytes"] is None else size(gate["scratch_bytes"])
        fused = f"{gate['fused']} of {gate['expected']}"
        table.add_row(plan["graph"], f"{plan['seconds']:.1f}", size(plan["bytes"]), scratch, fused, gate["verdict"])
    verb.print(table)
    peak = outcome["peak_host_bytes"]
    memory = "" if peak is None else f", peak host memory {size(peak)}"
    verb.print(f"{outcome['flavour']} {outcome['version']}, target {outcome['target']}{memory}")
    verb.print(f"store {outcome['store']}")
