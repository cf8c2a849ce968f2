"""The settings of one request, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from .errors import OptionError, PromptError
from .values.plain_numbers import as_float
from .values.plain_words import one_of
from .values.shown import shown

__all__ = ["Options", "WeightMode"]

WeightMode = Literal["bias", "scale"]

_WEIGHT_MODES = ("bias", "scale")
_SEEDS = (0, 2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a picture is made.

        Options()                          what the method's authors use
        Options(steps=20, guidance=5.0)    fewer steps, weaker guidance
        Options(alpha=1.0)                 first stage only: every place may look at every reference
        Options(alpha=0.0)                 regions from the second step on
        Options(seed=7, images=4)          four pictures; picture k is the same whatever `images` is

    negative_prompt    what the picture should not show
    steps              1..1000; denoising steps
    guidance           above 0, up to 1000; strength of the prompt. At 1 the negative prompt has no effect on average
    alpha              0..1; the part of the steps spent in the first stage (RSA), before regions are separated (RBA)
    ca_scale           above 0, up to 2; how tokens of no concept compete for regions. None: see
                       `effective_ca_scale`. Below 0.9 concepts are kept to the foreground
    weight_mode        "bias": a concept's weight is added to logits; "scale": it multiplies them
    semantic_guidance  balance the guidance between regions
    seed               0..2**64-1; noise of the pictures
    images             1..1024; pictures to make
    reference_seed     0..2**64-1; noise put on the references

    Raises `OptionError`, naming the field, for a value of the wrong kind or out of range; `PromptError` for a negative
    prompt that is not text.
    """

    negative_prompt: str = ""
    steps: int = 50
    guidance: float = 7.5
    alpha: float = 0.4
    ca_scale: float | None = None
    weight_mode: WeightMode = "bias"
    semantic_guidance: bool = True
    seed: int = 0
    images: int = 1
    reference_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.negative_prompt, str):
            raise PromptError(f"negative_prompt is {self.negative_prompt!r}, expected text (it may be empty).")
        if not one_of(self.weight_mode, _WEIGHT_MODES):
            raise OptionError(f"weight_mode is {shown(self.weight_mode)}, expected 'bias' or 'scale'.")
        if not isinstance(self.semantic_guidance, (bool, np.bool_)):
            raise OptionError(f"semantic_guidance is {self.semantic_guidance!r}, expected True or False.")
        self._set("semantic_guidance", bool(self.semantic_guidance))
        self._whole("steps", 1, 1000)
        self._whole("images", 1, 1024)
        self._whole("seed", *_SEEDS)
        self._whole("reference_seed", *_SEEDS)
        self._number("alpha", 0.0, 1.0)
        self._number("guidance", 0.0, 1000.0, above=True)
        if self.ca_scale is not None:
            self._number("ca_scale", 0.0, 2.0, above=True)

    def effective_ca_scale(self, n_concepts: int) -> float:
        """`ca_scale`, or, if it is None, the authors' choice: 0.9 for one concept (or none), 0.6 for more."""
        if self.ca_scale is not None:
            return self.ca_scale
        return 0.9 if n_concepts <= 1 else 0.6

    @classmethod
    def of(cls, options: Options | None, settings: Mapping[str, Any]) -> Options:
        """Return `options`, or the defaults, with the given settings replaced.

        Raises:
            OptionError: `options` is not an `Options` object, or a setting is not known.
        """
        if options is not None and not isinstance(options, Options):
            raise OptionError(f"options is {options!r}, expected an Options object; or give settings by name.")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f" Is {near[0]} meant?" if near else f" There are {', '.join(known)}."
                raise OptionError(f"setting {name!r} is not known.{hint}")
        return cls(**{**(options.to_dict() if options is not None else {}), **settings})

    def to_dict(self) -> dict[str, Any]:
        """Return every setting by name, as JSON can hold it; `Options(**options.to_dict())` gives an equal object."""
        return asdict(self)

    def _whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            limit = "2**64-1" if high == _SEEDS[1] else high
            raise OptionError(f"{name} is {shown(value)}, expected a whole number from {low} to {limit}.")
        self._set(name, int(value))

    def _number(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not number or not low <= value <= high or (above and value == low) or not math.isfinite(value):
            start = f"above {low:g}, up to {high:g}" if above else f"from {low:g} to {high:g}"
            raise OptionError(f"{name} is {shown(value)}, expected a finite number {start}.")
        self._set(name, as_float(value))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
