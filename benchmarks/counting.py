"""Work that is counted, not timed: U-Net rows, floating point operations, bytes.

PyTorch's contenders are counted as they run, operator by operator. A bundle's graphs are counted from their shapes:
the ONNX file with the case's sizes put in for its symbols. On both sides FLOPs are those of matrix products and
convolutions, 2 for each multiply-add, and bytes are what every operator reads and writes, as if nothing stayed in a
cache. Views, reshapes and new tensors without content move nothing; a slice that is copied does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from magicface_rt import Bundle
from magicface_rt.regions import MAX_CONCEPTS

CODE_CHANNELS = MAX_CONCEPTS + 2
"""Channels that RegionAttention adds to each head of q and k: groups 0 to 6, and one for what rounding lost."""

MOVES_NOTHING = {
    "Constant",
    "Shape",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Flatten",
}
COPIES_ITS_OUTPUT = {"Slice", "Split", "Expand", "Gather"}
"""Operators that read no more than they write, however large their input is."""


def rows_of_theory(kind: str, concepts: int, *, steps: int = 1, images: int = 1) -> int:
    """Number of U-Net rows of a request with one reference for each concept.

    `bare` counts reference rows in full, though they end at the last injection layer; they are shared by the images of
    a batch.
    """
    n, t, b = concepts, steps, images
    return {
        "authors": 2 * (1 + n) * t * b,
        "strong": (2 + n) * t * b,
        "compiled": (2 + n) * t * b,
        "plain": 2 * b * t,
        "bare": (2 * b + n) * t,
        "kept": 2 * b * t,
    }[kind]


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float


# ----------------------------------------------------------------------------------------------------- a bundle's graph


def graph_cost(bundle: Bundle, graph: str, sizes: Mapping[str, int]) -> Cost:
    """The cost of one run of a graph with these values for its symbols. Raises ImportError without the package `onnx`.

    Raises:
        ValueError: a shape cannot be inferred, so the count would be too small.
    """
    import onnx

    model = onnx.load(str(bundle.path / bundle.graph(graph).files["onnxruntime"]), load_external_data=False)
    nodes, shapes, widths = _inferred(model, sizes)
    flops = moved = 0.0
    for node, call in nodes:
        tensors = [name for name in (*(call or node).input, *node.output) if name]
        missing = [name for name in tensors if name not in shapes]
        if missing:
            raise ValueError(f"graph {graph}: the shape of {missing[0]} stays unknown")
        if call is not None:
            flops += _attention_flops(call, shapes)
        else:
            flops += _node_flops(node, shapes)
        kind = (call or node).op_type
        if kind in COPIES_ITS_OUTPUT:
            moved += 2 * sum(prod(shapes[name]) * widths.get(name, 4) for name in node.output if name)
        elif kind not in MOVES_NOTHING:
            moved += sum(prod(shapes[name]) * widths.get(name, 4) for name in tensors)
    return Cost(flops, moved)


def graph_rows(bundle: Bundle, graph: str, sizes: Mapping[str, int]) -> int:
    """Number of rows that one run of a U-Net's graph computes with these values for its symbols.

    It is read off the first convolution. Needs the package `onnx`.
    """
    import onnx

    model = onnx.load(str(bundle.path / bundle.graph(graph).files["onnxruntime"]), load_external_data=False)
    nodes, shapes, _ = _inferred(model, sizes)
    return shapes[next(node for node, _ in nodes if node.op_type == "Conv").output[0]][0]


def _inferred(model: Any, sizes: Mapping[str, int]) -> tuple[list[Any], dict[str, list[int]], dict[str, int]]:
    """Nodes, each with the function call that it stands for or None; shapes, and bytes per element, by tensor."""
    from onnx import TensorProto, helper, shape_inference

    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    # Inference does not see through the functions' bodies. What they return has the shape of q, their first input.
    functions = {(f.domain, f.name) for f in model.functions}
    del model.functions[:]
    calls: dict[str, Any] = {}
    for node in model.graph.node:
        if (node.domain, node.op_type) in functions:
            call = type(node)()
            call.CopyFrom(node)
            calls[node.output[0]] = call
            node.CopyFrom(helper.make_node("Identity", [call.input[0]], list(call.output)))
    found = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, list[int]] = {}
    widths: dict[str, int] = {}
    for value in (*found.value_info, *found.output, *found.input):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[value.name] = [d.dim_value for d in kind.shape.dim]
            widths[value.name] = _width(TensorProto, kind.elem_type)
    for tensor in found.initializer:
        shapes[tensor.name], widths[tensor.name] = list(tensor.dims), _width(TensorProto, tensor.data_type)
    return [(node, calls.get(node.output[0])) for node in found.node], shapes, widths


def _width(kinds: Any, kind: int) -> int:
    return {kinds.FLOAT16: 2, kinds.BFLOAT16: 2, kinds.INT64: 8, kinds.DOUBLE: 8, kinds.BOOL: 1}.get(kind, 4)


def _node_flops(node: Any, shapes: Mapping[str, Sequence[int]]) -> float:
    if node.op_type == "MatMul":
        return 2.0 * prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        inner = shapes[node.input[0]][0 if _attribute(node, "transA", 0) else 1]
        return 2.0 * prod(shapes[node.output[0]]) * inner
    if node.op_type == "Conv":
        return 2.0 * prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
    return 0.0


def _attention_flops(call: Any, shapes: Mapping[str, Sequence[int]]) -> float:
    q, k = shapes[call.input[0]], shapes[call.input[1]]
    batch, n, width = q
    if call.op_type != "RegionAttention":
        return 4.0 * batch * n * k[1] * width
    keys = k[1] + shapes[call.input[3]][1]
    wide = width + CODE_CHANNELS * _attribute(call, "num_heads", 1)
    return 2.0 * batch * n * keys * (wide + width)


def _attribute(node: Any, name: str, otherwise: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), otherwise)


# -------------------------------------------------------------------------------------------------------------- PyTorch


class TorchCounter:
    """Counts FLOPs and bytes of what PyTorch runs inside the context."""

    def __init__(self) -> None:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        # PyTorch counts the attention kernels of GPUs, and not that of CPUs.
        cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        self._flops = FlopCounterMode(display=False, custom_mapping={cpu_kernel: _sdpa_flops})
        self._bytes = _byte_counter()

    def __enter__(self) -> TorchCounter:
        self._flops.__enter__()
        self._bytes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bytes.__exit__(*error)
        self._flops.__exit__(*error)

    @property
    def cost(self) -> Cost:
        return Cost(float(self._flops.get_total_flops()), float(self._bytes.moved))


def _sdpa_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products, [.., n, d] [.., d, m] and [.., n, m] [.., m, d]."""
    return 2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _byte_counter() -> Any:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten
    # To PyTorch a reshape after a product is no view, but it moves nothing; nor does memory that is only allocated.
    moves_nothing = {aten._unsafe_view.default, aten.empty_like.default, aten.empty.memory_format}
    moves_nothing |= {aten.new_empty.default, aten.empty_strided.default}

    class ByteCounter(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            if not func.is_view and func not in moves_nothing:
                self.moved += sum(x.numel() * x.element_size() for x in (*tensors, *made))
            return result

    return ByteCounter()
