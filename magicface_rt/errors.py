"""Every error that this package raises on purpose.

    MagicFaceError                     anything below; `except MagicFaceError` is enough for most callers
    ├── InputError                     what the caller gave cannot be used (also a ValueError)
    │   ├── OptionError                an option outside its range
    │   ├── PromptError                a prompt longer than the text encoder takes; a word that it does not hold
    │   ├── ConceptError               a concept that cannot be placed: weight, token, number of concepts
    │   ├── KeptConceptError           a kept concept of another bundle, schedule or form, or a damaged file of one
    │   ├── BudgetError                too little memory was allowed for the reference keys
    │   ├── ImageError                 an image that cannot be read or used
    │   ├── MaskError                  a mask that is empty, vanishes, or does not fit its image
    │   ├── JobError                   a job file that cannot be read or does not have the expected form
    │   ├── OutputError                an output folder that exists or cannot be written
    │   └── TargetError                an engine target that is not known, or that its flavour cannot build for
    ├── BundleError                    a bundle that is missing, incomplete, changed, or of another format version
    ├── CheckpointError                a checkpoint that cannot be read or is not of a supported architecture
    ├── RecordingError                 a recording (golden case) that cannot be read
    ├── ExportError                    tracing or writing the graphs failed
    │   └── ParityError                an exported graph does not compute what PyTorch computes
    ├── EngineError                    TensorRT plans: making, keeping, finding them
    │   ├── BuildError                 a graph could not be parsed or built
    │   │   └── GateError              a plan was built, but lost its fused attentions or needs too much memory
    │   ├── PlanError                  a plan that is missing, stale, damaged, or made for another GPU
    │   └── StoreError                 an engine store that cannot be read or written
    ├── BackendError                   a runtime failed
    │   ├── BackendMissingError        no usable runtime, or an extra that is not installed
    │   ├── DeviceError                no GPU, too old a driver, too little device memory, a failed CUDA call
    │   └── NonFiniteError             a graph produced NaN or infinity
    ├── SessionClosedError             a Session was used after close()
    └── Cancelled                      the progress callback returned False

Each message names the thing, what was found, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendMissingError",
    "BudgetError",
    "BuildError",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "ConceptError",
    "DeviceError",
    "EngineError",
    "ExportError",
    "GateError",
    "ImageError",
    "InputError",
    "JobError",
    "KeptConceptError",
    "MagicFaceError",
    "MaskError",
    "NonFiniteError",
    "OptionError",
    "OutputError",
    "ParityError",
    "PlanError",
    "PromptError",
    "RecordingError",
    "SessionClosedError",
    "StoreError",
    "TargetError",
]


class MagicFaceError(Exception):
    """Base class of the family.

    `exit_code` is what the command line returns for it: 1 a failed check, 2 bad input, 3 a missing backend.
    """

    exit_code = 2


class InputError(MagicFaceError, ValueError):
    """What the caller gave cannot be used."""


class OptionError(InputError):
    """An option is outside its range."""


class PromptError(InputError):
    """A prompt is too long for the text encoder, or does not hold the word that was looked for."""


class ConceptError(InputError):
    """A concept cannot be placed: its weight, its tokens, or the number of concepts."""


class KeptConceptError(InputError):
    """A kept concept is of another bundle, schedule, number of steps or format, or its file is damaged."""


class BudgetError(InputError):
    """The memory that was allowed for the reference keys is too little for what was asked."""


class ImageError(InputError):
    """An image cannot be read or used."""


class MaskError(InputError):
    """A mask is empty, vanishes at a layer's resolution, or does not fit its image."""


class JobError(InputError):
    """A job file cannot be read or does not have the expected form."""


class OutputError(InputError):
    """An output folder exists already or cannot be written."""


class TargetError(InputError):
    """An engine target is not known, or its flavour cannot build for it."""


class BundleError(MagicFaceError):
    """A bundle is missing, incomplete, changed, or of another format version."""


class CheckpointError(MagicFaceError):
    """A checkpoint cannot be read or is not of a supported architecture."""


class RecordingError(MagicFaceError):
    """A recording cannot be read or does not have the expected form."""


class ExportError(MagicFaceError):
    """Tracing or writing the graphs failed."""

    exit_code = 1


class ParityError(ExportError):
    """An exported graph does not compute what PyTorch computes."""


class EngineError(MagicFaceError):
    """A TensorRT plan could not be made, kept or found."""


class BuildError(EngineError):
    """A graph could not be parsed or built."""

    exit_code = 1


class GateError(BuildError):
    """A plan was built, but an attention was decomposed in it or it needs too much memory; it was not kept."""


class PlanError(EngineError):
    """A plan is missing, stale, damaged, or was made for another GPU."""


class StoreError(EngineError):
    """An engine store cannot be read or written."""


class BackendError(MagicFaceError):
    """A runtime failed."""

    exit_code = 3


class BackendMissingError(BackendError):
    """No usable runtime, or an optional extra that is not installed."""


class DeviceError(BackendError):
    """No GPU, too old a driver, too little device memory, or a CUDA call that failed."""


class NonFiniteError(BackendError):
    """A graph produced NaN or infinity; the message names the graph and the output."""

    exit_code = 1


class SessionClosedError(MagicFaceError):
    """A Session was used after close()."""


class Cancelled(MagicFaceError):  # noqa: N818 - it is an outcome the caller asked for, not a fault
    """The progress callback returned False. The session stays usable."""

    exit_code = 130
