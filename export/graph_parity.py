"""Compare the graphs of a bundle with their PyTorch modules, as is done for every graph at the end of an export.

The module runs in float32, with the weights as the bundle holds them; the graph runs on ONNX Runtime's CPU provider.
For 16-bit bundles the yardstick is measured, not chosen: how far the same PyTorch module's outputs move on the same
inputs when the output of each of its layers is rounded to 16 bits. A graph passes within twice that distance (plus
float32's own).
PyTorch's own 16-bit kernels are not the yardstick, because on a CPU they take minutes where float32 takes seconds.
A bfloat16 graph is compared in float32 arithmetic, with the tolerance of 16 bits all the same: the constants in the
file are rounded to bfloat16 (quick GELU's 1.702 is 1.703 there, which moves the text embeddings by 8e-4).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from magicface_rt.backends import Backend, GraphRunner, OnnxRuntime
from magicface_rt.backends.base import Arrays
from magicface_rt.backends.checks import ShapeRanges
from magicface_rt.backends.host import BFLOAT16, from_bfloat16, to_contract_dtype
from magicface_rt.bundle import Bundle
from magicface_rt.errors import BackendError, NonFiniteError, OutputError, ParityError
from magicface_rt.files import atomic_files
from magicface_rt.process.interrupts import reraise_if_interrupt

from .graphs import DenoiseStep, Graph
from .guidance import SemanticGuidance
from .replay import NEAR_TIE, relative_error
from .samples import sample_inputs
from .tracing import torch_inputs
from .widened import widen

CPU = "onnxruntime-cpu"
IN_FLOAT32 = "compared in float32 arithmetic: ONNX Runtime's CPU provider has no bfloat16 kernels"

FLOAT32_TOLERANCE = 5e-5
"""Relative 2-norm. 1e-6 to 6e-6 was seen between float32 PyTorch and float32 ONNX Runtime on the recorded models."""

MOST_ALLOWED = 0.1
"""Upper bound of a tolerance, whatever 16 bits cost: weights that lose more in 16 bits must not be served in them."""

SAME_STEP_TOLERANCE = 1e-5
"""For guidance and the DDIM step, recomputed from the graph's own predictions and labels."""

PARITY_SIZES = {"B": 3, "R": 3, "K": 1, "M1": 37, "M2": 23, "M4": 13, "M8": 6}
"""Other sizes than the traced ones, so a size that was traced as a constant is noticed."""


@dataclass(frozen=True)
class Expected:
    """A module's outputs on seeded inputs in float32. `floor`: how far rounding to 16 bits moves each of them."""

    graph: str
    inputs: Arrays
    outputs: Arrays
    floor: Mapping[str, float]
    step: SemanticGuidance | None


@dataclass(frozen=True)
class GraphParity:
    """How far a graph is from PyTorch.

    `errors`: relative 2-norm of each output; `note`: what was done differently than for most graphs, and why.
    """

    graph: str
    errors: Mapping[str, float]
    tolerance: Mapping[str, float]
    flipped_cells: int = 0
    near_ties: int = 0
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.failures()

    def summary(self) -> list[str]:
        """A few lines for people."""
        worst = max(self.errors, key=lambda name: self.errors[name] / self.tolerance[name])
        lines = [
            f"  {self.graph:<13} worst {self.errors[worst]:.1e} of {self.tolerance[worst]:.1e} allowed ({worst})"
            + (f"; {self.flipped_cells} labels differ, {self.near_ties} as near-ties" if self.flipped_cells else "")
            + (f"; {self.note}" if self.note else "")
        ]
        return lines + [f"    FAILED {failure}" for failure in self.failures()]

    def failures(self) -> list[str]:
        """What is out of tolerance, in words."""
        found = [
            f"{name}: relative error {error:.2e}, allowed {self.tolerance[name]:.2e}"
            for name, error in self.errors.items()
            if not error <= self.tolerance[name]
        ]
        if self.flipped_cells > self.near_ties:
            found.append(f"{self.flipped_cells - self.near_ties} labels differ in cells that are no near-ties")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "passed": self.passed,
            "errors": dict(self.errors),
            "tolerance": dict(self.tolerance),
            "flipped_cells": self.flipped_cells,
            "near_ties": self.near_ties,
            "note": self.note,
        }


