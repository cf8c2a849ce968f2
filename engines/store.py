"""The engine store: finds plans by what they were made from and for. Its folders are drawn in engines/layout.py.

A plan appears and disappears by one rename, so a reader finds it whole or not at all and needs no lock.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magicface_rt.errors import PlanError, StoreError
from magicface_rt.files import atomic_files
from magicface_rt.files.write_access import anyone_may_write

from . import caches, layout, manifest
from .locking import FileLock, Lease, unused
from .manifest import PLAN, Damaged, Plan
from .plan_key import FieldDifference, PlanKey

__all__ = ["Damaged", "EngineStore", "Lease", "Plan", "Pruned"]

logger = logging.getLogger("magicface_rt.engines")

Entry = Plan | Damaged
Make = Callable[[Path], Mapping[str, Any]]

_SHOWN_DIFFERENCES = 4
_OF_WRITING = atomic_files.FULL | {errno.EFBIG, errno.EROFS}


@dataclass
class Pruned:
    """What pruning did.

    entries      the plans and damaged entries that were removed
    cache_files  how many cache files were removed
    cache_bytes  bytes that these took
    """

    entries: list[Entry] = field(default_factory=list)
    cache_files: int = 0
    cache_bytes: int = 0


class EngineStore:
    """A folder of plans. Constructing it touches no file; it is safe to use from several threads and processes.

    `size_limit`: bytes of all plans and caches together, enforced after each build by removing the least recently used.
    """

    def __init__(self, root: Path | str, *, size_limit: int | None = None) -> None:
        self.root = Path(root).absolute()
        self.size_limit = size_limit

    # Finding and reading

    def find(self, key: PlanKey) -> Plan | None:
        """Return the plan of a key, or None if there is none that can be used. The plan file itself is not read.

        Raises:
            StoreError: the store cannot be read.
        """
        found = self._load(key)
        return found if isinstance(found, Plan) else None

    def get(self, key: PlanKey, command: str | None = None) -> Plan:
        """Return the plan of a key. `command`: the command that builds it, for an error's message.

        Raises:
            PlanError: it is damaged or missing, or every user may replace it. The message names the fields by which
                the closest plan is stale.
            StoreError: the store cannot be read.
        """
        found = self._load(key)
        if isinstance(found, Plan):
            self._check_trusted(found, command)
            return found
        if isinstance(found, Damaged):
            raise self._damaged(found, key, command)
        raise PlanError(
            f"engine store {self.root}: no plan for graph {key.graph} ({key.flavour} {key.flavour_version}, "
            f"{key.precision}). {self._closest(key)} Build it: {self._command(key, command)}"
        )

    def read(self, plan: Plan, command: str | None = None) -> bytes:
        """Read the bytes of a plan, all checked against the manifest, and mark the plan as used now.

        command  as for `get`

        Raises:
            PlanError: the plan is gone, a byte of it or of its manifest was changed, or every user may replace it.
            StoreError: the store cannot be read.
        """
        self._check_trusted(plan, command)
        # Everything is checked again: the plan may have been found long ago.
        found = self._load(plan.key)
        try:
            if found is None:
                raise PlanError("it is missing")
            if isinstance(found, Damaged):
                raise PlanError(found.reason)
            data = manifest.read_checked(found)
        except PlanError as error:
            if not os.path.lexists(plan.folder):
                raise self._gone(plan, command) from error
            raise self._damaged(Damaged(plan.folder, str(error)), plan.key, command) from error
        layout.mark_used(plan.folder)
        return data

    def in_use(self, plan: Plan, command: str | None = None) -> Lease:
        """Take a lease: as long as it is open, in this process or another, `prune` leaves the plan alone.

        command  as for `get`

        Use it as a context manager, or `close` it. It ends with its process in any case. Needs no write access.

        Raises:
            PlanError: the plan is gone.
            StoreError: the plan file cannot be opened.
        """
        try:
            lease = Lease.take(plan.path)
        except OSError as error:
            raise StoreError(f"engine store: {plan.path} cannot be opened ({error.strerror}).") from error
        if lease is None:
            raise self._gone(plan, command)
        layout.mark_used(plan.folder)
        return lease

    # Listing and explaining

    def entries(self) -> list[Entry]:
        """List everything in a plan's place, sorted by folder: plans, and what is damaged.

        Raises:
            StoreError: the store cannot be read.
        """
        found = [manifest.load(folder) for folder in layout.plan_folders(self.root)]
        return [self._checked_location(entry) for entry in found if entry is not None]

    def plans(self) -> list[Plan]:
        """List the plans that are not known to be damaged; their files are not read."""
        return [entry for entry in self.entries() if isinstance(entry, Plan)]

    def why(self, key: PlanKey) -> list[tuple[Plan, list[FieldDifference]]]:
        """List every plan of the same graph with the fields in which it differs from a key, the closest first."""
        candidates = [plan for plan in self.plans() if plan.key.graph == key.graph]
        pairs = [(plan, plan.key.differences(key)) for plan in candidates]
        return sorted(pairs, key=lambda pair: (len(pair[1]), -self.last_used(pair[0])))

    def verify(self) -> list[tuple[Entry, str | None]]:
        """List every entry with what is wrong with it, or None for a sound plan. Reads every plan once."""
        checked = [(entry, _fault(entry) or self._why_not_trusted(entry.folder)) for entry in self.entries()]
        # A plan may have been pruned while the others were read.
        return [(entry, fault) for entry, fault in checked if fault is None or os.path.lexists(entry.folder)]

    def size(self, entry: Entry) -> int:
        """Bytes that an entry takes."""
        return layout.bytes_of(entry.folder)

    def last_used(self, entry: Entry) -> float:
        """When an entry was last built, read or leased, in seconds since the epoch; 0 if it is gone."""
        return layout.last_used(entry.folder)

    # Building

    def build(
        self,
        key: PlanKey,
        make: Make,
        *,
        timeout: float | None = None,
        on_wait: Callable[[], object] | None = None,
    ) -> Plan:
        """Return the plan of a key: the stored one if it is sound, else a new one that replaces it.

        `make(path)` writes the plan file to `path`, the only file that is kept, and returns facts for the manifest.
        If several callers, in any process, want the plan, one makes it and the others wait for at most `timeout`
        seconds (None: as long as it takes). `on_wait` is called once, before the first wait. However `make` ends,
        nothing half-written is left. After a build the store's size limit is applied to all plans but this one; what
        cannot be removed then is logged as a warning.

        Raises:
            StoreError: the store cannot be written, every user may write to it, or the wait was too long.
            Anything that `make` raises.
        """
        folder = self._folder(key)
        if reason := self._why_not_trusted(folder):
            raise StoreError(f"engine store {self.root}: {reason}.")
        found = self._sound(key)
        if found is not None:
            # Clean up after a process that was killed at the very end; the plan is there whether this works or not.
            with contextlib.suppress(StoreError, OSError):
                if any(folder.parent.glob(f".{folder.name}.*")):
                    self._sweep(folder)
            return found
        with self._writing(folder.parent):
            layout.make_parents(self.root, folder)
        with self._lock(folder, timeout, on_wait):
            # Another process may have built it while this one waited.
            found = self._sound(key)
            if found is None:
                found = self._build(key, folder, make)
        self._prune_after_build(key)
        return found

    def _build(self, key: PlanKey, folder: Path, make: Make) -> Plan:
        """Make a plan, write its manifest and move both into place; the caller holds its lock."""
        part = layout.new_part(folder)
        try:
            with self._writing(folder):
                layout.remove_parts(folder)
                os.mkdir(part, 0o700)
            facts = self._make(make, part / PLAN)
            with self._writing(folder):
                layout.keep_only(part, PLAN)
                manifest.write_manifest(part, key, facts)
                if os.path.lexists(folder):
                    os.rename(folder, layout.new_part(folder))  # damaged
                os.rename(part, folder)
                try:
                    atomic_files.fsync(folder.parent)
                except OSError:
                    # A caller that gets this error must not find the plan there.
                    with contextlib.suppress(OSError):
                        os.rename(folder, part)
                    raise
        finally:
            layout.remove_parts(folder)
        layout.mark_used(folder)
        placed = manifest.load(folder)
        if not isinstance(placed, Plan):
            raise StoreError(f"engine store {self.root}: {folder} was changed by another program while it was written.")
        return placed

    def _make(self, make: Make, path: Path) -> Mapping[str, Any]:
        try:
            return make(path)
        except OSError as error:
            # Only errors that concern the store's disk: `make` reads other files too.
            if error.errno in _OF_WRITING or str(error.filename or "").startswith(str(path.parent)):
                raise self._unwritable(path, error) from error
            raise

    # Removing

    def check(self) -> None:
        """Check that the folder looks like a store: it holds one of a store's folders, or nothing, or is not there.

        Raises:
            StoreError: it holds only other things, or cannot be read.
        """
        layout.check_root(self.root)

    def prune(
        self,
        limit: int | None = None,
        keep: Iterable[PlanKey] = (),
        *,
        on_fault: Callable[[StoreError], object] | None = None,
    ) -> Pruned:
        """Remove what killed processes left, then caches and entries until `limit` bytes remain.

        Caches are removed first (those of plans that are gone always), then damaged entries, then the least recently
        used plans. Plans in use, plans being built and those of `keep` stay, even over the limit. `limit` defaults to
        the store's; without either, no entry is removed. Whatever else the folder holds is left alone.

        What cannot be removed does not keep the rest. At the end `on_fault` is called with an error for each of these,
        or, without it, the first error is raised.

        Raises:
            StoreError: the folder is not a store, or cannot be read; or, without `on_fault`, something could not be
                removed.
        """
        self.check()
        faults: list[StoreError] = []
        pruned = self._prune(self.size_limit if limit is None else limit, {self._folder(key) for key in keep}, faults)
        for fault in faults:
            if on_fault is None:
                raise fault
            on_fault(fault)
        return pruned

    def _prune(self, limit: int | None, spared: set[Path], faults: list[StoreError]) -> Pruned:
        pruned = Pruned()
        for folder in layout.leftovers(self.root):
            with _collecting(faults):
                self._sweep(folder)
        entries = [(entry, self.size(entry)) for entry in self.entries()]
        plans = sum(size for _, size in entries)
        digests = [entry.folder.name for entry, _ in entries]
        self._prune_caches(digests, None if limit is None else limit - plans, pruned, faults)
        if limit is None:
            return pruned
        total = plans + self.cache_size()
        for entry, size in sorted(entries, key=lambda pair: (isinstance(pair[0], Plan), self.last_used(pair[0]))):
            if total <= limit:
                break
            with _collecting(faults):
                if entry.folder not in spared and self.remove(entry):
                    pruned.entries.append(entry)
                    total -= size
        return pruned

    def _prune_after_build(self, key: PlanKey) -> None:
        """Apply the size limit. The plan is there whether this works or not, so what does not is only logged."""

        def warn(fault: StoreError) -> None:
            logger.warning("the plan was built; pruning the store afterwards: %s", fault)

        try:
            self.prune(keep=[key], on_fault=warn)
        except StoreError as error:
            warn(error)

    def cache_size(self) -> int:
        """Bytes of the caches that stand beside the plans."""
        return caches.size(caches.cache_files(self.root))

    def _prune_caches(self, digests: list[str], limit: int | None, pruned: Pruned, faults: list[StoreError]) -> None:
        """Remove caches of plans that are gone, then the oldest until `limit` bytes of caches remain."""
        caches.clear_unfinished(self.root)
        files = caches.cache_files(self.root)
        orphans = caches.orphans(self.root, files, digests)
        for path in orphans:
            self._remove_cache(path, pruned, faults)
        if limit is None:
            return
        total = caches.size(files)
        for path in files:
            if total <= max(limit, 0):
                break
            if path not in orphans:
                total -= self._remove_cache(path, pruned, faults)

    def _remove_cache(self, path: Path, pruned: Pruned, faults: list[StoreError]) -> int:
        """Remove a cache file, and return the bytes that are free now."""
        size = caches.size([path])
        with _collecting(faults), self._writing(path):
            caches.remove(path)
            pruned.cache_files += 1
            pruned.cache_bytes += size
            return size
        return 0

    def remove(self, entry: Entry) -> bool:
        """Remove an entry unless it is in use, being built, repaired, or gone; return whether it was removed.

        Raises:
            StoreError: the store cannot be written.
        """
        folder = entry.folder
        if not os.path.isdir(folder.parent):
            return False
        with self._writing(folder):
            lock = FileLock.acquire(layout.lock_path(folder), timeout=0)
            if lock is None:
                return False
            with lock:
                found = manifest.load(folder)
                if found is None or (isinstance(entry, Damaged) and isinstance(self._checked_location(found), Plan)):
                    return False
                with unused(entry.path) as free:
                    if not free:
                        return False
                    try:
                        os.rename(folder, layout.new_part(folder))
                        layout.remove_parts(folder)
                    except BaseException:  # a signal arrived meanwhile
                        layout.remove_parts(folder)
                        raise
        return True

    def _sweep(self, folder: Path) -> None:
        """Remove temporary folders and a lock file beside a plan that no live process owns."""
        with self._writing(folder.parent):
            lock = FileLock.acquire(layout.lock_path(folder), timeout=0)
            if lock is not None:
                with lock:
                    layout.remove_parts(folder)

    # Places

    def _folder(self, key: PlanKey) -> Path:
        return layout.plan_folder(self.root, key.flavour, key.digest)

    def _load(self, key: PlanKey) -> Entry | None:
        folder = self._folder(key)
        link = layout.linked_parent(folder)
        if link is not None:
            return Damaged(folder, f"{link} is a symbolic link, expected a folder of the store's own")
        found = manifest.load(folder)
        return found if found is None else self._checked_location(found)

    def _checked_location(self, entry: Entry) -> Entry:
        if isinstance(entry, Plan) and entry.folder != self._folder(entry.key):
            return Damaged(entry.folder, f"it belongs into {self._folder(entry.key).parent}")
        return entry

    def _sound(self, key: PlanKey) -> Plan | None:
        found = self.find(key)
        return None if found is None or _fault(found) else found

    def _lock(self, folder: Path, timeout: float | None, on_wait: Callable[[], object] | None) -> FileLock:
        path = layout.lock_path(folder)
        with self._writing(path):
            lock = FileLock.acquire(path, timeout=timeout, on_wait=on_wait)
        if lock is None:
            raise StoreError(
                f"engine store {self.root}: another process builds the same plan and did not end within {timeout:g} s "
                f"(it holds {path}). Wait longer, or end that process: its lock ends with it."
            )
        return lock

    # Messages

    def _closest(self, key: PlanKey) -> str:
        stale = [differences for plan, differences in self.why(key) if plan.key.flavour == key.flavour]
        if not stale:
            return "The store holds no plan of this graph and flavour."
        shown = [str(difference) for difference in stale[0][:_SHOWN_DIFFERENCES]]
        more = len(stale[0]) - len(shown)
        return f"The closest one is stale: {'; '.join(shown)}{f'; and {more} more' if more else ''}."

    def _command(self, key: PlanKey, command: str | None) -> str:
        known = f"magicface-rt build BUNDLE --flavour {key.flavour} --store {shlex.quote(str(self.root))}"
        return f"`{command or known}`"

    def _why_not_trusted(self, folder: Path) -> str | None:
        """Return why a plan's folder, or what will be there, is not trusted, and what to do; None if it is."""
        if (found := anyone_may_write(folder / PLAN, self.root)) is None:
            return None
        place, mode = found
        return (
            f"every user may write to {place} (mode {mode}), expected trusted ones only: a plan is native code. "
            f"Withdraw that (`chmod o-w {shlex.quote(str(place))}`) and delete the plans that others may have "
            "written, or name a folder of your own with --store DIR"
        )

    def _check_trusted(self, plan: Plan, command: str | None) -> None:
        if reason := self._why_not_trusted(plan.folder):
            raise PlanError(f"plan {plan.folder}: {reason}, and build it there: {self._command(plan.key, command)}")

    def _gone(self, plan: Plan, command: str | None) -> PlanError:
        built = self._command(plan.key, command)
        return PlanError(f"plan {plan.folder}: it was removed from the store. Build it: {built}")

    def _damaged(self, entry: Damaged, key: PlanKey, command: str | None) -> PlanError:
        return PlanError(f"plan {entry.folder}: {entry.reason}. Build it again: {self._command(key, command)}")

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._unwritable(path, error) from error

    def _unwritable(self, path: Path, error: OSError) -> StoreError:
        prune = f"magicface-rt engines prune --store {shlex.quote(str(self.root))}"
        advice = atomic_files.advice(
            error,
            place="store",
            room=f"Free some space (for instance with `{prune}`)",
            other="name another folder with --store DIR",
        )
        return StoreError(f"engine store {self.root}: {path} cannot be written ({error.strerror or error}). {advice}")


@contextlib.contextmanager
def _collecting(faults: list[StoreError]) -> Iterator[None]:
    """Add a StoreError that the block raises to the list, and go on after the block."""
    try:
        yield
    except StoreError as error:
        faults.append(error)


def _fault(entry: Entry) -> str | None:
    if isinstance(entry, Damaged):
        return entry.reason
    try:
        manifest.check(entry)
    except PlanError as error:
        return str(error)
    return None
