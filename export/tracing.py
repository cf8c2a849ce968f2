"""Trace a graph's module into an ONNX model."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch

from magicface_rt.errors import ExportError
from magicface_rt.process.interrupts import reraise_if_interrupt

from .graphs import Graph
from .operators import OPSET
from .samples import sample_inputs
from .simplification import simplify

TRACE_SIZES = {"B": 2, "R": 2, "K": 3, "M1": 11, "M2": 9, "M4": 7, "M8": 5}
"""Sizes while tracing: 0 and 1 would be taken for constants, and equal sizes for one symbol."""

_LARGEST = {"B": 64, "R": 1024, "K": 64, "M1": 1 << 20, "M2": 1 << 20, "M4": 1 << 20, "M8": 1 << 20}

_LEVELS = dict.fromkeys(("torch.onnx", "onnxscript", "torch.export", "onnx_ir"), logging.ERROR) | {
    # It logs the traceback of errors that it raises as well, among them what it makes of Ctrl-C.
    "torch._subclasses.fake_tensor": logging.CRITICAL,
}

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def torch_inputs(graph: Graph, arrays: Mapping[str, object]) -> tuple[object, ...]:
    """Turn arrays by name into the arguments of the graph's forward, in the contract's dtypes."""
    values = []
    for tensor in graph.inputs:
        value = torch.as_tensor(arrays[tensor.name])
        values.append(value.to(_DTYPES[tensor.dtype]) if tensor.dtype in _DTYPES else value)
    return graph.arguments(values)


def trace(graph: Graph) -> ir.Model:
    """Trace a graph with every symbol of its contract dynamic.

    Raises:
        ExportError: the exporter failed; the message names the graph.
    """
    arrays = sample_inputs(graph.inputs, TRACE_SIZES, seed=0, vocabulary=512)
    symbols = sorted({d for t in graph.inputs for d in t.shape if isinstance(d, str)})
    dims = {s: torch.export.Dim(s, min=1, max=_LARGEST[s]) for s in symbols}
    shapes = [{i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} for t in graph.inputs]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                torch_inputs(graph, arrays),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=graph.arguments(shapes),
                input_names=[t.name for t in graph.inputs],
                output_names=[t.name for t in graph.outputs],
                optimize=False,  # simplify() does, and tries fewer rules
                verbose=False,
            )
            assert program is not None
            simplify(program.model)
    except Exception as error:
        reraise_if_interrupt(error)
        cause = error.__cause__ or error  # the exporter wraps what really went wrong
        reason = (str(cause).strip().splitlines() or [""])[0]
        raise ExportError(f"graph {graph.name}: tracing failed: {type(cause).__name__}: {reason}") from error
    model = program.model
    _restore_names(graph, model)
    return model


def _restore_names(graph: Graph, model: ir.Model) -> None:
    """Check that the traced model has exactly the contract's inputs, and write the contract's symbols into it."""
    found = {value.name: value for value in model.graph.inputs}
    names = [t.name for t in graph.inputs]
    if sorted(found) != sorted(names):
        raise ExportError(f"graph {graph.name}: traced inputs are {sorted(found)}, expected {sorted(names)}")
    outputs = [value.name for value in model.graph.outputs]
    if outputs != [t.name for t in graph.outputs]:
        raise ExportError(f"graph {graph.name}: traced outputs are {outputs}")
    for tensor, value in [
        *((t, found[t.name]) for t in graph.inputs),
        *zip(graph.outputs, model.graph.outputs, strict=True),
    ]:
        value.shape = ir.Shape(tensor.shape)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about itself; what matters is compared afterwards."""
    levels = {logging.getLogger(name): level for name, level in _LEVELS.items()}
    before = {logger: logger.level for logger in levels}
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
