"""Kept concepts: a reference's keys and values, computed once for all steps and used for every picture after.

What they are and the form of their files: docs/kept-concepts.md.
"""

from __future__ import annotations

from .concept import KeptConcept
from .memory import MemoryMode, MemoryPlan, MemoryUse
from .origin import Origin
from .reference import KeptReference, Storage

__all__ = ["KeptConcept", "KeptReference", "MemoryMode", "MemoryPlan", "MemoryUse", "Origin", "Storage"]
