"""The gate that every built plan passes: are the large attentions fused, and does it fit the memory?

An attention that TensorRT decomposes stores its logits: gigabytes, where a fused one needs megabytes, and nothing else
shows this before a GPU runs out of memory. `check_plan` judges by the plan's own text, which works without a GPU; where
there is one, `inspect_engine` asks the library, and `agree` demands that both say the same.

A verdict is `fine`, `closed` (the plan must not be kept), or `unknown` (what was read does not suffice for either).
A plan that is not understood is never called fine.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from magicface_rt.errors import GateError

from .attentions import Attention
from .plan_text import Buffer, Kernel, PlanFacts, read_plan

Verdict = Literal["fine", "closed", "unknown"]

SCRATCH_TOLERANCE = 0.1
"""How far the plan's text and the engine may differ in scratch, as a share of the larger: alignment, and workspaces of
library calls that are chosen on the GPU."""
SCRATCH_SLACK_BYTES = 16 << 20
"""The same in bytes, for small graphs: two workspaces of 8 MB."""

_FUSED_KERNEL = re.compile(r"(?:^|_)f?mha(?:_|$)|flash", re.IGNORECASE)
"""TensorRT-RTX 1.7.1: `_gemm_mha_v2`; the inspector appends its place, `_gemm_mha_v2_myl0_4`."""
_METADATA_ENTRY = re.compile(r"\[ONNX Layer: [^\]]*\]")


@dataclass(frozen=True)
class GateReport:
    """What the gate saw of one graph's plan.

    `expected` counts the attentions that must be fused, and `fused` those of them that are; `decomposed` names those
    that are not, with their sizes, and `unseen` those whose state the kernels do not show. `attentions` and
    `attentions_fused` count all calls, small ones included. `scratch_bytes` is None if it could not be read.
    `causes`: why the verdict is not fine, most likely first.
    """

    graph: str
    verdict: Verdict
    scratch_bytes: int | None
    scratch_limit: int
    expected: int
    fused: int
    attentions: int
    attentions_fused: int
    decomposed: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    inspected: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types, for manifests and `--json`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        scratch = "scratch not read" if self.scratch_bytes is None else f"{_size(self.scratch_bytes)} of scratch"
        return f"{self.graph}: {self.verdict}, {self.fused} of {self.expected} large attentions fused, {scratch}"

    def raise_if_closed(self) -> None:
        """Raise GateError if the verdict is closed, naming graph, attentions, the likely cause and what to do."""
        if self.verdict != "closed":
            return
        parts = [f"graph {self.graph}: the plan is refused."]
        if self.decomposed:
            parts.append(
                f"{len(self.decomposed)} of {self.expected} large attentions were decomposed, expected none: "
                f"{_some(self.decomposed)}."
            )
        if self.scratch_bytes is not None and self.scratch_bytes > self.scratch_limit:
            parts.append(
                f"It needs {_size(self.scratch_bytes)} of scratch, expected at most {_size(self.scratch_limit)}."
            )
        if self.causes:
            parts.append(f"Likely cause: {_some(self.causes)}.")
        parts.append(
            "Compare the operators' bodies with those that fuse (docs/design.md, one operator and two bodies)"
            + ("." if self.decomposed else ", or build for smaller batches and fewer kept tokens.")
        )
        raise GateError(" ".join(parts))


@dataclass(frozen=True)
class Inspection:
    """What the library reports about an engine on a GPU. `problem` is empty if its answer was understood."""

    scratch_bytes: int
    kernels: tuple[Kernel, ...]
    problem: str = ""


def check_plan(graph: str, plan: Buffer, attentions: Sequence[Attention], scratch_limit: int) -> GateReport:
    """Judge a plan by its own text; needs no GPU.

    `attentions`: what `find_attentions` found in the network that the plan was built from. `scratch_limit`: bytes.
    """
    facts = read_plan(plan)
    if not facts.understood:
        expected = [a for a in attentions if a.expected]
        return GateReport(
            graph=graph,
            verdict="unknown",
            scratch_bytes=None,
            scratch_limit=scratch_limit,
            expected=len(expected),
            fused=0,
            attentions=len(attentions),
            attentions_fused=0,
            unseen=tuple(map(str, expected)),
            causes=(f"the plan's text was not understood: {facts.problem}",),
        )
    return _judge(graph, facts.kernels, facts.scratch_bytes, attentions, scratch_limit, _memory_causes(facts))


def _judge(
    graph: str,
    kernels: Sequence[Kernel],
    scratch_bytes: int,
    attentions: Sequence[Attention],
    scratch_limit: int,
    memory_causes: Sequence[str],
) -> GateReport:
    states = _states(kernels, attentions)
    expected = [(a, state) for a, state in zip(attentions, states, strict=True) if a.expected]
    decomposed = [a for a, state in expected if state == "decomposed"]
    unseen = [a for a, state in expected if state == "unseen"]
    over = scratch_bytes > scratch_limit
    causes: list[str] = []
    if decomposed or over:
        # If the scratch is too large although no expected attention was decomposed, the reason may be a mask, or
        # attentions too small or too odd to be expected; so the obstacles of all attentions are reported then.
        suspects = decomposed or list(attentions)
        causes += [f"{a.name}: {text}" for a in suspects for text in a.obstacles]
        if not causes:
            causes += [f"{a.name}: {text}" for a in suspects for text in a.hints]
        if decomposed and not causes:
            causes.append("nothing in the network is known to prevent fusion here, so the library may have changed")
    if over:
        causes += memory_causes
    if unseen:
        causes.append(f"no kernel that is known computes {len(unseen)} of the attentions, such as {unseen[0]}")
    return GateReport(
        graph=graph,
        verdict="closed" if decomposed or over else "unknown" if unseen else "fine",
        scratch_bytes=scratch_bytes,
        scratch_limit=scratch_limit,
        expected=len(expected),
        fused=sum(state == "fused" for _, state in expected),
        attentions=len(attentions),
        attentions_fused=states.count("fused"),
        decomposed=tuple(map(str, decomposed)),
        unseen=tuple(map(str, unseen)),
        causes=tuple(dict.fromkeys(causes)),
    )


def _states(kernels: Sequence[Kernel], attentions: Sequence[Attention]) -> list[str]:
    """Classify each attention as `fused`, `decomposed` or `unseen`.

    An attention is fused if every program that mentions its softmax does so in a fused kernel. It is unseen if nothing
    mentions its softmax, or if a single kernel of unknown name computes all of it: another version of the library may
    have renamed its kernels, which proves nothing either way.
    """
    citing: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for layer in set(kernel.layers):
            citing.setdefault(layer, []).append(kernel)
    calls = Counter(a.layer for a in attentions)  # more than one only where nodes share a name
    states = []
    for attention in attentions:
        found = citing.get(attention.layer, [])
        fused = Counter(k.program for k in found if _FUSED_KERNEL.search(k.name))
        if found and all(fused[program] >= calls[attention.layer] for program in {k.program for k in found}):
            states.append("fused")
            continue
        involved = {id(k) for layer in (attention.layer, *attention.products) for k in citing.get(layer, [])}
        states.append("decomposed" if found and len(involved) > 1 else "unseen")
    return states


def _memory_causes(facts: PlanFacts) -> list[str]:
    sizes = ", ".join(_size(r.bytes) for r in facts.largest_regions(3))
    return [f"the largest memory regions are {sizes}"]


def inspect_engine(engine: Any, trt: Any) -> Inspection:
    """Ask a deserialised engine (on a GPU) for its kernels and its scratch.

    `trt`: the flavour's module. The plan must have been built with ProfilingVerbosity.DETAILED; otherwise its layers
    carry no metadata and the answer is not understood.
    """
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    kernels, problem = _inspected_kernels(text)
    return Inspection(int(engine.device_memory_size_v2), kernels, problem)


def _inspected_kernels(text: str) -> tuple[tuple[Kernel, ...], str]:
    try:
        layers = json.loads(text, strict=False)["Layers"]  # metadata holds a control character as separator
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return (), f"the inspector's answer is not the expected JSON ({type(error).__name__}: {error})"
    if not isinstance(layers, list) or not all(isinstance(x, dict) for x in layers):
        return (), "the inspector names layers without details; build with ProfilingVerbosity.DETAILED"
    kernels = tuple(
        Kernel(
            program=0,
            kind=str(x.get("LayerType", "")),
            name=str(x.get("Name", "")),
            fqn=str(x.get("TacticName", "")),
            layers=tuple(_METADATA_ENTRY.findall(str(x.get("Metadata", "")))),
        )
        for x in layers
    )
    if not any(kernel.layers for kernel in kernels):
        return kernels, "the inspector's layers carry no metadata; build with ProfilingVerbosity.DETAILED"
    return kernels, ""


def agree(report: GateReport, inspection: Inspection, attentions: Sequence[Attention]) -> GateReport:
    """Combine the verdicts of the plan's text and of the inspector.

    The result is closed if either is. It is fine only if both are, with as many attentions fused and the scratch equal
    within SCRATCH_TOLERANCE or SCRATCH_SLACK_BYTES; otherwise unknown, with the disagreement among the causes.
    """
    if inspection.problem:
        verdict: Verdict = "closed" if report.verdict == "closed" else "unknown"
        causes: Iterable[str] = (*report.causes, inspection.problem)
        return replace(report, verdict=verdict, causes=tuple(causes), inspected=True)
    seen = _judge(
        report.graph, inspection.kernels, inspection.scratch_bytes, attentions, report.scratch_limit, memory_causes=()
    )
    disagreements = _disagreements(report, seen)
    if "closed" in (report.verdict, seen.verdict):
        verdict = "closed"
    elif disagreements or "unknown" in (report.verdict, seen.verdict):
        verdict = "unknown"
    else:
        verdict = "fine"
    return replace(
        report,
        verdict=verdict,
        scratch_bytes=max(report.scratch_bytes or 0, inspection.scratch_bytes),
        fused=min(report.fused, seen.fused),
        attentions_fused=min(report.attentions_fused, seen.attentions_fused),
        decomposed=tuple(dict.fromkeys((*report.decomposed, *seen.decomposed))),
        causes=tuple(dict.fromkeys((*report.causes, *seen.causes, *disagreements))),
        inspected=True,
    )


def _disagreements(report: GateReport, seen: GateReport) -> list[str]:
    found = []
    if report.scratch_bytes is not None and seen.scratch_bytes is not None:
        difference = abs(report.scratch_bytes - seen.scratch_bytes)
        allowed = max(SCRATCH_SLACK_BYTES, SCRATCH_TOLERANCE * max(report.scratch_bytes, seen.scratch_bytes))
        if difference > allowed:
            found.append(
                f"the plan's text says {_size(report.scratch_bytes)} of scratch, the engine {_size(seen.scratch_bytes)}"
            )
    if report.fused != seen.fused:
        found.append(f"the plan's text says {report.fused} attentions are fused, the inspector {seen.fused}")
    return found


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _some(texts: Sequence[str], count: int = 4) -> str:
    more = len(texts) - count
    return "; ".join(texts[:count]) + (f"; and {more} more" if more > 0 else "")
