"""What the page knows of the service before anybody asks for a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..serve.settings import ServeSettings

__all__ = ["Facts"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The bundle and the limits that the page's controls have.

    name           of the bundle's folder; the path to it is nobody's business
    backend        what makes the pictures, in words
    concepts       most in a picture; the page gives each one photograph
    steps          most of a request
    body_bytes     most of a request's body
    pixels         most of one photograph; larger ones are not drawn in the browser either
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
        """Of a service that makes pictures from that bundle."""
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
