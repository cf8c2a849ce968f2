"""Kept concepts: a reference's keys and values, computed once for all steps and used for every later picture.

Their form and that of their files are described in docs/kept-concepts.md.
"""

from __future__ import annotations

from .concept import KeptConcept
from .memory import MemoryMode, MemoryPlan, MemoryUse
from .origin import Origin
from .reference import KeptReference, Storage

__all__ = ["KeptConcept", "KeptReference", "MemoryMode", "MemoryPlan", "MemoryUse", "Origin", "Storage"]
