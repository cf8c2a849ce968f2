"""Ctrl-C and SIGTERM at any moment: the exit code says so, nothing half written stays, and a Session goes on."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import figures
import numpy as np
import pytest
from killing_checks import plan_at, whole_result
from memory_hollow import Hollow
from memory_limits import Scene
from PIL import Image
from plan_store import with_a_plan
from safetensors.numpy import load_file
from threads_requests import HAT, MAN, PROMPT, STEPS, Mixed, digest
from threads_signalled import OUTSIDE, Ended, Forks

import magicface_rt
from magicface_rt import Bundle, Concept, KeptConcept, Progress, Session
from magicface_rt.backends.device import Device
from magicface_rt.backends.key_uploader import KeyUploader
from magicface_rt.backends.worker_stream import WorkerStream
from magicface_rt.engines.store import EngineStore
from magicface_rt.files.atomic_files import temporary_sibling
from magicface_rt.kept.on_device import OnDevice
from tests.runtime.drawn_backend import Drawn
from tests.runtime.fake_cuda import FakeCuda

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

NUMBERS = (signal.SIGINT, signal.SIGTERM)
SOON_SECONDS = 120
LOADED_SECONDS = 600
"""How long a command may take to load its runtime; an export traces its graphs before, beside other tests."""


@pytest.fixture(scope="module")
def scene(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tiny_bundle, tiny_checkpoint, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def forks(request: pytest.FixtureRequest) -> Iterator[Forks]:
    started = Forks(request.param)
    yield started
    started.stop()


# ---------------------------------------------------------------------------------------------------- what may be there


WRITTEN = ("out", "bundle", r"\w+\.concept", "checkpoint", "portrait", r"sheet\.png", "magicface-demo-bundle")
UNFINISHED = re.compile(rf"\.({'|'.join(WRITTEN)}|[0-9a-f]{{64}})\.[0-9a-f]{{32}}\.part")


def unfinished(folder: Path) -> list[str]:
    """What is temporary by its name."""
    return [path.name for path in folder.rglob(".*") if UNFINISHED.fullmatch(path.name)]


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not UNFINISHED.fullmatch(path.name)}


def check_run(folder: Path) -> bool:
    """A result is whole, or not there; says which."""
    assert there(folder) <= {"out"}
    if not (folder / "out").exists():
        return False
    whole_result(folder / "out")
    return True


def check_prepare(folder: Path) -> bool:
    """Every file that is there is whole; says whether all are."""
    assert there(folder) <= {"kept"}
    files = there(folder / "kept") if (folder / "kept").exists() else set()
    assert files <= {"man.concept", "hat.concept"}
    for name in files:
        KeptConcept.load(folder / "kept" / name)
    return len(files) == 2


def check_export(folder: Path) -> bool:
    assert there(folder) <= {"bundle"}
    if not (folder / "bundle").exists():
        return False
    Bundle.open(folder / "bundle")
    return True


def check_verify(folder: Path) -> bool:
    """It writes nothing."""
    assert not there(folder)
    return True


def check_checkpoint(folder: Path) -> bool:
    """Every file of weights is read to its end; the index of the model comes last."""
    assert there(folder) <= {"checkpoint"}
    place = folder / "checkpoint"
    if not place.exists():
        return False
    assert (place / "model_index.json").exists()
    for weights in place.rglob("*.safetensors"):
        assert load_file(weights)
    return True


def check_bench(folder: Path) -> bool:
    """The report that stands there can be read; says whether there is one with its case measured."""
    assert there(folder) <= {"report"}
    report = folder / "report" / "bench.json"
    return report.exists() and len(json.loads(report.read_text())["cases"]) == 1


def check_build(folder: Path) -> bool:
    assert there(folder) <= {"plans"}
    return (folder / "plans").exists() and plan_at(folder / "plans")


def check_demo(folder: Path) -> bool:
    """Each of the three things that it leaves is whole; says whether all are there."""
    assert there(folder) <= {"work", "demo-out"}
    bundle, portrait, sheet = (
        folder / place for place in ("work/magicface-demo-bundle", "demo-out/portrait", "demo-out/sheet.png")
    )
    if bundle.exists():
        Bundle.open(bundle)
    if portrait.exists():
        whole_result(portrait)
    if sheet.exists():
        with Image.open(sheet) as image:
            image.load()
    return bundle.exists() and portrait.exists() and sheet.exists()


CHECKS: dict[str, Callable[[Path], bool]] = {
    "run": check_run,
    "run, prompt alone": check_run,
    "prepare": check_prepare,
    "export": check_export,
    "verify": check_verify,
    "checkpoint": check_checkpoint,
    "build": check_build,
    "bench": check_bench,
    "demo": check_demo,
}


class Tally:
    """How processes ended that a signal came to."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()

    def check(self, verb: str, ended: Ended, number: int, folder: Path) -> None:
        where = f"{verb}, signal {number}: code {ended.code}: {ended.said[-2000:]}"
        whole = CHECKS[verb](folder)
        assert not unfinished(folder), where
        assert "Traceback" not in ended.said, where
        if ended.code == 130:
            assert ended.said.endswith("interrupted; nothing half written\n"), where
            self.ended["interrupted"] += 1
        elif ended.code == 0:
            assert whole, where
            self.ended["done before"] += 1
        else:  # it came before the verb began to listen, or after it had ended
            assert ended.code in (-number, OUTSIDE), where
            self.ended["outside of the verb"] += 1

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {how}" for how, n in self.ended.most_common())
        return f"{self.ended.total()} signals: {ends}; none left anything temporary"


