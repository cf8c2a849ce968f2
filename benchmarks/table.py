"""Format a report as Markdown, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .bootstrap import MIN_SAMPLES
from .settings import Contender

Json = Mapping[str, Any]

QUIET_SHARE = 0.05
"""Part of the processors' time that other processes may take on a quiet machine."""
ENOUGH_FOR_P95 = 20
"""With fewer samples a 95th percentile is the slowest, or a guess between the two slowest."""


def markdown(report: Json) -> str:
    """Format tables for each case. A contender that was not measured has the reason in place of times."""
    machine = report["machine"]
    memory = machine["memory_bytes"]
    lines = [
        "# Benchmark",
        "",
        f"{machine['started']}, {machine['processor']}, {machine['cores']} cores"
        + (f", {memory / 1e9:.0f} GB" if memory else "")
        + (f", {machine['gpu']}" if machine["gpu"] else "")
        + f"; {_load(report)}.  ",
        f"Python {machine['python']}, " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + ".  ",
        f"Commit {machine['commit'] or 'unknown'}. Peaks measured: "
        + "; ".join(
            f"{p['flops'] / 1e9:.0f} GFLOP/s, {p['bytes_per_second'] / 1e9:.1f} GB/s ({p['where']})"
            for p in report["peaks"].values()
            if p
        )
        + ".",
    ]
    for case in report["cases"]:
        lines += ["", *_case(case, report["settings"], machine)]
    return "\n".join(lines) + "\n"


def _load(report: Json) -> str:
    """Describe the load at the start and, if known, what other processes took while cases were measured."""
    machine = report["machine"]
    at_start = f"load average {machine['load_average'][0]} at the start, {'' if machine['quiet'] else 'NOT '}quiet"
    too_long = "NOT quiet: other work ran, so absolute times are too long"
    shares = [case["foreign_load"] for case in report["cases"] if case["foreign_load"] is not None]
    quiet = all(was_quiet(report, case) for case in report["cases"])
    if shares:
        meanwhile = f"others took up to {max(shares):.1%} of the processors' time while it measured"
        return f"{at_start}; {meanwhile}, {'quiet' if quiet else too_long}"
    return at_start if quiet else at_start.replace("NOT quiet", too_long)


def was_quiet(report: Json, case: Json) -> bool:
    """Whether little else ran: by the other processes' part of the processors' time, else by the load at the start."""
    share = case["foreign_load"]
    return bool(report["machine"]["quiet"]) if share is None else share < QUIET_SHARE


def _case(case: Json, settings: Json, machine: Json) -> list[str]:
    images = "1 image" if case["images"] == 1 else f"{case['images']} images"
    lines = [
        f"## {case['width']} x {case['height']}, {case['dtype']}, N = {case['concepts']}, masks "
        f"{case['mask_share']:.0%}, {images}, {case['steps']} steps",
        "",
        f"One step of all images, median (fastest to slowest; p95 from {ENOUGH_FOR_P95} samples on) in seconds; memory "
        "in GB; work of one RBA step.",
        "",
    ]
    where = dict.fromkeys(device(machine, o) for o in case["outcomes"] if o["status"] == "measured")
    if len(where) == 1:
        lines[-1:] = [f"All of them ran on {next(iter(where))}.", ""]
    head = ["contender", "RSA step", "RBA step", "reference pass", "host", "device", "rows", "GFLOP", "parity error"]
    rows = [_steps_row(outcome) for outcome in case["outcomes"]]
    if len(where) > 1:
        head.insert(1, "ran on")
        for row, outcome in zip(rows, case["outcomes"], strict=True):
            row.insert(1, device(machine, outcome) if outcome["status"] == "measured" else "")
    lines += _table(head, rows)
    with_requests = [o for o in case["outcomes"] if o["requests"]]
    if with_requests:
        lines += ["", f"Requests of {case['steps']} steps, from prompt and images to pictures, seconds.", ""]
        head = [
            "contender",
            "process start to loaded",
            "to first picture",
            "first request",
            "next: median (fastest to slowest)",
            "rows",
            "U-Net GFLOP",
        ]
        lines += _table(head, [_request_row(outcome) for outcome in with_requests])
        stages = list(dict.fromkeys(stage for o in with_requests for stage in o["requests"]["stages"]))
        if stages:
            lines += ["", "Where the seconds of the next requests go: medians of each stage, all steps together.", ""]
            lines += _table(["contender", *map(_words, stages)], [_stage_row(o, stages) for o in with_requests])
    if case["ratios"]:
        share = f"{settings['confidence']:.0%}"
        said = f"How many times longer than ours; ratio of medians, {share} bootstrap interval, or the range that was "
        said += f"seen where fewer than {MIN_SAMPLES} rounds were made; then the two medians in seconds."
        lines += ["", said, ""]
        lines += _ratios(case["ratios"])
    notes = [f"- {name(o)}: {note}" for o in case["outcomes"] for note in _notes(o)]
    notes += [f"- {note}" for note in case["notes"]]
    if case["started"] != machine["started"]:
        notes.append(f"- measured in a run that began {case['started']}, commit {case['commit'] or 'unknown'}")
    if case["foreign_load"] is not None:
        notes.append(f"- other processes took {case['foreign_load']:.1%} of the processors' time meanwhile")
    return [*lines, *(["", *notes] if notes else [])]


