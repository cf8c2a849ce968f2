"""Targets: what a plan is built for. One small TOML file each in `engines/targets`; adding a GPU is adding a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from magicface_rt.errors import TargetError
from magicface_rt.files.plain_file import read_plain
from magicface_rt.values.shown import shown

from .flavour import FLAVOURS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "targets"
DEFAULT = {"tensorrt-rtx": "rtx-portable"}
"""`tensorrt` has no default: it builds for the GPU that it runs on, which determines the target."""

PRECISIONS = ("float16", "bfloat16", "float32")
GRAPHS = ("text_encoder", "vae_encoder", "vae_decoder", "reference_kv", "denoise_step")
COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT-RTX 1.7 builds for."""
TURING = "7.5"

MOST_BYTES = 100_000
"""Largest size of a target file."""
MOST = 1 << 20
"""Largest value of any count, including memory in MiB: a plan for more could not be built anywhere."""

_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")


@dataclass(frozen=True)
class Span:
    """How many of something a plan is tuned for, and how many it takes at most; the minimum is 1."""

    optimum: int
    maximum: int


@dataclass(frozen=True)
class BuilderOptions:
    """Options of the builder. They are part of a plan's key: another value makes another plan.

    workspace_mib           memory that the builder may let one layer use, MiB
    optimization_level      0..5, how long the builder searches
    tf32                    compute fp32 products in TF32; off, because they differ from PyTorch by 1e-3
    hardware_compatibility  `tensorrt` only, whose target files must name it: "none", "ampere_plus" or
                            "same_compute_capability". With "none", a plan is for the model of GPU that builds it, which
                            its key does not name: keep a store for each
    parity_outputs          keep the outputs that only `verify` reads
    """

    workspace_mib: int = 4096
    optimization_level: int = 3
    tf32: bool = False
    hardware_compatibility: str = "none"
    parity_outputs: bool = False


@dataclass(frozen=True)
class Target:
    """What a plan is built for.

    `compute_capabilities`: of the GPUs that may load it, such as "8.9"; `precisions`: dtypes of bundles that it takes
    (float32 is for small models: the gate refuses a full-size one, because its attention is not fused);
    `images` and `references`: of one request, within the bundle's own limits. `full_masks`: how many references fit if
    their masks keep everything; more fit if the masks are smaller. `scratch_limits_mib`: by graph, and for `others`; a
    plan that needs more is refused. `file`: that of a user's own target.
    """

    name: str
    flavour: str
    compute_capabilities: tuple[str, ...]
    precisions: tuple[str, ...]
    full_masks: int
    images: Span
    references: Span
    scratch_limits_mib: Mapping[str, int]
    builder: BuilderOptions = field(default_factory=BuilderOptions)
    file: Path | None = field(default=None, compare=False)

    def with_parity_outputs(self) -> Target:
        """The same target, for plans that `verify` can judge output by output."""
        return replace(self, builder=replace(self.builder, parity_outputs=True))

    def scratch_limit(self, graph: str) -> int:
        """Bytes of scratch that a graph's plan may need."""
        return self.scratch_limits_mib.get(graph, self.scratch_limits_mib["others"]) << 20

    def check_precision(self, dtype: str) -> None:
        """Raise TargetError if this target does not serve a bundle's dtype."""
        if dtype not in self.precisions:
            raise TargetError(
                f"target {self.name}: the bundle is in {dtype}, expected {' or '.join(self.precisions)}. "
                "Export it again with another --dtype, or choose another target."
            )


