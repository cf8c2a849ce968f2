"""Server-sent events, as the server writes them: the progress of a request, with its answer or its problem as the last
event. The client reads them with `wire.EventParser`.

event: accepted   {"waiting": 2}
event: progress   {"step": 1, "steps": 20, "stage": "rsa", "batch": 0, "batches": 1}
event: pictures   what a JSON answer holds
event: problem    what a problem's body holds
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict
from typing import Any

from ..request import Progress
from .problems import Problem
from .service import Accepted, Outcome

__all__ = ["HEARTBEAT", "MEDIA_TYPE", "SCHEMA", "event", "follow"]

MEDIA_TYPE = "text/event-stream"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": ["accepted", "progress", "pictures", "problem"]},
        "data": {"type": "string", "description": "JSON; of `pictures` that of a JSON answer."},
    },
}
"""The schema of one event, for the OpenAPI document."""

HEARTBEAT = 10.0
"""Seconds of silence after which a comment is sent, so that nothing on the way takes the connection for dead."""


def event(name: str, data: Mapping[str, Any] | bytes) -> bytes:
    """Encode an event for the wire. JSON has no line break in it, so the data are one line."""
    text = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=True, allow_nan=False).encode("ascii")
    return b"event: " + name.encode("ascii") + b"\ndata: " + text + b"\n\n"


async def follow(
    task: asyncio.Task[Outcome],
    news: asyncio.Queue[Accepted | Progress],
    answer: Callable[[Outcome], bytes],
    failed: Callable[[BaseException], Problem],
) -> AsyncIterator[bytes]:
    """Yield the events of a request until its task is done. Closing the generator early cancels the task."""
    waiting: asyncio.Future[Accepted | Progress] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(news.get())
            await asyncio.wait({task, waiting}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                one = waiting.result()
                yield event("accepted" if isinstance(one, Accepted) else "progress", asdict(one))
                continue
            waiting.cancel()
            if task.done():
                break
            yield b": still here\n\n"
        while not news.empty():
            yield event("progress", asdict(news.get_nowait()))
        try:
            outcome = task.result()
        except (Exception, asyncio.CancelledError) as error:
            yield event("problem", failed(error).body)
        else:
            yield event("pictures", await asyncio.to_thread(answer, outcome))
    finally:
        task.cancel()
        if waiting is not None:
            waiting.cancel()
