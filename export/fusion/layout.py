"""Turn convolutions, group norms and all nodes between them from [B, C, H, W] to [B, H, W, C].

Every node that can work channels-last is replaced by a twin that does; a Transpose is inserted only where a tensor
enters or leaves that part of the graph. The transpositions of the traced graph before and after its attentions vanish,
because tokens are channels-last already.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .matching import constant, made_by, new_value, only_consumer, permutation, permuted, rank, replace
from .patterns import CHANNELS_FIRST

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def channels_last(graph: ir.Graph) -> list[str]:
    """Rewrite a graph in place; return the convolutions that were left as they are."""
    return _ChannelsLast(graph).run()


class _ChannelsLast:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.twins: dict[ir.Value, ir.Value] = {}
        """Maps a [B, C, H, W] value to its [B, H, W, C] form."""
        self.replaced: list[ir.Node] = []
        self.missed: list[str] = []
        self.handlers: dict[tuple[str, str], Callable[[ir.Node], bool]] = {
            ("", "Conv"): self._conv,
            (CHANNELS_FIRST, "GroupNorm"): self._group_norm,
            (CHANNELS_FIRST, "SkipGroupNorm"): self._group_norm,
            ("", "Add"): self._add,
            ("", "Concat"): self._concat,
            ("", "Resize"): self._resize,
            ("", "Transpose"): self._transpose,
            ("", "Reshape"): self._reshape,
        }

    def run(self) -> list[str]:
        for node in tuple(self.graph):
            handler = self.handlers.get((node.domain, node.op_type))
            if handler is not None and handler(node):
                self.replaced.append(node)
        for node in self.replaced:
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)
        for node in self.replaced:
            for value in node.outputs:
                if value.is_graph_output() or value.uses():
                    self._leave(value)
        self.graph.remove(self.replaced)
        return self.missed

    def _twin(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Return the channels-last form of a value; if there is none yet, insert a Transpose that makes it."""
        if value not in self.twins:
            twin = new_value(value, "_nhwc", permuted(value, TO_LAST))
            self.graph.insert_before(before, ir.node("Transpose", [value], {"perm": TO_LAST}, outputs=[twin]))
            self.twins[value] = twin
        return self.twins[value]

    def _leave(self, value: ir.Value) -> None:
        """Transpose a twin back for those that still read the value as [B, C, H, W]."""
        twin = self.twins[value]
        again = new_value(value, "_nchw", value.shape)
        node = ir.node("Transpose", [twin], {"perm": TO_FIRST}, outputs=[again])
        producer = twin.producer()
        assert producer is not None
        self.graph.insert_after(producer, node)
        replace(value, again)

    def _emit(self, node: ir.Node, twin: ir.Node) -> bool:
        """Insert a node's twin, and record its outputs as the twins of the node's outputs."""
        self.graph.insert_before(node, twin)
        self.twins |= dict(zip(node.outputs, twin.outputs, strict=True))
        return True

    def _outputs(self, node: ir.Node) -> list[ir.Value]:
        return [new_value(v, "_nhwc", permuted(v, TO_LAST)) for v in node.outputs]

    def _conv(self, node: ir.Node) -> bool:
        x, weight = node.inputs[:2]
        if x is None or weight is None or rank(x) != 4 or weight.const_value is None:
            self.missed.append(f"convolution {node.outputs[0].name}")
            return False
        # OHWI, by a node on the weight, so weights.bin holds it once; ONNX Runtime folds it when it opens the graph
        inputs = [self._twin(x, node), self._twin(weight, node), *node.inputs[2:]]
        attributes = dict(node.attributes)
        twin = ir.node("NhwcConv", inputs, attributes, domain="com.microsoft", outputs=self._outputs(node))
        return self._emit(node, twin)

    def _group_norm(self, node: ir.Node) -> bool:
        inputs = [self._twin(v, node) if rank(v) == 4 and v is not None else v for v in node.inputs]
        twin = ir.node(node.op_type, inputs, dict(node.attributes), domain="com.microsoft", outputs=self._outputs(node))
        return self._emit(node, twin)

    def _known(self, node: ir.Node) -> list[ir.Value] | None:
        """The twins of a node's inputs, or None unless all have one."""
        twins = [self.twins.get(v) for v in node.inputs if v is not None]
        return [t for t in twins if t is not None] if twins and None not in twins else None

    def _add(self, node: ir.Node) -> bool:
        twins = self._known(node)
        return twins is not None and self._emit(node, ir.node("Add", twins, outputs=self._outputs(node)))

    def _concat(self, node: ir.Node) -> bool:
        twins = self._known(node)
        if twins is None or node.attributes.get_int("axis", 0) != 1:
            return False
        return self._emit(node, ir.node("Concat", twins, {"axis": 3}, outputs=self._outputs(node)))

    def _resize(self, node: ir.Node) -> bool:
        x, roi, scales, *sizes = (*node.inputs, None)[:4]
        factors = constant(scales)
        nearest = node.attributes.get_string("mode", "nearest") == "nearest"
        if x not in self.twins or roi is not None or any(sizes) or factors is None or len(factors) != 4 or not nearest:
            return False
        assert x is not None
        assert scales is not None
        name = f"{scales.name}_nhwc"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.ascontiguousarray(factors[list(TO_LAST)]), name=name)
            value = ir.Value(name=name, type=scales.type, shape=tensor.shape, const_value=tensor)
            self.graph.register_initializer(value)
        inputs = [self.twins[x], None, self.graph.initializers[name]]
        return self._emit(node, ir.node("Resize", inputs, dict(node.attributes), outputs=self._outputs(node)))

    def _transpose(self, node: ir.Node) -> bool:
        """Drop a transposition of an image to tokens, or of tokens to an image."""
        x = node.inputs[0]
        if x is None:
            return False
        if permutation(node) == TO_LAST and x in self.twins:
            replace(node.outputs[0], self.twins[x])
            return True
        if permutation(node) == TO_FIRST:
            self.twins[node.outputs[0]] = x
            return True
        return False

    def _reshape(self, node: ir.Node) -> bool:
        """Do the same for the VAE's attention, whose tokens are transposed as [B, C, H W]."""
        x, y = node.inputs[0], node.outputs[0]
        if x is None or not _static(x) or not _static(y):
            return False
        assert x.shape is not None
        assert y.shape is not None
        if x in self.twins and rank(y) == 3 and x.shape[1] == y.shape[1]:
            tokens = only_consumer(y, "Transpose")
            if permutation(tokens) == (0, 2, 1) and tokens is not None:
                out = new_value(tokens.outputs[0], "_nhwc", tokens.outputs[0].shape)
                self.graph.insert_before(node, self._reshaped(self.twins[x], out))
                replace(tokens.outputs[0], out)
            return False
        back = made_by(x, "Transpose")
        if rank(x) == 3 and rank(y) == 4 and permutation(back) == (0, 2, 1) and x.shape[1] == y.shape[1]:
            assert back is not None
            source = back.inputs[0]
            assert source is not None
            return self._emit(node, self._reshaped(source, self._outputs(node)[0]))
        return False

    def _reshaped(self, x: ir.Value, out: ir.Value) -> ir.Node:
        """Return a Reshape to the static shape of `out`, whose first dimension is the batch."""
        assert out.shape is not None
        name = f"{out.name}_shape"
        tensor = ir.tensor(np.array([-1, *(int(str(d)) for d in list(out.shape)[1:])], np.int64), name=name)
        shape = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(shape)
        return ir.node("Reshape", [x, shape], outputs=[out])


def _static(value: ir.Value) -> bool:
    """Whether all dimensions but the batch are numbers."""
    return value.shape is not None and all(isinstance(d, int) for d in list(value.shape)[1:])
