"""Which target's plans serve a bundle here, and the command that builds what is missing."""

from __future__ import annotations

import shlex
from pathlib import Path

from magicface_rt.bundle import Bundle
from magicface_rt.errors import TargetError

from .builder import plan_key
from .flavour import load_flavour
from .store import EngineStore
from .targets import Target, load_target, targets_for


def target_with_plans(
    bundle: Bundle,
    flavour: str,
    name: str | Path | None,
    store: EngineStore,
    capability: str | None,
    *,
    parity: bool = False,
) -> Target:
    """Return the target `name`, or, without a name, the narrowest one for this GPU with all the bundle's plans stored.

    If there is no such target, return the one to build for: the narrowest that serves the GPU. `parity`: look for plans
    that keep the outputs for `verify`.

    Raises:
        TargetError: no such target, or none for this GPU.
    """
    if name is not None:
        chosen = load_target(name, flavour)
        return chosen.with_parity_outputs() if parity else chosen
    library = load_flavour(flavour)
    candidates = [t.with_parity_outputs() if parity else t for t in targets_for(flavour, capability)]
    for target in candidates:
        try:
            if all(store.find(plan_key(bundle, graph, library, target)) for graph in bundle.graphs):
                return target
        except TargetError:  # it does not serve the bundle's precision
            continue
    return candidates[0]


def build_command(bundle: Bundle, target: Target, root: Path, device: int = 0) -> str:
    """The command line that builds a bundle's plans for a target, on the GPU with this ordinal."""
    named = target.name if target.file is None else str(target.file)
    parts = ["magicface-rt", "build", str(bundle.path), "--flavour", target.flavour, "--target", named]
    parts += ["--store", str(root), *(["--parity"] if target.builder.parity_outputs else [])]
    parts += ["--device", str(device)] if device else []
    return shlex.join(parts)
