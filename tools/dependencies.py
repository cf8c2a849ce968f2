"""The packages that this project depends on, with what brings each, from the metadata of what is installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

from tools.lockfile import normal

# Nobody who installs the wheel gets these.
DEVELOPMENT = ("build", "dev")


@dataclass
class Package:
    """An installed package.

    Args:
        name: normalised as PEP 503 says.
        groups: what brings it: "base", an extra of pyproject.toml, or "build" for what builds the wheel.
        needs: names of the packages that it requires here, including those of the extras with which it was asked for.
    """

    name: str
    installed: Distribution
    groups: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)

    @property
    def version(self) -> str:
        return self.installed.version

    @property
    def only_for_development(self) -> bool:
        return self.groups <= set(DEVELOPMENT)


def packages(
    groups: Mapping[str, Iterable[str]], described: Mapping[str, Distribution] | None = None
) -> dict[str, Package]:
    """Every installed package that `groups` need, by name.

    Args:
        groups: requirements by group, see `tools.wanted.asked_for`.
        described: packages that cannot be installed here, by name; see `tools.apart`.

    Raises:
        SystemExit: a package is not installed, or its version is not what is required.
    """
    known, found = described or {}, dict[str, Package]()
    for group, requirements in groups.items():
        seen: set[tuple[str, str]] = set()
        waiting: list[tuple[str | None, Requirement, str]] = [(None, Requirement(text), "") for text in requirements]
        while waiting:
            parent, requirement, extra = waiting.pop()
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = normal(requirement.name)
            package = found.get(name) or Package(name, known.get(name) or _installed(name, group))
            found[name] = package
            if not requirement.specifier.contains(package.version, prereleases=True):
                raise SystemExit(
                    f"{name} {package.version} is installed, but {parent or 'pyproject.toml'} needs {requirement}: "
                    "run `make venv`"
                )
            package.groups.add(group)
            if parent is not None:
                found[parent].needs.add(name)
            for asked in ("", *requirement.extras):
                if (name, asked) not in seen:
                    seen.add((name, asked))
                    waiting += [(name, Requirement(text), asked) for text in package.installed.requires or []]
    return found


def _installed(name: str, group: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed, which the group {group!r} needs: run `make venv`") from None
