"""The lock files agree with pyproject.toml and constraints.txt, and an archive with another hash is not installed."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from locations import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tools import install, lock, lockfile
from tools.apart import NEEDS
from tools.wanted import APART, EXTRAS, IMAGE, IMAGE_PYTHON, asked_for

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCKS = sorted(lockfile.FOLDER.glob("*.txt"))
ids = [path.stem for path in LOCKS]
LOCKS_APART = sorted(path for extra in APART for path in (lockfile.FOLDER / extra).glob("*.txt"))
ids_apart = [f"{path.parent.name}-{path.stem}" for path in LOCKS_APART]
LOCKS_OF_IMAGE = [lockfile.path_apart(IMAGE_PYTHON, folder) for folder in IMAGE]
ids_of_image = list(IMAGE)
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def python_of(path: Path) -> dict[str, str]:
    """The markers' environment of the Python that a lock is for."""
    digits = path.stem.split("-py")[1].split("-")[0]
    version = f"{digits[0]}.{digits[1:]}"
    return {"python_version": version, "python_full_version": f"{version}.0", "platform_machine": "x86_64", "extra": ""}


def required_of(path: Path, lines: list[str]) -> Iterator[Requirement]:
    """The requirements among `lines` that hold for the Python of a lock."""
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(python_of(path)):
            yield requirement


def wheel_in(folder: Path, name: str, version: str) -> Path:
    """A wheel with one empty module, which pip can install."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{file},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, which is all that pip sees; it installs into the folder `target` beside it."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "target"))
    return tmp_path / "wheels"


def test_each_python_that_is_claimed_has_a_lock() -> None:
    assert sorted({python_of(path)["python_version"] for path in LOCKS}) == PYTHONS
    for extra in APART:
        apart = [python_of(path)["python_version"] for path in LOCKS_APART if path.parent.name == extra]
        assert apart == PYTHONS, extra


def test_the_pythons_that_are_claimed_are_those_that_are_accepted() -> None:
    """By pip, by the classifiers, by make, and in the documents."""
    about = project()
    minors = range(int(PYTHONS[0].partition(".")[2]), int(PYTHONS[-1].partition(".")[2]) + 1)
    assert (
        [version for version in (f"3.{n}" for n in range(99)) if version in SpecifierSet(about["requires-python"])]
        == [f"3.{n}" for n in minors]
        == PYTHONS
    )
    python = "Programming Language :: Python :: "
    assert [c.removeprefix(python) for c in about["classifiers"] if c.startswith(f"{python}3.")] == PYTHONS
    assert f"not (3, {minors[0]}) <= sys.version_info[:2] <= (3, {minors[-1]})" in (ROOT / "Makefile").read_text()
    for document in ("README.md", "Makefile"):
        assert f"3.{minors[0]} to 3.{minors[-1]}" in (ROOT / document).read_text(encoding="utf-8"), document


def test_every_extra_has_a_lock_or_is_said_to_have_none() -> None:
    locked = {*EXTRAS, *APART}
    readme = (lockfile.FOLDER / "README.md").read_text(encoding="utf-8")
    assert locked <= project()["optional-dependencies"].keys()
    for extra in project()["optional-dependencies"].keys() - locked:
        assert f"**The extra `{extra}` has no lock**" in readme, extra


def project() -> dict[str, Any]:
    """The table of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


@pytest.mark.parametrize("path", LOCKS, ids=ids)
def test_a_lock_holds_what_pyproject_asks_for(path: Path) -> None:
    pins = {pin.name: pin for pin in lockfile.read(path)}
    for lines in asked_for().values():
        for requirement in required_of(path, lines):
            assert requirement.specifier.contains(pins[lockfile.normal(requirement.name)].version), requirement


@pytest.mark.parametrize("path", [*LOCKS_APART, *LOCKS_OF_IMAGE], ids=[*ids_apart, *ids_of_image])
def test_a_lock_apart_holds_its_extra_and_not_what_it_overwrites(path: Path) -> None:
    pins = {pin.name: pin for pin in lockfile.read(path)}
    for lines in asked_for(path.parent.name).values():
        for requirement in required_of(path, lines):
            assert requirement.specifier.contains(pins[lockfile.normal(requirement.name)].version), requirement
    assert "onnxruntime" not in pins
    assert "torch" not in pins


