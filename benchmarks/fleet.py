"""Estimate what each part of a fleet, and the whole, would do, using only the figures of a measured report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from magicface_rt.errors import InputError
from magicface_rt.schedule import is_region_step

from .schema import problems
from .settings import OURS_KINDS
from .table import name, was_quiet

Json = Mapping[str, Any]
STAGES = {"text": "text encoder", "vae_encode": "VAE encoder", "decode": "decoder"}
"""The stages of a request besides its steps: the report's names, and names for people."""


@dataclass(frozen=True)
class Machines:
    """A part of the fleet: `count` devices of one name, with `memory_bytes` each."""

    name: str
    count: int
    memory_bytes: float

    @classmethod
    def parse(cls, text: str) -> Machines:
        """Parse `NAME=COUNT:GB`, such as `h200=4:141`. Raises InputError for another form."""
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
    """What an estimate assumes.

    steps: of a request; alpha: its part in RSA; reserve_bytes: memory left free; busy: part of the time in which a
    device has work; as_measured: "gpu" or "cpu", whether parts of the fleet that were not measured are assumed to be
    like the measured GPU or like the measured machine's processor.
    """

    steps: int = 50
    alpha: float = 0.4
    reserve_bytes: float = 2e9
    busy: float = 0.8
    as_measured: str = ""


@dataclass(frozen=True)
class Shape:
    """What a report's case measured. steps: of the schedule whose middle step was timed."""

    bundle: str
    width: int
    height: int
    dtype: str
    concepts: int
    mask_share: float
    images: int
    steps: int


@dataclass(frozen=True)
class Capacity:
    """The capacity of one part of the fleet, with one form of the SDK.

    measured_on: the GPU or processor that the figures are of; title: of the form, for people; images_per_second: of the
    whole part, 0 if the measured peak does not fit; bytes_per_concept: of the keys of one reference for all steps;
    resident: how many such concepts fit on one device beside a request, at least and at most. Both are None if nothing
    is kept, resident also if the peak is not known. notes: what holds for this row and not for all.
    """

    machines: Machines
    measured_on: str
    shape: Shape
    kind: str
    title: str
    seconds_per_image: float
    images_per_second: float
    bytes_per_concept: float | None
    resident: tuple[int, int] | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Total:
    """The capacity of the whole fleet with one kind of the SDK's forms, where every part uses its fastest.

    resident: distinct concepts, each on one device. without: the parts that add nothing, because no form of the kind
    was measured there or fits.
    """

    shape: Shape
    kind: str
    images_per_second: float
    resident: tuple[int, int] | None
    without: tuple[str, ...]


def capacity(report: Json, fleet: Sequence[Machines], assumed: Assumptions) -> list[Capacity]:
    """Estimate, for every part of the fleet, every case of every form of the SDK that was measured on such a device.

    Raises:
        InputError: the file is no report, or nothing of the SDK was measured on a part's device.
    """
    wrong = problems(report)
    if not wrong and not isinstance(report["settings"].get("parity_steps"), int):
        wrong = ["settings.parity_steps is missing"]
    if wrong:
        raise InputError(f"this is no report of `magicface-rt bench`: {wrong[0]}.")
    ours = [
        (case, outcome)
        for case in report["cases"]
        for outcome in case["outcomes"]
        if outcome["status"] == "measured" and outcome["kind"] in OURS_KINDS
    ]
    found = []
    for machines in fleet:
        on_device = _is_gpu(report, machines, assumed)
        fitting = [(case, outcome) for case, outcome in ours if outcome["on_device"] == on_device]
        if not fitting:
            raise InputError(
                f"fleet: nothing of the SDK was measured on {_where(report, on_device)!r}, which {machines.name!r} "
                f"stands for; the report has {_measured(report, ours)}. Run `magicface-rt bench` with a backend there."
            )
        found += [_one(report, case, outcome, machines, assumed) for case, outcome in fitting]
    return found


def totals(found: Sequence[Capacity], fleet: Sequence[Machines]) -> list[Total]:
    """Make a total for each shape and kind that was found."""
    made = []
    for shape, kind in dict.fromkeys((one.shape, one.kind) for one in found):
        speed, fewest, most, without, known = 0.0, 0, 0, [], True
        for part in fleet:
            forms = [x for x in found if (x.machines, x.shape, x.kind) == (part, shape, kind) and x.images_per_second]
            if not forms:
                without.append(part.name)
                continue
            best = max(forms, key=lambda x: x.images_per_second)
            speed += best.images_per_second
            known &= best.resident is not None
            if best.resident is not None:
                fewest, most = fewest + part.count * best.resident[0], most + part.count * best.resident[1]
        known &= len(without) < len(fleet)
        made.append(Total(shape, kind, speed, (fewest, most) if known else None, tuple(without)))
    return made


