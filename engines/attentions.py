"""Which attentions a parsed network holds, how large they are, and what in the network keeps one from being fused.

The graphs call `magicface::TokenAttention` and `magicface::RegionAttention` where an attention is meant to be fused,
and write probabilities out where the segmentation reads them. TensorRT inlines the calls, but each layer's metadata
keeps the way to it, `[ONNX Layer: node | call (TokenAttention)]`, and the plan cites the same text for the kernels that
compute the layer. So an attention is known here by its softmax, and found again in the plan by that softmax's metadata.

Everything is read from the library's network definition: neither torch nor the onnx package is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from magicface_rt.errors import BuildError

FUNCTIONS = ("TokenAttention", "RegionAttention")

LARGE_LOGITS_BYTES = 4 << 20
"""An attention whose logits take less than this may be decomposed without harm."""

LARGE_CHANNELS = 128
"""Attentions over fewer channels (all heads together) occur in test models only. Some of their heads are too narrow for
any fused kernel, so they need not be fused."""

FUSED_WIDTHS = range(9, 257)
"""Head widths with a fused kernel (measured with TensorRT-RTX 1.7.1). The VAE's one head of 512 has none."""

_METADATA = re.compile(r"\[ONNX Layer: ([^|\]]*)((?: \| [^|\]]* \(\w+\))+)\]")
_CALL = re.compile(r" \| ([^|\]]*) \((\w+)\)")
_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2}


@dataclass(frozen=True)
class Attention:
    """A call of an attention function, with its sizes at the largest shapes of the optimisation profile.

    `layer`: metadata of its softmax; `products`: of its two matrix products. `width`, `value_width`: channels of a head
    of q and k, code channels included, and of v. `dtype`: of q, by TensorRT's name. `obstacles`: what in the network
    is known to prevent fusion; `hints`: what may.
    """

    name: str
    function: str
    layer: str
    products: tuple[str, ...]
    rows: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    dtype: str
    obstacles: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits, if they are stored."""
        return self.rows * self.heads * self.queries * self.keys * _ITEM_BYTES.get(self.dtype, 1)

    @property
    def expected(self) -> bool:
        """Whether it must be fused: it is large, and of a form for which there is a fused kernel in 16 bits.

        Its precision does not matter: an fp32 attention that would be fused in 16 bits is expected, and found missing.
        Nor does a head that is too narrow, if all channels together are a real model's: then the head count was lost.
        """
        return (
            self.logits_bytes >= LARGE_LOGITS_BYTES
            and self.heads * self.width >= LARGE_CHANNELS
            and self.width < FUSED_WIDTHS.stop
            and self.rows * self.heads > 1  # a single head of a single row is never fused
        )

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.function}: {self.queries} queries, {self.keys} keys, "
            f"{self.rows} x {self.heads} heads of {self.width})"
        )


def find_attentions(
    network: Any, largest: Mapping[str, Sequence[int]], graph: str, region_attentions: int | None = None
) -> tuple[Attention, ...]:
    """Find the attention calls of a parsed network, in network order.

    `network`: an INetworkDefinition of either flavour. `largest`: for each input of dynamic shape the profile's largest
    shape; the inputs are given these shapes while the network is read, and their own again afterwards.
    `region_attentions`: how many calls of RegionAttention the graph has, if the caller knows.

    Raises:
        BuildError: an attention call has no softmax between two matrix products, or the number of RegionAttention calls
            is not the expected one; either way the gate would watch the wrong thing.
    """
    with _shapes(network, largest):
        layers = _Layers(network)
        found = [
            _attention(layers, index, function, call)
            for index, function, call in _softmaxes(layers)
            if function in FUNCTIONS
        ]
    _check_calls(layers, found, graph, region_attentions)
    return tuple(found)


@contextmanager
def _shapes(network: Any, largest: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Set the inputs to their largest shapes for a while, so TensorRT infers a static shape for every tensor."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    kept = [(tensor, tuple(tensor.shape)) for tensor in inputs if -1 in tuple(tensor.shape)]
    try:
        for tensor, _ in kept:
            tensor.shape = tuple(largest[tensor.name])
        yield
    finally:
        for tensor, shape in kept:
            tensor.shape = shape


class _Layers:
    """A network's layers, with the producer and the consumers of each tensor."""

    def __init__(self, network: Any) -> None:
        self.all = [network.get_layer(i) for i in range(network.num_layers)]
        self.producer: dict[str, Any] = {}
        self.consumers: dict[str, list[Any]] = {}
        for layer in self.all:
            for i in range(layer.num_outputs):
                self.producer[layer.get_output(i).name] = layer
            for tensor in self.inputs(layer):
                self.consumers.setdefault(tensor.name, []).append(layer)

    @staticmethod
    def inputs(layer: Any) -> list[Any]:
        tensors = (layer.get_input(i) for i in range(layer.num_inputs))
        return [t for t in tensors if t is not None]

    @staticmethod
    def kind(layer: Any) -> str:
        return str(layer.type).rpartition(".")[2]