@pytest.mark.parametrize("path", [*LOCKS, *LOCKS_APART, *LOCKS_OF_IMAGE], ids=[*ids, *ids_apart, *ids_of_image])
def test_a_lock_has_the_versions_of_the_constraints(path: Path) -> None:
    lines = [line for line in lockfile.CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    constrained = {lockfile.normal(requirement.name): requirement.specifier for requirement in required_of(path, lines)}
    for pin in lockfile.read(path):
        # What only another build of PyTorch brings is pinned by that build itself.
        if pin.name in constrained:
            assert constrained[pin.name].contains(pin.version), pin
        else:
            assert pin.name.startswith(("cuda-", "nvidia-", "triton")), f"{pin.name} is not in constraints.txt"


def test_the_image_has_the_archives_of_the_other_locks() -> None:
    """What was tested here by another lock is what the image gets, byte for byte."""
    others = [lockfile.path_of(IMAGE_PYTHON, lockfile.torch_version())]
    others += [lockfile.path_apart(IMAGE_PYTHON, extra) for extra in APART]
    known = {pin for path in others for pin in lockfile.read(path)}
    for path in LOCKS_OF_IMAGE:
        assert set(lockfile.read(path)) <= known, path


@pytest.mark.parametrize("folder", IMAGE)
def test_the_locks_of_the_image_hold_what_their_packages_need(folder: str) -> None:
    """By what the packages that are installed here require, and those that are not as `NEEDS` has them."""
    path = lockfile.path_apart(IMAGE_PYTHON, folder)
    environment = python_of(path)
    pins = {pin.name: pin.version for pin in lockfile.read(path)}
    waiting = [requirement for lines in asked_for(folder).values() for requirement in required_of(path, lines)]
    gone: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        name = lockfile.normal(requirement.name)
        assert requirement.specifier.contains(pins[name], prereleases=True), requirement
        if f"{requirement}" in gone:
            continue
        gone.add(f"{requirement}")
        lines = NEEDS[name] if name in NEEDS else distribution(name).requires or ()
        for line in lines:
            needed = Requirement(line)
            if needed.marker is None or any(
                needed.marker.evaluate({**environment, "extra": extra}) for extra in ("", *requirement.extras)
            ):
                waiting.append(needed)
    assert {lockfile.normal(Requirement(one).name) for one in gone} == pins.keys()


def test_the_image_installs_nothing_without_its_hash() -> None:
    """Each run of pip in the Dockerfile either checks a lock or fetches nothing, and resolves nothing."""
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#")]
    runs = [part for line in lines for part in line.split("&&") if re.search(r"\bpip\b|-m build\b", part)]
    assert len(runs) == 4
    for run in runs:
        assert "--no-deps" in run, run
        assert "--require-hashes -r /locks/" in run or "--no-index" in run, run
        assert " wheel " not in run or "--no-build-isolation" in run, run
    given = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    copied = re.findall(r"^COPY (\S+) /locks/\S+$", text, re.MULTILINE)
    named = [re.sub(r"\$\{(\w+)\}", lambda match: given[match[1]], one) for one in copied]
    assert sorted(named) == sorted(str(path.relative_to(ROOT)) for path in LOCKS_OF_IMAGE)


def test_the_lock_in_use_holds_what_its_packages_need() -> None:
    path = install.usable_lock(distribution("torch").version)
    if path is None:
        pytest.skip("this environment was not installed by a lock")
    pins = {pin.name: pin.version for pin in lockfile.read(path)}
    extras: dict[str, set[str]] = {name: {""} for name in pins}
    waiting = [Requirement(line) for lines in asked_for().values() for line in lines]
    while waiting:
        requirement = waiting.pop()
        name = lockfile.normal(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        assert name in pins, f"{requirement} is needed, and {path.name} does not have it"
        extras[name] |= requirement.extras
    for name, version in pins.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is in {path.name} and not installed: run `make venv`")
        assert installed.version == version, f"{name}: run `make venv`"
        for line in installed.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras[name]):
                needed = lockfile.normal(requirement.name)
                assert requirement.specifier.contains(pins[needed], prereleases=True), f"{name} needs {requirement}"


@pytest.mark.parametrize(
    "text",
    [
        "numpy==2.4.6\n",
        "numpy>=2.4.6 --hash=sha256:" + "0" * 64 + "\n",
        "numpy==2.4.6 --hash=sha256:" + "0" * 63 + "\n",
        "numpy==2.4.6 --hash=md5:" + "0" * 32 + "\n",
        "--index-url=somewhere\n",
        ("numpy==2.4.6 \\\n    --hash=sha256:" + "0" * 64 + "\n") * 2,
    ],
)
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="make lock"):
        lockfile.read(path)