def fresh(folder: Path, number: int) -> Path:
    made = folder / str(number)
    made.mkdir()
    return made


# ----------------------------------------------------------------------------------------------------------- any moment


def at_random(forks: Forks, scene: Scene, verb: str, count: int, folder: Path) -> Tally:
    """At moments drawn over the whole length of the verb, by both signals in turn; more where too many come too late.

    How long the verb takes is not the same twice: after a signal that came too late the next come before its moment.
    """
    arguments, draw, tally, turn = scene.verbs[verb], random.Random(count), Tally(), 0
    whole = forks.run(arguments, fresh(folder, -1))
    assert whole.code == 0, whole.said
    length = whole.seconds
    while turn < count or tally.ended["interrupted"] < count // 2:
        assert turn < 10 * count, tally
        number, where, seconds = NUMBERS[turn % 2], fresh(folder, turn), draw.uniform(0.03, 0.98) * length
        ended = forks.run(arguments, where, number, seconds=seconds)
        tally.check(verb, ended, number, where)
        if ended.code == 0:
            length = seconds
        turn += 1
    assert tally.ended["outside of the verb"] <= max(1, turn // 10), tally
    return tally


def at_changes(forks: Forks, scene: Scene, verb: str, most: int, folder: Path) -> Tally:
    """As it is about to change each of the files and folders that it changes."""
    arguments, tally = scene.verbs[verb], Tally()
    whole = forks.run(arguments, fresh(folder, -1))
    assert whole.code == 0, whole.said
    assert whole.events >= 3, "it changed nothing"
    chosen = range(whole.events)
    if whole.events > most:
        chosen = sorted(random.Random(most).sample(chosen, most))
    for event in chosen:
        number, where = NUMBERS[event % 2], fresh(folder, event)
        tally.check(verb, forks.run(arguments, where, number, event=event), number, where)
    assert tally.ended["interrupted"] >= len(chosen) // 2, tally
    assert not tally.ended["outside of the verb"], tally
    return tally


def everything(folder: Path) -> dict[str, bytes]:
    """The files in a folder, except locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


LAST_CALLS = 5
"""With so few calls left, a verb may have ended as far as it can be told."""


def with_a_plan_at(folder: Path) -> None:
    with_a_plan(EngineStore(folder / "plans"))


def at_calls(
    forks: Forks,
    arguments: Sequence[str],
    verb: str,
    most: int,
    folder: Path,
    make: Callable[[Path], object] = lambda _: None,
    check: Callable[[Path], object] = lambda _: None,
    ends: Collection[int] = (0,),
) -> Tally:
    """As it calls each of our functions that it calls. `ends`: codes with which it ends without a signal."""
    tally = Tally()
    make(whole_folder := fresh(folder, -1))
    whole = forks.run(arguments, whole_folder, calls=True)
    assert whole.code in ends, whole.said
    assert whole.events > most or whole.events > 100, "nothing is counted"
    chosen = range(whole.events)
    if whole.events > most:
        chosen = sorted(random.Random(most).sample(chosen, most))
    for event in chosen:
        number, where = NUMBERS[event % 2], fresh(folder, event)
        make(where)
        ended = forks.run(arguments, where, number, event=event, calls=True)
        told = f"{verb}, signal {number} at call {event}: code {ended.code}: {ended.said[-2000:]}"
        assert "Traceback" not in ended.said, told
        assert not unfinished(where), told
        if ended.code == 130:
            assert ended.said.endswith("interrupted; nothing half written\n"), told
        elif event < ended.events - LAST_CALLS:
            assert ended.code in (-number, OUTSIDE), told
        tally.ended["interrupted" if ended.code == 130 else "outside of the verb"] += 1
        check(where)
    assert tally.ended["interrupted"] >= len(chosen) // 2, tally
    return tally


@pytest.mark.parametrize("forks", ["cli"], indirect=True)
@pytest.mark.parametrize(
    ("verb", "count"),
    [
        ("run, prompt alone", 2),
        ("prepare", 2),
        pytest.param("run", 40, marks=pytest.mark.slow),
        pytest.param("prepare", 40, marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_any_moment(forks: Forks, scene: Scene, verb: str, count: int, tmp_path: Path) -> None:
    figures.tell("signals", f"{verb}, any of {count} moments", str(at_random(forks, scene, verb, count, tmp_path)))


@pytest.mark.parametrize("forks", ["cli"], indirect=True)
@pytest.mark.parametrize(
    ("verb", "most"),
    [
        ("run, prompt alone", 3),
        ("prepare", 3),
        pytest.param("run", 200, marks=pytest.mark.slow),
        pytest.param("prepare", 200, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_each_change(forks: Forks, scene: Scene, verb: str, most: int, tmp_path: Path) -> None:
    told = str(at_changes(forks, scene, verb, most, tmp_path))
    figures.tell("signals", f"{verb}, at most {most} changes of files", told)


OTHERS = ("verify", "checkpoint", "build", "demo", "bench")


@pytest.mark.parametrize("forks", ["all"], indirect=True)
@pytest.mark.parametrize(
    ("verb", "seconds"),
    [("verify", 0.8), ("checkpoint", 0.1), ("build", 0.2), ("demo", 2.0), ("bench", 3.0)],
    ids=OTHERS,
)
def test_a_signal_in_the_middle_of_another_verb(
    forks: Forks, scene: Scene, verb: str, seconds: float, tmp_path: Path
) -> None:
    """Long before it can be done."""
    if verb == "build":
        pytest.importorskip("tensorrt_rtx")
    number, tally = NUMBERS[OTHERS.index(verb) % 2], Tally()
    tally.check(verb, forks.run(scene.verbs[verb], tmp_path, number, seconds=seconds), number, tmp_path)
    assert tally.ended["interrupted"] == 1, tally
    figures.tell("signals", f"{verb}, a moment", str(tally))


@pytest.mark.slow
@pytest.mark.parametrize("forks", ["all"], indirect=True)
@pytest.mark.parametrize(
    ("verb", "count"), [("verify", 10), ("checkpoint", 20), ("build", 20), ("demo", 6), ("bench", 10)]
)
def test_a_signal_at_any_moment_of_another_verb(
    forks: Forks, scene: Scene, verb: str, count: int, tmp_path: Path
) -> None:
    if verb == "build":
        pytest.importorskip("tensorrt_rtx")
    figures.tell("signals", f"{verb}, any moment (slow)", str(at_random(forks, scene, verb, count, tmp_path)))


LOOKING = ("plan", "inspect", "doctor", "engines list", "engines why", "engines verify")
"""Verbs that change nothing."""


@pytest.mark.parametrize("forks", ["cli"], indirect=True)
@pytest.mark.parametrize(
    ("verb", "most"),
    [("inspect", 6), ("engines verify", 6), *(pytest.param(verb, 30, marks=pytest.mark.slow) for verb in LOOKING)],
)
def test_a_signal_at_any_call_of_a_verb_that_changes_nothing(
    forks: Forks, scene: Scene, verb: str, most: int, tmp_path: Path
) -> None:
    store = with_a_plan(EngineStore(scene.inputs / "store")).root
    before = everything(store)
    told = str(at_calls(forks, scene.verbs[verb], verb, most, tmp_path, ends=(0, 1)))
    assert everything(store) == before
    figures.tell("signals", f"{verb}, at most {most} calls", told)


@pytest.mark.parametrize("forks", ["cli"], indirect=True)
@pytest.mark.parametrize("most", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_a_plan_is_whole_or_gone_after_a_signal_at_any_call_of_prune(forks: Forks, most: int, tmp_path: Path) -> None:
    """And the next prune removes what is left of it."""
    arguments = ["engines", "prune", "--store", "plans", "--limit", "1"]
    kept = 0

    def check(folder: Path) -> None:
        nonlocal kept
        kept += plan_at(folder / "plans")
        assert forks.run(arguments, folder).code == 0
        assert everything(folder / "plans") == {}

    told = str(at_calls(forks, arguments, "engines prune", most, tmp_path, with_a_plan_at, check))
    assert kept > 0, "it was always gone"
    figures.tell("signals", f"engines prune, at most {most} calls", f"{told}; {kept} plans were still whole")


@pytest.mark.slow
@pytest.mark.parametrize("forks", ["export"], indirect=True)
def test_a_signal_at_any_moment_of_an_export(forks: Forks, scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "time").mkdir()
    figures.tell("signals", "export, any moment (slow)", str(at_random(forks, scene, "export", 20, tmp_path / "time")))
    (tmp_path / "changes").mkdir()
    told = str(at_changes(forks, scene, "export", 30, tmp_path / "changes"))
    figures.tell("signals", "export, each change (slow)", told)


@pytest.mark.slow
@pytest.mark.parametrize("forks", ["cli"], indirect=True)
def test_an_earlier_result_outlives_a_signal(forks: Forks, scene: Scene, tmp_path: Path) -> None:
    """`--overwrite` sets it aside, puts the new one in its place and removes it; before each of these."""
    arguments = [*scene.verbs["run, prompt alone"], "--overwrite"]
    assert forks.run(arguments, tmp_path).code == 0
    whole = forks.run(arguments, tmp_path)
    assert whole.code == 0
    tally = Tally()
    for event in range(max(0, whole.events - 12), whole.events):
        ended = forks.run([*arguments, "--seed", str(event)], tmp_path, NUMBERS[event % 2], event=event)
        tally.check("run", ended, NUMBERS[event % 2], tmp_path)
        assert (tmp_path / "out").exists(), ended.said
    assert tally.ended["interrupted"] >= 3, tally
    assert forks.run(arguments, tmp_path).code == 0
    figures.tell("signals", "run --overwrite, last changes", f"{tally}; a whole result was always there")


# ----------------------------------------------------------------------------------------------- processes of their own


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        ("run", signal.SIGINT),
        pytest.param("run", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("prepare", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("prepare", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("export", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("export", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_process_is_ended_in_the_middle(scene: Scene, verb: str, number: int, tmp_path: Path) -> None:
    """As a shell starts it: it has loaded its runtime, and computes or writes."""
    steps = ["--steps", "400"] if verb != "export" else []
    process = subprocess.Popen(
        [sys.executable, "-m", "magicface_rt.cli", *scene.verbs[verb], *steps],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    maps, last = Path(f"/proc/{process.pid}/maps"), time.monotonic() + LOADED_SECONDS
    while process.poll() is None and time.monotonic() < last and "onnxruntime_pybind11_state" not in maps.read_text():
        time.sleep(0.02)
    time.sleep(0.5)
    watch = threading.Timer(SOON_SECONDS, process.kill)
    watch.start()
    process.send_signal(number)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait() == 130, said
    watch.cancel()
    assert said.endswith("interrupted; nothing half written\n")
    assert "Traceback" not in said
    assert not CHECKS[verb](tmp_path)
    assert not list(tmp_path.glob("*/*.part")) + list(tmp_path.glob(".*"))


# -------------------------------------------------------------------------------------------------- inside of a Session


@pytest.fixture(scope="module")
def mixed(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(tiny_bundle, tmp_path_factory.mktemp("kept"))


@pytest.fixture
def heard() -> Iterator[None]:
    """A shell's background job starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_by(thread: threading.Thread) -> None:
    """A signal that a thread gets is told to the main thread, wherever that is."""
    signal.pthread_kill(thread.ident or 0, signal.SIGINT)
    for _ in range(SOON_SECONDS * 10):  # an interrupted `join` takes the thread for ended, in Python 3.11
        time.sleep(0.1)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_while_a_thread_draws_reaches_the_main_thread_alone(mixed: Mixed) -> None:
    """The thread's request goes on and draws what it would have drawn; so does the main thread's next."""
    with Session(mixed.bundle, backend=mixed.backend, workers=2) as session:
        expected = digest(session.generate(PROMPT, [MAN, HAT], steps=8, seed=1))
        stepped, found = threading.Event(), []

        def work() -> None:
            found.append(
                digest(session.generate(PROMPT, [MAN, HAT], steps=8, seed=1, progress=lambda _: stepped.set()))
            )

        thread = threading.Thread(target=work)
        thread.start()
        assert stepped.wait(SOON_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            interrupt_by(thread)
        assert thread.is_alive(), "it came too late"
        thread.join(SOON_SECONDS)
        assert found == [expected]
        with pytest.raises(KeyboardInterrupt):
            session.generate(PROMPT, [MAN], steps=8, progress=lambda _: os.kill(os.getpid(), signal.SIGINT))
        assert digest(session.generate(PROMPT, [MAN, HAT], steps=8, seed=1)) == expected


@pytest.mark.usefixtures("heard")
def test_ctrl_c_while_a_request_that_ends_waits_for_a_lock_leaves_its_worker_free(mixed: Mixed) -> None:
    """Another thread holds what the request must have to be counted off."""
    held, interrupted = threading.Event(), threading.Event()

    def hold() -> None:
        with session._admission._lock:
            held.set()
            time.sleep(1.0)  # the request has ended by then, and waits
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted.wait(SOON_SECONDS)

    def step(progress: Progress) -> None:
        if progress.stage != "prepare":
            holder.start()
            assert held.wait(SOON_SECONDS)

    with Session(mixed.bundle, backend=Hollow()) as session:
        session.generate(PROMPT, steps=1)  # all graphs are bound
        holder = threading.Thread(target=hold)
        with pytest.raises(KeyboardInterrupt):
            session.generate(PROMPT, steps=1, progress=step)
        interrupted.set()
        holder.join(SOON_SECONDS)
        assert not session._admission._running
        session.generate(PROMPT, steps=1)
        assert not session._admission._finished, "whoever comes next settles it"


PACKAGE = Path(magicface_rt.__file__).parent
KEEPING = ("kept/store", "kept/on_device", "kept/awaited")
DRAWING = (
    "session",
    "admission",
    "work",
    "worker_context",
    "graphs",
    "preparing",
    "request_progress",
    "reference_sources",
    "denoiser",
    "request",
    "results",
    *KEEPING,
)
"""Modules whose calls are interrupted. What Python's own library does in between, such as taking a semaphore, has
moments at which an interrupt loses it; these cannot be mended here."""
COUNTING = ("session.py", "admission.py", "worker_context.py", "graphs.py", "store.py", "on_device.py", "awaited.py")
"""Those which keep count of who is at work, or for whom others wait."""
SAVING = ("results", "files/atomic_files", "provenance")
LIBRARY = {contextlib.__file__, pathlib.__file__, shutil.__file__}
"""What of Python's own library is interrupted while files are written: all that leaves something to clean up."""


class Interrupt:
    """KeyboardInterrupt where Python looks for signals: as a function begins, and as one written in C has ended.

    Counts such moments in some files, and interrupts at that with the number `at`. With `hold` it keeps what it raised
    in `raised`, and with that everything that was going on.
    """

    def __init__(self, files: Collection[str], at: int = -1, *, hold: bool = False) -> None:
        self.files, self.at, self.where, self.hold = files, at, "", hold
        self.raised: KeyboardInterrupt | None = None
        self.moments: list[str] = []
        self._ours: dict[CodeType, bool] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_return") or not self._is_ours(frame.f_code):
            return
        self.moments.append(os.path.basename(frame.f_code.co_filename))
        if len(self.moments) - 1 == self.at:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            error = KeyboardInterrupt()
            self.raised = error if self.hold else None
            try:
                raise error
            finally:
                del error  # which holds this frame

    def _is_ours(self, code: CodeType) -> bool:
        if code not in self._ours:
            self._ours[code] = code.co_filename in self.files
        return self._ours[code]


def some_of(moments: Sequence[str], most: int, always: Collection[str] = ()) -> list[int]:
    """Numbers of about `most` moments; of all those in some files, which keep count of who is at work."""
    first = {number for number, name in enumerate(moments) if name in always}
    others = [number for number in range(len(moments)) if number not in first]
    return sorted(first | set(random.Random(most).sample(others, min(most, len(others)))))


def interrupted(interrupt: Interrupt, work: Callable[[], object]) -> bool:
    """Whether the work ended by the interrupt, and not by itself or by an error that it became.

    No garbage is collected meanwhile: what other tests left would be counted among the moments of this work.
    """
    gc.disable()
    sys.setprofile(interrupt)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
        gc.enable()
    return False


@pytest.mark.parametrize(("most", "form"), [(30, "quick"), pytest.param(4000, "slow", marks=pytest.mark.slow)])
def test_ctrl_c_at_any_call_leaves_the_session_usable(tiny_bundle: Path, most: int, form: str) -> None:
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    files = {str(PACKAGE / f"{name}.py") for name in DRAWING}
    with Session(bundle, backend=Drawn(), keep="16MiB") as session:
        another = Concept("hat", *MAN.references, weight=HAT.weight)
        kept, other = (session.prepare(hat, steps=STEPS) for hat in (HAT, another))

        def draw(hat: KeptConcept = kept) -> np.ndarray:
            session.forget()
            return session.generate(PROMPT, [MAN, hat], steps=STEPS, seed=1).latents

        expected = draw()
        assert not np.array_equal(draw(other), expected), "keys do not show in the latents"
        counting = Interrupt(files)
        assert not interrupted(counting, draw)
        chosen = some_of(counting.moments, most, always=COUNTING)
        stopped = 0
        for at in chosen:
            interrupt = Interrupt(files, at)
            stopped += interrupted(interrupt, draw)
            admission = session._admission
            assert not admission._running, interrupt.where
            assert not admission._users, interrupt.where
            assert not admission._in_exclusive, interrupt.where
            assert not admission._lock._is_owned(), interrupt.where
            found = draw_in_time(draw, interrupt.where)
            np.testing.assert_array_equal(found, expected, interrupt.where)
    assert stopped >= 0.95 * len(chosen)
    told = (
        f"{stopped} of {len(counting.moments)} moments tried, the Session usable and the next picture right after each"
    )
    figures.tell("signals", f"Ctrl-C at any call ({form})", told)


def test_ctrl_c_at_any_call_of_bringing_keys_up_and_using_them(tiny_bundle: Path) -> None:
    """On a device that is made up: whoever comes next brings them up or finds them, and nobody is left using them."""
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    with Session(bundle, backend=Drawn()) as session:
        reference = session.prepare(HAT, steps=STEPS).references[0]
    cuda, on_device = FakeCuda(), OnDevice()
    worker_stream = WorkerStream(Device(0, cuda=cuda))
    worker_stream.join()
    files = {str(PACKAGE / f"{name}.py") for name in KEEPING}
    stopped = tried = 0

    def use() -> np.ndarray:
        with on_device.use(
            reference, KeyUploader(worker_stream, "denoise_step", "reference keys"), bundle, STEPS
        ) as keys:
            found = keys[STEPS - 1, "k_ref_10"]
            return cuda.view(found.buffer.address + found.offset, found.nbytes).copy()

    expected = use()
    for there in (False, True):
        counting = Interrupt(files)
        if not there:
            on_device.free_unused()
        assert not interrupted(counting, use)
        for at in range(len(counting.moments)):
            on_device.free_unused()
            if there:
                use()
            interrupt = Interrupt(files, at)
            stopped += interrupted(interrupt, use)
            tried += 1
            assert not any(entry.users for entry in on_device._entries.values()), interrupt.where
            np.testing.assert_array_equal(draw_in_time(use, interrupt.where), expected, interrupt.where)
            assert len(on_device._entries) == 1, interrupt.where
    assert stopped >= 0.95 * tried
    on_device.close()
    worker_stream.leave()
    assert not cuda.alive()


def draw_in_time(draw: Callable[[], np.ndarray], where: str) -> np.ndarray:
    found: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(draw()), daemon=True)
    thread.start()
    thread.join(SOON_SECONDS)
    assert found, f"after an interrupt at {where} the next request hangs or fails"
    return found[0]


@pytest.mark.parametrize(("most", "form"), [(30, "quick"), pytest.param(4000, "slow", marks=pytest.mark.slow)])
def test_ctrl_c_at_any_call_of_saving_keeps_a_result(tiny_bundle: Path, tmp_path: Path, most: int, form: str) -> None:
    """The earlier or the new one is there, whole, at every moment; and the next is saved as ever."""
    bundle = Bundle.open(tiny_bundle, check_hashes=False)
    files = {str(PACKAGE / f"{name}.py") for name in SAVING} | LIBRARY
    with Session(bundle, backend=Drawn()) as session:
        results = [session.generate(PROMPT, steps=1, seed=seed) for seed in range(2)]
    out = tmp_path / "out"

    def save(number: int) -> None:
        results[number % 2].save(out, overwrite=True)

    save(0)
    counting = Interrupt(files)
    assert not interrupted(counting, lambda: save(1))
    chosen = some_of(counting.moments, most)
    stopped = 0
    for at in chosen:
        interrupt = Interrupt(files, at)
        stopped += interrupted(interrupt, lambda at=at: save(at))
        assert out.is_dir(), f"the result was lost by an interrupt at {interrupt.where}"
        drawn = results[whole_result(out)["options"]["seed"]]
        with Image.open(out / "image-0.png") as image:
            np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn.images[0]), interrupt.where)
        assert list(tmp_path.iterdir()) == [out], f"something temporary was left by an interrupt at {interrupt.where}"
        save(at + 1)
    assert stopped >= 0.9 * len(chosen)
    tried = f"{stopped} of {len(counting.moments)} moments tried"
    told = f"{tried}: a whole result there after each, and nothing else"
    figures.tell("signals", f"Ctrl-C at any call of saving ({form})", told)


