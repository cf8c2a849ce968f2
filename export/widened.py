"""Convert a bfloat16 graph to float32, so a machine without bfloat16 kernels can compare it with PyTorch.

Every bfloat16 type in the file becomes float32 and every weight keeps its value. So the graph that is compared is the
exported one, its rounded constants included, in other arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from magicface_rt.bundle import WEIGHTS, Bundle, GraphContract, Tensor

RUNTIME = "onnxruntime"


def widen(bundle: Bundle, graph: str, folder: Path) -> Bundle:
    """Write a graph of a bfloat16 bundle into `folder` as float32; return a bundle of that graph alone.

    The weights are converted one by one, so only one is in memory at a time.
    """
    contract = bundle.graph(graph)
    model = onnx.load_model(str(bundle.path / contract.files[RUNTIME]), load_external_data=False)
    _widen_types(model)
    _widen_weights(model, bundle.path / WEIGHTS, folder / WEIGHTS)
    onnx.save_model(model, str(folder / contract.files[RUNTIME]))
    wide = GraphContract(graph, _wide(contract.inputs), _wide(contract.outputs), contract.files)
    return dataclasses.replace(bundle, path=folder, dtype="float32", graphs={graph: wide})


def _wide(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(dataclasses.replace(t, dtype="float32") if t.dtype == "bfloat16" else t for t in tensors)


def _widen_types(model: ModelProto) -> None:
    for value in _values(model.graph):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for function in model.functions:
        del function.value_info[:]
    for node in _nodes(model):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(_float32(onnx.numpy_helper.to_array(attribute.t))))


def _values(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def _widen_weights(model: ModelProto, source: Path, target: Path) -> None:
    with target.open("wb") as stream:
        for weight in model.graph.initializer:
            if not weight.external_data:
                if weight.data_type == TensorProto.BFLOAT16:
                    values = _float32(onnx.numpy_helper.to_array(weight))
                    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
                continue
            place = {entry.key: entry.value for entry in weight.external_data}
            kind = np.uint16 if weight.data_type == TensorProto.BFLOAT16 else np.uint8
            size = int(place["length"]) // np.dtype(kind).itemsize
            stored = np.fromfile(source, kind, size, offset=int(place["offset"]))
            if weight.data_type == TensorProto.BFLOAT16:
                stored = stored.astype(np.uint32) << 16  # bfloat16 is the upper half of float32
                weight.data_type = TensorProto.FLOAT
            del weight.external_data[:]
            written = {"location": target.name, "offset": stream.tell(), "length": stored.nbytes}
            for key, entry in written.items():
                weight.external_data.add(key=key, value=str(entry))
            stream.write(stored.tobytes())
            stream.write(bytes(-stored.nbytes % 64))
