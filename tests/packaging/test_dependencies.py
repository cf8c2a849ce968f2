"""Every package has a licence, docs/dependencies.md lists them, and the bill of materials is valid CycloneDX."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tools import licences, lockfile, page, sbom
from tools.dependencies import packages
from tools.wanted import asked_for

Fake = Callable[..., Distribution]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Makes an installed package with the lines of metadata given to it."""

    def make(*lines: str) -> Distribution:
        info = tmp_path / "thing-1.0.dist-info"
        info.mkdir(exist_ok=True)
        info.joinpath("METADATA").write_text(
            "\n".join(["Metadata-Version: 2.4", "Name: Thing", "Version: 1.0", *lines])
        )
        return Distribution.at(info)

    return make


@pytest.mark.parametrize(
    ("lines", "expression"),
    [
        (["License-Expression: MIT OR Apache-2.0"], "MIT OR Apache-2.0"),
        (["License: Apache License, Version 2.0"], "Apache-2.0"),
        (["License: MIT"], "MIT"),
        (["Classifier: License :: OSI Approved :: MIT License"], "MIT"),
        (["License: a text", "Classifier: License :: OSI Approved :: ISC License (ISCL)", "License: ISC"], "ISC"),
    ],
)
def test_a_licence_is_read_where_it_is_said(fake: Fake, lines: list[str], expression: str) -> None:
    assert licences.expression_of(fake(*lines)) == expression


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["License: BSD"],
        ["License: UNKNOWN"],
        ["License-Expression: AGPL-3.0-only"],
        ["Classifier: License :: OSI Approved :: BSD License"],
        ["Classifier: License :: OSI Approved :: MIT License", "Classifier: License :: Other/Proprietary License"],
    ],
)
def test_an_unclear_licence_stops_the_command(fake: Fake, lines: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"licence of thing 1\.0 is not clear"):
        licences.expression_of(fake(*lines))


def test_a_package_of_another_lock_needs_a_licence_too() -> None:
    assert licences.elsewhere("nvidia-cublas") == licences.PROPRIETARY
    with pytest.raises(SystemExit, match="no-such-thing is in a lock and not installed here"):
        licences.elsewhere("no-such-thing")


def test_a_licence_that_is_not_permissive_needs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(page.WORDS, "certifi")
    with pytest.raises(SystemExit, match="certifi is under MPL"):
        page.page()


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no-such-thing is not installed, which the group 'base' needs"):
        packages({"base": ["no.such_thing>=1"]})
    with pytest.raises(SystemExit, match=r"numpy .* is installed, but pyproject.toml needs numpy>=99"):
        packages({"base": ["numpy>=99"]})


def test_what_brings_a_package_is_found_through_others() -> None:
    found = packages({"base": ["rich"], "dev": ["pytest"]})
    assert found["rich"].groups == {"base"}
    assert found["mdurl"].groups == {"base"}
    assert "markdown-it-py" in found["rich"].needs
    assert found["pluggy"].only_for_development
    assert not found["pygments"].only_for_development  # both bring it


def test_the_page_is_what_the_command_writes() -> None:
    if page.made_with() not in page.PAGE.read_text(encoding="utf-8"):
        pytest.skip(f"the page was made with another Python or build of PyTorch than {page.made_with()}")
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `make licences`"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dist") / "magicface_rt-0.1.0-py3-none-any.whl"
    path.write_bytes(b"a wheel's bytes")
    return path


@pytest.fixture(scope="module")
def bill(wheel: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(sbom.bill(wheel))
    return found


def test_the_bill_is_valid_cyclonedx(wheel: Path) -> None:
    text = sbom.bill(wheel)
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    # The validator does refuse.
    assert validator.validate_str(text.replace('"SHA-256"', '"SHA-257"', 1)) is not None
    assert validator.validate_str(text.replace('"library"', '"book"', 1)) is not None


def test_the_bill_is_the_same_each_time(wheel: Path) -> None:
    assert sbom.bill(wheel) == sbom.bill(wheel)


def test_the_bill_is_of_the_wheel(wheel: Path, bill: dict[str, Any]) -> None:
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"]) == ("magicface_rt", "0.1.0")
    assert root["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}]


def test_the_bill_holds_every_package_once_with_its_licence(bill: dict[str, Any]) -> None:
    found = packages(asked_for())
    listed = {component["name"]: component for component in bill["components"]}
    assert len(listed) == len(bill["components"])
    assert {name: package.version for name, package in found.items()} == {n: c["version"] for n, c in listed.items()}
    assert all(component["licenses"][0]["expression"] for component in listed.values())
    assert listed["numpy"]["scope"] == "required"
    assert listed["onnxruntime"]["scope"] == "optional"
    assert listed["pytest"]["scope"] == "excluded"


def test_the_bill_has_the_locked_hash_of_each_package(bill: dict[str, Any]) -> None:
    path = lockfile.path_of(*_python_and_torch(bill))
    if not path.is_file():
        pytest.skip(f"there is no {path.name}")
    locked = {pin.name: pin for pin in lockfile.read(path)}
    for component in bill["components"]:
        hashes = tuple(entry["content"] for entry in component["hashes"])
        assert hashes == locked[component["name"]].sha256, component["name"]


def test_the_bill_of_an_extra_that_stands_apart_is_that_of_its_lock(wheel: Path) -> None:
    text = sbom.bill(wheel, "gpu")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    listed = {one["name"]: one for one in found["components"]}
    pins = {pin.name: pin for pin in lockfile.read(lockfile.path_apart(sys.version_info[:2], "gpu"))}
    assert {name: (pin.version, pin.sha256) for name, pin in pins.items()} == {
        name: (one["version"], tuple(entry["content"] for entry in one["hashes"])) for name, one in listed.items()
    }
    assert listed["onnxruntime-gpu"]["licenses"] == [{"expression": "MIT"}]
    assert (listed["onnxruntime-gpu"]["scope"], listed["numpy"]["scope"]) == ("optional", "required")
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in found["dependencies"]}
    assert {"flatbuffers", "numpy", "packaging", "protobuf"} <= needs["onnxruntime-gpu"]
    assert "onnxruntime-gpu" in needs["magicface_rt"]


def test_the_bill_says_what_needs_what(bill: dict[str, Any]) -> None:
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in bill["dependencies"]}
    assert {"numpy", "onnxruntime", "rich"} <= needs["magicface_rt"]
    assert not {"pytest", "cmake"} & needs["magicface_rt"]  # whoever installs the wheel gets none of them
    assert {"markdown-it-py", "pygments"} <= needs["rich"]
    assert set().union(*needs.values()) <= set(needs)


def _python_and_torch(bill: dict[str, Any]) -> tuple[tuple[int, int], str]:
    (torch,) = (component["version"] for component in bill["components"] if component["name"] == "torch")
    return sys.version_info[:2], torch
