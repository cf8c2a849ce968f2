"""What the process holds of what a tab has not read: while the tab is there, and when it is not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from paging import Held, Served, Tab, bridged, served, until

from magicface_rt.serve import ServeSettings
from magicface_rt.ui.mounting import TABS
from magicface_rt.ui.tabs import UNREAD

PROMPT = "a man with a hat"
MESSAGES = "/ui/gradio_api/queue/data"


@pytest.fixture(scope="module")
def server(session: Held) -> Iterator[Served]:
    with served(session, settings=ServeSettings(default_steps=3, steps=60, batch_wait=0, batch=1)) as started:
        yield started


@pytest.fixture
def tab(server: Served) -> Iterator[Tab]:
    with server.http() as http:
        yield Tab(http)


@pytest.fixture
def queue(server: Served) -> Any:
    return server.page.page._queue


def named(tab: Tab, name: str) -> Tab:
    """The same under another name, which spares a look at the page."""
    other = object.__new__(Tab)
    other.__dict__ = {**tab.__dict__, "hash": name}
    return other


def at_rest(queue: Any) -> None:
    until(lambda: not queue.event_ids_to_events, "an event is still in progress")


def held(queue: Any, tab: Tab) -> bool:
    return tab.hash in queue.pending_messages_per_session or tab.hash in queue.pending_event_ids_session


def begin(tab: Tab, session: Held, **fields: object) -> None:
    """A picture, up to its first step, at which it stops."""
    session.free.clear()
    before = session.steps
    tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", **fields))
    until(lambda: session.steps > before, "no step was reached")


def test_what_a_closed_tab_has_not_read_is_let_go_of(
    tab: Tab, session: Held, queue: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    tab.send("words", [PROMPT])
    tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=1))
    at_rest(queue)
    assert queue.pending_messages_per_session[tab.hash].qsize() > 5, "this would not find them"
    begin(tab, session, Steps=50)
    with tab.http.stream("GET", f"/ui/gradio_api/heartbeat/{tab.hash}") as heartbeat:
        lines = heartbeat.iter_lines()  # let go of, it closes the connection
        assert "ALIVE" in next(lines)
        assert held(queue, tab)
    until(lambda: not held(queue, tab), "something is held")
    session.free.set()
    at_rest(queue)
    assert not held(queue, tab)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert "Done in" in tab.generate(bridged(), Prompt="a house", Steps=1)[0]


def test_what_was_not_read_is_held_of_the_tabs_used_last_which_go_on(tab: Tab, queue: Any) -> None:
    tabs = [named(tab, f"{tab.hash}-{number}") for number in range(TABS + 3)]
    for one in tabs:
        one.send("words", [PROMPT])
    at_rest(queue)
    assert not any(held(queue, one) for one in tabs[:3])
    assert all(held(queue, one) for one in tabs[3:])
    assert len(queue.pending_messages_per_session) <= TABS
    assert len(queue.pending_event_ids_session) <= TABS
    for one in (tabs[0], tabs[-1]):
        assert one.outcome("words", [PROMPT])


def test_a_tab_that_does_not_read_is_refused_further_events(tab: Tab, queue: Any) -> None:
    for _ in range(UNREAD):
        tab.send("words", [PROMPT])
    at_rest(queue)
    with pytest.raises(httpx.HTTPStatusError, match="429") as refused:
        tab.send("words", [PROMPT])
    answer = refused.value.response
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0
    assert (answer.json()["kind"], answer.json()["field"]) == ("unread", "session_hash")
    assert named(tab, f"{tab.hash}-2").outcome("words", [PROMPT])
    assert sum(message["msg"] == "process_completed" for message in tab.news()) == UNREAD
    assert tab.outcome("words", [PROMPT])


def test_events_that_come_at_the_same_time_are_counted_before_they_begin(tab: Tab, queue: Any) -> None:
    def send(_: int) -> bool:
        try:
            tab.send("words", [PROMPT])
        except httpx.HTTPStatusError:
            return False
        return True

    with ThreadPoolExecutor(2 * UNREAD) as threads:
        taken = sum(threads.map(send, range(3 * UNREAD)))
    assert UNREAD / 2 <= taken <= UNREAD  # until it is taken in, one may count twice
    assert len(queue.pending_event_ids_session[tab.hash]) == taken


def test_a_tab_that_listens_loses_nothing_and_is_not_refused(
    tab: Tab, session: Held, queue: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    begin(tab, session, Steps=2 * UNREAD)
    news = tab.news()
    assert next(news)["msg"] == "estimation"
    for number in range(TABS + 3):
        named(tab, f"{tab.hash}-{number}").send("words", [PROMPT])
    for _ in range(2 * UNREAD):
        tab.send("words", [PROMPT])
        assert any(message["msg"] == "process_completed" for message in news)
    session.free.set()
    rest = list(news)
    assert sum(message["msg"] == "process_generating" for message in rest) >= 2 * UNREAD
    assert [message["msg"] for message in rest[-2:]] == ["process_completed", "close_stream"]
    assert "Done in" in str(rest)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_what_was_not_read_when_a_connection_is_lost_counts_no_longer(tab: Tab, session: Held, queue: Any) -> None:
    for _ in range(2):
        begin(tab, session, Steps=50)
        for _ in range(UNREAD // 2):
            tab.send("words", [PROMPT])
        with tab.http.stream("GET", MESSAGES, params={"session_hash": tab.hash}) as stream:
            next(stream.iter_lines())
        until(lambda: not held(queue, tab), "it is held")
        session.free.set()
        at_rest(queue)
        assert not held(queue, tab)
    assert tab.outcome("words", [PROMPT])


def test_an_event_that_waits_for_its_turn_when_its_tab_is_forgotten_stops_no_other(
    tab: Tab, queue: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = named(tab, f"{tab.hash}-2")
    with monkeypatch.context() as full:
        full.setattr(queue, "get_events", lambda: None)
        other.send("words", [PROMPT])
        tab.send("words", [PROMPT])
        until(lambda: len(queue) == 2, "they do not wait")
        with tab.http.stream("GET", f"/ui/gradio_api/heartbeat/{tab.hash}") as heartbeat:
            next(heartbeat.iter_lines())
        until(lambda: not held(queue, tab), "something is held")
    until(lambda: len(queue) == 0 or queue.stopped, "they still wait")
    assert not queue.stopped
    assert any(message["msg"] == "process_completed" for message in other.news())
    at_rest(queue)
    assert "Traceback" not in "".join(capfd.readouterr())
