"""Deployment SDK for MagicFace: pictures of people from a prompt and masked reference images, without training.

    from magicface_rt import Concept, Reference, Session

    with Session("bundles/sd15-512") as session:
        man = Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man"), weight=2.5)
        result = session.generate("a man in the rain", [man], seed=7)
        result.images[0].save("out.png")

Importing this package loads no torch, diffusers, transformers or onnx. Its other dependencies are loaded when the first
name is accessed, so that the command line can start, and report it, where there is too little memory to load them.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which is not imported just for this
if TYPE_CHECKING:
    from ._public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        public = import_module(f"{__name__}._public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, getattr(public, name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
