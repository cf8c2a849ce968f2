"""Too little memory is said, a plan is kept, and what is asked for a thousand times takes no more than at first."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import figures
import memory_soak
import numpy as np
import pytest
from killing import unlimited
from memory_hollow import Hollow
from memory_limits import Ended, Scene, largest_refused, limited
from memory_slopes import Slope, slope_of
from PIL import Image
from threads_requests import HAT, MAN, PROMPT

from magicface_rt import Concept, KeptConcept, MemoryPlan, Options, Reference, Request, Session
from magicface_rt.backends.onnxruntime import ORT_ADDRESSES, THREADS_ADDRESSES, OnnxRuntime, import_onnxruntime
from magicface_rt.bundle import Bundle
from magicface_rt.cli import main
from magicface_rt.cli._command import TORCH_ADDRESSES, export_module
from magicface_rt.cli.build import BUILD_ADDRESSES
from magicface_rt.cli.doctor import DOCTOR_ADDRESSES
from magicface_rt.cli.serve import SERVE_ADDRESSES
from magicface_rt.encoding import load_references
from magicface_rt.errors import BackendError, BuildError, DeviceMemoryError, HostMemoryError, InputError, PromptError
from magicface_rt.kept.memory import request_bytes
from magicface_rt.preparing import load_bare
from magicface_rt.shortage import _group_limits, shortage, stack_bytes, told_as_ours
from tests.runtime.drawn_backend import Drawn

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")

MIB = 1 << 20
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


# ---------------------------------------------------------------------------------------------------- too few addresses


@pytest.fixture(scope="module")
def scene(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tiny_bundle, tiny_checkpoint, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def least() -> int:
    """Addresses with which a verb can end: those that one took which found nothing to do."""
    code = "import magicface_rt.cli as cli; cli.main(['inspect', '/nowhere']); print(open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **ENVIRONMENT}
    )
    (peak,) = [line for line in done.stdout.splitlines() if line.startswith("VmPeak:")]
    return int(peak.split()[1]) << 10


FINE = {"engines why": 1}
"""By verb, the exit code where all is well, if not 0: `engines why` says 1 where a graph has no plan, as here."""


def check_refusal(verb: str, addresses: int, ended: Ended, folder: Path) -> str:
    """The way it ended, which is one of two."""
    where = f"{verb} with {addresses >> 20} MiB of addresses: code {ended.code}: {ended.said[-1500:]}"
    assert not ended.hung, where
    assert "Traceback" not in ended.said, where
    if ended.code == FINE.get(verb, 0) and "error: " not in ended.said:
        return "done"
    assert ended.code in (2, 3), where
    assert "memory" in ended.last or "addresses" in ended.last, where
    assert any(line.startswith("error: ") for line in ended.said.splitlines()), where
    done = [path for path in ended.left if verb == "prepare" and path.endswith(".concept")]
    assert set(ended.left) == set(done), f"{where}: left {ended.left}"
    for path in done:  # of two concepts the first, which was done before there was too little
        KeptConcept.load(folder / path)
    return "refused"


class Limits:
    """A verb under limits of addresses: which it was given, and how it ended."""

    def __init__(self, scene: Scene, verb: str, folder: Path) -> None:
        self.scene, self.verb, self.folder = scene, verb, folder
        self.ended: dict[int, str] = {}

    def refused(self, size: int) -> bool:
        ended = self.scene.run(
            self.scene.verbs[self.verb],
            self.folder / str(size),
            addresses=size,
            environment=ENVIRONMENT,
            ends=self.verb not in ("serve", "ui"),
        )
        self.ended[size] = check_refusal(self.verb, size, ended, self.folder / str(size))
        return self.ended[size] == "refused"

    def tell(self) -> None:
        sizes, counted = sorted(self.ended), Counter(self.ended.values())
        told = f"{len(sizes)} limits from {sizes[0] >> 20} to {sizes[-1] >> 20} MiB: "
        told += ", ".join(f"{n} {how}" for how, n in sorted(counted.items()))
        most = max((size for size, how in self.ended.items() if how == "refused"), default=0)
        figures.tell("memory", f"{self.verb}, too few addresses", f"{told}; the largest refused {most >> 20} MiB")


QUICK_VERBS = ("run", "prepare")


@pytest.mark.parametrize("verb", QUICK_VERBS)
def test_too_few_addresses_are_said(scene: Scene, verb: str, least: int, tmp_path: Path) -> None:
    limits = Limits(scene, verb, tmp_path)
    for more in (16, 96):
        assert limits.refused(least + more * MIB)
    limits.tell()


CONSOLE = Path(sys.executable).with_name("magicface-rt")
ENTRIES = {"console": [str(CONSOLE)], "module": [sys.executable, "-m", "magicface_rt.cli"]}


@pytest.mark.parametrize("entry", ENTRIES)
def test_too_few_addresses_for_the_command_line_itself_are_said(entry: str, tmp_path: Path) -> None:
    """Between the interpreter, which cannot be limited, and the verbs. OpenBLAS would end the process, or interrupt it
    where it finds no stack for another thread.
    """
    if entry == "console" and not CONSOLE.exists():
        pytest.skip("the package is not installed beside this interpreter")
    command = [*ENTRIES[entry], "--version"]
    for size, environment in ((24, ENVIRONMENT), (60, ENVIRONMENT), (117, ENVIRONMENT), (134, {})):
        ended = limited(command, tmp_path, addresses=size * MIB, environment=environment)
        where = f"{size} MiB: {ended}"
        assert ended.code == 3, where
        assert ended.said.startswith("error: "), where
        assert len(ended.said.splitlines()) == 1, where
        assert "ulimit -v" in ended.said, where


@pytest.fixture(scope="module")
def unread(least: int, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The largest limit of addresses with which no command line can be read."""
    folder, command = tmp_path_factory.mktemp("unread"), [*ENTRIES["module"], "--version"]

    def refused(size: int) -> bool:
        ended = limited(command, folder, addresses=size, environment=ENVIRONMENT)
        return check_refusal("--version", size, ended, folder) == "refused"

    return largest_refused(24 * MIB, least, refused)


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        *("run", "prepare", "plan", "inspect", "doctor", "engines list", "engines why", "engines verify"),
        *("engines prune", "build", "bench", "serve", "ui", "checkpoint", "export", "verify", "demo"),
    ],
)
def test_too_few_addresses_are_said_by_every_verb(
    scene: Scene, verb: str, least: int, unread: int, tmp_path: Path
) -> None:
    """All over the range, and then where it ends: the verb itself was short of memory, and not the command line."""
    limits, steps = Limits(scene, verb, tmp_path), (4, 24, 48, 96, 160, 256, 320, 384, 416, 448, 512, 640, 1024, 1536)
    ways = {least + more * MIB: limits.refused(least + more * MIB) for more in steps}
    most = max((size for size, refused in ways.items() if refused), default=unread)
    enough = [size for size in ways if size > most]
    if enough:
        most = largest_refused(most, min(enough), limits.refused)
    limits.tell()
    assert most > unread, f"{verb} was never short of memory: {limits.ended}"


