"""`magicface-rt engines`: what an engine store holds, why a plan is stale, whether plans are whole, and pruning."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from magicface_rt.bundle import Bundle
from magicface_rt.engines.store import EngineStore, Plan
from magicface_rt.errors import StoreError
from magicface_rt.values.sizes import parse_size

from ._backend_options import DeviceOption
from ._bundle_view import grid, size
from ._command import JsonOption, command
from .build import FlavourOption, TargetOption, choose_target, plan_outcome

app = typer.Typer(help="Look after an engine store.", no_args_is_help=True, rich_markup_mode=None)

StoreOption = Annotated[Path, typer.Option(metavar="DIR", help="The engine store.")]


@app.command("list")
def list_plans(store: StoreOption, json_to: JsonOption = None) -> None:
    """Every plan of a store, and what is damaged in it. Exit code 1 where something is."""
    with command(json_to) as verb:
        kept = _open(store)
        entries = kept.entries()
        plans = [entry for entry in entries if isinstance(entry, Plan)]
        damaged = [entry for entry in entries if not isinstance(entry, Plan)]
        verb.outcome = {
            "store": str(kept.root),
            "bytes": sum(kept.size(entry) for entry in entries),
            "cache_bytes": kept.cache_size(),
            "plans": [plan_outcome(plan) | {"last_used": _time(kept.last_used(plan))} for plan in plans],
            "damaged": [{"path": str(entry.folder), "reason": entry.reason} for entry in damaged],
        }
        table = grid("plans", "graph", "flavour", "precision", "for", "size>", "last used", "digest")
        for plan in plans:
            key = plan.key
            table.add_row(
                key.graph,
                f"{key.flavour} {key.flavour_version}",
                key.precision,
                " ".join(key.compute_capabilities),
                size(plan.bytes),
                _time(kept.last_used(plan)),
                key.digest[:12],
            )
        verb.print(table)
        for entry in damaged:
            verb.print(f"damaged: {entry.folder}: {entry.reason}")
        caches = f" and {size(verb.outcome['cache_bytes'])} of caches" if verb.outcome["cache_bytes"] else ""
        verb.print(f"{len(plans)} plans, {size(verb.outcome['bytes'])}{caches} in {kept.root}")
        if damaged:
            verb.fail()


@app.command()
def why(
    bundle: Annotated[Path, typer.Argument(help="The bundle that the plans should be of.")],
    store: StoreOption,
    flavour: FlavourOption = "tensorrt-rtx",
    target: TargetOption = None,
    parity: Annotated[bool, typer.Option("--parity", help="Look for plans with the outputs for `verify`.")] = False,
    device: DeviceOption = 0,
    json_to: JsonOption = None,
) -> None:
    """Which plans serve a bundle, and by which fields the others are stale. Exit code 1 where a graph has none."""
    with command(json_to) as verb:
        from magicface_rt.engines.builder import plan_key
        from magicface_rt.engines.finding import build_command

        kept = _open(store)
        chosen, library = choose_target(flavour, target, device)
        opened = Bundle.open(bundle)
        if parity:
            chosen = chosen.with_parity_outputs()
        graphs: dict[str, Any] = {}
        for name in opened.graphs:
            key = plan_key(opened, name, library, chosen)
            found = kept.find(key)
            stale = [pair for pair in kept.why(key) if pair[1]]
            graphs[name] = {
                "digest": key.digest,
                "serves": None if found is None else str(found.path),
                "stale": [
                    {
                        "path": str(plan.path),
                        "differences": [
                            {"field": d.field, "reason": d.reason, "found": d.found, "expected": d.expected}
                            for d in differences
                        ],
                    }
                    for plan, differences in stale
                ],
            }
            there = "a plan is there (`engines verify` reads it)" if found else "no plan"
            verb.print(f"{name}: {there} ({key.digest[:12]})")
            for plan, differences in stale:
                verb.print(f"  {plan.key.digest[:12]} is stale:")
                for difference in differences:
                    verb.print(f"    {difference}")
        verb.outcome = {"store": str(kept.root), "target": chosen.name, "graphs": graphs}
        if not all(graph["serves"] for graph in graphs.values()):
            verb.print(f"build them: {build_command(opened, chosen, kept.root)}")
            verb.fail()


@app.command()
def verify(store: StoreOption, json_to: JsonOption = None) -> None:
    """Read every plan and compare it with its manifest. Exit code 1 where one is damaged."""
    with command(json_to) as verb:
        kept = _open(store)
        checked = kept.verify()
        verb.outcome = {
            "store": str(kept.root),
            "entries": [{"path": str(entry.folder), "fault": fault} for entry, fault in checked],
        }
        for entry, fault in checked:
            name = entry.key.graph if isinstance(entry, Plan) else entry.folder.name[:12]
            verb.print(f"{name}: {'whole' if fault is None else fault}")
        faults = sum(fault is not None for _, fault in checked)
        verb.print(f"{len(checked)} plans, {faults} damaged, in {kept.root}")
        if faults:
            verb.fail()


@app.command()
def prune(
    store: StoreOption,
    limit: Annotated[str, typer.Option(metavar="SIZE", help="What may stay, such as 20GiB; the oldest go first.")],
    json_to: JsonOption = None,
) -> None:
    """Remove caches and the least recently used plans until the store is under a size. Plans in use stay.

    Exit code 2 where something could not be removed; the rest is removed all the same.
    """
    with command(json_to) as verb:
        kept = _open(store)
        allowed = parse_size(limit, "--limit")
        faults: list[StoreError] = []
        pruned = kept.prune(allowed, on_fault=faults.append)
        left = sum(kept.size(entry) for entry in kept.entries())
        left_of_caches = kept.cache_size()
        verb.outcome = {
            "store": str(kept.root),
            "removed": [str(entry.folder) for entry in pruned.entries],
            "removed_cache_files": pruned.cache_files,
            "removed_cache_bytes": pruned.cache_bytes,
            "bytes": left,
            "cache_bytes": left_of_caches,
            "faults": [str(fault) for fault in faults],
        }
        caches = f" and {size(left_of_caches)} of caches" if left_of_caches else ""
        verb.print(
            f"{len(pruned.entries)} plans and {pruned.cache_files} cache files ({size(pruned.cache_bytes)}) removed, "
            f"{size(left)}{caches} left in {kept.root}"
        )
        for fault in faults:
            verb.note(f"error: {fault}")
        if faults:
            verb.fail(StoreError.exit_code)
        elif left + left_of_caches > allowed:
            verb.print("the rest is in use, or being built")


def _open(store: Path) -> EngineStore:
    if not store.is_dir():
        raise StoreError(
            f"engine store {store}: no such folder. Make one with `magicface-rt build BUNDLE --store DIR`."
        )
    kept = EngineStore(store)
    kept.check()
    return kept


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
