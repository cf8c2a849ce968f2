"""What the framework holds of each tab: its last field values, and what it has not yet read about its events."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from ..serve.problems import refusal

__all__ = ["UNREAD", "Tabs"]

UNREAD = 16
"""Events of a tab that may be in progress, or whose end the tab has not yet read. A browser has fewer, since it sends
an event of a field or button again only when it has read the end of the last one.
"""


class Tabs:
    """The tabs that have sent events. The framework itself would keep what a tab does not read, without limit.

    page  after its queue was configured
    most  tabs of which something is held: those used last. A tab that listens for messages is held as well, and does
          not lose any

    All calls come from one event loop.
    """

    def __init__(self, page: gr.Blocks, most: int) -> None:
        self._page = page
        self._most = most
        self._used = OrderedDict[str, None]()
        self._sending = Counter[str]()
        self._listening = Counter[str]()

    def check(self, tab: str) -> None:
        """Raise AnswerError, 429, if the tab has so many events whose end it has not read that it may send no more."""
        if self._sending[tab] + len(self._page._queue.pending_event_ids_session.get(tab, ())) >= UNREAD:
            unread = refusal(
                429, "unread", f"this tab has not read the end of {UNREAD} events, which is the limit.", "session_hash"
            )
            unread.retry_after = 1.0
            raise unread

    @contextmanager
    def sending(self, tab: str) -> Iterator[None]:
        """Within the block the framework is given an event of the tab."""
        with self._at_work(tab, self._sending):
            self._use(tab)
            yield

    @contextmanager
    def listening(self, tab: str) -> Iterator[None]:
        """Within the block the framework sends the tab its messages."""
        try:
            with self._at_work(tab, self._listening):
                yield
        finally:
            if tab in self._used:
                self._use(tab)

    def lost(self, tab: str) -> None:
        """Handle the loss of a connection over which a tab listened: what it has not read, nobody will read."""
        if tab not in self._listening:
            self._drop_messages(tab)

    def forget(self, tab: str) -> None:
        """Drop what the framework holds of a tab; but not the messages, if it listens for them."""
        self._page.state_holder.session_data.pop(tab, None)
        self._page.state_holder.time_last_used.pop(tab, None)
        if tab not in self._listening:
            self._drop_messages(tab)
            if tab not in self._sending:
                self._used.pop(tab, None)

    @contextmanager
    def _at_work(self, tab: str, count: Counter[str]) -> Iterator[None]:
        count[tab] += 1
        try:
            yield
        finally:
            count[tab] -= 1
            if not count[tab]:
                del count[tab]

    def _use(self, tab: str) -> None:
        """Note that the tab is used now, and forget those whose turn it is."""
        self._used[tab] = None
        self._used.move_to_end(tab)
        idle = (one for one in [*self._used] if one not in self._sending and one not in self._listening)
        for one in idle:
            if len(self._used) <= self._most:
                break
            self.forget(one)

    def _drop_messages(self, tab: str) -> None:
        queue = self._page._queue
        for event in queue.event_ids_to_events.values():
            if event.session_hash == tab:
                event.alive = False  # else its next message would find no place, and the framework's queue would end
        queue.pending_messages_per_session.pop(tab, None)
        queue.pending_event_ids_session.pop(tab, None)
