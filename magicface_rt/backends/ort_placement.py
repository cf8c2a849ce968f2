"""Finds the providers that ONNX Runtime put a graph's operators on: those that one has no kernel for go to the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..process.interrupts import reraise_if_interrupt

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
"""Types of operators that compute a picture. Others, such as arithmetic on shapes, are left to the CPU on purpose."""


def record_placement(options: Any) -> None:
    """Make a session with these options record where it puts its operators; before onnxruntime 1.24 it does not."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def left_to_the_cpu(session: Any) -> str | None:
    """Return the heavy operators that a session computes on the CPU, counted, most common first: "2 Conv, 1 MatMul".

    "" if there are none; None if the session does not know, as onnxruntime is older or the placement was not recorded.
    """
    try:
        parts = session.get_provider_graph_assignment_info()
    except Exception as error:  # not knowing is no reason to refuse a graph
        reraise_if_interrupt(error)
        return None
    kinds = Counter(node.op_type for part in parts if part.ep_name == CPU for node in part.get_nodes())
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common() if kind in HEAVY)
