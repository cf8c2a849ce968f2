"""What the quality figures compare: the two-stage method by default, and one setting changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from magicface_rt.backends import BACKENDS
from magicface_rt.errors import OptionError

WEIGHT = 3.0
"""The default weight of `magicface_rt.Concept`."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to make the pictures.

    concepts   whether the references are given at all
    weight     of every concept
    dtype      of the bundle
    backend    None: the first one named on the command line
    options    of `magicface_rt.Options`, besides steps, guidance and seed
    """

    name: str
    label: str
    concepts: bool = True
    weight: float = WEIGHT
    dtype: str = "fp32"
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


DEFAULT, PLAIN, RSA = "two-stage", "plain", "rsa"


def _alpha(value: float, name: str = "", label: str = "") -> Variant:
    return Variant(name=name or f"alpha-{value:g}", label=label or f"alpha {value:g}", options={"alpha": value})


VARIANTS = (
    Variant(name=DEFAULT, label="two-stage: alpha 0.4, weight 3, bias, semantic guidance"),
    Variant(name=PLAIN, label="plain model, no references", concepts=False, options={"semantic_guidance": False}),
    Variant(name="plain-guided", label="plain model with semantic guidance", concepts=False),
    _alpha(1.0, RSA, "RSA only (alpha 1)"),
    _alpha(0.0, "rba", "RBA from the second step (alpha 0)"),
    _alpha(0.2),
    _alpha(0.6),
    _alpha(0.8),
    Variant(name="weight-1", label="weight 1", weight=1.0),
    Variant(name="weight-2", label="weight 2", weight=2.0),
    Variant(name="weight-4", label="weight 4", weight=4.0),
    Variant(name="scale", label="weight 3 as a scale", options={"weight_mode": "scale"}),
    Variant(name="scale-1.5", label="weight 1.5 as a scale", weight=1.5, options={"weight_mode": "scale"}),
    Variant(name="unguided", label="semantic guidance off", options={"semantic_guidance": False}),
    Variant(name="fp16", label="fp16 bundle", dtype="fp16"),
)

EXTRA = (
    Variant(name="ca-scale-0.3", label="tokens of no concept times 0.3", options={"ca_scale": 0.3}),
    Variant(name="ca-scale-0.6", label="tokens of no concept times 0.6", options={"ca_scale": 0.6}),
    Variant(name="ca-scale-1", label="tokens of no concept as they are", options={"ca_scale": 1.0}),
    Variant(name="weight-6", label="weight 6", weight=6.0),
    Variant(name="guidance-1.5", label="guidance 1.5", options={"guidance": 1.5}),
    Variant(name="guidance-7.5", label="guidance 7.5, the authors'", options={"guidance": 7.5}),
)
"""Variants that are made only if they are named."""


def chosen(only: str | None, backends: tuple[str, ...]) -> tuple[Variant, ...]:
    """The variants named in `only` (by default all of `VARIANTS`), and the default one on each further backend.

    Raises OptionError for a name that is not known.
    """
    for name in backends:
        if name not in BACKENDS:
            raise OptionError(f"--backend is {name!r}, expected one of {', '.join(BACKENDS)}.")
    found = VARIANTS
    if only is not None:
        known = {one.name: one for one in (*VARIANTS, *EXTRA)}
        names = [name.strip() for name in only.split(",") if name.strip()]
        for name in names:
            if name not in known:
                raise OptionError(f"--only has {name!r}, expected names of {', '.join(known)}.")
        found = tuple(known[name] for name in dict.fromkeys(names))
    return (
        *found,
        *(
            Variant(name=f"backend-{name}", label=f"two-stage on {name}", backend=name)
            for name in dict.fromkeys(backends[1:])
        ),
    )
