"""Which provider ONNX Runtime put a graph's operators on: one without a kernel leaves its operators to the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..interrupts import let_through

CPU = "CPUExecutionProvider"

HEAVY = frozenset(
    {
        *("Conv", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv"),
        *("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum"),
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "Softmax"),
        *("InstanceNormalization", "GroupNormalization", "GroupNorm", "SkipGroupNorm"),
        *("LayerNormalization", "SkipLayerNormalization", "Resize"),
    }
)
"""Kinds of operators that compute a picture. Others, such as a shape's arithmetic, ONNX Runtime leaves to the CPU on
purpose."""


def record_placement(options: Any) -> None:
    """Let a session with these options remember where it puts its operators; before onnxruntime 1.24 it does not."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def left_to_the_cpu(session: Any) -> str | None:
    """The heavy operators that a session computes on the CPU, counted, the commonest first: "2 Conv, 1 MatMul".

    "" where there are none; None where the session does not know: it is of an older onnxruntime, or did not record.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception as error:  # that it is not known is no reason to refuse a graph
        let_through(error)
        return None
    kinds = Counter(node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes())
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common() if kind in HEAVY)
