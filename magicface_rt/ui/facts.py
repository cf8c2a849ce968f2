"""What the page knows about the service before any picture is requested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..serve.settings import ServeSettings

__all__ = ["Facts"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The bundle, and the limits for the page's controls.

    name           of the bundle's folder; the path to it is not shown
    backend        what makes the pictures, in words
    concepts       the most in a picture; the page gives each one photograph
    steps          the most of a request
    default_steps  steps that the page's slider starts at
    body_bytes     the most bytes of a request's body
    pixels         the most of one photograph; larger ones are not drawn in the browser either
    protected      whether callers need a token
    """

    name: str
    hash: str
    architecture: str
    dtype: str
    height: int
    width: int
    backend: str
    concepts: int
    steps: int
    default_steps: int
    body_bytes: int
    pixels: int
    protected: bool = False

    @classmethod
    def of(cls, bundle: Bundle, settings: ServeSettings, *, backend: str, protected: bool = False) -> Facts:
        """Collect the facts of a service that makes pictures from this bundle."""
        return cls(
            name=Path(bundle.path).resolve().name,
            hash=bundle.hash,
            architecture=bundle.architecture,
            dtype=bundle.dtype,
            height=bundle.height,
            width=bundle.width,
            backend=backend,
            concepts=min(bundle.limits.concepts, bundle.limits.references),
            steps=settings.steps,
            default_steps=settings.default_steps,
            body_bytes=settings.body_bytes,
            pixels=settings.pixels,
            protected=protected,
        )
