"""The requests in progress, one per browser tab, which the tab can stop."""

from __future__ import annotations

import asyncio

from ..request import Progress
from ..serve.schemas import PictureOrder
from ..serve.service import Accepted, Outcome, Service

__all__ = ["Run", "Runs"]


class Run:
    """A request in progress. `news` holds what the service has reported about it; `stopped` is set once the tab wanted
    it to end.
    """

    def __init__(self, service: Service, order: PictureOrder, owner: str) -> None:
        self.news: asyncio.Queue[Accepted | Progress] = asyncio.Queue()
        self.stopped = False
        self._task = asyncio.ensure_future(service.generate(order, owner=owner, listener=self.news.put_nowait))

    @property
    def outcome(self) -> Outcome:
        """The outcome, once the request is over.

        Raises:
            asyncio.CancelledError: it was stopped.
            MagicFaceError: it was refused or failed.
        """
        return self._task.result()

    async def next(self) -> Accepted | Progress | None:
        """Wait for the next news; None when the request is over."""
        while self.news.empty():
            if self._task.done():
                return None
            heard = asyncio.ensure_future(self.news.get())
            try:
                await asyncio.wait({heard, self._task}, return_when=asyncio.FIRST_COMPLETED)
                if heard.done():
                    return heard.result()
            finally:
                heard.cancel()
        return self.news.get_nowait()

    def stop(self) -> None:
        """Stop the request for the tab; the work ends at its next step. Does nothing if the request is over."""
        self.stopped = True
        self.end()

    def end(self) -> None:
        """End the request without marking it as stopped, for when nobody follows it any more."""
        self._task.cancel()
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to ask


class Runs:
    """The requests in progress, by tab. All calls come from one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._under_way: dict[str, Run] = {}

    def start(self, tab: str, order: PictureOrder, owner: str) -> Run:
        """Begin a request, and stop the one that the tab has in progress, if any."""
        self.stop(tab)
        run = self._under_way[tab] = Run(self._service, order, owner)
        return run

    def stop(self, tab: str) -> bool:
        """Stop what the tab has in progress; return whether there was anything."""
        run = self._under_way.pop(tab, None)
        if run is not None:
            run.stop()
        return run is not None

    def over(self, tab: str, run: Run) -> None:
        """Remove a request that has ended, or that nobody follows any more."""
        run.end()
        if self._under_way.get(tab) is run:
            del self._under_way[tab]
