"""Byte counts as people write them."""

from __future__ import annotations

from magicface_rt.sizes import parse_size

__all__ = ["parse_size"]
