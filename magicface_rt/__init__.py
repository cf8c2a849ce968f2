"""Deployment SDK for MagicFace: pictures of people from a prompt and masked reference images, without training.

    from magicface_rt import Concept, Reference, Session

    with Session("bundles/sd15-512") as session:
        man = Concept("man", Reference("man.jpg", mask="man-mask.png", prompt="a man"), weight=2.5)
        result = session.generate("a man in the rain", [man], seed=7)
        result.images[0].save("out.png")

Importing this package loads no torch, diffusers, transformers or onnx.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .bundle import Bundle
from .concept import Concept, Reference
from .errors import (
    BackendError,
    BackendMissingError,
    BudgetError,
    BuildError,
    BundleError,
    Cancelled,
    CheckpointError,
    ConceptError,
    DeviceError,
    DeviceMemoryError,
    EngineError,
    ExportError,
    GateError,
    ImageError,
    InputError,
    JobError,
    KeptConceptError,
    MagicFaceError,
    MaskError,
    NonFiniteError,
    OptionError,
    OutputError,
    ParityError,
    PlanError,
    PromptError,
    RecordingError,
    SessionClosedError,
    StoreError,
    TargetError,
)
from .kept import KeptConcept, MemoryPlan
from .options import Options
from .results import Result, Timings
from .session import Progress, Request, Session

try:
    __version__ = version("magicface_rt")
except PackageNotFoundError:  # running from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "BackendError",
    "BackendMissingError",
    "BudgetError",
    "BuildError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "Concept",
    "ConceptError",
    "DeviceError",
    "DeviceMemoryError",
    "EngineError",
    "ExportError",
    "GateError",
    "ImageError",
    "InputError",
    "JobError",
    "KeptConcept",
    "KeptConceptError",
    "MagicFaceError",
    "MaskError",
    "MemoryPlan",
    "NonFiniteError",
    "OptionError",
    "Options",
    "OutputError",
    "ParityError",
    "PlanError",
    "Progress",
    "PromptError",
    "RecordingError",
    "Reference",
    "Request",
    "Result",
    "Session",
    "SessionClosedError",
    "StoreError",
    "TargetError",
    "Timings",
    "__version__",
]
