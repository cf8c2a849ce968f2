"""`make sbom`: the bill of materials, CycloneDX 1.6 in JSON, from what is installed and the lock it was installed by.

Each package is listed with its version, licence, SHA-256 and what it needs. Its scope is `required` if the wheel cannot
do without it, `optional` if an extra brings it, `excluded` if only development needs it; the property
`magicface_rt:brought-by` names the extras. The same environment and wheel give the same bytes.

An extra that cannot be installed beside the others (`APART` of tools/wanted.py) has a bill of its own, of the package
with that extra only, by its lock: `magicface_rt-gpu.cdx.json` beside the other.

    python -m tools.sbom dist/magicface_rt-0.1.0-py3-none-any.whl dist/magicface_rt.cdx.json
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentScope, ComponentType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL
from packaging.requirements import Requirement

from tools import lockfile
from tools.apart import described
from tools.dependencies import DEVELOPMENT, Package, packages
from tools.licences import expression_of
from tools.wanted import APART, asked_for

_EPOCH = 1667997441  # when SOURCE_DATE_EPOCH is not set; what scikit-build-core dates the files of the wheel with
_NAMESPACE = uuid.UUID("6f1f6f3a-3a0e-5d0c-9f57-6a1d2f0d8b11")


def _component(package: Package, sha256: tuple[str, ...]) -> Component:
    if "base" in package.groups:
        scope = ComponentScope.REQUIRED
    else:
        scope = ComponentScope.EXCLUDED if package.only_for_development else ComponentScope.OPTIONAL
    return Component(
        type=ComponentType.LIBRARY,
        bom_ref=package.name,
        name=package.name,
        version=package.version,
        scope=scope,
        licenses=[LicenseExpression(expression_of(package.installed))],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=value) for value in sha256],
        purl=PackageURL("pypi", None, package.name, package.version),
        properties=[Property(name="magicface_rt:brought-by", value=",".join(sorted(package.groups)))],
    )


def _locked(apart: str | None) -> dict[tuple[str, str], tuple[str, ...]]:
    """SHA-256 by name and version, from the lock of this Python and this build of torch; empty if there is none."""
    python = sys.version_info[:2]
    path = lockfile.path_of(python, version("torch")) if apart is None else lockfile.path_apart(python, apart)
    return {(pin.name, pin.version): pin.sha256 for pin in lockfile.read(path)} if path.is_file() else {}


def bill(wheel: Path, apart: str | None = None) -> str:
    """The bill of materials of `wheel` and everything that it or its development depends on, as JSON.

    Args:
        wheel: ours, whose file name has its version.
        apart: one of `APART`, for a bill of the wheel with that extra only.

    Raises:
        SystemExit: a package is missing or its licence unknown.
    """
    wanted = asked_for(apart)
    found = packages(wanted, described(apart) if apart is not None else None)
    locked = _locked(apart)
    name, release = wheel.name.split("-")[:2]
    root = Component(
        type=ComponentType.LIBRARY,
        bom_ref=name,
        name=name,
        version=release,
        licenses=[LicenseExpression("Apache-2.0")],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(wheel.read_bytes()).hexdigest())],
        purl=PackageURL("pypi", None, lockfile.normal(name), release),
    )
    components = {name: _component(package, locked.get((name, package.version), ())) for name, package in found.items()}
    bom = Bom(components=components.values())
    bom.metadata.component = root
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", _EPOCH))
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, timezone.utc)
    listing = "\n".join(f"{name}=={package.version}" for name, package in sorted(found.items()))
    bom.serial_number = uuid.uuid5(_NAMESPACE, f"{wheel.name}\n{next(iter(root.hashes)).content}\n{listing}")
    asked = {name: texts for name, texts in wanted.items() if name not in DEVELOPMENT}
    direct = {lockfile.normal(Requirement(text).name) for texts in asked.values() for text in texts}
    bom.register_dependency(root, [components[name] for name in sorted(direct & set(components))])
    for name, package in sorted(found.items()):
        bom.register_dependency(components[name], [components[needed] for needed in sorted(package.needs)])
    return str(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)) + "\n"


def main(wheel: str, out: str) -> None:
    for apart in (None, *APART):
        text = bill(Path(wheel), apart)
        path = Path(out if apart is None else out.replace(".cdx.json", f"-{apart}.cdx.json"))
        path.write_text(text, encoding="utf-8")
        print(f"{path}: {text.count(chr(34) + 'scope' + chr(34))} packages, {text.count('SHA-256')} hashes")


if __name__ == "__main__":
    main(*sys.argv[1:])
