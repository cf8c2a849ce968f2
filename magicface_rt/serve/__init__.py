"""Serve a Session over HTTP, and the client for such a service.

    from magicface_rt.serve import Client

    with Client("http://127.0.0.1:8000") as client:
        man = client.put_concept(Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man")), steps=20)
        made = client.generate("a man in the rain", [man.use(weight=2.5)], seed=7)
        made.images[0].save("out.png")

The client's side is `client`, `wire` and `answers`; every other module is the server's. The client needs httpx, the
server the whole extra `serve`; each is imported on first use. What the service promises: docs/serving.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import BackendMissingError

if TYPE_CHECKING:
    from .app import build_app
    from .client import AsyncClient, Client
    from .concepts import ConceptStore, FolderConcepts, MemoryConcepts
    from .engine import Engine
    from .local import LocalService
    from .server import serve
    from .service import Service
    from .settings import ServeSettings
    from .wire import KeptId, Made, Warned

__all__ = [
    "AsyncClient",
    "Client",
    "ConceptStore",
    "Engine",
    "FolderConcepts",
    "KeptId",
    "LocalService",
    "Made",
    "MemoryConcepts",
    "ServeSettings",
    "Service",
    "Warned",
    "build_app",
    "serve",
]

_WHERE = {
    "AsyncClient": "client",
    "Client": "client",
    "ConceptStore": "concepts",
    "Engine": "engine",
    "FolderConcepts": "concepts",
    "KeptId": "wire",
    "LocalService": "local",
    "Made": "wire",
    "MemoryConcepts": "concepts",
    "ServeSettings": "settings",
    "Service": "service",
    "Warned": "wire",
    "build_app": "app",
    "serve": "server",
}


def module(name: str) -> Any:
    """Import a module of this package.

    Raises:
        BackendMissingError: the extra is not installed.
    """
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("magicface_rt"):
            raise
        on_ray = (error.name or "").partition(".")[0] == "ray"
        what, extras = ("serving on Ray", "serve,ray") if on_ray else ("serving", "serve")
        raise BackendMissingError(
            f"{what} needs the extra {extras.rpartition(',')[2]}, which is not installed or not whole ({error}). "
            f"Install it: pip install 'magicface_rt[{extras}]'"
        ) from error


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module(_WHERE[name]), name)