@pytest.mark.parametrize("through", ["BundleWriter", "with", "ExitStack"])
def test_ctrl_c_at_any_call_of_making_a_temporary_folder_leaves_none(through: str, tmp_path: Path) -> None:
    """Not even while the interrupt is being handled, which holds all that was going on. What is interrupted as it is
    left may stay until then.
    """
    files = {str(PACKAGE / "files" / "atomic_files.py")} | LIBRARY
    out, entered = tmp_path / "bundle", False
    if through == "BundleWriter":
        writers = pytest.importorskip("magicface_rt.export.bundle_writer")
        files.add(str(writers.__file__))

    def write() -> None:
        nonlocal entered
        entered = False
        if through == "BundleWriter":
            with writers.BundleWriter(out):
                entered = True
            return
        made = temporary_sibling(out, folder=True)
        try:
            with contextlib.ExitStack() as stack, made if through == "with" else contextlib.nullcontext():
                if through == "ExitStack":
                    stack.enter_context(made)
                entered = True
        except BaseException:
            if through == "ExitStack":
                made.close()
            raise

    write()  # what is done once only is done now
    counting, stopped = Interrupt(files), 0
    assert not interrupted(counting, write)
    assert "contextlib.py" in counting.moments
    for at in range(len(counting.moments)):
        interrupt = Interrupt(files, at, hold=True)
        stopped += interrupted(interrupt, write)
        if not entered:
            assert list(tmp_path.iterdir()) == [], f"left by an interrupt at {interrupt.where}"
        interrupt.raised = None
        assert list(tmp_path.iterdir()) == [], f"left by an interrupt at {interrupt.where}, after it was handled"
    assert stopped >= 0.9 * len(counting.moments)
