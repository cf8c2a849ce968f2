"""Errors with which a service ends or refuses requests of its own accord, where one process and Ray say the same."""

from __future__ import annotations

from ..errors import DeadlineError, DrainingError, QueueFullError

__all__ = ["cut_off", "deadline_passed", "draining", "queue_full", "remaining_seconds"]


def draining() -> DrainingError:
    """Make the error for a request that comes when no more work is taken."""
    return DrainingError("the service is ending and takes no more work.", retry_after=1.0)


def queue_full(waiting: int, retry_after: float) -> QueueFullError:
    """Make the error for a request that finds the queue full.

    waiting      how many requests wait
    retry_after  seconds until a place is likely free
    """
    return QueueFullError(f"{waiting} requests wait, which is the limit. Try again later.", retry_after=retry_after)


def cut_off() -> DrainingError:
    """Make the error for a request that had not ended when the service did."""
    return DrainingError("the service has ended before this request was done.", retry_after=1.0)


def deadline_passed() -> DeadlineError:
    """Make the error for a request whose deadline has passed."""
    return DeadlineError(
        "the deadline passed before the request was done. Allow more time, or ask for fewer steps or pictures."
    )


def remaining_seconds(*deadlines: float | None) -> float:
    """Return the seconds that a request has: the fewest of these, at least one of which is a number. None: no limit."""
    return min(seconds for seconds in deadlines if seconds is not None)
