"""Too few addresses (`ulimit -v`) are said by every command, and seen before a library would end the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import figures
import pytest
from memory_limits import Ended, Scene, largest_refused, limited

from magicface_rt import KeptConcept
from magicface_rt.backends.onnxruntime import ORT_ADDRESSES, THREADS_ADDRESSES, OnnxRuntime, import_onnxruntime
from magicface_rt.bundle import Bundle
from magicface_rt.cli import main
from magicface_rt.cli._command import TORCH_ADDRESSES, export_module
from magicface_rt.cli.build import BUILD_ADDRESSES
from magicface_rt.cli.doctor import DOCTOR_ADDRESSES
from magicface_rt.cli.serve import SERVE_ADDRESSES
from magicface_rt.errors import BackendError, HostMemoryError
from magicface_rt.process.host_memory import stack_bytes

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")

MIB = 1 << 20


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle, check_hashes=False)


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


def test_what_would_end_the_process_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch under a limit of addresses; without one there is nothing to foresee."""
    left: list[tuple[str, int]] = []
    monkeypatch.setattr("magicface_rt.process.host_memory._address_limit", lambda: left)
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
    monkeypatch.setattr(
        "magicface_rt.process.host_memory._address_limit", lambda: [("limit of addresses (ulimit -v)", left)]
    )
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
    monkeypatch.setattr(
        "magicface_rt.process.host_memory._address_limit", lambda: [("limit of addresses (ulimit -v)", left)]
    )
    assert main(command) == 3
    assert f"{needs} of addresses. By its limit" in capsys.readouterr().err
    left += 1
    main(command)
    assert "of addresses. By its limit" not in capsys.readouterr().err


def test_onnxruntime_is_not_loaded_with_too_few_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is loaded nothing more is needed for that."""
    import_onnxruntime()
    left = ORT_ADDRESSES - 1
    monkeypatch.setattr(
        "magicface_rt.process.host_memory._address_limit", lambda: [("limit of addresses (ulimit -v)", left)]
    )
    import_onnxruntime()
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(HostMemoryError, match=r"ONNX Runtime needs 101 MB of addresses\. By its limit"):
        import_onnxruntime()
    assert "onnxruntime" not in sys.modules


def test_a_graph_is_not_loaded_with_too_few_addresses_for_its_threads(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, left = OnnxRuntime("cpu", threads=3), THREADS_ADDRESSES + 2 * stack_bytes() - 1
    monkeypatch.setattr(
        "magicface_rt.process.host_memory._address_limit", lambda: [("limit of addresses (ulimit -v)", left)]
    )
    with pytest.raises(
        HostMemoryError, match=r"a graph that runs on 3 threads needs 34 MB of addresses\. By its limit"
    ):
        backend.load(bundle, "text_encoder")
    left += 1
    backend.load(bundle, "text_encoder")


ALLOCATING = """
import resource, threading
from magicface_rt.process.host_memory import share_heap

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
