"""From a measured report to a fleet, on paper: images a second, and concepts that fit beside them on each GPU.

    python -m benchmarks.capacity bench-out/bench.json --fleet h200=4:141 [--steps 50] [--reserve 4] [--busy 0.8]

Everything that is timed comes out of the report; this file knows no figure of any device. A fleet of machines that
the report was not measured on is refused, unless `--as-measured` says that they are taken to be as fast.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicface_rt.errors import InputError, MagicFaceError
from magicface_rt.schedule import is_region_step

from .schema import problems
from .table import was_quiet

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Machines:
    """A part of the fleet: so many devices of one name, with so many bytes of memory each."""

    name: str
    count: int
    memory_bytes: float

    @classmethod
    def parse(cls, text: str) -> Machines:
        """`NAME=COUNT:GB`, such as `h200=4:141`. Raises InputError for another form."""
        name, _, rest = text.partition("=")
        count, _, memory = rest.partition(":")
        try:
            found = cls(name.strip(), int(count), float(memory) * 1e9)
        except ValueError:
            raise InputError(f"fleet {text!r}: expected NAME=COUNT:GB, such as h200=4:141.") from None
        if not found.name or found.count < 1 or not found.memory_bytes > 0:
            raise InputError(f"fleet {text!r}: the name is empty, or a number is not above 0.")
        return found


@dataclass(frozen=True)
class Assumptions:
    """steps: of a request; alpha: its part in RSA; reserve_bytes: memory left free; busy: part of the time in which a
    device has work; as_measured: other devices are taken to be as fast as the measured one."""

    steps: int = 50
    alpha: float = 0.4
    reserve_bytes: float = 2e9
    busy: float = 0.8
    as_measured: bool = False


@dataclass(frozen=True)
class Capacity:
    """Of one part of the fleet. resident_concepts: kept for all steps, with one reference each; None where the report
    has no measured kept bytes or memory."""

    machines: Machines
    contender: str
    concepts: int
    images: int
    seconds_per_image: float
    images_per_second: float
    bytes_per_concept: float | None
    resident_concepts: int | None


def capacity(report: Json, fleet: Sequence[Machines], assumptions: Assumptions) -> list[Capacity]:
    """For every measured form of the SDK, in every case, on every part of the fleet.

    Raises:
        InputError: the file is no report; nothing of the SDK was measured in it; a device was not measured.
    """
    wrong = problems(report)
    if wrong:
        raise InputError(f"this is no report of `magicface-rt bench`: {wrong[0]}.")
    measured_on = str(report["machine"]["gpu"] or report["machine"]["processor"])
    for machines in fleet:
        named = re.search(rf"\b{re.escape(machines.name)}\b", measured_on, re.IGNORECASE)
        if not assumptions.as_measured and not named:
            raise InputError(
                f"fleet: {machines.name!r} was not measured; the report is of {measured_on!r}. Run `magicface-rt "
                "bench` there, or say --as-measured if it shall be taken to be as fast."
            )
    found = [
        _one(case, outcome, machines, assumptions)
        for case in report["cases"]
        for outcome in case["outcomes"]
        for machines in fleet
        if outcome["status"] == "measured" and outcome["kind"] in ("bare", "kept")
    ]
    if not found:
        raise InputError("nothing of the SDK was measured in this report, so there is nothing to count with.")
    return found


def _one(case: Json, outcome: Json, machines: Machines, assumed: Assumptions) -> Capacity:
    first, second = outcome["steps"]["rsa"]["median"], outcome["steps"]["rba"]["median"]
    rba = sum(is_region_step(i, assumed.steps, assumed.alpha) for i in range(assumed.steps))
    seconds = (assumed.steps - rba) * first + rba * second
    if outcome["requests"]:
        for stage in ("text", "vae_encode", "decode"):
            if stage in outcome["requests"]["stages"]:
                seconds += outcome["requests"]["stages"][stage]["median"]
    kept = outcome["counts"]["kept_bytes"]
    per_concept = kept * assumed.steps / case["concepts"] if kept and case["concepts"] else None
    on_host = outcome["backend"].endswith("cpu")
    peak = outcome["host_peak_bytes"] if on_host else outcome["device_peak_bytes"]
    resident = None
    if per_concept and peak:
        free = machines.memory_bytes - assumed.reserve_bytes - peak
        resident = max(0, int(free // per_concept))
    return Capacity(
        machines,
        outcome["contender"],
        case["concepts"],
        case["images"],
        seconds / case["images"],
        machines.count * assumed.busy * case["images"] / seconds,
        per_concept,
        resident,
    )


def text(report: Json, found: Sequence[Capacity], assumed: Assumptions) -> str:
    """A Markdown table under everything that it rests on."""
    machine = report["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    case = report["cases"][0]
    quiet = all(was_quiet(report, one) for one in report["cases"])
    lines = [
        f"Measured on {where}, {machine['started']}, {'quiet' if quiet else 'NOT quiet'}; "
        f"{case['width']} x {case['height']}, {case['dtype']}.",
        "",
        "Assumed:",
        "",
        f"- a request has {assumed.steps} steps, RSA while the step is at most {assumed.alpha:g} of them; a step costs "
        "its measured median; text encoder, VAE encoder and decoder theirs where requests were measured, else nothing;",
        "- devices work independently, and no time goes into the network, queues or saving pictures;",
        f"- each is busy {assumed.busy:.0%} of the time;",
        "- a concept has one reference with a mask as in the case, kept for all steps; memory for it is what is left "
        f"of a device after the measured peak and {assumed.reserve_bytes / 1e9:g} GB;",
    ]
    if assumed.as_measured:
        lines.append("- **every device is taken to be as fast as the measured one, which was not measured.**")
    lines += [
        "",
        "| fleet | contender | N | images | s an image | images a second | MB a concept | concepts resident a device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        size = "not measured" if one.bytes_per_concept is None else f"{one.bytes_per_concept / 1e6:.4g}"
        resident = "not measured" if one.resident_concepts is None else str(one.resident_concepts)
        lines.append(
            f"| {one.machines.count} x {one.machines.name} | {one.contender} | {one.concepts} | {one.images} | "
            f"{one.seconds_per_image:.4g} | {one.images_per_second:.4g} | {size} | {resident} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=str(__doc__).splitlines()[0])
    parser.add_argument("report", type=Path, help="bench.json")
    parser.add_argument("--fleet", action="append", required=True, metavar="NAME=COUNT:GB")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--alpha", type=float, default=0.4)
    parser.add_argument("--reserve", type=float, default=2.0, metavar="GB")
    parser.add_argument("--busy", type=float, default=0.8)
    parser.add_argument("--as-measured", action="store_true")
    a = parser.parse_args(argv)
    try:
        if a.steps < 1 or not 0 <= a.alpha <= 1 or not 0 < a.busy <= 1 or not a.reserve >= 0:
            raise InputError("steps is below 1, alpha not in 0..1, busy not in 0..1, or reserve below 0.")
        try:
            report = json.loads(a.report.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"report {a.report} cannot be read: {error}.") from error
        assumed = Assumptions(a.steps, a.alpha, a.reserve * 1e9, a.busy, a.as_measured)
        found = capacity(report, [Machines.parse(part) for part in a.fleet], assumed)
        print(text(report, found, assumed), end="")
    except MagicFaceError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