def expected_outputs(graph: Graph, vocabulary: int, limits: ShapeRanges | None = None) -> Expected:
    """Run a module on seeded inputs. A 16-bit module is turned into float32 on the way and stays so.

    `limits`: the smallest and largest shape of each input, for a runtime that does not accept all shapes.
    """
    sizes = _sizes(graph, limits or {})
    inputs = sample_inputs(graph.inputs, sizes, seed=1, vocabulary=vocabulary)
    names = [tensor.name for tensor in graph.outputs]
    # Inputs that enter in 16 bits are rounded first, so both runs see the same values.
    arguments = torch_inputs(graph, inputs)
    for tensor, value in zip(graph.inputs, _flat(arguments), strict=True):
        inputs[tensor.name] = _numpy(value)
    floor: dict[str, float] = {}
    dtype = next(graph.parameters()).dtype
    with torch.no_grad():
        if dtype != torch.float32:
            graph.float()
            graph.dtype = torch.float32
            arguments = graph.arguments([v.float() if v.is_floating_point() else v for v in _flat(arguments)])
        outputs = dict(zip(names, map(_numpy, _tuple(graph(*arguments))), strict=True))
        if dtype != torch.float32:
            with _rounded_layers(graph, dtype):
                rounded = dict(zip(names, map(_numpy, _tuple(graph(*arguments))), strict=True))
            for name, array in rounded.items():
                if name.endswith("margin"):  # compared with margins, so an absolute figure
                    floor[name] = float(np.abs(array - outputs[name]).max())
                elif array.dtype.kind == "f":
                    floor[name] = relative_error(array, outputs[name])
    step = graph.guidance if isinstance(graph, DenoiseStep) else None
    return Expected(graph.name, inputs, outputs, floor, step)


def _sizes(graph: Graph, limits: ShapeRanges) -> dict[str, int]:
    """PARITY_SIZES, or the nearest sizes that a runtime accepts."""
    sizes = dict(PARITY_SIZES)
    for tensor in graph.inputs:
        if tensor.name in limits:
            for symbol, least, most in zip(tensor.shape, *limits[tensor.name], strict=True):
                if isinstance(symbol, str):
                    sizes[symbol] = min(max(sizes[symbol], least), most)
    if isinstance(graph, DenoiseStep):
        sizes["K"] = sizes["B"]  # each image has reference keys of its own
    return sizes


