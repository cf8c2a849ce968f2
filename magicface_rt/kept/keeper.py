"""What a Session keeps of references, and how much memory that may take."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..backends import Backend
from ..bundle import Bundle
from ..errors import OptionError
from ..process.host_memory import available_bytes, host_memory_error
from ..values.plain_words import one_of
from ..values.shown import shown
from ..values.sizes import megabytes, parse_size
from .memory import FREE_SHARE, MEMORY, WORKSPACE, MemoryPlan, PlannedReference, make_plan, rows_per_pass, stored_bytes
from .on_device import OnDevice
from .reference import STORAGES, Storage
from .store import KeptStore


@dataclass(frozen=True)
class KeepSettings:
    """How a Session keeps references; see `Session`. `keep` and `budget` in bytes; a budget of None is what is free."""

    keep: int = 0
    memory: str = "auto"
    budget: int | None = None
    storage: Storage = "exact"
    pad_keys: bool = False

    @classmethod
    def of(
        cls,
        keep: int | str | None,
        memory: str,
        budget: int | str | None,
        storage: str,
        pad_keys: bool,
    ) -> KeepSettings:
        """Make settings from a Session's options. Raises OptionError, naming the option, if one cannot be used."""
        if not one_of(memory, MEMORY):
            raise OptionError(f"memory is {shown(memory)}, expected one of {', '.join(MEMORY)}.")
        return cls(
            0 if keep is None else parse_size(keep, "keep"),
            memory,
            None if budget is None else parse_size(budget, "budget"),
            checked_storage(storage),
            pad_keys,
        )


def checked_storage(storage: str) -> Storage:
    """Return the form of storage. Raises OptionError if there is no such form."""
    if one_of(storage, STORAGES):
        return "8-bit" if storage == "8-bit" else "exact"
    raise OptionError(f"storage is {shown(storage)}, expected one of {', '.join(STORAGES)}.")


class Keeper:
    """Keeps prepared references: `store` holds them on the host, `on_device` on the device. Thread-safe."""

    def __init__(self, bundle: Bundle, backend: Backend, settings: KeepSettings) -> None:
        self.bundle = bundle
        self.backend = backend
        self.settings = settings
        self.store = KeptStore(settings.keep)
        self.on_device = OnDevice()

    @property
    def plans_without_graphs(self) -> bool:
        """Whether a plan can be made before graphs are loaded. On a device without a budget, the budget is what the
        loaded graphs leave free.
        """
        return self.settings.budget is not None or self.backend.free_device_memory() is None

    def plan(
        self,
        references: Sequence[PlannedReference],
        *,
        steps: int,
        images: int,
        content_keys: Sequence[str] = (),
        keys_per_image: bool = False,
        memory: str | None = None,
        budget: int | None = None,
    ) -> MemoryPlan:
        """Make the plan of a request, by the Session's settings where nothing else is given.

        content_keys: of the references that may be on the device already.
        """
        free = self.backend.free_device_memory()
        budget = said = self.settings.budget if budget is None else budget
        if budget is None and free is not None:
            budget = int(FREE_SHARE * free) + self.on_device.unused_bytes(content_keys)
        bare = [r.tokens for r in references if r.stored_in == "nowhere"]
        return make_plan(
            self.bundle,
            references,
            steps=steps,
            images=images,
            at_once=min(images, self.bundle.limits.images),
            keys_per_image=keys_per_image,
            storage=self.settings.storage,
            memory=self.settings.memory if memory is None else memory,
            budget=budget,
            store_limit=self.settings.keep,
            on_device=free is not None,
            # What is free on a device is no limit to the workspace, in the plan as little as where rows are made.
            rows=max((self.rows(tokens, steps, {}, _workspace(said)) for tokens in bare), default=0),
            host_room=available_bytes(),
        )

    def rows(
        self,
        tokens: Mapping[int, int],
        steps: int,
        largest: Mapping[str, int | None],
        workspace: int | None = None,
    ) -> int:
        """Return the number of rows in a pass that prepares a reference. `largest`: what the graph takes, by symbol."""
        if workspace is None:
            workspace = _workspace(self.settings.budget)
        return rows_per_pass(self.bundle, tokens, steps, largest, workspace)

    def check_room(self, tokens: Mapping[int, int], steps: int, storage: Storage) -> None:
        """Raise HostMemoryError if the keys of a reference would not fit under a limit of this process."""
        need, left = stored_bytes(self.bundle, tokens, steps, storage), available_bytes()
        if left is not None and need > left:
            raise host_memory_error(
                f"the keys of a reference for {steps} steps need {megabytes(need)} more on the host"
            )

    def make_room(self, plan: MemoryPlan, wanted: Collection[Hashable]) -> None:
        """Make sure that a request keeps to its budget on the device, whatever earlier ones left there.

        wanted: identities of the references that the request will use. What other running requests use stays, and
        counts in their budgets. If the caller set no budget, all memory may be used, and is freed when it is needed.
        """
        if plan.on_device and plan.bytes_per_step and self.settings.budget is not None:
            self.on_device.trim(self.settings.budget - plan.peak.device, wanted if plan.mode == "keep" else ())

    def forget(self, keys: Collection[str] | None) -> bool:
        """Drop what is kept under these content keys, on the host and, unless in use, on the device; None: everything.

        Returns whether it is gone, as found by looking at both afterwards.
        """
        self.store.forget(keys)
        self.on_device.forget(keys)
        if keys is None:
            return not self.store.content_keys and not self.on_device.nbytes
        return set(keys).isdisjoint(self.store.content_keys) and not any(self.on_device.holds(key) for key in keys)

    def close(self) -> None:
        """Free what is on the device, and forget the rest."""
        self.on_device.close()
        self.store.forget()


def _workspace(budget: int | None) -> int:
    """Return how many bytes a pass that prepares a reference may take; None: of a budget that nobody set."""
    return WORKSPACE if budget is None else min(WORKSPACE, budget // 4)
