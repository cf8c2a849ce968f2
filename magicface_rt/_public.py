"""The package's public names; the package imports this module when the first of them is accessed."""

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
