"""Parses byte counts as people write them, such as 4GiB."""

from __future__ import annotations

from magicface_rt.sizes import parse_size

__all__ = ["parse_size"]