def target_names() -> list[str]:
    """The names of the targets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_target(name: str | Path, flavour: str | None = None) -> Target:
    """Load a target by name, or from a TOML file of the user's own (anything that ends in .toml).

    `flavour`: the flavour that the target must be of, if given.

    Raises:
        TargetError: no such target, an invalid file, a target of another flavour, or one that its flavour cannot build.
    """
    own = str(name).endswith(".toml")
    path = Path(name) if own else FOLDER / f"{name}.toml"
    if not own and str(name) not in target_names():
        raise TargetError(f"target {str(name)!r} is not known; there are {', '.join(target_names())}.")
    try:
        values = tomllib.loads(read_plain(path, MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last where it is nested too deeply
        raise TargetError(f"target file {path}: it cannot be read as TOML ({error}).") from error
    target = _parse(path.stem, path, values)
    if own:
        target = replace(target, file=path)
    _check_capabilities(path, target)
    if flavour is not None and flavour != target.flavour:
        raise TargetError(
            f"target {target.name} is for {target.flavour}, and {flavour} was asked for. "
            f"Targets of {flavour}: {', '.join(targets_of(flavour)) or 'none'}."
        )
    return target


def targets_of(flavour: str) -> list[str]:
    """The names of a flavour's targets."""
    return [name for name in target_names() if load_target(name).flavour == flavour]


def target_for(flavour: str, capability: str | None) -> Target:
    """Return the narrowest target for a GPU of this compute capability, or, for None (no GPU), the flavour's default.

    Raises:
        TargetError: there is none.
    """
    known = [load_target(name) for name in targets_of(flavour)]
    if capability is None and flavour in DEFAULT:
        return load_target(DEFAULT[flavour])
    fitting = sorted((t for t in known if capability in t.compute_capabilities), key=_narrowness)
    if fitting:
        return fitting[0]
    if capability is None:
        raise TargetError(
            f"{flavour} builds for the GPU that it runs on, and there is none here. Name what to build for with "
            f"--target ({', '.join(targets_of(flavour))}) on a machine with that GPU."
        )
    other = next((f for f in FLAVOURS if f != flavour and targets_serving(f, capability)), None)
    advice = f"Use --flavour {other}." if other else "Write a target file (engines/targets holds examples)."
    raise TargetError(f"{flavour} has no target for compute capability {capability}. {advice}")


def targets_for(flavour: str, capability: str | None) -> list[Target]:
    """Return the targets whose plans a GPU can load, beginning with that of `target_for`, which may be the only one.

    Raises:
        TargetError: there is none.
    """
    first = target_for(flavour, capability)
    return [first, *(load_target(name) for name in targets_serving(flavour, capability or "") if name != first.name)]


def targets_serving(flavour: str, capability: str) -> list[str]:
    """The names of a flavour's targets whose plans a GPU can load."""
    return [name for name in targets_of(flavour) if capability in load_target(name).compute_capabilities]


def _narrowness(target: Target) -> tuple[int, str]:
    return len(target.compute_capabilities), target.name


def _parse(name: str, path: Path, values: Mapping[str, Any]) -> Target:
    known = {f.name for f in fields(Target)} - {"name", "file"}
    unknown, missing = sorted(set(values) - known), sorted(known - set(values) - {"builder"})
    if unknown or missing:
        raise TargetError(
            f"target file {path}: unknown {shown(unknown)}, missing {missing}; expected {', '.join(sorted(known))}."
        )
    builder = values.get("builder", {})
    types = {f.name: type(f.default) for f in fields(BuilderOptions)}
    if not isinstance(builder, Mapping) or not all(type(v) is types.get(k) for k, v in builder.items()):
        raise TargetError(
            f"target file {path}: [builder] is {shown(builder)}, expected "
            f"{', '.join(f'{option} ({kind.__name__})' for option, kind in types.items())}."
        )
    if values["flavour"] == "tensorrt" and "hardware_compatibility" not in builder:
        raise TargetError(
            f"target file {path}: [builder] has no hardware_compatibility, expected {' or '.join(COMPATIBILITY)}. With "
            "'none', plans are for the very model of GPU that builds them, and another one of the same compute "
            "capability would take them for its own."
        )
    options = BuilderOptions(**builder)
    _check_options(path, options, str(values["flavour"]))
    return Target(
        name=name,
        flavour=_word(path, "flavour", values["flavour"]),
        compute_capabilities=_words(path, "compute_capabilities", values["compute_capabilities"], _CAPABILITY),
        precisions=_words(path, "precisions", values["precisions"], re.compile("|".join(PRECISIONS))),
        full_masks=_count(path, "full_masks", values["full_masks"]),
        images=_span(path, "images", values["images"]),
        references=_span(path, "references", values["references"]),
        scratch_limits_mib=_limits(path, values["scratch_limits_mib"]),
        builder=options,
    )


