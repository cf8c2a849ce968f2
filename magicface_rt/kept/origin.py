"""What kept keys were made for, and what names their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..bundle import Bundle
from ..errors import KeptConceptError
from ..images import LoadedReference


@dataclass(frozen=True)
class Origin:
    """Keys are good for requests of the same origin only: one bundle, one schedule and number of steps, one noise.

    layers: (index, factor, width) of the injection layers; scheduler: `Schedule.to_config`.
    """

    bundle_hash: str
    architecture: str
    dtype: str
    height: int
    width: int
    layers: tuple[tuple[int, int, int], ...]
    scheduler: Mapping[str, Any]
    timesteps: tuple[int, ...]
    reference_seed: int

    @classmethod
    def of(cls, bundle: Bundle, steps: int, reference_seed: int) -> Origin:
        """What a request of that bundle needs.

        Raises:
            OptionError: the schedule cannot make so many steps.
        """
        return cls(
            bundle.hash,
            bundle.architecture,
            bundle.dtype,
            bundle.height,
            bundle.width,
            tuple((layer.index, layer.factor, layer.width) for layer in bundle.injection_layers),
            bundle.schedule.to_config(),
            tuple(int(t) for t in bundle.schedule.timesteps(steps)),
            reference_seed,
        )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.timesteps)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(factor, C) of every kept tensor, by its name as input of `denoise_step`."""
        return {f"{kind}_ref_{index}": (factor, width) for index, factor, width in self.layers for kind in "kv"}

    @property
    def factors(self) -> tuple[int, ...]:
        """Grids of the injection layers, finest first."""
        return tuple(sorted({factor for _, factor, _ in self.layers}))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` reads it back to an equal one."""
        return {**asdict(self), "layers": [list(layer) for layer in self.layers], "timesteps": list(self.timesteps)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """Raises KeyError, TypeError or ValueError for what is no origin."""
        return cls(
            **{
                **data,
                "layers": tuple((int(i), int(f), int(w)) for i, f, w in data["layers"]),
                "timesteps": tuple(int(t) for t in data["timesteps"]),
            }
        )

    def check(self, wanted: Origin, name: str) -> None:
        """Raises KeptConceptError, saying by what, where keys of this origin are not good for the wanted one."""
        again = f"Prepare it again: magicface-rt prepare, or session.prepare(concept, steps={wanted.steps})."
        if self.bundle_hash != wanted.bundle_hash:
            raise KeptConceptError(
                f"kept concept {name!r} is of the bundle {self.bundle_hash[:16]}... ({self.architecture}, "
                f"{self.height} x {self.width} px, {self.dtype}), and this is {wanted.bundle_hash[:16]}... "
                f"({wanted.architecture}, {wanted.height} x {wanted.width} px, {wanted.dtype}). {again}"
            )
        if self.steps != wanted.steps:
            raise KeptConceptError(
                f"kept concept {name!r} is for {self.steps} steps, and the request has {wanted.steps}. Ask for "
                f"steps={self.steps}, or prepare it again with steps={wanted.steps}."
            )
        if self.scheduler != wanted.scheduler or self.timesteps != wanted.timesteps:
            different = sorted(
                key
                for key in {*self.scheduler, *wanted.scheduler}
                if self.scheduler.get(key) != wanted.scheduler.get(key)
            )
            raise KeptConceptError(
                f"kept concept {name!r} is of another schedule ({', '.join(different) or 'timesteps'} differ). {again}"
            )
        if self.reference_seed != wanted.reference_seed:
            raise KeptConceptError(
                f"kept concept {name!r} has the noise of reference_seed {self.reference_seed}, and the request asks "
                f"for {wanted.reference_seed}. Ask for reference_seed={self.reference_seed}, or prepare it again."
            )
        if self != wanted:
            raise KeptConceptError(f"kept concept {name!r} does not fit the bundle it names. {again}")


def content_key(origin: Origin, loaded: LoadedReference, prompt: str, storage: str) -> str:
    """A SHA-256 over all that a reference's keys depend on: its pixels and mask as they are used, not their files."""
    pixels = loaded.pixels(origin.height, origin.width)
    parts = {
        "origin": origin.to_dict(),
        "storage": storage,
        "prompt": prompt,
        "pixels": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "mask": hashlib.sha256(loaded.mask_grid.tobytes()).hexdigest(),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
