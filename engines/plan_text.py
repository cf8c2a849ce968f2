"""What a plan's own bytes say about its memory and its kernels, without a GPU.

A plan can only be deserialised and inspected where there is a GPU. But it holds its compiled programs as text:

    NLYM <u32> <u64 length> header { version = 5 ... region = { name=... size=... } ... }
    descriptors { tensor={ ... region="..." } ... } main { function={ name=... layers="..." } ... } shape_main { ... }

Each program begins with that signature, and the length counts the text after it. A plan has one program for each
optimisation profile, which owns the memory regions, and a small one for every piece that is compiled at first load,
which owns constants only. The text is there at every profiling verbosity (seen with TensorRT-RTX 1.7.1).

The format is not documented and may change. So the reader checks that what it took for regions and kernels is complete
and consistent, and reports in `PlanFacts.problem` if it is not; facts with a problem must not be trusted.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

Buffer = bytes | bytearray | memoryview | mmap.mmap

MAX_TEXT_BYTES = 256 << 20
"""A program's text longer than this is not read. That of Stable Diffusion's largest graph has 3 MB."""

_SIGNATURE = re.compile(rb"NLYM.{4}(.{8})header \{\n", re.DOTALL)
_SIGNATURE_BYTES = 16
_REGION_START = re.compile(rb"(?m)^[^\S\n]*region\s*=")
_REGION = re.compile(
    rb"(?m)^  region = \{ name=(\S+) size=(\d{1,19}) alignment=\d+ instance=\d+ type=(\w+) place=(\w+) ([^}\n]*)\}$"
)
_REGION_REFERENCE = re.compile(rb' region="([^"\n]+)"')
_MAIN = re.compile(rb"(?m)^main \{\n")
_MAIN_END = re.compile(rb"(?m)^\}$")
_FUNCTION_START = re.compile(rb"(?m)^[^\S\n]*function\s*=")
_STEP = re.compile(rb'(?m)^  (\w+)=\{ name=("[^"\n]*"|\S+) (?:fqn=(\S+) )?([^\n]*)\}$')
_LAYERS = re.compile(rb' layers="([^"\n]*)"')
_LAYER_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Region:
    """A piece of memory of a program. `place`: accelerator or host; `kind`: user (the caller lends it) or system."""

    name: str
    bytes: int
    kind: str
    place: str
    constant: bool


@dataclass(frozen=True)
class Kernel:
    """A step of a program: a compiled function or a library call.

    `program` numbers the programs of the plan. `layers`: metadata of the network's layers that it computes, each as
    `[ONNX Layer: node | call (Function)]`. `kind`: `function` for compiled ones; others are fully_connected, corrltn,
    runtime_fusion, ...
    """

    program: int
    kind: str
    name: str
    fqn: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class PlanFacts:
    """What was read from a plan. `problem` says why the plan was not understood, and is empty if it was."""

    plan_bytes: int
    programs: int
    regions: tuple[Region, ...]
    kernels: tuple[Kernel, ...]
    problem: str = ""

    @property
    def understood(self) -> bool:
        return not self.problem

    @property
    def scratch_bytes(self) -> int:
        """Device memory that an execution context needs while it runs, besides inputs, outputs and weights.

        The sum of all regions on the accelerator that are not constant. The regions of one program live side by side:
        the compiler has already laid tensors whose lives do not overlap into the same region. Inputs and outputs have
        no region. Programs of several profiles do not run together, so for a plan with more than one the sum is an
        upper bound.
        """
        return sum(r.bytes for r in self.regions if r.place == "accelerator" and not r.constant)

    def largest_regions(self, count: int) -> tuple[Region, ...]:
        """The largest regions that count as scratch, largest first."""
        scratch = (r for r in self.regions if r.place == "accelerator" and not r.constant)
        return tuple(sorted(scratch, key=lambda r: (-r.bytes, r.name))[:count])


def read_plan(plan: Buffer) -> PlanFacts:
    """Read the programs in a plan's bytes.

    The plan is searched in place, and only the programs' text is copied, one program at a time: a plan of 1.8 GB takes
    a second or two and a few megabytes. No content makes it raise; look at `problem`.
    """
    if isinstance(plan, memoryview):
        plan = plan.cast("B")  # the library's own buffer declares its items as floats
    regions: list[Region] = []
    kernels: list[Kernel] = []
    programs = 0
    problem = ""
    for text, fault in _programs(plan):
        found = _regions(text)
        steps, step_fault = _kernels(text, programs)
        fault = fault or _check_regions(text, found) or step_fault
        problem = problem or (f"program {programs}: {fault}" if fault else "")
        regions += found
        kernels += steps
        programs += 1
    if not programs:
        problem = "no program text was found"
    elif not problem and not regions:
        problem = f"{programs} programs were found, none with a memory region"
    elif not problem and not any(k.kind == "function" for k in kernels):
        problem = f"{programs} programs were found, none with a compiled function"
    return PlanFacts(len(plan), programs, tuple(regions), tuple(kernels), problem)


def _programs(plan: Buffer) -> Iterator[tuple[bytes, str]]:
    """Yield the text of each program with what is wrong with it, or an empty string."""
    end_of_last = 0
    for match in _SIGNATURE.finditer(plan):
        start = match.start() + _SIGNATURE_BYTES
        if start < end_of_last:
            continue  # inside the text of the program before it
        length = int.from_bytes(match.group(1), "little")
        if length > len(plan) - start:
            yield b"", f"its text of {length} bytes ends after the plan"
        elif length > MAX_TEXT_BYTES:
            yield b"", f"its text has {length} bytes, more than {MAX_TEXT_BYTES}"
        else:
            end_of_last = start + length
            text = bytes(plan[start:end_of_last])
            yield text, "" if text.endswith(b"}\n") else "its text does not end with a closing brace"


def _regions(text: bytes) -> list[Region]:
    return [
        Region(_decode(name), int(size), _decode(kind), _decode(place), b"constant=true" in rest)
        for name, size, kind, place, rest in _REGION.findall(_header(text))
    ]


def _check_regions(text: bytes, found: list[Region]) -> str:
    """Describe a region line that was not understood, or a region used but not listed: either way bytes are missing."""
    lines = len(_REGION_START.findall(_header(text)))
    if lines != len(found):
        return f"{lines} lines look like memory regions, {len(found)} of them were understood"
    unlisted = {_decode(name) for name in _REGION_REFERENCE.findall(text)} - {r.name for r in found}
    if unlisted:
        return f"tensors lie in the memory region {min(unlisted)!r}, which the header does not list"
    return ""


def _header(text: bytes) -> bytes:
    end = text.find(b"\n}\n")
    return text if end < 0 else text[: end + 1]


def _kernels(text: bytes, program: int) -> tuple[list[Kernel], str]:
    begin = _MAIN.search(text)
    end = None if begin is None else _MAIN_END.search(text, begin.end())
    if begin is None or end is None:
        return [], "its text has no main section"
    main = text[begin.end() : end.start()]
    steps = []
    for kind, name, fqn, rest in _STEP.findall(main):
        cited = _LAYERS.search(rest)  # what the compiler added by itself, such as a transposition, cites none
        layers = tuple(filter(None, _decode(cited.group(1)).split(_LAYER_SEPARATOR))) if cited else ()
        steps.append(Kernel(program, _decode(kind), _decode(name).strip('"'), _decode(fqn), layers))
    lines = len(_FUNCTION_START.findall(main))
    understood = sum(step.kind == "function" and bool(step.fqn) for step in steps)
    if lines != understood:
        return steps, f"{lines} lines look like compiled functions, {understood} of them were understood"
    return steps, ""


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")