def _one(report: Json, case: Json, outcome: Json, machines: Machines, assumed: Assumptions) -> Capacity:
    shape = Shape(**{field: case[field] for field in Shape.__dataclass_fields__})
    seconds, uncounted = _seconds(outcome, assumed)
    notes = []
    if uncounted:
        notes.append(f"without {', '.join(uncounted)}, not measured here: a request takes longer than this")
    kept = outcome["counts"]["kept_bytes"]
    per_concept = kept * assumed.steps / shape.concepts if kept and shape.concepts else None
    peak = outcome["device_peak_bytes" if outcome["on_device"] else "host_peak_bytes"]
    resident, fits = None, True
    if peak is None:
        notes.append("memory not measured: whether a request fits is not known")
    else:
        free = machines.memory_bytes - assumed.reserve_bytes - peak
        held = min(peak, kept * _steps_held(report, case, outcome))
        fits = free + held >= 0
        if per_concept is not None:
            resident = max(0, int(free // per_concept)), max(0, int((free + held) // per_concept))
    if not fits:
        notes.append("the measured peak does not fit into the memory")
    elif resident is not None and resident[1] < shape.concepts:
        notes.append("fewer concepts fit than a request of this row has: their keys cannot stay on the device")
    if not was_quiet(report, case):
        notes.append("measured while other work ran: too slow")
    if case["started"] != report["machine"]["started"]:
        notes.append(f"measured in a run that began {case['started']}, commit {case['commit'] or 'unknown'}")
    if outcome["threads"]:
        notes.append(f"measured with {outcome['threads']} threads")
    return Capacity(
        machines,
        _where(report, outcome["on_device"]),
        shape,
        outcome["kind"],
        name(outcome),
        seconds / shape.images,
        machines.count * assumed.busy * shape.images / seconds if fits else 0.0,
        per_concept,
        resident,
        (*notes, *outcome["notes"]),
    )


def _seconds(outcome: Json, assumed: Assumptions) -> tuple[float, list[str]]:
    """Seconds of a request for all its images, and the stages that they lack because these were not measured."""
    rba = sum(is_region_step(i, assumed.steps, assumed.alpha) for i in range(assumed.steps))
    seconds = (assumed.steps - rba) * outcome["steps"]["rsa"]["median"] + rba * outcome["steps"]["rba"]["median"]
    measured = outcome["requests"]["stages"] if outcome["requests"] else {}
    # A report leaves out a stage that took no time: with kept keys, and without concepts, no image is encoded.
    needed = [stage for stage in STAGES if stage != "vae_encode" or outcome["kind"] == "bare"]
    return (
        seconds + sum(measured[stage]["median"] for stage in STAGES if stage in measured),
        [STAGES[stage] for stage in needed if stage not in measured],
    )


def _steps_held(report: Json, case: Json, outcome: Json) -> int:
    """For how many steps keys may have been in memory at the peak.

    They are those of a request, and those that the single steps and the compared run read, which stay on the host.
    """
    single = 1 if outcome["on_device"] else 1 + int(report["settings"]["parity_steps"])
    return single + (case["steps"] if outcome["requests"] else 0)


def _is_gpu(report: Json, machines: Machines, assumed: Assumptions) -> bool:
    """Whether a part of the fleet is taken to be like the report's GPU; if not, it is like its processor."""
    matches = [gpu for gpu in (True, False) if bears(_where(report, gpu), machines.name)]
    if len(matches) == 2:
        raise InputError(f"fleet: {machines.name!r} is in the GPU's name and in the processor's. Name one of the two.")
    if matches:
        return matches[0]
    if not assumed.as_measured:
        raise InputError(
            f"fleet: {machines.name!r} was not measured; the report is of the GPU {_where(report, True)!r} and the "
            f"processor {_where(report, False)!r}. Run `magicface-rt bench` there, or say --as-measured gpu (or cpu) "
            "if it shall be taken to be as fast."
        )
    return assumed.as_measured == "gpu"


def bears(device: str, name: str) -> bool:
    """Whether a device's full name contains these words."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device, re.IGNORECASE) is not None


def _where(report: Json, on_device: bool) -> str:
    machine = report["machine"]
    if not on_device:
        return str(machine["processor"])
    return str(machine["gpu"]).split(",")[0] if machine["gpu"] else "none"  # name, driver, memory


def _measured(report: Json, ours: Sequence[tuple[Json, Json]]) -> str:
    found = dict.fromkeys(f"{o['contender']} on {_where(report, o['on_device'])!r}" for _, o in ours)
    return ", ".join(found) or "nothing of the SDK at all"