# --------------------------------------------------------------------------------------------- what shortage looks like


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError("Unable to allocate 3.00 TiB for an array"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 1"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        BackendError("graph denoise_step: onnxruntime failed: bad allocation"),
        BuildError("graph denoise_step: tensorrt could not build it. It said: std::bad_alloc"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_shortage_is_told_whichever_library_says_it(raised: Exception) -> None:
    with pytest.raises(HostMemoryError, match=r"too little memory on the host: .*Free some") as caught, told_as_ours():
        raise raised
    assert caught.value.exit_code == 3
    assert str(raised).rstrip(".") in str(caught.value)
    wrapped = BackendError("the graph was refused")
    wrapped.__cause__ = raised
    with pytest.raises(HostMemoryError), told_as_ours():
        raise wrapped


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("no memory of that"),
        OSError(28, "No space left on device"),
        DeviceMemoryError("graph denoise_step needs 3 MB more"),
        BackendError("graph vae_decoder: onnxruntime failed: an input is missing"),
        RuntimeError("CUDA out of memory"),
        PromptError("the word 'dog' is not in the prompt 'a bad allocation'"),
        InputError("image 'cannot allocate memory.png' does not exist"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_other_failures_stay_what_they_are(raised: Exception) -> None:
    assert shortage(raised) is None
    with pytest.raises(type(raised)) as caught, told_as_ours():
        raise raised
    assert caught.value is raised


class Short:
    """One of numpy's functions; the call with that number, from 0, finds no memory."""

    def __init__(self, name: str) -> None:
        self.name, self.calls, self.fails = name, 0, -1
        self._real: Callable[..., Any] = getattr(np, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.fails:
            raise MemoryError("Unable to allocate 3.00 GiB for an array")
        return self._real(*arguments, **named)


def test_a_session_that_ran_out_of_memory_goes_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy finds no memory at one of many places of a request; each time it is said, and the next picture is right."""
    tried = 0
    with Session(bundle, backend=Drawn(), keep="8MiB") as session:

        def ask(short: Short, fails: int = -1, **options: Any) -> np.ndarray:
            session.forget()
            short.calls, short.fails = 0, fails
            with monkeypatch.context() as patch:
                patch.setattr(np, short.name, short)
                return session.generate(PROMPT, [MAN, HAT], **{"steps": 3, "seed": 1, **options}).latents

        for name in ("zeros", "concatenate", "full", "repeat"):
            short = Short(name)
            assert not np.array_equal(ask(short), ask(short, reference_seed=1)), "keys do not show in the latents"
            expected = ask(short)
            for fails in range(0, short.calls, max(1, short.calls // 10)):
                with pytest.raises(HostMemoryError, match="Unable to allocate"):
                    ask(short, fails)
                np.testing.assert_array_equal(ask(short), expected)
                tried += 1
    assert tried >= 20
    figures.tell("memory", "allocations failed in a request", f"{tried}, each said, and the next picture right")


# ---------------------------------------------------------------------------------------------------------------- plans


WHOLE = [
    Concept(
        word,
        Reference(Image.fromarray(np.full((64, 64, 3), 90 * k, np.uint8)), mask=np.ones((64, 64), bool), prompt="a"),
    )
    for k, word in enumerate(("man", "hat"))
]
PLAN_STEPS = 20


def used_plans(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[MemoryPlan]:
    """What the Session plans from now on."""
    plans: list[MemoryPlan] = []
    real = session._keeper.plan

    def plan(*arguments: Any, **named: Any) -> MemoryPlan:
        plans.append(real(*arguments, **named))
        return plans[-1]

    monkeypatch.setattr(session._keeper, "plan", plan)
    return plans


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SOURCES, ASKED = ("bare", "kept", "file", "stored"), ("one picture", "three pictures", "more than fit", "batch")
QUICK = {
    *(("bare", "batch", "exact"), ("kept", "more than fit", "8-bit")),
    *(("file", "three pictures", "8-bit"), ("stored", "one picture", "exact")),
}


@pytest.mark.parametrize(
    ("source", "asked", "storage", "padded"),
    [
        pytest.param(*kind, padded, marks=() if kind in QUICK and not padded else pytest.mark.slow)
        for kind in itertools.product(SOURCES, ASKED, ("exact", "8-bit"))
        for padded in (False, True)
    ],
)
@pytest.mark.parametrize("memory", ["keep", "stream", "recompute"])
def test_no_request_takes_more_than_its_plan(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str,
    storage: str,
    source: str,
    asked: str,
    padded: bool,
) -> None:
    """Every way to ask and to keep, over a network that takes nothing, so that nothing may be allowed for it either.

    The request's own pictures, of which a plan allows more than enough, are left out on both sides.
    """
    monkeypatch.setattr("magicface_rt.kept.memory.ROW_TENSORS", 0)
    # As many rows in a pass that prepares as the network's own rows would leave.
    monkeypatch.setattr("magicface_rt.kept.memory.WORKSPACE", 2 * MIB)
    monkeypatch.setattr("magicface_rt.kept.keeper.WORKSPACE", 2 * MIB)
    images = {"three pictures": 3, "more than fit": bundle.limits.images + 1}.get(asked, 1)
    steps = PLAN_STEPS
    settings: dict[str, Any] = {"memory": memory, "storage": storage, "pad_keys": padded}
    with Session(bundle, backend=Hollow(), **settings, keep="1GiB" if source == "stored" else None) as session:
        concepts: list[Any] = WHOLE
        if source in ("kept", "file"):
            concepts = [session.prepare(concept, steps=steps) for concept in WHOLE]
        if source == "file":
            for concept in concepts:
                concept.save(tmp_path / f"{concept.word}.concept")
            concepts = [KeptConcept.load(tmp_path / f"{concept.word}.concept") for concept in concepts]
        if source == "stored":
            for concept in WHOLE:
                session.prepare(concept, steps=steps)

        def request(concepts: Sequence[Any]) -> None:
            if asked == "batch":
                options = [Options(steps=steps, seed=seed, alpha=seed / 2) for seed in range(3)]
                session.generate_batch([Request(PROMPT, concepts, one) for one in options])
            else:
                session.generate(PROMPT, concepts, steps=steps, images=images)

        request([])
        without = peak_of(lambda: request([]))
        plans = used_plans(session, monkeypatch)
        held = 0 if source in ("bare", "file") else _in_memory(concepts, session)
        added = peak_of(lambda: request(concepts)) - without + held
    (plan,) = plans
    assert plan.mode == memory
    pictures = 3 if asked == "batch" else images
    allowed = plan.peak.host - request_bytes(bundle, pictures, plan_bare(plan, source))
    assert added <= allowed, f"{added:,} bytes were taken, and {allowed:,} were planned"
    _told(memory, storage, added / allowed)


HIGHEST: dict[tuple[str, str], float] = {}
COUNTED: dict[tuple[str, str], int] = {}


def _told(memory: str, storage: str, share: float) -> None:
    which = memory, storage
    HIGHEST[which] = max(HIGHEST.get(which, 0.0), share)
    COUNTED[which] = COUNTED.get(which, 0) + 1
    figures.tell(
        "memory",
        f"plan, {memory}, {storage}",
        f"{COUNTED[which]} kinds of requests took at most {100 * HIGHEST[which]:.0f} % of their plan",
    )


def plan_bare(plan: MemoryPlan, source: str) -> int:
    return len(WHOLE) if source == "bare" else 0


def _in_memory(concepts: Sequence[Any], session: Session) -> int:
    kept = [concept.nbytes for concept in concepts if isinstance(concept, KeptConcept)]
    return sum(kept) or session.kept_bytes


def test_what_a_limit_has_no_room_for_is_refused_before_it_is_computed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a device's free memory decides where keys are, so does a limit of the process: `auto` takes what fits."""
    left: int | None = None
    monkeypatch.setattr("magicface_rt.kept.keeper.room", lambda: left)
    with Session(bundle, backend=Hollow(), keep="1GiB") as session:
        plan = session.plan(WHOLE, PLAN_STEPS)
        assert plan.mode == "keep"
        left = plan.modes["keep"].host - 1
        assert session.plan(WHOLE, PLAN_STEPS).mode == "recompute"
        with pytest.raises(HostMemoryError, match=r"need [\d.,]+ MB more on the host \('keep'\)"):
            session.plan(WHOLE, PLAN_STEPS, memory="keep")
        left = plan.modes["recompute"].host - 1
        with pytest.raises(HostMemoryError, match="'recompute'"):
            session.generate(PROMPT, WHOLE, steps=PLAN_STEPS)
        left = plan.bytes_kept // len(WHOLE) - 1
        with pytest.raises(HostMemoryError, match="keys of a reference for 20 steps need"):
            session.prepare(WHOLE[0], steps=PLAN_STEPS)
        session.generate(PROMPT, [], steps=1)
        left = None
        kept = [session.prepare(concept, steps=PLAN_STEPS) for concept in WHOLE]
        left = session.plan(kept, PLAN_STEPS).peak.host - plan.bytes_kept
        session.generate(PROMPT, kept, steps=PLAN_STEPS)  # what is in memory already takes no more


def test_what_would_end_the_process_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch under a limit of addresses; without one there is nothing to foresee."""
    left: list[tuple[str, int]] = []
    monkeypatch.setattr("magicface_rt.shortage._address_limit", lambda: left)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    loaded: list[str] = []
    monkeypatch.setattr("importlib.import_module", loaded.append)
    export_module("exporter")
    left = [("limit of addresses (ulimit -v)", TORCH_ADDRESSES)]
    export_module("exporter")
    left = [("limit of addresses (ulimit -v)", TORCH_ADDRESSES - 1)]
    with pytest.raises(HostMemoryError, match=r"PyTorch needs 629 MB of addresses\. By its limit .* take 629 MB more"):
        export_module("exporter")
    assert len(loaded) == 2


def test_a_plan_is_not_begun_with_too_few_addresses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    begun: list[str] = []

    def begin(flavour: str, *_: object) -> None:
        begun.append(flavour)
        raise BackendError("TensorRT was begun")

    monkeypatch.setattr("magicface_rt.cli.build.choose_target", begin)
    left = BUILD_ADDRESSES - 1
    monkeypatch.setattr("magicface_rt.shortage._address_limit", lambda: [("limit of addresses (ulimit -v)", left)])
    build = ["build", "nowhere", "--store", str(tmp_path / "plans")]
    assert main(build) == 3
    assert "TensorRT needs 671 MB of addresses. By its limit" in capsys.readouterr().err
    assert not begun
    left += 1
    assert main(build) == BackendError.exit_code
    assert begun == ["tensorrt-rtx"]


@pytest.mark.parametrize(
    ("command", "needs", "least"),
    [
        (["doctor"], "doctor, which loads every library that there is, needs 201 MB", DOCTOR_ADDRESSES),
        (["serve", "nowhere"], "the service needs 671 MB", SERVE_ADDRESSES),
        (["ui", "nowhere"], "the service needs 671 MB", SERVE_ADDRESSES),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_the_runtime_would_end_is_not_begun_with_too_few_addresses(
    command: list[str],
    needs: str,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = least - 1
    monkeypatch.setattr("magicface_rt.shortage._address_limit", lambda: [("limit of addresses (ulimit -v)", left)])
    assert main(command) == 3
    assert f"{needs} of addresses. By its limit" in capsys.readouterr().err
    left += 1
    main(command)
    assert "of addresses. By its limit" not in capsys.readouterr().err


def test_onnxruntime_is_not_loaded_with_too_few_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is loaded nothing more is needed for that."""
    import_onnxruntime()
    left = ORT_ADDRESSES - 1
    monkeypatch.setattr("magicface_rt.shortage._address_limit", lambda: [("limit of addresses (ulimit -v)", left)])
    import_onnxruntime()
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(HostMemoryError, match=r"ONNX Runtime needs 101 MB of addresses\. By its limit"):
        import_onnxruntime()
    assert "onnxruntime" not in sys.modules


def test_a_graph_is_not_loaded_with_too_few_addresses_for_its_threads(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, left = OnnxRuntime("cpu", threads=3), THREADS_ADDRESSES + 2 * stack_bytes() - 1
    monkeypatch.setattr("magicface_rt.shortage._address_limit", lambda: [("limit of addresses (ulimit -v)", left)])
    with pytest.raises(
        HostMemoryError, match=r"a graph that runs on 3 threads needs 34 MB of addresses\. By its limit"
    ):
        backend.load(bundle, "text_encoder")
    left += 1
    backend.load(bundle, "text_encoder")


ALLOCATING = """
import resource, threading
from magicface_rt.shortage import share_heap

hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (8 << 30 if {limited} else hard, hard))
share_heap()
pages = lambda: int(open("/proc/self/statm").read().split()[0])
before, there, over = pages(), threading.Barrier(5), threading.Event()

def work():
    held = [bytearray(5000) for _ in range(100)]
    there.wait()
    over.wait()

threading.stack_size(1 << 20)
for _ in range(4):
    threading.Thread(target=work).start()
there.wait()
print((pages() - before) * resource.getpagesize())
over.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc reserves addresses for each thread")
def test_under_a_limit_of_addresses_threads_share_one_heap() -> None:
    taken = [
        int(subprocess.check_output([sys.executable, "-c", ALLOCATING.format(limited=limited)]))
        for limited in (True, False)
    ]
    assert taken[0] < 16 * MIB < 4 * 64 * MIB < taken[1]


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_are_read(tmp_path: Path, version: int) -> None:
    root, of = tmp_path / "cgroup", tmp_path / "self"
    base = root if version == 2 else root / "memory"
    of.write_text("0::/outer/inner\n" if version == 2 else "3:cpu:/\n4:memory,hugetlb:/outer/inner\n0::/\n")
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    none = "max" if version == 2 else str(2**63 - 4096)
    for name, limit, used in (("outer", "1000", "700"), ("outer/inner", none, "500")):
        (base / name).mkdir(parents=True)
        (base / name / names[0]).write_text(f"{limit}\n")
        (base / name / names[1]).write_text(f"{used}\n")
        lines = [f"{prefix}anon 400", f"{prefix}active_file 30", f"{prefix}inactive_file 20"]
        (base / name / "memory.stat").write_text("\n".join(lines))
    assert _group_limits(root, of) == [("control group's memory limit", 1000 - 700 + 30 + 20)]
    (base / "outer" / "memory.stat").write_text("nonsense")
    assert _group_limits(root, of) == []
    assert _group_limits(root, tmp_path / "none") == []


@pytest.mark.parametrize("resample", ["lanczos", "nearest"])
def test_a_photograph_is_held_in_the_bundles_size(bundle: Bundle, resample: Any) -> None:
    """Four bytes a pixel of a photograph, for as long as the request takes, are more than all of its keys."""
    values = np.random.default_rng(3).integers(0, 255, (700, 900, 3), dtype=np.uint8)
    reference = Reference(Image.fromarray(values), mask=np.ones((700, 900), bool), prompt="a", resample=resample)
    concept = Concept("man", reference, reference)
    size = bundle.height, bundle.width
    as_read, held = load_references(concept, bundle), load_bare(concept, bundle)
    for one, of_request in zip(as_read, held, strict=True):
        assert of_request.loaded.image.size == size[::-1]
        np.testing.assert_array_equal(of_request.loaded.pixels(*size), one.pixels(*size))
        assert of_request.loaded.name == one.name


# --------------------------------------------------------------------------------------------------------------- slopes


def soak(what: str, bundle: Path, folder: Path, turns: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, memory_soak.__file__, what, str(bundle), str(folder), str(turns)],
        preexec_fn=unlimited,  # with a limit of addresses its threads would share one heap, and usually they do not
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check_flat(found: dict[str, Any], most: int) -> Slope:
    """The interval of the slope lies below so many bytes a turn; nothing is left open; like requests end alike."""
    for kind, outcomes in found["outcomes"].items():
        assert len(outcomes) == 1, f"{kind} ended in different ways: {outcomes}"
    assert found["ended"] == found["begun"]
    slope = slope_of(found["readings"])
    assert slope.high < most, f"memory grows by {slope}; at most {most:,} bytes a turn may be"
    return slope


REQUEST_BYTES = {"quick": 64 << 10, "slow": 4 << 10}
"""A picture of the tiny bundle is 196,608 bytes: to keep one of a few requests shows in either."""


@pytest.mark.parametrize(("turns", "form"), [(40, "quick"), pytest.param(1000, "slow", marks=pytest.mark.slow)])
def test_memory_is_flat_over_mixed_requests(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    found = soak("requests", tiny_bundle, tmp_path, turns)
    slope = check_flat(found, REQUEST_BYTES[form])
    ended = {outcome.partition(":")[0] for outcomes in found["outcomes"].values() for outcome in outcomes}
    assert {"Cancelled", "PromptError", "BackendError", "LookupError"} <= ended, "these are among them"
    figures.tell("memory", f"requests, bytes a request ({form})", f"{slope}, bound {REQUEST_BYTES[form]:,}")
    figures.tell("memory", f"requests, left open ({form})", _left_open(found))


CYCLE_BYTES = {"quick": 4 << 20, "slow": 32 << 10}
"""The tiny bundle's weights are 13.5 MB."""


@pytest.mark.parametrize(("turns", "form"), [(10, "quick"), pytest.param(200, "slow", marks=pytest.mark.slow)])
def test_memory_is_flat_over_sessions(tiny_bundle: Path, tmp_path: Path, turns: int, form: str) -> None:
    found = soak("cycles", tiny_bundle, tmp_path, turns)
    slope = check_flat(found, CYCLE_BYTES[form])
    figures.tell("memory", f"open and close, bytes a cycle ({form})", f"{slope}, bound {CYCLE_BYTES[form]:,}")
    figures.tell("memory", f"open and close, left open ({form})", _left_open(found))


def _left_open(found: dict[str, Any]) -> str:
    counts = {name: len(entries) if name != "tasks" else int(entries[0]) for name, entries in found["ended"].items()}
    told = f"{counts['descriptors']} descriptors, {counts['threads']} Python threads, {counts['tasks']} system threads"
    return f"{told} after the first of each kind and at the end"


def test_a_slope_is_found_with_its_interval() -> None:
    """The measure itself: flat noise holds 0, growth is found, and a single step is not taken for either."""
    draw = np.random.default_rng(0)
    noise = np.convolve(draw.normal(0, 20_000, 1004), np.ones(5) / 5, "valid")  # neighbours depend on each other
    flat, grown = slope_of(list(map(int, 1e8 + noise))), slope_of(list(map(int, 1e8 + noise + 500 * np.arange(1000))))
    assert flat.low < 0 < flat.high < 100
    assert 400 < grown.low < 500 < grown.high < 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = slope_of([7] * 40)
    assert (constant.low, constant.value, constant.high) == (0, 0, 0)