def _calls(layer: Any) -> list[tuple[str, str]]:
    """The (call, function) pairs around a layer, innermost first; empty for a layer of the graph itself."""
    match = _METADATA.fullmatch(layer.metadata)
    return _CALL.findall(match.group(2)) if match else []


def _softmaxes(layers: _Layers) -> Iterator[tuple[int, str, str]]:
    for index, layer in enumerate(layers.all):
        calls = _calls(layer)
        if calls and layers.kind(layer) == "SOFTMAX":
            call, function = calls[-1]  # the outermost call is the graph's node
            yield index, function, call


def _attention(layers: _Layers, index: int, function: str, call: str) -> Attention:
    softmax = layers.all[index]
    probabilities = softmax.get_output(0)
    shape = tuple(softmax.get_input(0).shape)  # [rows, heads, queries, keys], or [rows * heads, queries, keys]
    heads, queries, keys = shape[-3:]
    logits, masks = _logits_product(layers, softmax.get_input(0))
    values = _values_product(layers, probabilities)
    if logits is None or values is None:
        missing = "before" if logits is None else "after"
        raise BuildError(
            f"attention {call} ({function}): no matrix product was found {missing} its softmax, so its fusion cannot "
            f"be judged. Compare the function's body with magicface_rt/export/operators.py."
        )
    q, v = layers.inputs(logits)[0], layers.inputs(values)[1]
    width, value_width = _other(q, queries), values.get_output(0).shape[-1]
    dtype = str(q.dtype).rpartition(".")[2]
    return Attention(
        name=call,
        function=function,
        layer=softmax.metadata,
        products=(logits.metadata, values.metadata),
        rows=math.prod(shape[:-2]) // heads,
        heads=heads,
        queries=queries,
        keys=keys,
        width=width,
        value_width=value_width,
        dtype=dtype,
        obstacles=_obstacles(dtype, width, value_width),
        hints=(*masks, *_flattened(layers, [*layers.inputs(logits), v], call)),
    )


def _other(tensor: Any, size: int) -> int:
    """The dimension of a matrix that is not `size`."""
    rows, columns = tuple(tensor.shape)[-2:]
    return int(columns if rows == size else rows)


def _logits_product(layers: _Layers, tensor: Any) -> tuple[Any | None, tuple[str, ...]]:
    """Find the matrix product that a softmax's input comes from, and describe the masks that were added on the way."""
    masks: list[str] = []
    while (layer := layers.producer.get(tensor.name)) is not None:
        kind = layers.kind(layer)
        if kind == "MATRIX_MULTIPLY":
            return layer, tuple(masks)
        inputs = layers.inputs(layer)
        if kind == "ELEMENTWISE":
            # One operand is the logits; the other a scale, or a mask that is added.
            path = next((t for t in inputs if _from_product(layers, t)), inputs[0])
            masks += [
                f"a mask of shape {list(t.shape)} meets the logits at {_node(layer)}, and is stored; who sees whom "
                f"belongs into channels of q and k"
                for t in inputs
                if t is not path and _volume(t) > 1
            ]
            inputs = [path]
        elif kind not in ("CAST", "SHUFFLE", "IDENTITY"):
            return None, tuple(masks)
        tensor = inputs[0]
    return None, tuple(masks)


