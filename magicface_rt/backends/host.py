"""How tensors look on the host. numpy has no bfloat16: such a tensor is held as its 16 bits, in a uint16 array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = "bfloat16"


def host_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds a contract's dtype."""
    return np.dtype(np.uint16) if dtype == BFLOAT16 else np.dtype(dtype)


def holds(array: NDArray[Any], dtype: str) -> bool:
    """Whether an array is of a contract's dtype; for bfloat16, also an array of ml_dtypes' type."""
    return array.dtype.name == dtype or array.dtype == host_dtype(dtype)


def from_bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Convert bfloat16 bits to float32, exactly: they become the upper half."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(array: NDArray[Any]) -> NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def to_contract_dtype(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Convert an array of numbers to a tensor of a contract's dtype."""
    return to_bfloat16(array) if dtype == BFLOAT16 else array.astype(dtype, copy=False)


def non_finite(array: NDArray[Any], dtype: str) -> int:
    """Count the values that are NaN or infinite; 0 for a dtype that has none."""
    if dtype == BFLOAT16:
        return int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    if array.dtype.kind != "f":
        return 0
    return int(array.size - np.isfinite(array).sum())
