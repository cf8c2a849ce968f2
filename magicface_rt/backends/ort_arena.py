"""One arena per process, for the working memory of all graphs that ONNX Runtime runs on the CPU.

By default each graph keeps an arena of its own and plans a block of it for every shape that it has seen. A request runs
its graphs one after the other, so most arenas lie idle: at full size, in fp32 with three kept concepts, 9.4 GB at the
peak, against 5.8 GB with one arena and no such plans (docs/design.md, "On the device").
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from typing import Any

import numpy as np

from ..process.interrupts import reraise_if_interrupt
from .sum_model import sum_model

logger = logging.getLogger("magicface_rt.onnxruntime")
_registering = threading.Lock()
_usable: bool | None = None  # None: not tried yet


def _leave_to_parent() -> None:
    """Replace the lock in a forked process: a thread that held it does not exist there and would never release it.

    The same goes for the arena's own lock, inside ONNX Runtime, so graphs do without an arena that the parent has used.
    """
    global _registering, _usable
    if _usable is not None or _registering.locked():
        _usable = False
    _registering = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def registering() -> threading.Lock:
    """Return the lock to hold while something is registered with ONNX Runtime for the whole process."""
    return _registering


def use_shared_arena(ort: Any, options: Any) -> None:
    """Set the options of a session on the CPU so that its tensors lie in the arena, but not its weights."""
    global _usable
    with registering():
        if _usable is None:
            try:
                kind, memory = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
                ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, memory), None)
                # The arena never gives back its first block, so that has to be a small one.
                _run_in_arena(ort, ort.RunOptions())
                _usable = True
            except Exception as error:
                reraise_if_interrupt(error)
                logger.warning("graphs on the CPU have arenas of their own, and take more memory: %s", error)
                _usable = False
    if _usable:
        _set(options)


def give_back(ort: Any) -> None:
    """Return to the system the memory that no graph uses now. Graphs may run meanwhile."""
    if _usable:
        shrinking = ort.RunOptions()
        shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            _run_in_arena(ort, shrinking)
        except Exception as error:  # where memory is short; what was asked for is done
            reraise_if_interrupt(error)
            logger.warning("memory of graphs that are closed stays with this process: %s", error)
    trim()


def trim() -> None:
    """Return freed weights to the system: glibc would hold on to gigabytes of them. Elsewhere this does nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set(options: Any) -> None:
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Weights come and go with their graph; in the arena they would keep its blocks from being given back.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


def _run_in_arena(ort: Any, run_options: Any) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    _set(options)
    session = ort.InferenceSession(sum_model(), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.ones(1, np.float32)}, run_options)