def _word(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TargetError(f"target file {path}: {key} is {shown(value)}, expected text.")
    return value


def _words(path: Path, key: str, value: object, form: re.Pattern[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise TargetError(f"target file {path}: {key} is {shown(value)}, expected a list of text.")
    wrong = [entry for entry in value if not form.fullmatch(_word(path, key, entry))]
    if wrong:
        raise TargetError(
            f"target file {path}: {key} holds {shown(wrong[0])}, expected text of the form {form.pattern}."
        )
    return tuple(value)


def _check_options(path: Path, options: BuilderOptions, flavour: str) -> None:
    compatibility = COMPATIBILITY if flavour == "tensorrt" else ("none",)
    for name, fine, expected in (
        ("workspace_mib", 1 <= options.workspace_mib <= MOST, f"a whole number from 1 to {MOST}"),
        ("optimization_level", 0 <= options.optimization_level <= 5, "0 to 5"),
        ("hardware_compatibility", options.hardware_compatibility in compatibility, " or ".join(compatibility)),
    ):
        if not fine:
            raise TargetError(
                f"target file {path}: [builder] {name} is {shown(getattr(options, name))}, expected {expected}"
                f" for {flavour}."
            )


def _count(path: Path, key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MOST:
        raise TargetError(f"target file {path}: {key} is {shown(value)}, expected a whole number from 1 to {MOST}.")
    return value


def _span(path: Path, key: str, value: object) -> Span:
    sizes = value if isinstance(value, Mapping) else {}
    optimum, maximum = sizes.get("optimum"), sizes.get("maximum")
    if type(optimum) is int and type(maximum) is int and len(sizes) == 2 and 1 <= optimum <= maximum <= MOST:
        return Span(optimum, maximum)
    raise TargetError(f"target file {path}: [{key}] is {shown(value)}, expected 1 <= optimum <= maximum <= {MOST}.")


def _limits(path: Path, value: object) -> dict[str, int]:
    limits = dict(value) if isinstance(value, Mapping) else {}
    known = {*GRAPHS, "others"}
    fine = all(k in known and type(mib) is int and 1 <= mib <= MOST for k, mib in limits.items())
    if "others" not in limits or not fine:
        raise TargetError(
            f"target file {path}: [scratch_limits_mib] is {shown(value)}, expected whole MiB from 1 to {MOST} for "
            f"`others`, and for any of {', '.join(GRAPHS)}."
        )
    return limits


def _check_capabilities(path: Path, target: Target) -> None:
    if target.flavour not in FLAVOURS:
        raise TargetError(
            f"target file {path}: flavour {shown(target.flavour)} is not known; there are {', '.join(FLAVOURS)}."
        )
    if target.flavour != "tensorrt-rtx":
        return
    refused = [c for c in target.compute_capabilities if c not in RTX_CAPABILITIES]
    if refused:
        raise TargetError(
            f"target file {path}: tensorrt-rtx does not offer compute capability {shown(refused)}; expected some of "
            f"{', '.join(RTX_CAPABILITIES)} (no H100, H200 or B200). Use flavour tensorrt on such a GPU."
        )
    if TURING in target.compute_capabilities and len(target.compute_capabilities) > 1:
        raise TargetError(
            f"target file {path}: {TURING} stands beside other compute capabilities, and would drag them all down "
            "to Turing's kernels; expected it alone. Give it a target of its own."
        )
