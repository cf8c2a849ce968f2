"""Estimate a fleet from a measured report: images a second, and concepts that fit beside them on each device.

    python -m benchmarks.capacity bench-out/bench.json --fleet h200=4:141 [--steps 50] [--reserve 4] [--busy 0.8]

All timings come from the report; no figure of any device is built in. A part of the fleet gets what was measured on the
GPU or the processor of that name. Other parts are refused, unless `--as-measured` says which of the two they are
assumed to be as fast as.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magicface_rt.errors import InputError, MagicFaceError

from .fleet import Assumptions, Capacity, Machines, Shape, bears, capacity, totals
from .schema import read_report

Json = Mapping[str, Any]
SHAPE = ["bundle", "size", "dtype", "N", "masks", "images", "steps measured"]
OF_A_PART = ["s an image", "images a second", "MB a concept", "concepts resident a device", "notes"]


def text(report: Json, found: Sequence[Capacity], fleet: Sequence[Machines], assumed: Assumptions) -> str:
    """Format as Markdown: the assumptions, a table of the parts, and one of the whole fleet."""
    machine = report["machine"]
    lines = [
        f"Measured {machine['started']}, commit {machine['commit'] or 'unknown'}, on {machine['processor']}, "
        f"{machine['cores']} cores; GPU: {machine['gpu'] or 'none'}.",
        "",
        "Assumed:",
        "",
        *(f"- {one};" for one in _assumptions(assumed)),
    ]
    for name, where in dict.fromkeys((one.machines.name, one.measured_on) for one in found):
        if not bears(where, name):
            lines.append(f"- **{name} is taken to be as fast as {where}, without having been measured;**")
    numbers: dict[str, int] = {}
    rows = []
    for one in found:
        marks = [f"[{numbers.setdefault(note, len(numbers) + 1)}]" for note in one.notes]
        rows.append(
            [
                f"{one.machines.count} x {one.machines.name}",
                one.measured_on,
                one.title,
                *_shape(one.shape),
                f"{one.seconds_per_image:.4g}",
                f"{one.images_per_second:.4g}" if one.images_per_second else "does not fit",
                "none kept" if one.bytes_per_concept is None else f"{one.bytes_per_concept / 1e6:.4g}",
                _resident(one.resident, one.bytes_per_concept is None),
                " ".join(marks),
            ]
        )
    lines += ["", *_table(["fleet", "measured on", "contender", *SHAPE, *OF_A_PART], rows), ""]
    lines += [f"[{number}] {note}.  " for note, number in numbers.items()]
    lines += ["", "The whole fleet:", ""]
    head = ["kind", *SHAPE, "images a second", "concepts resident, each on one device", "without"]
    lines += _table(
        head,
        [
            [
                total.kind,
                *_shape(total.shape),
                f"{total.images_per_second:.4g}",
                _resident(total.resident, total.kind == "bare" or not total.shape.concepts),
                ", ".join(total.without),
            ]
            for total in totals(found, fleet)
        ],
    )
    return "\n".join(lines) + "\n"


def _assumptions(assumed: Assumptions) -> list[str]:
    return [
        f"a request has {assumed.steps} steps, RSA while the step is at most {assumed.alpha:g} of them; a step costs "
        "its measured median, the one in the middle of the schedule standing for all; text encoder, VAE encoder and "
        "decoder cost theirs where requests were measured, else nothing, and the row says so",
        "a device makes one request after the other, each of the row's images; no time goes into the network, queues, "
        "loading, warming up or saving pictures",
        f"each device is busy {assumed.busy:.0%} of the time; devices do not slow each other down",
        "a device that bears a measured one's name is like it in everything: clock, power, cores, host, versions; of "
        "the GPUs of a machine the report names the first",
        f"its memory is what --fleet says, of which {assumed.reserve_bytes / 1e9:g} GB stay free; host memory of GPUs "
        "suffices",
        "a concept has one reference with the row's mask, whose keys are kept exactly (not in 8 bits) for all steps",
        "keys and values that are kept were made before, and are in the memory of the device that uses them: neither "
        "making nor fetching them is counted; without kept keys the reference pass is a part of each step",
        "a request needs its measured peak besides. The peak may hold keys of the measured concepts already, how many "
        "bytes is not known: the smaller number of resident concepts takes none of it for such keys, the larger as "
        "many as there can have been",
        "in the whole fleet each part has its fastest measured form of the kind, and no concept is on two devices: a "
        "request for one goes to the device that has it",
    ]


def _shape(shape: Shape) -> list[str]:
    return [
        Path(shape.bundle).name,
        f"{shape.width} x {shape.height}",
        shape.dtype,
        str(shape.concepts),
        f"{shape.mask_share:.0%}" if shape.concepts else "-",
        str(shape.images),
        str(shape.steps),
    ]


def _resident(found: tuple[int, int] | None, none_kept: bool) -> str:
    if none_kept:
        return "none kept"
    if found is None:
        return "not known"
    return str(found[0]) if found[0] == found[1] else f"{found[0]} to {found[1]}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=str(__doc__).splitlines()[0])
    parser.add_argument("report", type=Path, help="bench.json")
    parser.add_argument("--fleet", action="append", required=True, metavar="NAME=COUNT:GB", help="may be repeated")
    parser.add_argument("--steps", type=int, default=50, help="of a request")
    parser.add_argument("--alpha", type=float, default=0.4, help="its part in RSA")
    parser.add_argument("--reserve", type=float, default=2.0, metavar="GB", help="memory that stays free")
    parser.add_argument("--busy", type=float, default=0.8, help="part of the time in which a device has work")
    parser.add_argument("--as-measured", choices=("gpu", "cpu"), default="", help="what others are as fast as")
    a = parser.parse_args(argv)
    try:
        if a.steps < 1 or not 0 <= a.alpha <= 1 or not 0 < a.busy <= 1 or not a.reserve >= 0:
            raise InputError("steps is below 1, alpha not in 0..1, busy not in 0..1, or reserve below 0.")
        report = read_report(a.report)
        assumed = Assumptions(a.steps, a.alpha, a.reserve * 1e9, a.busy, a.as_measured)
        fleet = [Machines.parse(part) for part in a.fleet]
        print(text(report, capacity(report, fleet, assumed), fleet, assumed), end="")
    except MagicFaceError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