def _from_product(layers: _Layers, tensor: Any) -> bool:
    """Whether a tensor comes from a matrix product by way of elementwise layers, casts and reshapes only."""
    for _ in range(8):
        layer = layers.producer.get(tensor.name)
        if layer is None or layers.kind(layer) == "MATRIX_MULTIPLY":
            return layer is not None
        if layers.kind(layer) not in ("CAST", "SHUFFLE", "IDENTITY", "ELEMENTWISE"):
            return False
        tensor = max(layers.inputs(layer), key=_volume)
    return False


def _volume(tensor: Any) -> int:
    return math.prod(tuple(tensor.shape))


def _values_product(layers: _Layers, tensor: Any) -> Any | None:
    """Find the matrix product that reads the probabilities."""
    for layer in layers.consumers.get(tensor.name, []):
        kind = layers.kind(layer)
        if kind == "MATRIX_MULTIPLY":
            return layer
        if kind in ("CAST", "SHUFFLE", "IDENTITY") and layers.inputs(layer)[0].name == tensor.name:
            found = _values_product(layers, layer.get_output(0))
            if found is not None:
                return found
    return None


def _obstacles(dtype: str, width: int, value_width: int) -> tuple[str, ...]:
    found = []
    if dtype == "FLOAT":
        found.append("it is fp32, for which there is no fused kernel; export the bundle with --dtype fp16 or bf16")
    if value_width != width:
        found.append(
            f"its v is {value_width} wide, its q and k are {width} wide; pad v with zeros to {width} and slice the "
            f"output"
        )
    if width not in FUSED_WIDTHS:
        found.append(
            f"its heads are {width} wide, fused kernels take {FUSED_WIDTHS.start} to {FUSED_WIDTHS.stop - 1}"
            + (
                "; TensorRT's parser reads num_heads and scale as 0 in a function that another function calls, so "
                "write such a body out"
                if width < FUSED_WIDTHS.start
                else ""
            )
        )
    return tuple(found)


def _flattened(layers: _Layers, operands: Sequence[Any], call: str) -> tuple[str, ...]:
    """Describe reshapes from four dimensions to three on the way to the products, inside the same call."""
    found: list[str] = []
    seen: set[str] = set()
    waiting = list(operands)
    while waiting:
        tensor = waiting.pop()
        layer = layers.producer.get(tensor.name)
        if layer is None or tensor.name in seen:
            continue
        seen.add(tensor.name)
        calls = _calls(layer)
        if not calls or calls[-1][0] != call:
            if not layer.name.startswith("ONNXTRT_"):  # the parser's own helpers carry no metadata
                continue
        elif layers.kind(layer) == "SHUFFLE" and len(layer.get_input(0).shape) == 4 and len(tensor.shape) == 3:
            found.append(f"it is reshaped to three dimensions at {_node(layer)}; keep it in four")
        waiting += layers.inputs(layer)
    return tuple(sorted(found))


def _node(layer: Any) -> str:
    match = _METADATA.fullmatch(layer.metadata)
    return match.group(1) if match else str(layer.name)


def _check_calls(layers: _Layers, found: Sequence[Attention], graph: str, region_attentions: int | None) -> None:
    called = {calls[-1] for layer in layers.all if (calls := _calls(layer)) and calls[-1][1] in FUNCTIONS}
    missed = sorted(called - {(a.name, a.function) for a in found})
    if missed:
        raise BuildError(
            f"graph {graph}: the attention {missed[0][0]} ({missed[0][1]}) holds no softmax, so its fusion cannot be "
            f"judged. Compare the function's body with magicface_rt/export/operators.py."
        )
    regions = sum(a.function == "RegionAttention" for a in found)
    if region_attentions is not None and regions != region_attentions:
        raise BuildError(
            f"graph {graph}: {regions} calls of RegionAttention were found in the parsed network, expected "
            f"{region_attentions}. The parser may no longer note the calls in its layers' metadata; without that the "
            f"gate cannot tell which attentions must be fused."
        )
