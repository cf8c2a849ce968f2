"""The keys and values of one reference over all steps, stored as they are or in 8 bits."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..backends.host import BFLOAT16, from_bfloat16, host_dtype, non_finite, to_bfloat16
from ..errors import KeptConceptError, NonFiniteError
from ..files.stamps import Stamp
from ..process.interrupts import reraise_if_interrupt
from ..values.shown import shown
from .origin import Origin

Storage = Literal["exact", "8-bit"]
STORAGES = ("exact", "8-bit")

LEVELS = 255


class Stored(ABC):
    """One tensor over all steps, [T, M, C], in the form in which it is stored."""

    @abstractmethod
    def put(self, step: int, values: NDArray[Any]) -> None:
        """Store a step's values [M, C].

        Raises:
            NonFiniteError: the values cannot be stored in this form.
        """

    @abstractmethod
    def step(self, step: int) -> NDArray[Any]:
        """Return a step's values [M, C], in the bundle's dtype (bfloat16 as bits)."""

    @abstractmethod
    def finite_witness(self, steps: slice) -> NDArray[Any]:
        """Return an array [..., C] that is finite if and only if every value of these steps is.

        Cheaper than reading the values: of 8-bit keys only the scale and offset decide.
        """

    @property
    @abstractmethod
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The arrays that are stored, by their suffix to the tensor's name."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Exact(Stored):
    """Values stored as they are. `values`: [T, M, C] in the bundle's dtype."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    @property
    def values(self) -> NDArray[Any]:
        return self._values

    @classmethod
    def empty(cls, steps: int, tokens: int, width: int, dtype: str) -> Exact:
        return cls(np.zeros((steps, tokens, width), host_dtype(dtype)))

    def put(self, step: int, values: NDArray[Any]) -> None:
        self.values[step] = values if values.dtype == self.values.dtype else values.view(self.values.dtype)

    def step(self, step: int) -> NDArray[Any]:
        return np.asarray(self.values[step])

    def finite_witness(self, steps: slice) -> NDArray[Any]:
        return np.asarray(self.values[steps])

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        return {"": self.values}


