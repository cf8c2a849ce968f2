"""A service under load, on loopback: latency and throughput against offered load, and whether memory stays flat.

    python -m benchmarks.serve_load BUNDLE --out DIR [--replicas 0,2] [--workers 1,2] [--batches 1,4] [--steps 4]

Each form of service is started as its users would start it, and driven with the client from this process, on the same
cores. First a closed loop measures what one process without batching can do; the offered loads are parts of that, equal
for all forms. `warm`: every request uses a concept that is kept and was used before. `cold`: every request first puts a
concept that nobody has seen, and then asks for its picture; the latency is that of both. At the end each form gets
`--memory-requests` requests while its memory is followed.

Writes serve_load.json, serve_load.md, and as PNG and SVG latency, throughput, memory. Ends by itself: every loop is
bounded in time and in requests, and all of them go to 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from magicface_rt import Bundle, Concept, Reference
from magicface_rt.errors import BackendMissingError, InputError, MagicFaceError, OutputError
from magicface_rt.process.interrupts import reraise_if_interrupt
from magicface_rt.serve import AsyncClient

from .machine import describe
from .serving.figures import COLOURS, draw, markdown
from .serving.flatness import Flatness, flatness
from .serving.offering import MOST_REQUESTS, Point, Send, arrivals, offer, repeat, saturate
from .serving.service import Form, Service, served
from .workload import mask_of_share

PROMPT = "a man in the rain"
CLIENTS = 8
"""Clients of a closed loop: enough that the service never waits for the next request."""
CALIBRATION = Form(batch=1)

Say = Callable[[str], object]


@dataclass(frozen=True)
class Settings:
    """What is run. loads: parts of what one process without batching can do; seconds: of each load; queue: requests
    that may wait."""

    bundle: str
    forms: tuple[Form, ...]
    loads: tuple[float, ...] = (0.3, 0.6, 0.9, 1.2, 1.8, 2.4)
    seconds: float = 20.0
    steps: int = 4
    mask_share: float = 0.3
    queue: int = 32
    memory_requests: int = 1000
    seed: int = 0


def concept(number: int, share: float) -> Concept:
    """Draw a concept whose reference differs from those of all other numbers."""
    rng = np.random.default_rng([17, number])
    picture = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
        (128, 128), Image.Resampling.BICUBIC
    )
    return Concept("man", Reference(picture, mask=mask_of_share(share) * np.uint8(255), prompt="a man"))


def run(settings: Settings, say: Say, so_far: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Put all loads on all forms of service; return the report. `so_far`: called with it after each form.

    Raises:
        BackendError: a service does not start.
        InputError: no picture was made in time, or a load would need more requests than are ever sent.
    """
    report: dict[str, Any] = {"machine": describe(), "settings": asdict(settings), "bundle": _bundle(settings.bundle)}
    options = ["--queue", str(settings.queue)]
    with served(Path(settings.bundle), CALIBRATION, options) as service:
        capacity = asyncio.run(_capacity(service, settings))
    if not capacity:
        raise InputError(f"{settings.bundle}: no picture was made in {settings.seconds:g} s; give more --seconds.")
    say(f"{CALIBRATION.name}: {capacity:.2f} pictures a second")
    try:
        arrivals(max(settings.loads) * capacity, settings.seconds, settings.seed)  # before hours are spent on others
    except ValueError as error:
        raise InputError(f"{error} Give fewer --seconds, or smaller --loads.") from error
    report["capacity"], report["forms"] = capacity, []
    for form in settings.forms:
        found: dict[str, Any] = {**asdict(form), "name": form.name, "warm": [], "cold": [], "memory": None}
        report["forms"].append(found)
        for kind in ("warm", "cold"):
            # Each kind has a service of its own, so what cold requests leave behind does not slow warm ones.
            with served(Path(settings.bundle), form, options) as service:
                for load in settings.loads:
                    point = asyncio.run(_point(service, settings, kind, load * capacity, len(found[kind])))
                    found[kind].append(asdict(point))
                    say(f"{form.name}, {kind}: {_in_words(point)}")
        so_far(report)
    # Last, since they need no quiet machine: these requests are not timed.
    for form, found in zip(settings.forms, report["forms"], strict=True):
        if settings.memory_requests:
            with served(Path(settings.bundle), form, options) as service:
                grown, endings = asyncio.run(_memory(service, settings))
            found["memory"] = {**asdict(grown), "flat": grown.flat, "endings": endings}
            slope, low, high = (value / 1024 for value in (grown.bytes_per_request, grown.low, grown.high))
            so_far(report)
            say(f"{form.name}, {grown.requests} requests: {slope:+.2f} KiB a request ({low:+.2f} to {high:+.2f})")
    return report


async def _capacity(service: Service, settings: Settings) -> float:
    async with _client(service) as client:
        return await saturate(await _warm(client, settings), CLIENTS, settings.seconds)


async def _point(service: Service, settings: Settings, kind: str, rate: float, number: int) -> Point:
    async with _client(service) as client:
        send = await (
            _warm(client, settings) if kind == "warm" else _cold(client, settings, first=1 + number * MOST_REQUESTS)
        )
        return await offer(send, rate, settings.seconds, settings.seed + number)


