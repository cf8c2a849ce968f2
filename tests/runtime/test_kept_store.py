"""The store of prepared references, and buckets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magicface_rt import OptionError
from magicface_rt.kept import awaited
from magicface_rt.kept.awaited import Awaited
from magicface_rt.kept.reference import Exact, KeptReference
from magicface_rt.kept.store import KeptStore
from magicface_rt.regions import PADDING, KeptTokens, bucket, key_access
from magicface_rt.values.sizes import parse_size


def entry(key: str, nbytes: int = 100) -> KeptReference:
    return KeptReference(key, "", "exact", {}, {"k": Exact(np.zeros((1, nbytes, 1), np.uint8))})


def test_the_least_recently_used_is_forgotten_first() -> None:
    store = KeptStore(250)
    for key in ("a", "b", "a", "c"):
        store.get_or_make(key, lambda key=key: entry(key))
    assert store.content_keys == ("a", "c")
    assert store.nbytes == 200
    store.get_or_make("d", lambda: entry("d", 260))
    assert store.content_keys == ("a", "c"), "what does not fit at all drives nobody out"
    store.get_or_make("e", lambda: entry("e", 250))
    assert store.content_keys == ("e",)


def test_many_threads_make_each_reference_once() -> None:
    store, made = KeptStore(10**6), []

    def make(key: str) -> KeptReference:
        made.append(key)
        time.sleep(0.02)
        return entry(key)

    threads = [
        threading.Thread(target=lambda n=n: store.get_or_make(str(n % 3), lambda: make(str(n % 3)))) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(made) == ["0", "1", "2"]


def test_where_one_fails_another_that_waited_makes_it() -> None:
    store, first, errors = KeptStore(1000), threading.Event(), []

    def failing() -> KeptReference:
        first.set()
        time.sleep(0.05)
        raise KeyboardInterrupt

    def run() -> None:
        try:
            store.get_or_make("a", failing)
        except KeyboardInterrupt as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    first.wait(30)
    assert store.get_or_make("a", lambda: entry("a")).key == "a"
    thread.join(30)
    assert len(errors) == 1
    assert store.content_keys == ("a",)


class Interrupting:
    """A lock; Ctrl-C comes right after it was let go for the time with the number `at`."""

    def __init__(self, at: int) -> None:
        self.lock, self.at, self.came = threading.Lock(), at, False

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.at -= 1
        if self.at == -1:
            self.came = True
            raise KeyboardInterrupt


def ends(work: Callable[[], object]) -> bool:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_an_interrupt_at_any_moment_leaves_nobody_waiting() -> None:
    for at in range(20):
        store = KeptStore(1000)
        interrupting = Interrupting(at)
        store._lock = interrupting  # type: ignore[assignment]
        try:
            store.get_or_make("a", lambda: entry("a"))
        except KeyboardInterrupt:
            assert interrupting.came
        interrupting.at = -1  # not from here on
        assert ends(lambda store=store: store.get_or_make("a", lambda: entry("a"))), f"after {at} times"
        assert store.content_keys == ("a",)
        assert not store._making
        if not interrupting.came:
            break
    assert at == 3


def test_an_interrupt_as_it_says_that_it_is_over_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    store, first, found, wake = KeptStore(1000), threading.Event(), list[str](), Awaited.wake

    def making() -> KeptReference:
        first.set()
        time.sleep(0.5)
        return entry("a")

    def interrupted(self: Awaited) -> None:
        if threading.current_thread() is maker:
            raise KeyboardInterrupt
        wake(self)

    def make() -> None:
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make("a", making)

    monkeypatch.setattr(Awaited, "wake", interrupted)
    maker = threading.Thread(target=make)
    maker.start()
    assert first.wait(10)
    assert ends(lambda: found.append(store.get_or_make("a", lambda: entry("b")).key))
    maker.join(10)
    assert found == ["a"]
    store.forget()
    assert not store._making


def test_who_waits_is_asked_from_time_to_time_and_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awaited, "WAIT_SECONDS", 0.001)
    store, first, go_on, asked = KeptStore(1000), threading.Event(), threading.Event(), list[int]()

    def making() -> KeptReference:
        first.set()
        assert go_on.wait(60)
        return entry("a")

    def waiting() -> None:
        asked.append(len(asked))
        if len(asked) == 3:
            raise KeyboardInterrupt

    maker = threading.Thread(target=store.get_or_make, args=("a", making))
    maker.start()
    assert first.wait(10)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("a", lambda: entry("b"), waiting)
    assert asked == [0, 1, 2]
    go_on.set()
    maker.join(10)
    assert store.content_keys == ("a",), "who makes it was not disturbed"


def test_who_waits_goes_on_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    store, first, waits, go_on, wait = (
        KeptStore(1000),
        threading.Event(),
        threading.Event(),
        threading.Event(),
        Awaited.wait,
    )

    def making() -> KeptReference:
        first.set()
        assert go_on.wait(60)
        return entry("a")

    def waited(self: Awaited, waiting: Callable[[], object]) -> None:
        waits.set()
        wait(self, waiting)

    monkeypatch.setattr(awaited, "WAIT_SECONDS", 1000)
    monkeypatch.setattr(Awaited, "wait", waited)
    threads = []
    for make, begun in ((making, first), (lambda: entry("b"), waits)):
        threads.append(threading.Thread(target=store.get_or_make, args=("a", make), daemon=True))
        threads[-1].start()
        assert begun.wait(10)
    time.sleep(0.05)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_what_is_forgotten_is_gone_where_an_interrupt_came_as_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Awaited) -> None:
        raise KeyboardInterrupt

    store = KeptStore(1000)
    with monkeypatch.context() as patched:
        patched.setattr(Awaited, "wake", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make("a", lambda: entry("a"))
    store.forget()
    assert not store._making
    assert not store.content_keys


@given(count=st.integers(1, 30_000), largest=st.none() | st.integers(1, 30_000))
def test_a_bucket_holds_its_tokens_and_little_more(count: int, largest: int | None) -> None:
    found = bucket(count, largest)
    assert count <= found <= max(count + 15, 1.25 * count)
    assert largest is None or found <= max(count, largest)
    assert bucket(bucket(count)) == bucket(count)


def test_there_are_few_buckets() -> None:
    assert len({bucket(count) for count in range(1, 12289)}) <= 44


def test_padding_is_seen_by_nobody() -> None:
    tokens = KeptTokens(np.arange(3), np.array([0, 0, 1]), np.full(3, 2.0, np.float32)).padded(5)
    assert tokens.count == 5
    for stage in ("rsa", "rba"):
        group = key_access({1: tokens}, stage, "bias")["key_group_1"]  # type: ignore[arg-type]
        assert (group[0, 3:] == PADDING).all()
        assert (group[0, :3] > 0).all()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 2**32), ("500 MB", 5 * 10**8), (7, 7), ("1.5kb", 1500), ("9007199254740993", 2**53 + 1)],
)
def test_sizes_as_people_write_them(text: int | str, size: int) -> None:
    assert parse_size(text, "keep") == size


@pytest.mark.parametrize("text", ["", "4 parsecs", -1, True, None, 1.5, "-1", "1_0GB", "٣GiB", "9" * 400, "9" * 5000])
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(OptionError, match="keep is"):
        parse_size(text, "keep")  # type: ignore[arg-type]
