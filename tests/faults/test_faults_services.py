"""Services as processes: on a slow disk, two that share a folder, told to end at any moment, and what they log."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import figures
import pytest
from killing import OUTSIDE, Ended, Forks, forking, leftovers
from killing_server import bundle_arguments, check, client_of, put, serve_arguments, serving, stored, wait_for
from killing_targets import GetForks

from magicface_rt import Concept, KeptConcept, Reference
from magicface_rt.errors import DrainingError, ServiceError, UnknownConceptError, UnreachableError

pytest.importorskip("uvicorn")
pytest_plugins = ("killing_fixtures",)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")

NUMBERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def man(man_job: Path) -> Concept:
    return Concept("man", Reference(man_job.parent / "man.png", prompt="a man"))


@pytest.fixture(scope="module")
def service(forks: GetForks) -> Forks:
    """With the page, where its extra is installed."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        return forks("serve")
    return forks("ui")


# ------------------------------------------------------------------------------------------------------------ slow disk


class SlowDisk:
    """Its steps are done when they are told to, while it is `slow`."""

    def __init__(self, folder: Path) -> None:
        self._armed, self.permits = folder / "armed", folder / "permits"
        os.mkfifo(self.permits)
        self._pipe = os.open(self.permits, os.O_RDWR)

    @property
    def kill(self) -> dict[str, str]:
        """For `Forks.run`."""
        return {"armed": os.fspath(self._armed)}

    @contextmanager
    def slow(self) -> Iterator[None]:
        """For the block; whatever has not been done by its end is done then."""
        self._armed.touch()
        try:
            yield
        finally:
            self.step(10_000)

    def step(self, count: int) -> None:
        os.write(self._pipe, b"." * count)

    def close(self) -> None:
        os.close(self._pipe)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SlowDisk]:
    made = SlowDisk(tmp_path)
    yield made
    made.close()


def prepared(client: Any) -> int:
    """How many concepts the service has prepared."""
    told = client._http.get("/metrics").text
    return int(float(told.partition("\nmagicface_concept_preparations_total ")[2].split()[0]))