async def _memory(service: Service, settings: Settings) -> tuple[Flatness, dict[str, int]]:
    samples: list[tuple[int, int]] = []
    every = max(1, settings.memory_requests // 100)

    def each(ended: int) -> None:
        if ended % every == 0:
            samples.append((ended, service.memory_bytes()))

    async with _client(service) as client:
        endings = await repeat(await _warm(client, settings), settings.memory_requests, CLIENTS // 2, each)
    return flatness(samples), endings


def _client(service: Service) -> AsyncClient:
    # No retries: refusals are counted. As many connections as requests, or the client itself would queue them.
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return AsyncClient(service.url, retries=0, trust_env=False, limits=limits)


async def _warm(client: AsyncClient, settings: Settings) -> Send:
    kept = await client.put_concept(concept(0, settings.mask_share), steps=settings.steps)
    await client.generate(PROMPT, [kept], steps=settings.steps)

    async def send(k: int) -> int:
        return (await client.generate(PROMPT, [kept], seed=k, steps=settings.steps)).batch

    return send


async def _cold(client: AsyncClient, settings: Settings, first: int) -> Send:
    async def send(k: int) -> int:
        kept = await client.put_concept(concept(first + k, settings.mask_share), steps=settings.steps)
        return (await client.generate(PROMPT, [kept], seed=k, steps=settings.steps)).batch

    return send


def _bundle(folder: str) -> dict[str, Any]:
    bundle = Bundle.open(folder, check_hashes=False)
    return {"width": bundle.width, "height": bundle.height, "dtype": bundle.dtype, "hash": bundle.hash}


def _in_words(point: Point) -> str:
    latencies = (
        "no picture" if point.p50 is None else f"p50 {point.p50:.3g} s, p95 {point.p95:.3g}, p99 {point.p99:.3g}"
    )
    failed = "".join(f", {count} {kind}" for kind, count in point.failed.items())
    rates = f"{point.offered:.2f} a second offered, {point.made_rate:.2f} made"
    return f"{rates}; {latencies}; {point.refused} refused{failed}"


def dump(report: dict[str, Any], out: Path) -> None:
    """Write the report as JSON. Raises OSError."""
    (out / "serve_load.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write(report: dict[str, Any], out: Path) -> list[Path]:
    """Write the report as JSON, as Markdown and as plots; return the files. Raises OutputError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        dump(report, out)
        text = markdown(report)
        made = [out / "serve_load.json", out / "serve_load.md"]
        try:
            made += draw(report, out)
        except BackendMissingError as error:
            text += f"\n{error}\n"
        (out / "serve_load.md").write_text(text, encoding="utf-8")
    except OSError as error:
        reraise_if_interrupt(error)
        raise OutputError(f"the report cannot be written into {out}: {error}.") from error
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    default = Settings("", ())
    parser = argparse.ArgumentParser(
        prog="serve_load", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--replicas", default="0", help="0: one process; above: Ray with so many replicas")
    parser.add_argument("--workers", default="1,2", help="of one process; a replica of Ray has one")
    parser.add_argument("--batches", default="1,4", help="pictures made together; 1 for no batching")
    parser.add_argument("--loads", default=",".join(map(str, default.loads)), help="parts of the capacity")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of each load")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--queue", type=int, default=default.queue)
    parser.add_argument("--memory-requests", type=int, default=default.memory_requests, help="0 for none")
    parser.add_argument("--seed", type=int, default=default.seed)
    given = parser.parse_args(arguments)
    try:
        where = [(n, w) for n in _whole(given.replicas) for w in (_whole(given.workers) if n == 0 else [1])]
        forms = tuple(Form(batch, replicas, workers) for replicas, workers in where for batch in _whole(given.batches))
        loads = tuple(float(load) for load in given.loads.split(","))
    except ValueError as error:
        parser.error(f"a list of numbers is expected: {error}")
    if not 0 < given.seconds <= 120 or any(not 0 < load <= 4 for load in loads) or given.memory_requests > 5000:
        parser.error("--seconds is up to 120, a load above 0 and up to 4, --memory-requests up to 5000.")
    if len(forms) > len(COLOURS):
        parser.error(f"these are {len(forms)} forms of service; a plot shows {len(COLOURS)} at most.")
    if given.memory_requests and given.memory_requests < 100:
        parser.error("--memory-requests is 0, or at least 100: fewer say nothing of a slope.")
    settings = Settings(
        bundle=str(given.bundle),
        forms=forms,
        loads=loads,
        seconds=given.seconds,
        steps=given.steps,
        queue=given.queue,
        memory_requests=given.memory_requests,
        seed=given.seed,
    )
    try:
        given.out.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
        report = run(
            settings,
            lambda line: print(line, file=sys.stderr, flush=True),
            lambda so_far: dump(so_far, given.out),  # another form may not start
        )
        for file in write(report, given.out):
            print(file)
    except OSError as error:
        reraise_if_interrupt(error)
        print(f"error: {given.out}: {error}", file=sys.stderr)
        return 2
    except MagicFaceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _whole(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if any(number < 0 for number in numbers):
        raise ValueError(f"{text!r} has a number below 0")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