def test_a_lock_is_read_as_it_was_written(tmp_path: Path) -> None:
    pins = [lockfile.Pin("a-b", "1.0+cpu", ("0" * 64, "1" * 64)), lockfile.Pin("b", "2!1.0rc1", ("2" * 64,))]
    path = tmp_path / "lock.txt"
    path.write_text("# words\n" + lockfile.text_of(reversed(pins)))
    assert lockfile.read(path) == pins


def test_an_archive_with_the_locked_hash_is_installed(offline: Path, tmp_path: Path) -> None:
    wheel = wheel_in(offline, "thing", "1.0")
    path = tmp_path / "lock.txt"
    path.write_text(lockfile.text_of([lockfile.Pin("thing", "1.0", (hashlib.sha256(wheel.read_bytes()).hexdigest(),))]))
    install.install_locked(path)
    assert (tmp_path / "target" / "thing.py").is_file()


def test_an_archive_with_another_hash_is_not_installed(
    offline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = wheel_in(offline, "thing", "1.0")
    good = hashlib.sha256(wheel.read_bytes()).hexdigest()
    path = tmp_path / "lock.txt"
    path.write_text(lockfile.text_of([lockfile.Pin("thing", "1.0", (good,))]))
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(SystemExit):
        install.install_locked(path)
    assert not (tmp_path / "target").exists()
    said = capfd.readouterr().err
    assert "DO NOT MATCH THE HASHES" in said
    assert good in said


def test_the_cpu_build_is_taken_where_it_is_offered(offline: Path) -> None:
    wheel_in(offline, "torch", lockfile.torch_version())
    assert install.torch_on_offer() == lockfile.torch_version()
    wheel_in(offline, "torch", f"{lockfile.torch_version()}+cpu")
    assert install.torch_on_offer() == f"{lockfile.torch_version()}+cpu"


def test_without_a_lock_the_constraints_are_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "torch_on_offer", lambda: "2.13.0+another")
    monkeypatch.setattr(install, "pip", lambda *arguments: calls.append(arguments))
    install.main()
    assert "there is no lock for Python" in capsys.readouterr().out
    tools, first, last = calls
    assert {"pip", "setuptools"} <= set(tools)
    assert f"torch=={lockfile.torch_version()}" in first
    assert last[-1] == f".[{','.join(EXTRAS)}]"
    assert all(str(lockfile.CONSTRAINTS) in call for call in calls)


def test_a_hash_is_the_indexs_or_that_of_a_file_here(tmp_path: Path) -> None:
    file = tmp_path / "a+b.whl"
    file.write_bytes(b"bytes")
    assert lock.sha256_of({"url": file.as_uri(), "archive_info": {}}) == hashlib.sha256(b"bytes").hexdigest()
    given = {"url": "https://index.invalid/a.whl", "archive_info": {"hashes": {"sha256": "0" * 64}}}
    assert lock.sha256_of(given) == "0" * 64
    with pytest.raises(SystemExit, match=r"no SHA-256 for a\.whl"):
        lock.sha256_of({"url": "https://index.invalid/a.whl", "archive_info": {}})


def test_what_would_be_built_is_not_locked_unless_it_was_read() -> None:
    def item(name: str, file: str) -> dict[str, Any]:
        info = {"url": f"https://index.invalid/{file}", "archive_info": {"hashes": {"sha256": "0" * 64}}}
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info}

    assert lock.pin_of(item("Some.Thing", "thing.whl")) == lockfile.Pin("some-thing", "1.0", ("0" * 64,))
    assert lock.pin_of(item("tensorrt_rtx", "tensorrt_rtx-1.0.tar.gz")).name == "tensorrt-rtx"
    with pytest.raises(SystemExit, match=r"some-thing 1\.0 comes as sources"):
        lock.pin_of(item("Some.Thing", "thing.tar.gz"))


def test_the_installer_needs_nothing_but_the_standard_library() -> None:
    for module in ("install", "lockfile"):
        imported = {
            line.split()[1].partition(".")[0]
            for line in (lockfile.ROOT / "tools" / f"{module}.py").read_text().splitlines()
            if line.startswith(("import ", "from "))
        }
        assert imported - {"tools", "__future__"} <= sys.stdlib_module_names