@contextmanager
def _rounded_layers(graph: Graph, dtype: torch.dtype) -> Iterator[None]:
    """Round every layer's output to `dtype` within this context, as a 16-bit runtime stores it."""

    def rounded(_: torch.nn.Module, __: Any, output: Any) -> Any:
        is_float = isinstance(output, torch.Tensor) and output.is_floating_point()
        return output.to(dtype).to(output.dtype) if is_float else output

    leaves = [module for module in graph.modules() if not next(module.children(), None)]
    handles = [module.register_forward_hook(rounded) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare_graph(
    bundle: Bundle,
    expected: Expected,
    backend: Backend | None = None,
    runner: GraphRunner | None = None,
    *,
    scratch: Path | None = None,
) -> GraphParity:
    """Run a graph of a bundle (by default on ONNX Runtime's CPU provider) and compare its outputs.

    runner   the graph, if it is loaded already; the caller still has to close it
    scratch  folder for the float32 copy of a bfloat16 graph, as large as its weights in float32; by default that of
             temporary files. If the process is killed, the next comparison there removes the copy

    Raises:
        ParityError: an output is not finite; the message names the graph and the output.
        BackendError: the runtime refused the graph.
        OutputError: there is no room for the weights of a bfloat16 graph in float32.
    """
    with ExitStack() as made:
        if backend is None:
            backend = made.enter_context(closing(OnnxRuntime("cpu")))  # closing it gives back what its graphs worked in
        widened = bundle.dtype == BFLOAT16 and backend.name == CPU
        if widened:
            bundle, runner = made.enter_context(_widened(bundle, expected.graph, scratch)), None
        if runner is None:
            runner = made.enter_context(closing(backend.load(bundle, expected.graph)))
        missing = sorted(expected.outputs.keys() - {t.name for t in runner.contract.outputs})
        if missing:
            raise BackendError(
                f"graph {expected.graph}: {backend.name} has no outputs {', '.join(missing)}, which are compared. "
                "Build plans with them: magicface-rt build BUNDLE --parity"
            )
        outputs = _run(runner, expected)
        found = _judge_step(expected, outputs) if expected.step is not None else _judge(expected, outputs)
    return dataclasses.replace(found, note=IN_FLOAT32) if widened else found


@contextmanager
def _widened(bundle: Bundle, graph: str, scratch: Path | None) -> Iterator[Bundle]:
    """A float32 copy of a bfloat16 bundle's graph, in a folder below `scratch` that is removed afterwards."""
    with ExitStack() as made:
        try:
            folder = atomic_files.temporary_folder("magicface-rt-float32", scratch)
            made.callback(folder.close)  # before it is entered, as an interrupt may come just after that
            wide = widen(bundle, graph, folder.__enter__())
        except OSError as error:
            reraise_if_interrupt(error)
            raise OutputError(
                f"graph {graph}: its weights in float32 cannot be written to "
                f"{scratch or tempfile.gettempdir()}: {atomic_files.explain_os_error(error)}"
            ) from error
        yield wide


def _run(runner: GraphRunner, expected: Expected) -> Arrays:
    """Run a graph on the inputs, and return its outputs by name; bfloat16 ones as float32."""
    inputs = {t.name: to_contract_dtype(expected.inputs[t.name], t.dtype) for t in runner.contract.inputs}
    try:
        return {
            t.name: from_bfloat16(array) if t.dtype == BFLOAT16 else array
            for t, array in zip(runner.contract.outputs, runner.run(inputs).values(), strict=True)
        }
    except NonFiniteError as error:
        raise ParityError(str(error)) from error


def check_graph(bundle: Bundle, graph: Graph, vocabulary: int, backend: Backend) -> GraphParity:
    """Call `expected_outputs`, then `compare_graph`."""
    if bundle.dtype == BFLOAT16 and backend.name == CPU:
        return compare_graph(bundle, expected_outputs(graph, vocabulary), backend)
    with closing(backend.load(bundle, graph.name)) as runner:
        return compare_graph(bundle, expected_outputs(graph, vocabulary, runner.limits), backend, runner)


def _judge(expected: Expected, outputs: Arrays) -> GraphParity:
    errors = {name: relative_error(outputs[name], array) for name, array in expected.outputs.items()}
    return GraphParity(expected.graph, errors, _tolerances(expected, errors))


def _judge_step(expected: Expected, outputs: Arrays) -> GraphParity:
    """Judge `denoise_step`: predictions against PyTorch's, labels except at near-ties, the rest recomputed."""
    errors = {"eps": relative_error(outputs["eps"], expected.outputs["eps"])}
    tolerance = _tolerances(expected, errors)
    near = NEAR_TIE
    if expected.floor:  # labels of a 16-bit graph may differ wherever 16-bit PyTorch is unsure as well
        near = max(NEAR_TIE, 2 * expected.floor["token_margin"], 2 * expected.floor["foreground_margin"])
    flipped = near_ties = 0
    foreground = expected.outputs["foreground_margin"]
    for differs, margin in (
        (outputs["token_label"] != expected.outputs["token_label"], expected.outputs["token_margin"]),
        ((outputs["foreground_margin"] > 0) != (foreground > 0), np.abs(foreground)),
    ):
        flipped += int(differs.sum())
        near_ties += int((differs & (margin < near)).sum())
    for name, array in _recomputed(expected, outputs).items():
        errors[name] = relative_error(outputs[name], array)
        tolerance[name] = SAME_STEP_TOLERANCE
    return GraphParity(expected.graph, errors, tolerance, flipped, near_ties)


def _recomputed(expected: Expected, outputs: Arrays) -> Arrays:
    """Compute rate, next latents and region labels from the graph's own predictions and token labels."""
    assert expected.step is not None
    t = {name: torch.from_numpy(array) for name, array in {**expected.inputs, **outputs}.items() if name != "text"}
    foreground = t["foreground_margin"] > 0
    labelled = foreground | (t["foreground_only"][:, None, None] == 0)
    group = torch.gather(t["token_group"], 1, t["token_label"].flatten(1)).reshape(t["token_label"].shape)
    eps, rate = expected.step(
        t["eps"][0], t["eps"][1], t["token_label"], labelled, foreground, t["guidance"], t["semantic_guidance"], 77
    )
    step = t["ddim"][:, :, None, None, None]
    latents = step[:, 0] * t["latents"] + step[:, 1] * eps
    region = torch.where(labelled, group, 0)
    return {"latents_out": latents.numpy(), "rate": rate.numpy(), "region_label_out": region.numpy()}


def _tolerances(expected: Expected, errors: Mapping[str, float]) -> dict[str, float]:
    return {name: min(FLOAT32_TOLERANCE + 2 * expected.floor.get(name, 0.0), MOST_ALLOWED) for name in errors}


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _flat(arguments: Any) -> list[Any]:
    return [leaf for a in arguments for leaf in (_flat(a) if isinstance(a, list) else [a])]
