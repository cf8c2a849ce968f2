"""A plan's folder: the plan and the manifest that describes it, and how both are checked and written.

    plan            the serialized engine
    manifest.json   key, size and SHA-256 of the plan, the builder's facts, and a checksum over all of these

Each content has exactly one text as a manifest, and any other is refused. So a change to any byte of either file is
detected, even one that makes no difference in JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from magicface_rt.errors import PlanError, StoreError
from magicface_rt.files import atomic_files

from .locking import OPEN_FLAGS
from .plan_key import PlanKey

PLAN = "plan"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 22

_FIELDS = {"bytes", "checksum", "facts", "key", "sha256"}
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Plan:
    """A plan in a store, as its manifest describes it; the plan file's content has not been checked.

    `bytes`, `sha256` (hex): of the plan file. `facts`: what the builder reported, as values that JSON can hold.
    """

    key: PlanKey
    folder: Path
    bytes: int
    sha256: str
    facts: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The plan file."""
        return self.folder / PLAN


@dataclass(frozen=True)
class Damaged:
    """Something in a plan's place that is not a valid plan. `reason`: what was found and what was expected."""

    folder: Path
    reason: str

    @property
    def path(self) -> Path:
        """Where the plan file should be."""
        return self.folder / PLAN


def load(folder: Path) -> Plan | Damaged | None:
    """Load what is in a plan's place, checking its manifest and the plan file's size; return None if nothing is there.

    Raises:
        StoreError: the place cannot be read.
    """
    try:
        mode = os.lstat(folder).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(
            f"engine store: {folder} cannot be read ({error.strerror}). Only the user who made a store can read it; "
            "name another one with --store DIR."
        ) from error
    if not stat.S_ISDIR(mode):
        return Damaged(folder, "it is not a folder")
    try:
        plan = _parse(folder, _read(folder / MANIFEST, MAX_MANIFEST_BYTES))
        size = _regular(folder / PLAN).st_size
        if size != plan.bytes:
            raise PlanError(f"{PLAN} has {size} bytes, expected {plan.bytes}")
    except PlanError as error:
        # A folder that went while it was read was pruned: it is missing, not damaged.
        return Damaged(folder, str(error).rstrip(".")) if os.path.lexists(folder) else None
    return plan


def read_checked(plan: Plan) -> bytes:
    """Read the plan's bytes and check them against the SHA-256 of the manifest.

    Raises:
        PlanError: they differ, or cannot be read.
    """
    # A serialized engine holds native code, which the library runs without checking for tampering. So nothing is
    # returned before all of it has been hashed, and what is returned is what was hashed: a copy in memory, not a
    # mapping of a file that may change afterwards.
    data = _read(plan.path, plan.bytes)
    _compare(plan, len(data), hashlib.sha256(data).hexdigest())
    return data


def check(plan: Plan) -> None:
    """Compare the plan file with the manifest, without holding it in memory.

    Raises:
        PlanError: they differ, or the file cannot be read.
    """
    _compare(plan, _regular(plan.path).st_size, _sha256(plan.path))


def write_manifest(folder: Path, key: PlanKey, facts: Mapping[str, Any]) -> None:
    """Write the manifest of the plan file in a folder, and flush both to the disk.

    Raises:
        StoreError: there is no plan, or JSON cannot hold the facts.
        OSError: writing failed.
    """
    path = folder / PLAN
    if path.is_symlink() or not path.is_file() or path.stat().st_size == 0:
        raise StoreError(f"engine store: the builder of graph {key.graph} wrote no plan into {path}.")
    try:
        plain = json.loads(_text(dict(facts)))  # as it will be read back, so its text will be the same then
        content = {"key": key.to_dict(), "bytes": path.stat().st_size, "sha256": _sha256(path), "facts": plain}
        text = _text({**content, "checksum": _checksum(content)})
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"engine store: JSON cannot hold the facts of graph {key.graph}: {error}.") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise StoreError(
            f"engine store: the facts of graph {key.graph} make a manifest of {len(text)} bytes, expected at most "
            f"{MAX_MANIFEST_BYTES}."
        )
    path.chmod(0o600)
    atomic_files.fsync(path)
    with os.fdopen(os.open(folder / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    atomic_files.fsync(folder)


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content)).hexdigest()


def _parse(folder: Path, raw: bytes) -> Plan:
    try:
        content = json.loads(raw)
        exact = isinstance(content, dict) and _text(content) == raw
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{MANIFEST} is not valid JSON ({error})") from error
    if not exact or set(content) != _FIELDS or not isinstance(content["facts"], dict):
        raise PlanError(f"{MANIFEST} does not have the expected form")
    stored = content.pop("checksum")
    found = _checksum(content)
    if stored != found:
        raise PlanError(f"{MANIFEST} was changed: its checksum is {found[:12]}..., expected {str(stored)[:12]}...")
    if type(content["bytes"]) is not int or not isinstance(content["sha256"], str):
        raise PlanError(f"{MANIFEST} does not have the expected form (bytes is no whole number, or sha256 no text)")
    _check_facts(content["facts"])
    key = PlanKey.from_dict(content["key"])
    if key.digest != folder.name:
        raise PlanError(f"{MANIFEST} is that of the plan {key.digest[:12]}..., expected {folder.name[:12]}...")
    return Plan(key, folder, content["bytes"], content["sha256"], content["facts"])


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Check the part of the builder's facts that is computed with."""
    gate = facts.get("gate", {})
    scratch = gate.get("scratch_bytes") if isinstance(gate, dict) else "none"
    if scratch is not None and (type(scratch) is not int or scratch < 0):
        raise PlanError(f"{MANIFEST} does not have the expected form (facts.gate.scratch_bytes is no whole number)")


def _compare(plan: Plan, size: int, digest: str) -> None:
    if size != plan.bytes:
        raise PlanError(f"{PLAN} has {size} bytes, expected {plan.bytes}")
    if digest != plan.sha256:
        raise PlanError(f"{PLAN} was changed: its SHA-256 is {digest[:12]}..., expected {plan.sha256[:12]}...")


def _regular(path: Path) -> os.stat_result:
    try:
        found = os.lstat(path)
    except FileNotFoundError as error:
        raise PlanError(f"{path.name} is missing") from error
    except OSError as error:
        raise PlanError(f"{path.name} cannot be read: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise PlanError(f"{path.name} is a symbolic link, expected a file of the store's own")
    if not stat.S_ISREG(found.st_mode):
        raise PlanError(f"{path.name} is not a file")
    return found


def _read(path: Path, limit: int) -> bytes:
    size = _regular(path).st_size
    if size > limit:
        raise PlanError(f"{path.name} has {size} bytes, expected at most {limit}")
    try:
        with _open(path) as stream:
            return stream.read(size + 1)
    except OSError as error:
        raise PlanError(f"{path.name} cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise PlanError(f"{path.name} has {size} bytes, more than there is memory for") from error


def _open(path: Path) -> BufferedReader:
    return os.fdopen(os.open(path, os.O_RDONLY | OPEN_FLAGS), "rb")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with _open(path) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise PlanError(f"{path.name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
