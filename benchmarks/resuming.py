"""Resume a report, for runs that take hours: what it has is kept, what it lacks is measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magicface_rt.bundle import Bundle
from magicface_rt.errors import InputError
from magicface_rt.values.shown import shown

from .machine import describe
from .results import FORMAT
from .schema import problems, read_report
from .settings import Case, Settings

SAME_MACHINE = ("system", "processor", "cores", "memory_bytes", "gpu", "python", "versions")
MAY_DIFFER = ("bundles", "checkpoint", "concepts", "mask_shares", "images", "steps", "one_at_a_time", "limit")
"""Settings that only select the cases, or that no figure depends on; the checkpoint is the bundle's in any case."""


class Earlier:
    """The cases of a report, without those in which a contender failed or made a wrong picture, and without those of a
    bundle that is another one by now: these are measured again, if the settings name them.

    bundles  what is in the folders of bundles now, as far as it is known

    Raises InputError: the file is no report, is of an older format, or was measured on another machine or with other
    packages or settings, so its figures could not be compared with new ones.
    """

    def __init__(self, file: Path, settings: Settings, bundles: Mapping[str, Bundle] | None = None) -> None:
        content = read_report(file)
        wrong = problems(content)
        if wrong:
            raise InputError(
                f"report {file}: it is no report of `magicface-rt bench`: {wrong[0]}. Measure anew without --resume."
            )
        _same(file, "format", content["format"], FORMAT)
        now = describe()
        for name in SAME_MACHINE:
            _same(file, f"machine.{name}", content["machine"].get(name), now[name])
        for name, value in settings.to_json().items():
            if name not in MAY_DIFFER:
                _same(file, f"settings.{name}", content["settings"].get(name), value)
        self.cases: tuple[Mapping[str, Any], ...] = tuple(
            case for case in content["cases"] if _whole(case) and _of_now(case, bundles or {})
        )
        self.peaks: Mapping[str, Any] = content["peaks"]

    def has(self, bundle: str, case: Case) -> bool:
        """Whether a case was measured with the bundle in that folder."""
        wanted = (bundle, case.concepts, case.mask_share, case.images, case.steps)
        return any(_identity(case) == wanted for case in self.cases)


def _identity(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("bundle", "concepts", "mask_share", "images", "steps"))


def _whole(case: Mapping[str, Any]) -> bool:
    return all(outcome["status"] not in ("failed", "wrong picture") for outcome in case["outcomes"])


def _of_now(case: Mapping[str, Any], bundles: Mapping[str, Bundle]) -> bool:
    """Whether a case was measured with the bundle that is in its folder now. Earlier reports have no hashes."""
    if (bundle := bundles.get(case["bundle"])) is None:
        return True
    form = (bundle.dtype, bundle.height, bundle.width)
    return (case["dtype"], case["height"], case["width"]) == form and case.get("bundle_hash", "") in ("", bundle.hash)


def _same(file: Path, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise InputError(
            f"report {file}: {name} is {shown(found)}, expected {shown(expected)} as now: figures of the two cannot "
            "stand beside each other. Measure anew without --resume, into another folder."
        )
