"""What kept keys were made for, and the key that identifies their content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from ..backends.host import BFLOAT16
from ..bundle import Bundle, reference_tensor_names
from ..errors import KeptConceptError
from ..images import LoadedReference
from ..values.shown import shown

DTYPES = ("float32", "float16", BFLOAT16)
MAX_LAYERS = 16
MAX_STEPS = 1000
"""The most layers there are, and the most steps that `Options` takes. A file with more would take hours to read."""


@dataclass(frozen=True)
class Origin:
    """What keys were made for: one bundle, schedule, number of steps and noise. They serve no other requests.

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
        """Return the origin that a request to this bundle needs.

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
        """The number of steps, T."""
        return len(self.timesteps)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(factor, C) of every kept tensor, by the name of its input of `denoise_step`."""
        return {name: (factor, width) for index, factor, width in self.layers for name in reference_tensor_names(index)}

    @property
    def factors(self) -> tuple[int, ...]:
        """The factors of the injection layers' grids, finest grid first."""
        return tuple(sorted({factor for _, factor, _ in self.layers}))

    def to_dict(self) -> dict[str, Any]:
        """Return the origin, as JSON can hold it; `from_dict` reads it back as an equal one."""
        return {**asdict(self), "layers": [list(layer) for layer in self.layers], "timesteps": list(self.timesteps)}

    @classmethod
    def from_dict(cls, data: object) -> Origin:
        """Make an origin from parsed JSON.

        Raises:
            ValueError: it is not an origin; the message names the entry.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise ValueError(f"origin is {shown(data)}, expected an object with {', '.join(sorted(names))}")
        dtype, layers, scheduler = text_entry(data, "dtype"), data["layers"], data["scheduler"]
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if not isinstance(layers, list) or not layers or any(len(whole_numbers(x, "layers")) != 3 for x in layers):
            raise ValueError(f"layers is {shown(layers)}, expected a list of [index, factor, width]")
        if len(layers) > MAX_LAYERS:
            raise ValueError(f"layers has {len(layers)} entries, expected at most {MAX_LAYERS}")
        if any(factor < 1 or width < 1 for _, factor, width in layers):
            raise ValueError("layers has a factor or a width of 0, expected whole numbers from 1")
        if any(later[0] <= layer[0] for layer, later in pairwise(layers)):
            raise ValueError("layers has an index that is not above the one before it, expected them rising")
        if not isinstance(scheduler, dict) or not all(_is_setting(value) for value in scheduler.values()):
            raise ValueError(f"scheduler is {shown(scheduler)}, expected an object of texts, numbers, true or false")
        timesteps = whole_numbers(data["timesteps"], "timesteps")
        if not timesteps:
            raise ValueError("timesteps is empty, expected one for each step")
        if len(timesteps) > MAX_STEPS:
            raise ValueError(f"timesteps has {len(timesteps)} entries, expected at most {MAX_STEPS}")
        return cls(
            bundle_hash=text_entry(data, "bundle_hash"),
            architecture=text_entry(data, "architecture"),
            dtype=dtype,
            height=whole_number(data["height"], "height", 1),
            width=whole_number(data["width"], "width", 1),
            layers=tuple((index, factor, width) for index, factor, width in layers),
            scheduler=scheduler,
            timesteps=tuple(timesteps),
            reference_seed=whole_number(data["reference_seed"], "reference_seed"),
        )

    def check(self, wanted: Origin, name: str) -> None:
        """Raise KeptConceptError, naming the difference, if keys of this origin do not serve the wanted one."""
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
    """Return a SHA-256 of all that a reference's keys depend on: its pixels and mask as used, not their files."""
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


# ---------------------------------------------------------------------------------------------- what JSON may hold


def whole_number(value: object, name: str, least: int = 0) -> int:
    """Return `value` if it is a whole number from `least` to 2**64 - 1, unlike true or 1.0; else raise ValueError."""
    if type(value) is not int or not least <= value < 2**64:
        raise ValueError(f"{name} is {shown(value)}, expected a whole number from {least}")
    return value


def whole_numbers(value: object, name: str, least: int = 0) -> list[int]:
    """Return `value` if it is a list of whole numbers, as `whole_number`; else raise ValueError."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {shown(value)}, expected a list of whole numbers")
    return [whole_number(entry, name, least) for entry in value]


def finite_number(value: object, name: str) -> float:
    """Return `value` as a float if it is a finite number of at least 0; else raise ValueError."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e308:
        raise ValueError(f"{name} is {shown(value)}, expected a number from 0")
    return float(value)


def text_entry(data: Mapping[str, object], name: str) -> str:
    """Return the entry of that name if it is a text; else raise ValueError."""
    value = data.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}, expected text")
    return value


def _is_setting(value: object) -> bool:
    """Whether `Schedule.to_config` may hold the value."""
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
