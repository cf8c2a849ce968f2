"""What a Session still holds of an erased concept, and getting rid of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kept import KeptConcept
from ..session import Session

__all__ = ["Trace", "scrub"]

_HOLD_REFERENCES = ("vae_encoder", "reference_kv", "denoise_step")
"""Graphs whose bindings hold pixels, latents or keys of the last references that went through them."""


class Trace:
    """Watches the memory of a concept's keys without holding it.

    keys: content keys of its references.
    """

    def __init__(self, concept: KeptConcept) -> None:
        self.keys = tuple(reference.key for reference in concept.references)
        owners = [
            _owner(array)
            for reference in concept.references
            for stored in reference.tensors.values()
            for array in stored.arrays.values()
        ]
        self._arrays = [weakref.ref(owner) for owner in {id(owner): owner for owner in owners}.values()]

    def alive(self) -> int:
        """How many of its arrays, or of the maps of its file, are still in memory."""
        if any(ref() is not None for ref in self._arrays):
            gc.collect()  # an error that was raised may hold frames, and these the concept
        return sum(ref() is not None for ref in self._arrays)


def scrub(sessions: Sequence[Session], trace: Trace) -> str | None:
    """Remove a concept from Sessions while none of their workers runs. Returns where one has it still, in words.

    What a Session keeps by itself is dropped as a whole; it comes back from the store of concepts, or is prepared
    again. Bindings are dropped because they hold the keys of the last step that ran; graphs stay loaded.
    """
    for session in sessions:
        keeper = session._keeper
        keeper.store.forget()
        keeper.on_device.free_unused()
        for graph in _HOLD_REFERENCES:
            session._workplaces.drop(graph)
    for session in sessions:
        keeper = session._keeper
        if set(trace.keys) & set(keeper.store.keys):
            return "a Session's store"
        if any(keeper.on_device.holds(key) for key in trace.keys):
            return "device memory"
    return None


def _owner(array: np.ndarray[Any, Any]) -> Any:
    """The array whose memory a view looks into; of a mapped file, the map."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