def _steps_row(outcome: Json) -> list[str]:
    if outcome["status"] != "measured":
        return [name(outcome), f"{outcome['status']}: {outcome['reason']}", *[""] * 7]
    steps, counts = outcome["steps"], outcome["counts"]
    return [
        name(outcome),
        *(_figures(steps.get(stage)) for stage in ("rsa", "rba", "reference_pass")),
        _scaled(outcome["host_peak_bytes"], 1e9),
        _scaled(outcome["device_peak_bytes"], 1e9),
        str(counts["rows"].get("rba", "")),
        _scaled(counts["flops"].get("rba"), 1e9),
        f"{outcome['parity']['error']:.1e}",
    ]


def _request_row(outcome: Json) -> list[str]:
    found, counts = outcome["requests"], outcome["counts"]
    return [
        name(outcome),
        f"{found['ready']:.3g}",
        f"{found['cold_start']:.3g}",
        f"{found['first']:.3g}",
        _figures(found["next"]),
        str(counts["request_rows"]),
        _scaled(counts["request_flops"], 1e9),
    ]


def _stage_row(outcome: Json, stages: Sequence[str]) -> list[str]:
    found = outcome["requests"]["stages"]
    return [name(outcome), *(f"{found[stage]['median']:.3g}" if stage in found else "" for stage in stages)]


def _words(stage: str) -> str:
    """A stage's name, such as `rba_steps`, in words."""
    return stage.replace("rsa", "RSA").replace("rba", "RBA").replace("vae", "VAE").replace("_", " ")


def _ratios(ratios: Sequence[Json]) -> list[str]:
    """A row for each pair, a column for each thing that was timed."""
    columns = [of for of in ("rsa step", "rba step", "request") if any(r["of"] == of for r in ratios)]
    pairs = list(dict.fromkeys((r["baseline"], r["candidate"]) for r in ratios))
    rows = []
    for pair in pairs:
        found = {r["of"]: r for r in ratios if (r["baseline"], r["candidate"]) == pair}
        rows.append([title(pair[0]), title(pair[1]), *(_ratio(found.get(of)) for of in columns)])
    return _table(["baseline", "ours", *columns], rows)


def _ratio(ratio: Json | None) -> str:
    if ratio is None:
        return ""
    rounds = "1 round" if ratio["rounds"] == 1 else f"{ratio['rounds']} rounds"
    interval = "no interval" if ratio["low"] is None else f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    interval = f"range {interval}" if ratio["interval"] == "range" else interval
    apart = "" if ratio["interleaved"] else ", not interleaved"
    return f"{ratio['ratio']:.2f} ({interval}, {rounds}{apart}){_medians(ratio)}"


def _medians(ratio: Json) -> str:
    """The two medians that the ratio is of, or "" for a report of the first format, which does not hold the samples.

    Beside a contender that ran alone ours was timed once more, so the steps' table has another median.
    """
    if "candidate_samples" not in ratio:
        return ""
    theirs, ours = median(ratio["baseline_samples"]), median(ratio["candidate_samples"])
    return f", {theirs:.4g} over {ours:.4g}"


def _notes(outcome: Json) -> list[str]:
    found = [*outcome["notes"], outcome["counts"]["note"]]
    if outcome["parity"] and outcome["parity"]["other_cells"]:
        found.append(f"{outcome['parity']['other_cells']} cells end in another region than the oracle's (near-ties)")
    if outcome["parity"]:
        found.append(outcome["parity"]["note"])
    if not outcome["interleaved"]:
        found.append(
            "ran when the others had ended, because of its memory; beside it those of ours that it has ratios to"
        )
    return [note for note in found if note]


def device(machine: Json, outcome: Json) -> str:
    """Where an outcome was computed, whatever else the machine has."""
    if outcome["on_device"]:
        return str(machine["gpu"]).split(",")[0] if machine["gpu"] else "a GPU"  # name, driver, memory
    return f"{machine['cores']} CPU cores"


def name(outcome: Json) -> str:
    return Contender(outcome["kind"], outcome["backend"]).title


def title(contender: str) -> str:
    """The title of a contender, from its name in a ratio, such as `kept@onnxruntime-cpu`."""
    kind, _, backend = contender.partition("@")
    return Contender(kind, backend).title


def _figures(found: Json | None) -> str:
    if found is None:
        return ""
    p95 = f", p95 {found['p95']:.3g}" if len(found["samples"]) >= ENOUGH_FOR_P95 else ""
    return f"{found['median']:.3g} ({found['fastest']:.3g} to {found['slowest']:.3g}{p95})"


def _scaled(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
