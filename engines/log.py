"""Pass TensorRT's messages to Python's logging, and a build's progress to a progress bar."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

LOGGER = logging.getLogger("magicface_rt.tensorrt")

_NOISE = (
    # Every inlined call of a function repeats the names of its nodes; the layers' metadata tells them apart.
    "already exists, the output tensors of this new instance will not be queryable",
    "Make sure input",
    "Make sure output",
)
_KEPT_ERRORS = 8
_SHOWN_ERRORS = 3


class ErrorRecord:
    """The last error messages of a library that reports a failure without its reason."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def add_error(self, message: str) -> None:
        self.errors = [*self.errors, message][-_KEPT_ERRORS:]

    def clear_errors(self) -> None:
        """Forget the errors so far, which are not about what is done next."""
        self.errors = []

    def reason(self) -> str:
        """Return a sentence with the last errors since `clear_errors`, for an error message."""
        if not self.errors:
            return f"It gave no reason; set the log level of {LOGGER.name} to DEBUG."
        return "It said: " + " | ".join(self.errors[-_SHOWN_ERRORS:])


def trt_logger(trt: Any) -> Any:
    """Return an ILogger of a flavour that writes to LOGGER, and is an `ErrorRecord`."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.CRITICAL,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
        trt.ILogger.INFO: logging.INFO,
        trt.ILogger.VERBOSE: logging.DEBUG,
    }

    class PythonLogger(trt.ILogger, ErrorRecord):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            ErrorRecord.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.INFO)
            if level >= logging.ERROR:
                self.add_error(message)
                level = logging.DEBUG  # the caller sees it as an exception
            elif any(part in message for part in _NOISE):
                level = logging.DEBUG
            LOGGER.log(level, "%s", message)

    return PythonLogger()


Advance = Callable[[str, int, int], object]
"""Called with a phase's name, the steps done, and its number of steps; returning False cancels the build."""


def progress_monitor(trt: Any, advance: Advance) -> Any:
    """Return an IProgressMonitor that reports the outermost phases. TensorRT calls it from threads of its own."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._steps: dict[str, int] = {}
            self.cancelled = False
            self.failure: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                with self._lock:
                    self._steps[phase_name] = num_steps
                self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                steps = self._steps.get(phase_name)
            if steps is not None:
                self._tell(phase_name, steps)

        def _tell(self, phase: str, done: int) -> bool:
            with self._lock:
                steps = self._steps.get(phase)
            if self.cancelled:
                return False
            if steps is None:
                return True
            try:
                self.cancelled = advance(phase, done, steps) is False
            except BaseException as error:  # raised again by the builder: it must not pass through C++
                self.failure, self.cancelled = error, True
            return not self.cancelled

    return Monitor()
