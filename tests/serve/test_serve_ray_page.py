"""The page on Ray Serve: the front shows it, and the replicas make its pictures."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import httpx
import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("gradio")

from loopback import PROMPT, Oracle, until
from raylike import TOKEN, OnRay, on_ray, stored_bytes

from magicface_rt import Concept, Reference
from magicface_rt.serve import ServeSettings
from tests.ui.paging import Tab, bridged, disc, dot, photograph, png

pytestmark = pytest.mark.ray

CONCEPTS = [
    Concept("man", Reference(photograph(1), mask=disc()), weight=2.5),
    Concept("hat", Reference(photograph(2), mask=disc()), weight=2.0),
]
BRIDGED = bridged(*((slot, png(photograph(slot)), png(disc())) for slot in (1, 2)))
WORD = "Word of the prompt that it stands for"
STEPS = 4
FIELDS = {
    "Prompt": PROMPT,
    WORD: ["man", "hat"],
    "Weight": [2.5, 2.0],
    "Steps": STEPS,
    "Seed": 3,
}


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnRay]:
    settings = ServeSettings(default_steps=STEPS, batch_wait=0, drain=20, deadline=60)
    with on_ray(tiny_bundle, tmp_path_factory.mktemp("ray"), settings=settings, page=True) as started:
        yield started


@pytest.fixture
def http(service: OnRay) -> Iterator[httpx.Client]:
    """As a browser that was told a token."""
    service.gate.forget()
    with httpx.Client(base_url=service.url, auth=("anybody", TOKEN), trust_env=False, timeout=60) as opened:
        yield opened
    service.gate.free()


def test_it_asks_for_a_token(service: OnRay) -> None:
    for path in ("/ui/", "/ui/config", "/ui/page.js"):
        refused = httpx.get(f"{service.url}{path}", trust_env=False)
        assert refused.status_code == 401, path
        assert refused.headers["www-authenticate"].startswith("Basic ")


def test_the_picture_is_the_sessions_and_what_it_says_comes_step_by_step(
    service: OnRay, http: httpx.Client, oracle: Oracle
) -> None:
    expected = oracle.generate(PROMPT, CONCEPTS, steps=STEPS, seed=3, record_regions=True)
    tab = Tab(http)
    assert "on Ray Serve" in json.dumps(tab.config)
    tab.send("generate", tab.values("generate", bridge=BRIDGED, **FIELDS))
    news = list(tab.news())
    for step in range(1, STEPS + 1):
        assert any(f"Step {step} of {STEPS}" in json.dumps(message) for message in news), step
    done = next(message for message in news if message["msg"] == "process_completed")["output"]["data"]
    assert "Done in" in done[0]
    found = re.search(r'src="data:image/png;base64,([^"]+)"', done[1])
    assert found is not None
    assert base64.b64decode(found.group(1)) == png(expected.images[0])
    regions = re.search(r'data-regions="([^"]+)"', done[1])
    assert regions is not None
    labels = np.frombuffer(base64.b64decode(json.loads(unescape(regions.group(1)))["labels"]), np.uint8)
    assert expected.regions_per_step is not None
    np.testing.assert_array_equal(labels, expected.regions_per_step[:, 0].ravel())
    assert len({step.tobytes() for step in expected.regions_per_step}) > 1, "nothing is shown where all are the same"
    assert service.gate.notes("made")


def test_no_photograph_is_written_or_left_in_rays_store(service: OnRay, http: httpx.Client) -> None:
    large = png(photograph(9, (1200, 1200)))
    assert len(large) > 200_000
    before = stored_bytes()
    prompt = {"Prompt": "a man of words that nobody else says", WORD: "man", "Steps": 1}
    status, *_ = Tab(http).generate(bridged((1, large, png(disc((1200, 1200))))), **prompt)
    assert "Done in" in status
    assert stored_bytes() - before < 100_000
    written = [path for path in service.cluster.folder.rglob("*") if path.is_file()]
    assert written
    for path in written:
        assert b"words that nobody else" not in path.read_bytes(), path


def test_what_a_replica_refuses_stands_on_the_page(http: httpx.Client) -> None:
    status, *_ = Tab(http).generate(BRIDGED, **{**FIELDS, WORD: ["man", "cat"]})
    assert 'role="alert"' in status
    assert "Concept 2, word:" in status


def test_what_a_replica_warns_of_stands_on_the_page_and_in_the_answer(service: OnRay, http: httpx.Client) -> None:
    status, *_ = Tab(http).generate(bridged((1, png(photograph(1)), png(dot()))), **{**FIELDS, WORD: "man"})
    assert "Done in" in status
    assert "the mask vanishes on the" in status
    with service.client() as client:
        made = client.generate(PROMPT, [Concept("man", Reference(photograph(1), mask=disc((48, 48))))], steps=1)
        assert [one.kind for one in made.warnings] == ["mask-stretched"]
        kept = client.put_concept(Concept("man", Reference(photograph(1), mask=disc((48, 48)))))
        assert [one.kind for one in kept.warnings] == ["mask-stretched"]


def test_cancel_stops_the_replica_at_its_next_step(service: OnRay, http: httpx.Client) -> None:
    tab = Tab(http)
    service.gate.hold()
    tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=50))
    service.gate.wait_for("step")
    tab.send("cancel", [])
    messages = []
    for message in tab.news():
        messages.append(json.dumps(message))
        if "Cancelled" in messages[-1]:
            service.gate.free()
    assert any("Cancelled" in message for message in messages)
    until(lambda: service.admitted() == 0, "it goes on")
    status, *_ = tab.generate(BRIDGED, **FIELDS)
    assert "Done in" in status
    assert len(service.gate.notes("step")) <= 2 + STEPS


@pytest.mark.parametrize(
    "which", ["the first", *(pytest.param(which, marks=pytest.mark.slow) for which in ("another", "a third"))]
)
def test_a_closed_tab_stops_its_request(service: OnRay, http: httpx.Client, which: str) -> None:
    service.gate.forget()
    tab = Tab(http)
    service.gate.hold()
    with http.stream("GET", f"/ui/gradio_api/heartbeat/{tab.hash}") as heartbeat:
        lines = heartbeat.iter_lines()  # let go of, it closes the connection
        assert "ALIVE" in next(lines)
        tab.send("generate", tab.values("generate", bridge=bridged(), Prompt="a house", Steps=50))
        service.gate.wait_for("step")
        assert service.admitted() == 1
    until(lambda: service.admitted() == 0, "it goes on")
    service.gate.free()
    status, *_ = Tab(http).generate(BRIDGED, **FIELDS)
    assert "Done in" in status
    assert len(service.gate.notes("step")) < 50


def test_an_open_tab_is_let_go_of_when_the_service_ends(service: OnRay, http: httpx.Client) -> None:
    """The last test: afterwards there is no service."""
    with http.stream("GET", "/ui/gradio_api/heartbeat/abc") as heartbeat:
        lines = heartbeat.iter_lines()
        assert "ALIVE" in next(lines)
        ending = threading.Thread(target=service.end)
        ending.start()
        for count, _ in enumerate(lines):  # it ends, or httpx says after a minute of silence that it does not
            assert count < 100, "it goes on"
    ending.join(60)
    assert not ending.is_alive()
    until(lambda: not service.replicas(), "the replicas wait for the tab", 60)
