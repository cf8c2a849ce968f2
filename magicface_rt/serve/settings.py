"""What a server allows, and how it divides its time among requests."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import OptionError

__all__ = ["ServeSettings"]

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of a service.

    queue           requests that may wait; one more is answered 429
    batch           the most pictures made together, of requests with the same number of steps; 1 for no batches
    batch_wait      seconds that a request waits for others to be made together with, counted from its arrival
    deadline        the most seconds that a request may take, and the default for requests that give no deadline
    drain           seconds that requests have left when the service is told to end
    body_bytes      bytes of one request's body
    bodies_bytes    bytes of all bodies that are being read or used; over that, 503
    body_seconds    seconds within which a body must have arrived; over that, 408
    pixels          pixels of one uploaded image, read from its header before it is decoded
    held_pixels     pixels of all decoded images of requests that wait or run; over that, 429
    decoders        threads that decode uploads, and as many that encode pictures
    steps           the most denoising steps of a request
    default_steps   steps of a request that has no kept concept and does not give them
    images          the most pictures of a request
    concepts        the most kept concepts
    concept_bytes   the most bytes of all kept concepts

    Raises OptionError, naming the setting, for what cannot be used.
    """

    queue: int = 32
    batch: int = 4
    batch_wait: float = 0.02
    deadline: float = 600.0
    drain: float = 60.0
    body_bytes: int = 32 * MIB
    bodies_bytes: int = 256 * MIB
    body_seconds: float = 60.0
    pixels: int = 16_000_000
    held_pixels: int = 256_000_000
    decoders: int = 2
    steps: int = 150
    default_steps: int = 50
    images: int = 4
    concepts: int = 1000
    concept_bytes: int = 8192 * MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("batch_wait", "drain", "concepts", "concept_bytes") else 1
            if isinstance(field.default, float):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not number or not math.isfinite(value) or value < 0 or (value == 0 and least):
                    raise OptionError(f"{field.name} is {value!r}, expected seconds, {'above' if least else 'from'} 0.")
            elif isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{field.name} is {value!r}, expected a whole number from {least}.")
        if self.body_bytes > self.bodies_bytes:
            raise OptionError(
                f"body_bytes is {self.body_bytes:,}, more than the {self.bodies_bytes:,} of bodies_bytes, which all "
                "bodies share; no such body could come in."
            )
        if self.default_steps > self.steps:
            raise OptionError(
                f"default_steps is {self.default_steps}, more than the {self.steps} steps that a request may have."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, as JSON can hold them."""
        return asdict(self)