class EightBit(Stored):
    """Values stored in 8 bits: value = level * scale + low, with a separate scale and low for each step and channel.

    levels: uint8 [T, M, C]; scale, low: float32 [T, C]. The channels of keys differ much in size and lie far from 0,
    which is why each has both.
    """

    def __init__(
        self, levels: NDArray[np.uint8], scale: NDArray[np.float32], low: NDArray[np.float32], dtype: str
    ) -> None:
        self._levels, self._scale, self._low, self._dtype = levels, scale, low, dtype
        self.squared_error = self.squared = 0.0

    @property
    def levels(self) -> NDArray[np.uint8]:
        return self._levels

    @property
    def scale(self) -> NDArray[np.float32]:
        return self._scale

    @property
    def low(self) -> NDArray[np.float32]:
        return self._low

    @property
    def dtype(self) -> str:
        return self._dtype

    @classmethod
    def empty(cls, steps: int, tokens: int, width: int, dtype: str) -> EightBit:
        scale, low = np.zeros((2, steps, width), np.float32)
        return cls(np.zeros((steps, tokens, width), np.uint8), scale, low, dtype)

    def put(self, step: int, values: NDArray[Any]) -> None:
        if not len(values):
            return
        exact = from_bfloat16(values) if self.dtype == BFLOAT16 else values.astype(np.float32)
        low, high = exact.min(axis=0), exact.max(axis=0)
        with np.errstate(over="ignore"):
            scale = (high - low) / np.float32(LEVELS)
        if not np.isfinite(scale).all():
            raise NonFiniteError(
                f"keys from {low.min():.3g} to {high.max():.3g} lie too far apart for 8 bits. Keep them as they are: "
                "storage='exact'."
            )
        self.levels[step] = np.rint((exact - low) / np.where(scale > 0, scale, 1)).clip(0, LEVELS)
        self.scale[step], self.low[step] = scale, low
        self.squared += float(np.square(exact, dtype=np.float64).sum())
        self.squared_error += float(np.square(exact - self._values(step), dtype=np.float64).sum())

    def step(self, step: int) -> NDArray[Any]:
        return self._in_dtype(self._values(step))

    def finite_witness(self, steps: slice) -> NDArray[Any]:
        # A value rises or falls with its level, so all lie between those of the first level and the last.
        ends = np.array([0, LEVELS], np.float32).reshape(2, 1, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            return self._in_dtype(ends * self.scale[steps] + self.low[steps])

    def _values(self, step: int) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self.levels[step].astype(np.float32)
        values *= self.scale[step]
        values += self.low[step]
        return values

    def _in_dtype(self, values: NDArray[np.float32]) -> NDArray[Any]:
        return to_bfloat16(values) if self.dtype == BFLOAT16 else values.astype(self.dtype, copy=False)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        return {".levels": self.levels, ".scale": self.scale, ".low": self.low}


@dataclass(frozen=True)
class MappedFile:
    """The file in which tensors lie. `path`: absolute and without links; `stamp`: its stamp when it was mapped."""

    path: str
    stamp: Stamp

    def check_not_modified(self) -> None:
        """Check that the file was not written to in place, which would have changed its keys. Takes microseconds.

        Raises:
            KeptConceptError: it was, or cannot be examined.
        """
        name = shown(os.path.basename(self.path))
        try:
            found = self.stamp.was_modified(self.path)
        except OSError as error:
            reraise_if_interrupt(error)
            raise KeptConceptError(f"kept concept {name} cannot be looked at: {error.strerror}.") from error
        if found is not None:
            raise KeptConceptError(
                f"kept concept {name} was written to since it was loaded: {found}, expected {self.stamp}. Load it "
                "again, and replace a file that is in use by renaming only, as `save` does."
            )


@dataclass(frozen=True, eq=False)
class KeptReference:
    """The keys of one reference. They are read-only, since requests and the Session's store share them.

    A copy, by `copy.deepcopy` or out of a pickle, is the same reference, and lies in memory. One with other keys is
    made by `dataclasses.replace(reference, tensors={...}, file=None)`.

    key      identifies its content, see `content_key`. If it came from a file, this is what the file says
    tokens   kept tokens by factor; 0 where the mask vanishes on that grid
    tensors  by name, such as "k_ref_10"
    error    what 8 bits cost: relative 2-norm of the worst tensor; 0 if the values are as they were computed
    file     the file that the tensors lie in, None if they are in memory
    identity    equal only for references that are sure to have the same keys, see `with_identity`; not for comparing
                across processes. `dataclasses.replace` gives the new one an identity of its own
    """

    key: str
    prompt: str
    storage: Storage
    tokens: Mapping[int, int]
    tensors: Mapping[str, Stored] = field(repr=False)
    error: float = 0.0
    file: MappedFile | None = None
    identity: Hashable = field(init=False, repr=False, default_factory=object)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        for stored in self.tensors.values():
            for array in stored.arrays.values():
                array.setflags(write=False)

    def __copy__(self) -> KeptReference:
        return self

    def __deepcopy__(self, memo: object) -> KeptReference:
        read = self._read()
        self.check_not_modified()  # otherwise what was read is not what the identity stands for
        return read

    def __reduce__(self) -> tuple[Any, ...]:
        read = self.in_memory()
        self.check_not_modified()
        fields = (self.key, self.prompt, self.storage, dict(self.tokens), dict(read.tensors), self.error)
        return _restored, (fields, self.identity)

    @property
    def mapped(self) -> bool:
        """Whether the tensors lie in a file rather than in memory."""
        return self.file is not None

    def describe(self) -> dict[str, Any]:
        """Return the entry of run.json for this reference."""
        return {"kept": self.key, "storage": self.storage, "prompt": self.prompt}

    def check_not_modified(self) -> None:
        """See `MappedFile.check_not_modified`; tensors in memory always pass."""
        if self.file is not None:
            self.file.check_not_modified()

    def with_identity(self, identity: Hashable) -> KeptReference:
        """Give this reference an identity that stands for its content and that no file can claim; return itself."""
        object.__setattr__(self, "identity", identity)
        return self

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    def non_finite_message(self, step: int) -> str:
        """Return a message on a step's keys that are not finite; "" if all are finite."""
        for name, stored in self.tensors.items():
            values = stored.step(step)
            # only bfloat16 is held as bits
            if bad := non_finite(values, BFLOAT16 if values.dtype == np.uint16 else values.dtype.name):
                return (
                    f"kept keys {name} of the reference {shown(self.prompt)} ({self.key[:16]}...): {bad} of "
                    f"{values.size} values are NaN or infinite. They were kept so, or have changed since; a file is "
                    "looked through as it is loaded, unless that was switched off. Prepare the concept again."
                )
        return ""

    def in_memory(self) -> KeptReference:
        """Return the reference with tensors read from the file now; itself if they are in memory."""
        return self._read() if self.mapped else self

    def _read(self) -> KeptReference:
        """Return the same reference with tensors of its own in memory."""
        tensors: dict[str, Stored] = {}
        for name, stored in self.tensors.items():
            if isinstance(stored, EightBit):
                levels, scale, low = np.array(stored.levels), np.array(stored.scale), np.array(stored.low)
                tensors[name] = EightBit(levels, scale, low, stored.dtype)
            else:
                tensors[name] = Exact(np.array(stored.arrays[""]))
        return _restored((self.key, self.prompt, self.storage, dict(self.tokens), tensors, self.error), self.identity)


def _restored(fields: tuple[Any, ...], identity: Hashable) -> KeptReference:
    return KeptReference(*fields).with_identity(identity)


def empty_tensors(origin: Origin, tokens: Mapping[int, int], storage: Storage) -> dict[str, Stored]:
    """Make room for a reference's keys over all steps."""
    kind: type[Exact] | type[EightBit] = EightBit if storage == "8-bit" else Exact
    return {
        name: kind.empty(origin.steps, tokens[factor], width, origin.dtype)
        for name, (factor, width) in origin.widths.items()
    }


def worst_error(tensors: Mapping[str, Stored]) -> float:
    """Return the relative 2-norm of what 8 bits cost, for the tensor where it is largest."""
    errors = [s.squared_error / s.squared for s in tensors.values() if isinstance(s, EightBit) and s.squared]
    return float(np.sqrt(max(errors, default=0.0)))
