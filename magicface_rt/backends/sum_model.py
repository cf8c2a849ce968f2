"""The smallest model worth running: for finding out whether a runtime works, and for talking to it."""

from __future__ import annotations


def sum_model() -> bytes:
    """Return the ONNX model y = x + x for float32 [1], written out as protobuf: the onnx package may be missing."""

    def field(number: int, content: bytes | int) -> bytes:
        if isinstance(content, int):
            return bytes([number << 3, content])
        return bytes([number << 3 | 2, len(content)]) + content

    def tensor(name: bytes) -> bytes:
        shape = field(1, field(1, 1))  # one dimension, of 1
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))  # element type 1: float32

    node = field(1, b"x") + field(1, b"x") + field(2, b"y") + field(4, b"Add")
    graph = field(1, node) + field(2, b"sum") + field(11, tensor(b"x")) + field(12, tensor(b"y"))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))  # IR version 8, operator set 13
