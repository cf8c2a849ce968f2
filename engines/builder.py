"""From a bundle to plans: parse a graph, give it its profile and options, build it, pass the gate, keep it."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from magicface_rt.bundle import WEIGHTS, Bundle
from magicface_rt.denoiser import SERVED_OUTPUTS
from magicface_rt.errors import BuildError, Cancelled, GateError, TargetError

from . import gpu, timing_cache
from .attentions import Attention, find_attentions
from .flavour import Flavour
from .gate import GateReport, agree, check_plan, inspect_engine
from .log import LOGGER, Advance, progress_monitor, trt_logger
from .plan_key import PlanKey, graph_hash
from .profiles import profile
from .store import EngineStore, Plan
from .targets import Target

Report = Callable[[str], object]

GRAPH_RUNTIME = "tensorrt"
_COMPATIBILITY = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}


def plan_key(bundle: Bundle, graph: str, flavour: Flavour, target: Target) -> PlanKey:
    """Return the key of a graph's plan: what it must have been made from and for.

    Raises:
        BundleError: the bundle does not hold that graph.
        TargetError: the target is for another flavour or precision.
    """
    contract = bundle.graph(graph)
    target.check_precision(bundle.dtype)
    if target.flavour != flavour.name:
        raise TargetError(f"target {target.name} is for {target.flavour}, expected one for {flavour.name}.")
    hashes = [str(bundle.files[name]["sha256"]) for name in (contract.files[GRAPH_RUNTIME], WEIGHTS)]
    return PlanKey(
        graph=graph,
        graph_hash=graph_hash(*hashes),
        flavour=flavour.name,
        flavour_version=flavour.version,
        precision=bundle.dtype,
        compute_capabilities=target.compute_capabilities,
        profile=profile(bundle, contract, target),
        builder_options=asdict(target.builder),
    )


def build(
    bundle: Bundle,
    flavour: Flavour,
    target: Target,
    store: EngineStore,
    *,
    graphs: Sequence[str] | None = None,
    device: int = 0,
    report: Report = lambda _: None,
    advance: Advance | None = None,
) -> list[Plan]:
    """Build a plan for each graph of the bundle, or of `graphs`, unless the store has it already.

    Raises: as `build_plan`. Plans that were built before the error stay in the store.
    """
    names = list(bundle.graphs) if graphs is None else list(graphs)
    plans = []
    with contextlib.ExitStack() as in_use:  # else the store's size limit may remove one as the next is built
        for name in names:
            plan = build_plan(bundle, name, flavour, target, store, device=device, report=report, advance=advance)
            in_use.enter_context(store.in_use(plan))
            plans.append(plan)
    return plans


def build_plan(
    bundle: Bundle,
    graph: str,
    flavour: Flavour,
    target: Target,
    store: EngineStore,
    *,
    device: int = 0,
    report: Report = lambda _: None,
    advance: Advance | None = None,
) -> Plan:
    """Return the plan of a graph: the store's if it has one, else a newly built one.

    `device`: ordinal of the GPU that `tensorrt` builds on and that the gate asks, where there is one.
    `report` is called with a description of what is being done. `advance` is called from one of TensorRT's threads with
    a phase's name, the steps done and its number of steps; if it returns False the build ends with `Cancelled`.

    Raises:
        BuildError: the graph could not be parsed or built; GateError: the plan was not fit to be kept.
        TargetError: the target is for another flavour, precision or GPU.
        BundleError: a file of the bundle was replaced during the build.
        StoreError: the store cannot be written.
    """
    key = plan_key(bundle, graph, flavour, target)

    def make(path: Path) -> Mapping[str, Any]:
        report(f"{graph}: building for {', '.join(key.compute_capabilities)} ({flavour.name} {flavour.version})")
        return _make(_Build(bundle, key, flavour, target, device, advance), store.root, path)

    plan = store.build(key, make, on_wait=lambda: report(f"{graph}: another process builds the same plan; waiting"))
    _check_scratch(plan, target)
    return plan


def _check_scratch(plan: Plan, target: Target) -> None:
    """Check the scratch limit of a stored plan: limits are not part of a key, so it may have been built under another.

    Raises:
        GateError: the plan needs more scratch than the target allows.
    """
    graph, scratch = plan.key.graph, plan.facts.get("gate", {}).get("scratch_bytes")
    if scratch is not None and scratch > target.scratch_limit(graph):
        raise GateError(
            f"graph {graph}: the plan in the store needs {scratch / 1e6:.1f} MB of scratch, and target {target.name} "
            f"allows {target.scratch_limit(graph) / 1e6:.1f} MB. Raise its [scratch_limits_mib], or build for fewer "
            "images and fewer full masks."
        )


def _make(build: _Build, root: Path, path: Path) -> Mapping[str, Any]:
    start = time.perf_counter()
    try:
        build.start()
        build.parse()
        parsed = time.perf_counter()
        build.write(root, path)
        built = time.perf_counter()
        build.bundle.check_unchanged()  # the plan is kept under the hash of what was there when it was opened
        gate = build.judge(path)
    finally:
        build.close()
    LOGGER.log(logging.WARNING if gate.verdict == "unknown" else logging.INFO, "%s", gate)
    return {
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bundle": build.bundle.hash,
        "target": build.target.name,
        "parse_seconds": round(parsed - start, 2),
        "build_seconds": round(built - parsed, 2),
        "gate": gate.to_dict(),
    }


class _Build:
    """One graph on its way to a plan. The library's objects live until `close`."""

    def __init__(
        self, bundle: Bundle, key: PlanKey, flavour: Flavour, target: Target, device: int, advance: Advance | None
    ) -> None:
        trt = self.trt = flavour.trt
        self.bundle, self.key, self.flavour, self.target, self.device = bundle, key, flavour, target, device
        self.graph = key.graph
        self.logger = trt_logger(trt)
        self.monitor = progress_monitor(trt, advance) if advance is not None else None
        self.builder: Any = None
        self.network: Any = None
        self.config: Any = None
        self.attentions: tuple[Attention, ...] = ()

    def start(self) -> None:
        """Check the GPU, then create the builder and an empty network."""
        gpu.check_target(self.flavour, self.target, self.device)
        self.builder = self.trt.Builder(self.logger)
        if self.builder is None:
            raise BuildError(f"graph {self.graph}: {self.flavour.name} made no builder. {self.logger.reason()}")
        self.network = self.builder.create_network(_network_flags(self.trt))

    def close(self) -> None:
        """Free the library's objects now. A cancelled build has threads that still call the monitor; they end here,
        and must not outlive the interpreter."""
        self.config = self.network = self.builder = None

    def parse(self) -> None:
        """Parse the graph file into the network, keep only the wanted outputs, and find the attentions."""
        contract = self.bundle.graph(self.graph)
        path = self.bundle.path / contract.files[GRAPH_RUNTIME]
        parser = self.trt.OnnxParser(self.network, self.logger)
        if not parser.parse_from_file(str(path)):
            raise BuildError(f"graph {self.graph}: {self.flavour.name} cannot parse {path.name}: {_errors(parser)}")
        self._check_contract(path)
        wanted = SERVED_OUTPUTS.get(self.graph)  # the others are read by `verify` alone
        if wanted is not None and not self.target.builder.parity_outputs:
            for tensor in [self.network.get_output(i) for i in range(self.network.num_outputs)]:
                if tensor.name not in wanted:
                    self.network.unmark_output(tensor)
        largest = {name: shapes[2] for name, shapes in self.key.profile.items()}
        regions = len(self.bundle.injection_layers) if self.graph == "denoise_step" else 0
        self.attentions = find_attentions(self.network, largest, self.graph, regions)

    def _check_contract(self, path: Path) -> None:
        contract = self.bundle.graph(self.graph)
        network = self.network
        found = {network.get_input(i).name for i in range(network.num_inputs)}
        outputs = {network.get_output(i).name for i in range(network.num_outputs)}
        if found != {t.name for t in contract.inputs} or outputs != {t.name for t in contract.outputs}:
            raise BuildError(
                f"graph {self.graph}: {path.name} has inputs {sorted(found)} and outputs {sorted(outputs)}, which are "
                "not those of the bundle's contract. Export the bundle again."
            )

    def write(self, root: Path, path: Path) -> None:
        """Build the plan into a file."""
        self.config = self._config(root)
        plan = self.builder.build_serialized_network(self.network, self.config)
        if self.monitor is not None and self.monitor.failure is not None:
            raise self.monitor.failure
        if plan is None:
            if self.monitor is not None and self.monitor.cancelled:
                raise Cancelled(f"building the plan of {self.graph} was cancelled.")
            raise BuildError(f"graph {self.graph}: {self.flavour.name} could not build it. {self.logger.reason()}")
        with path.open("wb") as stream:
            stream.write(memoryview(plan))
            stream.flush()
            os.fsync(stream.fileno())
        if not self.flavour.builds_without_gpu:
            timing_cache.save(root, self.flavour, self.device, self.config.get_timing_cache())

    def _config(self, root: Path) -> Any:
        trt, options = self.trt, self.target.builder
        config = self.builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the gate reads the names of layers and kernels
        config.builder_optimization_level = options.optimization_level
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        if self.monitor is not None:
            config.progress_monitor = self.monitor
        _switch(config, trt.BuilderFlag.TF32, options.tf32)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # Else a context may allocate as it runs, which a capture does not allow and no plan of memory knows of.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if self.flavour.builds_without_gpu:
            capabilities = self.key.compute_capabilities
            config.num_compute_capabilities = len(capabilities)
            for i, capability in enumerate(capabilities):
                if not config.set_compute_capability(_capability(trt, capability), i):
                    raise BuildError(
                        f"graph {self.graph}: {self.flavour.name} {self.flavour.version} refused compute capability "
                        f"{capability} of target {self.target.name}. {self.logger.reason()}"
                    )
        else:
            if options.hardware_compatibility != "none":
                level = getattr(trt.HardwareCompatibilityLevel, _COMPATIBILITY[options.hardware_compatibility], None)
                if level is None:
                    raise BuildError(
                        f"graph {self.graph}: {self.flavour.name} {self.flavour.version} cannot build for hardware "
                        f"compatibility {options.hardware_compatibility}, which target {self.target.name} asks for. "
                        "Install a newer one."
                    )
                config.hardware_compatibility_level = level
            timing_cache.load(root, self.flavour, self.device, config)
        self._add_profile(config)
        return config

    def _add_profile(self, config: Any) -> None:
        if not self.key.profile:
            return
        profile = self.builder.create_optimization_profile()
        for name, (smallest, best, largest) in self.key.profile.items():
            profile.set_shape(name, smallest, best, largest)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(
                f"graph {self.graph}: {self.flavour.name} refused the optimisation profile "
                f"{dict(self.key.profile)}. {self.logger.reason()}"
            )

    def judge(self, path: Path) -> GateReport:
        """Run the gate on the written plan, and on the loaded engine too where there is a GPU that can load it.

        Raises:
            GateError: the verdict is closed.
        """
        limit = self.target.scratch_limit(self.graph)
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            gate = check_plan(self.graph, plan, self.attentions, limit)
        if gpu.can_load(self.key.compute_capabilities, self.device):
            runtime = self.trt.Runtime(self.logger)
            self.logger.clear_errors()
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is not None:
                gate = agree(gate, inspect_engine(engine, self.trt), self.attentions)
            elif self.flavour.builds_without_gpu:  # so it may be that the GPU is busy
                LOGGER.warning(
                    "graph %s: the plan was judged by its text alone, since it was not loaded here. %s",
                    self.graph,
                    self.logger.reason(),
                )
            else:
                raise BuildError(
                    f"graph {self.graph}: the plan that was built cannot be loaded here. {self.logger.reason()}"
                )
        gate.raise_if_closed()
        return gate


def _network_flags(trt: Any) -> int:
    """Flags that make a network strongly typed, where there is a choice: TensorRT-RTX and TensorRT 11 have no other."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _switch(config: Any, flag: Any, on: bool) -> None:
    if on:
        config.set_flag(flag)
    else:
        config.clear_flag(flag)


def _capability(trt: Any, capability: str) -> Any:
    name = "SM" + capability.replace(".", "")
    try:
        return getattr(trt.ComputeCapability, name)
    except AttributeError:
        offered = [c for c in dir(trt.ComputeCapability) if c.startswith("SM")]
        raise TargetError(
            f"this version of the library does not build for compute capability {capability}; it offers "
            f"{', '.join(offered)}. Use another target, or flavour tensorrt on such a GPU."
        ) from None


def _errors(parser: Any) -> str:
    said = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        where = [f"node {error.node_name()!r} ({error.node_operator()})"]
        where += [f"in {name}" for name in error.local_function_stack()]
        said.append(f"{' '.join(where)}: {error.desc()}")
    return "; ".join(said[:3]) or "it gave no reason"
