"""Every error that this package raises on purpose.

    MagicFaceError                     anything below; `except MagicFaceError` is enough for most callers
    ├── InputError                     what the caller gave cannot be used (also a ValueError)
    │   ├── OptionError                an option outside its range
    │   ├── PromptError                a prompt that is too long for the text encoder, or lacks a concept's word
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
    │   │   └── DeviceMemoryError      too little memory on the device, or too little page-locked memory for it
    │   ├── HostMemoryError            too little memory on the host (also a MemoryError)
    │   └── NonFiniteError             a graph produced NaN or infinity
    ├── SessionClosedError             a Session was used after close()
    ├── OtherProcessError              a Session was used in a process forked from its own, or sent to another
    ├── ServiceError                   serving over HTTP; the client raises these too
    │   ├── QueueFullError             the queue of waiting requests is full
    │   ├── DrainingError              the service is shutting down and takes no more work
    │   ├── DeadlineError              a request's deadline passed before its picture was made
    │   ├── UnknownConceptError        no kept concept has that id
    │   ├── ErasedError                a concept was erased while a request used it
    │   ├── EraseError                 something of an erased concept could not be removed
    │   ├── StoreFullError             no room for another kept concept
    │   ├── UnreachableError           the client could not reach the service, or lost it
    │   └── AnswerError                the service answered the client with a problem of another kind
    └── Cancelled                      the progress callback returned False

Each message names the thing and what was found, and says what was expected or what to do, where that can be known.
"""

from __future__ import annotations

__all__ = [
    "AnswerError",
    "BackendError",
    "BackendMissingError",
    "BudgetError",
    "BuildError",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "ConceptError",
    "DeadlineError",
    "DeviceError",
    "DeviceMemoryError",
    "DrainingError",
    "EngineError",
    "EraseError",
    "ErasedError",
    "ExportError",
    "GateError",
    "HostMemoryError",
    "ImageError",
    "InputError",
    "JobError",
    "KeptConceptError",
    "MagicFaceError",
    "MaskError",
    "NonFiniteError",
    "OptionError",
    "OtherProcessError",
    "OutputError",
    "ParityError",
    "PlanError",
    "PromptError",
    "QueueFullError",
    "RecordingError",
    "ServiceError",
    "SessionClosedError",
    "StoreError",
    "StoreFullError",
    "TargetError",
    "UnknownConceptError",
    "UnreachableError",
]


class MagicFaceError(Exception):
    """Base class of all errors that this package raises on purpose.

    `exit_code` is what the command line returns for it: 1 if what was checked or computed is wrong (a check, an export
    or a build that failed, numbers that are not finite); 2 if the input cannot be used or a place cannot be written to;
    3 if it cannot be computed here (no runtime or extra, a device or runtime that fails, too little memory); 130 if it
    was interrupted. Unforeseen errors outside this family exit with 1 as well.
    """

    exit_code = 2


class InputError(MagicFaceError, ValueError):
    """The caller's input cannot be used."""


class OptionError(InputError):
    """An option is outside its range."""


class PromptError(InputError):
    """A prompt is too long for the text encoder, or does not contain the word that was looked for."""


class ConceptError(InputError):
    """A concept cannot be placed: its weight, its tokens, or the number of concepts."""


class KeptConceptError(InputError):
    """A kept concept is of another bundle, schedule, number of steps or format, or its file is damaged."""


class BudgetError(InputError):
    """The memory allowed for the reference keys is too little for the request."""


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


class DeviceMemoryError(DeviceError):
    """Too little memory is free on the device, or too little of the host's can be page-locked for it."""


class HostMemoryError(BackendError, MemoryError):
    """The host has too little memory, or this process may use too little of it; see `process/host_memory.py`."""


class NonFiniteError(BackendError):
    """A graph produced NaN or infinity; the message names the graph and the output."""

    exit_code = 1


class SessionClosedError(MagicFaceError):
    """A Session was used after close()."""


class OtherProcessError(MagicFaceError):
    """A Session was used in a process forked from its own, or an attempt was made to send it to another process."""


class Cancelled(MagicFaceError):  # noqa: N818 - it is an outcome the caller asked for, not a fault
    """The progress callback returned False. The session stays usable."""

    exit_code = 130


class ServiceError(MagicFaceError):
    """Serving failed, or a request to a service failed.

    status       HTTP status, 0 where there was no answer
    kind         names the problem, such as `queue-full`
    field        the part of the request at fault, such as `concepts[0].weight`; None if no part is
    retry_after  seconds after which the same request may succeed; None where that is not known
    """

    status = 500
    kind = "service-error"

    def __init__(self, message: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after = retry_after


class QueueFullError(ServiceError):
    """The queue of waiting requests is full. The same request may succeed after `retry_after` seconds."""

    status = 429
    kind = "queue-full"


class DrainingError(ServiceError):
    """The service is shutting down and takes no more work; another instance may."""

    status = 503
    kind = "draining"


class DeadlineError(ServiceError):
    """The request's deadline passed before its picture was made; it stopped at its next step."""

    status = 504
    kind = "deadline-passed"


class UnknownConceptError(ServiceError):
    """No kept concept has that id."""

    status = 404
    kind = "concept-not-found"


class ErasedError(ServiceError):
    """A concept was erased while the request that used it waited or ran; no picture was returned."""

    status = 410
    kind = "concept-erased"


class EraseError(ServiceError):
    """Something of an erased concept could not be removed; the message says what, and erasing may be tried again."""

    status = 500
    kind = "erase-incomplete"


class StoreFullError(ServiceError):
    """There is no room for another kept concept."""

    status = 507
    kind = "store-full"


class UnreachableError(ServiceError):
    """The client could not reach the service, or the connection broke before the answer was complete."""

    status = 0
    kind = "unreachable"


class AnswerError(ServiceError):
    """The service answered with a problem that has no class of its own; `status` and `kind` are the answer's."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        kind: str = "service-error",
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, field=field, retry_after=retry_after)
        self.status = status
        self.kind = kind
