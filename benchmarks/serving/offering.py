"""Offer requests to a service: in an open loop, and in a closed loop to find what it can do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

import numpy as np

from magicface_rt.errors import QueueFullError, ServiceError

MOST_REQUESTS = 2000
"""The most requests of one point; a rate that would need more is refused rather than cut short."""

Send = Callable[[int], Awaitable[int]]
"""Sends request k, waits for its picture, and returns how many pictures were made together."""


@dataclass(frozen=True)
class Sample:
    """One request.

    due: when it was to be sent, in seconds from the start; latency: from then to its end; ending: "made", "refused"
    (429), or the problem's kind.
    """

    due: float
    latency: float
    ending: str
    batch: int = 0


@dataclass(frozen=True)
class Point:
    """The result of one offered load. Rates are in requests a second, latencies in seconds, of those that were made.

    made_rate  over the time until the last had ended, which under overload is later than the last arrival
    """

    offered: float
    made_rate: float
    made: int
    refused: int
    failed: dict[str, int]
    p50: float | None
    p95: float | None
    p99: float | None
    mean_batch: float | None


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process in [0, seconds), the same for the same seed.

    Raises:
        ValueError: the rate would need more than MOST_REQUESTS.
    """
    if rate * seconds > MOST_REQUESTS:
        raise ValueError(f"{rate:g} requests a second over {seconds:g} s are more than {MOST_REQUESTS}.")
    gaps = np.random.default_rng(seed).exponential(1 / rate, MOST_REQUESTS * 2)
    return [float(at) for at in np.cumsum(gaps) if at < seconds]


async def offer(send: Send, rate: float, seconds: float, seed: int) -> Point:
    """Offer requests in an open loop: each is sent when it is due, whether or not those before it have ended.

    Its latency counts from when it is due. A closed loop would wait for the service, and so leave out the very waiting
    that is to be measured.
    """
    due = arrivals(rate, seconds, seed)
    start = monotonic()

    async def at(k: int, when: float) -> Sample:
        await asyncio.sleep(max(0.0, start + when - monotonic()))
        ending, batch = await _ended(send, k)
        return Sample(when, monotonic() - start - when, ending, batch)

    samples = await asyncio.gather(*(at(k, when) for k, when in enumerate(due)))
    return summary(rate, samples)


async def saturate(send: Send, clients: int, seconds: float) -> float:
    """Pictures a second in a closed loop of `clients`, each of which sends a request as soon as its last has ended."""
    start, numbers, made = monotonic(), iter(range(MOST_REQUESTS)), 0

    async def client() -> None:
        nonlocal made
        while monotonic() - start < seconds and (k := next(numbers, None)) is not None:
            ending, _ = await _ended(send, k)  # not in one line with the sum, which would be read before the wait
            made += ending == "made"

    await asyncio.gather(*(client() for _ in range(clients)))
    return made / (monotonic() - start)


async def repeat(send: Send, requests: int, clients: int, each: Callable[[int], object]) -> dict[str, int]:
    """Send `requests` in a closed loop; `each` is called with the number ended, in order. Returns counts by ending."""
    numbers, ended, endings = iter(range(requests)), 0, dict[str, int]()

    async def client() -> None:
        nonlocal ended
        for k in numbers:
            ending, _ = await _ended(send, k)
            endings[ending] = endings.get(ending, 0) + 1
            ended += 1
            each(ended)

    await asyncio.gather(*(client() for _ in range(clients)))
    return endings


def summary(offered: float, samples: list[Sample]) -> Point:
    """Summarise the samples of one load."""
    made = [s for s in samples if s.ending == "made"]
    others = [s.ending for s in samples if s.ending not in ("made", "refused")]
    latencies = np.array([s.latency for s in made])
    over = max((s.due + s.latency for s in samples), default=0.0)
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).tolist() if made else (None, None, None)
    return Point(
        offered=offered,
        made_rate=len(made) / over if made else 0.0,
        made=len(made),
        refused=sum(s.ending == "refused" for s in samples),
        failed={kind: others.count(kind) for kind in sorted(set(others))},
        p50=p50,
        p95=p95,
        p99=p99,
        mean_batch=float(np.mean([s.batch for s in made])) if made else None,
    )


async def _ended(send: Send, k: int) -> tuple[str, int]:
    try:
        return "made", await send(k)
    except QueueFullError:
        return "refused", 0
    except ServiceError as error:
        return error.kind, 0