def test_on_a_slow_disk_a_concept_is_whole_or_not_there_and_nobody_waits_for_it(
    service: Forks, disk: SlowDisk, tiny_bundle: Path, man: Concept, tmp_path: Path
) -> None:
    """Two are written, some steps at a time; between these another client lists, loads and draws."""
    folder = tmp_path / "concepts"
    with (
        serving(service, tiny_bundle, folder, kill=disk.kill, permits=disk.permits) as client,
        client_of(service, timeout=60) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        first = put(client, man, 0)
        assert first is not None
        picture = other.generate("a man", [first], seed=1).pngs
        with disk.slow():
            puts = [pool.submit(put, client, man, seed) for seed in (1, 2)]
            while prepared(other) < 3:
                time.sleep(0.01)
            rounds = beside = 0
            while not all(one.done() for one in puts):
                before, beginning = stored(folder), not any(one.done() for one in puts)
                for name in before:
                    KeptConcept.load(folder / name, check_hashes=True)
                listed = sorted(one.id for one in other.concepts())
                for id in listed:
                    assert other.concept(id).id == id
                assert other.generate("a man", [first], seed=1).pngs == picture
                assert {name.removesuffix(".concept") for name in before} <= set(listed)
                assert {f"{id}.concept" for id in listed} <= set(stored(folder))
                rounds, beside = rounds + 1, beside + beginning
                disk.step(8)
        assert None not in [one.result() for one in puts]
        check(other, folder)
        assert len(stored(folder)) == 3
        assert leftovers(folder) == []
    assert beside >= 3
    told = f"{rounds} times listed, loaded and drawn, {beside} of them while two were being written, never half there"
    figures.tell("disks", "PUT /v1/concepts, slow", told)


# --------------------------------------------------------------------------------------------------------- two services


@pytest.fixture(scope="module")
def beside(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Another process that forks: each has one child at a time."""
    with forking(tmp_path_factory.mktemp("forks-beside"), tiny_bundle, "serve") as forks:
        yield forks


@pytest.mark.parametrize("races", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_two_services_share_a_folder_of_concepts(
    races: int, service: Forks, beside: Forks, tiny_bundle: Path, man: Concept, tmp_path: Path
) -> None:
    folder = tmp_path / "concepts"
    with serving(service, tiny_bundle, folder) as one, serving(beside, tiny_bundle, folder) as other:
        kept = one.put_concept(man, steps=12)
        assert kept.new
        picture = one.generate("a man", [kept], seed=3).pngs
        assert not other.put_concept(man, steps=12).new
        assert [found.id for found in other.concepts()] == [kept.id]
        with ThreadPoolExecutor(2) as pool:
            begun, go = Event(), Event()

            def draw() -> Any:
                def told(_: object) -> None:
                    begun.set()
                    go.wait(60)

                return other.generate("a man", [kept], seed=3, progress=told)

            drawing: Future[Any] = pool.submit(draw)
            assert begun.wait(60)
            assert one.erase(kept)["files"] == 1
            assert stored(folder) == []
            go.set()
            assert drawing.result(60).pngs == picture  # what was begun in another process is not ended
            for client in (one, other):
                with pytest.raises(UnknownConceptError):
                    client.generate("a man", [kept], seed=3)
                assert client.concepts() == []
            race(pool, one, other, man, folder, races)
        assert leftovers(folder) == []
    told = f"{races} times the same was put at both at once, {races} times put at one and erased at the other"
    figures.tell("processes", "two services on one folder", f"{told}: whole or not there, alike at both")


def race(pool: ThreadPoolExecutor, one: Any, other: Any, man: Concept, folder: Path, races: int) -> None:
    both = Barrier(2)

    def at_once(first: Callable[[], Any], second: Callable[[], Any]) -> list[Any]:
        def begin(call: Callable[[], Any]) -> Any:
            both.wait(60)
            try:
                return call()
            except UnreachableError:
                raise
            except ServiceError as error:
                return error

        return list(pool.map(begin, (first, second)))

    def putting(client: Any, seed: int) -> Callable[[], Any]:
        return lambda: client.put_concept(man, reference_seed=seed)

    for seed in range(races):
        puts = at_once(putting(one, seed), putting(other, seed))
        id = puts[0].id
        assert puts[1].id == id
        assert stored(folder) == [f"{id}.concept"]
        pictures = {client.generate("a man", [id], seed=1).pngs for client in (one, other)}
        assert len(pictures) == 1
        one.erase(id)
        outcomes = at_once(putting(other, seed), partial(one.erase, id))
        for client in (one, other):
            check(client, folder)
        if stored(folder):
            assert outcomes[0].id == id
            assert other.generate("a man", [id], seed=1).pngs in pictures
            other.erase(id)
        for client in (one, other):
            assert client.concepts() == []


# -------------------------------------------------------------------------------------------------------------- signals


class Signals:
    """How services ended that a signal came to."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()

    def check(self, phase: str, ended: Ended, number: int, folder: Path) -> None:
        where = f"{phase}, signal {number}: code {ended.code}: {ended.said[-2000:]}"
        assert "Traceback" not in ended.said, where
        for name in stored(folder):
            KeptConcept.load(folder / name, check_hashes=True)
        if ended.code == 0:
            assert ended.said.splitlines()[-1].startswith("ended"), where
            self.ended["in order"] += 1
        elif ended.code == 130:
            assert ended.said.endswith("interrupted; nothing half written\n"), where
            assert "\nready\n" not in ended.said, where
            self.ended["interrupted"] += 1
        else:
            assert ended.code in (-number, OUTSIDE), where
            assert phase == "start-up", where
            self.ended["before the verb"] += 1

    def __str__(self) -> str:
        return ", ".join(f"{n} {how}" for how, n in sorted(self.ended.items()))


@pytest.mark.parametrize("rounds", [1, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["serve", "ui"])
def test_a_signal_at_any_moment_of_a_service(
    verb: str, rounds: int, service: Forks, tiny_bundle: Path, man: Concept, tmp_path: Path
) -> None:
    """As it warms up, as it prepares and stores a concept, and as it starts."""
    if verb == "ui":
        pytest.importorskip("gradio")
    folder = tmp_path / "concepts"
    arguments = serve_arguments(tiny_bundle, folder) if verb == "serve" else ["ui", *bundle_arguments(tiny_bundle)]
    draw, tally, seconds = random.Random(rounds), Signals(), {"warm-up": 0.2, "PUT": 0.3, "start-up": 0.5}
    answered = 0
    for turn in range(rounds):
        for place, phase in enumerate(("warm-up", "PUT", "start-up")):
            number = NUMBERS[(turn + place + (verb == "ui")) % 2]
            begun = time.monotonic()
            service.send("cli", [arguments], tmp_path)
            service.wait_for_start()
            if phase == "start-up":
                time.sleep(draw.uniform(0, seconds[phase]))
                os.kill(service.pid, number)
            elif phase == "warm-up":
                wait_for(service, "listening on ")
                seconds["start-up"] = time.monotonic() - begun
                time.sleep(draw.uniform(0, seconds[phase]))
                os.kill(service.pid, number)
            else:
                wait_for(service, "ready\n")
                with client_of(service) as client, ThreadPoolExecutor(1) as pool:
                    putting = pool.submit(putting_while_it_ends, client, man, turn)
                    time.sleep(draw.uniform(0, seconds[phase]))
                    os.kill(service.pid, number)
                    id = putting.result(60)
                answered += id is not None
            ended = service.answer()
            tally.check(phase, ended, number, folder)
            if phase == "PUT":
                assert ended.code == 0, ended.said
                assert leftovers(folder) == []
                if verb == "serve":
                    assert (f"{id}.concept" in stored(folder)) == (id is not None)
    told = (
        f"{3 * rounds} signals as it starts, warms up and stores a concept: {tally}; {answered} uploads were answered"
    )
    figures.tell("signals", verb, told)


def putting_while_it_ends(client: Any, man: Concept, seed: int) -> str | None:
    """The id; None where the service takes nothing any more."""
    try:
        return str(client.put_concept(man, reference_seed=seed).id)
    except (DrainingError, UnreachableError):
        return None


# ---------------------------------------------------------------------------------------------------------------- logs


TOKEN = "sesquipedalian-marzipan-balalaika"
WRONG = "xylophone-bergamot-zugzwang-isthmus"
SECRETS = ("pelican", "zeppelin", "rhubarb", "kumquat", "gazpacho", "obelisk", "quixotic", "limpet", "wombat", "yarrow")


def test_the_log_of_a_service_holds_nothing_of_what_it_was_sent(
    service: Forks, tiny_bundle: Path, man_job: Path, tmp_path: Path
) -> None:
    """At every level of every library, for requests that are right and for all kinds that are not."""
    import httpx

    image = (man_job.parent / "man.png").read_bytes()
    text = base64.b64encode(image).decode()
    (tmp_path / "tokens").write_text(TOKEN)
    folder, sent = tmp_path / "concepts", Reference(man_job.parent / "man.png", prompt="a limpet")
    options = ["--tokens", os.fspath(tmp_path / "tokens"), "--max-steps", "4", "--ui"][: 5 if has_page() else 4]
    with serving(service, tiny_bundle, folder, work="loud_cli", options=options, token=TOKEN) as client:
        kept = client.put_concept(Concept("pelican", sent, name="kumquat"))
        bare = Concept("zeppelin", sent, name="rhubarb")
        made = client.generate("a zeppelin, a pelican", [bare, kept], negative_prompt="gazpacho", steps=2)
        client.generate("a pelican", [kept], steps=2, progress=lambda _: None)
        with httpx.Client(base_url=client._http.base_url, trust_env=False) as http:
            right = {"Authorization": f"Bearer {TOKEN}"}
            statuses = [
                http.request(method, path, headers={**right, **headers}, content=content).status_code
                for method, path, headers, content in bad_requests(text, image)
            ]
        client.erase(kept)
        said = service.said
    assert min(statuses) >= 400, statuses
    assert {401, 404, 405, 415, 422} <= set(statuses), statuses
    assert "DEBUG" in said
    assert "asyncio" in said, "the libraries are not as loud as they can be"
    check_log(said, text, image, made.pngs)


def has_page() -> bool:
    try:
        import gradio  # noqa: F401
    except ImportError:
        return False
    return True


def bad_requests(text: str, image: bytes) -> list[tuple[str, str, dict[str, str], bytes]]:
    """What goes wrong at every place: names, forms, texts, images, tokens. Each holds something secret."""
    json_kind = {"Content-Type": "application/json"}
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    basic = base64.b64encode(f"wombat:{WRONG}".encode()).decode()

    def order(**fields: Any) -> bytes:
        return json.dumps({"prompt": "a quixotic obelisk", "steps": 1, **fields}).encode()

    def part(name: str, content: bytes, file: str = "") -> bytes:
        named = f'; filename="{file}"' if file else ""
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        return head + content + b"\r\n"

    inline = {"word": "obelisk", "references": [{"image": text, "prompt": "a limpet"}]}
    posts = [
        order(concepts=[{**inline, "word": "yarrow"}]),
        order(concepts=[{"id": "wombat"}]),
        order(concepts=[{"word": "obelisk", "references": [{"image": text[:-40] + "!", "prompt": "a limpet"}]}]),
        order(concepts=[{"word": "obelisk", "references": [{"image": text[:400], "prompt": "a limpet"}]}]),
        order(concepts=[{**inline, "name": "kumquat"}, {**inline, "name": "kumquat"}]),
        order(prompt="rhubarb " * 100),
        order(rhubarb=text),
        order(steps=text),
        order(steps=100),
        order(negative_prompt=["gazpacho", text]),
        order()[:-1],
        b'{"prompt": "a quixotic obelisk", "prompt": "' + text.encode() + b'"}',
        b'{"prompt": "a quixotic obelisk \xff' + image,
        b"[" * 1000 + text.encode(),
        order(concepts=[inline], deadline=0.001),
    ]
    puts = [
        part("prompt", b"a limpet") + b"--x--",
        part("image", image, "wombat.png") + part("prompt", b"rhubarb " * 100) + b"--x--",
        part("image", image[:300], "wombat.png") + part("prompt", b"a limpet") + b"--x--",
        part("image", image, "wombat.png") + part("mask", image[:50], "yarrow.png") + b"--x--",
        part("image", image, "wombat.png") + part("steps", b"gazpacho") + b"--x--",
        part("quixotic", image, "wombat.png") + b"--x--",
        part("image", image, "wombat.png")[:-60],
    ]
    wrong = {"Authorization": f"Bearer {WRONG}"}
    return [
        *(("POST", "/v1/images", json_kind, content) for content in posts),
        *(("PUT", "/v1/concepts", form, content) for content in puts),
        ("POST", "/v1/images", {"Content-Type": "text/wombat"}, order()),
        ("POST", "/v1/images", {**json_kind, **wrong}, order()),
        ("GET", "/ui/", {"Authorization": f"Basic {basic}"}, b""),
        ("GET", f"/v1/wombat?token={WRONG}&prompt=yarrow", {"X-Prompt": "a quixotic obelisk"}, b""),
        ("GET", "/v1/concepts/wombat", {"Cookie": f"token={WRONG}"}, b""),
        ("DELETE", "/v1/concepts/wombat", {}, b""),
        ("PATCH", "/v1/concepts", {}, b"rhubarb"),
    ]


def check_log(said: str, text: str, image: bytes, pngs: tuple[bytes, ...]) -> None:
    lower = said.lower()
    for secret in (*SECRETS, TOKEN, WRONG, *TOKEN.split("-"), *WRONG.split("-")):
        assert secret not in lower, around(lower, secret)
    forms = {"base64": text, "bytes": repr(image)[2:-1], "hex": image.hex()}
    forms |= {f"picture {k}": repr(png)[2:-1] for k, png in enumerate(pngs)}
    forms |= {f"picture {k}, base64": base64.b64encode(png).decode() for k, png in enumerate(pngs)}
    windows = {said[start : start + 16] for start in range(len(said))}
    for name, form in forms.items():
        found = [form[start : start + 16] for start in range(len(form) - 15) if form[start : start + 16] in windows]
        assert not found, f"{name}: {around(said, found[0])}"


def around(said: str, what: str) -> str:
    at = said.index(what)
    return said[max(0, at - 300) : at + 300]
